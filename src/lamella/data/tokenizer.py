"""Documents -> token ids, and which of them are learned. Nothing here imports torch before a tokenizer is loaded:
the workers of `lamella data prepare` are started with an `Encoder` alone."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash

from lamella.architecture.tokenizer_files import tokenizer_settings
from lamella.errors import UserError

# What of tokenizer_config.json changes the ids; the rest differs between versions of transformers.
_SETTINGS = ("eos_token", "bos_token", "add_bos_token", "add_eos_token")


class Text(NamedTuple):
    """A document, rendered. Plain text is learned as a whole; of a conversation, the assistant's answers."""

    text: str
    learned: tuple[tuple[int, int], ...] | None = None
    """Spans of characters; None: plain text."""


class Tokens(NamedTuple):
    """A document's ids (uint16 or uint32) and, of a conversation, for each id whether it is to be predicted (bool)."""

    ids: np.ndarray
    learned: np.ndarray | None = None


@dataclass(frozen=True)
class Encoder:
    """Tokenises rendered documents; can be pickled.

    Plain text gets the special tokens that the tokenizer itself adds (BOS, for some), and EOS at its end. A
    conversation is as its template rendered it, nothing added.
    """

    tokenizer_json: str
    eos_id: int
    vocab_size: int

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(np.uint16 if self.vocab_size <= 1 << 16 else np.uint32)

    def __call__(self, texts: Iterable[Text]) -> list[Tokens]:
        texts = list(texts)
        plain = iter(self._plain([t.text for t in texts if t.learned is None]))
        chats = iter(self._chats([t for t in texts if t.learned is not None]))
        return [next(plain if t.learned is None else chats) for t in texts]

    def _plain(self, texts: list[str]) -> list[Tokens]:
        rows = [encoding.ids for encoding in self._tokenizer().encode_batch_fast(texts)]
        rows = [ids if ids and ids[-1] == self.eos_id else [*ids, self.eos_id] for ids in rows]
        return [Tokens(np.asarray(ids, dtype=self.dtype)) for ids in rows]

    def _chats(self, texts: list[Text]) -> list[Tokens]:
        encodings = self._tokenizer().encode_batch([t.text for t in texts], add_special_tokens=False)
        return [
            Tokens(np.asarray(e.ids, dtype=self.dtype), learned_tokens(e.offsets, text.learned or ()))
            for e, text in zip(encodings, texts, strict=True)
        ]

    def _tokenizer(self) -> Any:
        """Built once per process: the dataclass is frozen and pickled without it."""
        if "_built" not in self.__dict__:
            from tokenizers import Tokenizer

            tokenizer = Tokenizer.from_str(self.tokenizer_json)
            tokenizer.no_truncation()
            tokenizer.no_padding()
            self.__dict__["_built"] = tokenizer
        return self.__dict__["_built"]

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_built"}


def learned_tokens(offsets: list[tuple[int, int]], spans: tuple[tuple[int, int], ...]) -> np.ndarray:
    """Tokens that lie within one of the ascending spans (bool); one that crosses into a span is the prompt's."""
    if not spans or not offsets:
        return np.zeros(len(offsets), dtype=bool)
    begins, ends = np.asarray(offsets).T
    span_begins, span_ends = np.asarray(spans).T
    span = np.searchsorted(span_begins, begins, side="right") - 1
    return (span >= 0) & (ends <= span_ends[span]) & (ends > begins)


class DocumentTokenizer:
    """The fast tokenizer of a folder or hub name. BOS comes only where the tokenizer itself adds it; EOS always."""

    def __init__(self, name: str | Path):
        from transformers import AutoTokenizer

        import lamella.hf.models  # noqa: F401  else a converted folder's tokenizer asks to trust the folder's code

        if is_path(str(name)) and not Path(name).is_dir():
            raise UserError(f"there is no folder {name}; pass that of a model with its tokenizer")
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(str(name))
        except (OSError, ValueError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise UserError(
                f"no tokenizer in {name} ({reason}); pass the folder of a model with its tokenizer"
            ) from error
        if self.tokenizer.eos_token_id is None:
            raise UserError(f"the tokenizer of {name} has no end-of-text token; set eos_token in tokenizer_config.json")
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise UserError(f"the tokenizer of {name} is no fast one; save it with a tokenizer.json")
        self.encoder = Encoder(backend.to_str(), self.tokenizer.eos_token_id, len(self.tokenizer))

    def __call__(self, texts: Iterable[str]) -> list[list[int]]:
        """Token ids of each text, EOS at the end."""
        return [tokens.ids.tolist() for tokens in self.encoder(map(Text, texts))]


def check_vocabulary(source: str, largest_id: int, vocab_size: int, tokenizer: str | Path) -> None:
    """UserError for an id that the model does not have."""
    if largest_id >= vocab_size:
        raise UserError(
            f"{source} has the token id {largest_id}, but the model's vocabulary has {vocab_size} ids; put the model's "
            f"own tokenizer into {tokenizer}"
        )


def is_path(name: str) -> bool:
    """Whether it cannot be a hub name, which is NAME or OWNER/NAME."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1


def fingerprint(tokenizer: str | Path) -> str:
    """Hash (32 hexadecimal digits) of what in a local folder makes the ids; of a hub name, of the name."""
    folder, digest = Path(tokenizer), xxhash.xxh3_128()
    if not folder.is_dir():
        return xxhash.xxh3_128_hexdigest(str(tokenizer).encode())
    names = ["tokenizer.json"] if (folder / "tokenizer.json").is_file() else _vocabulary_files(folder)
    for name in names:
        digest.update((folder / name).read_bytes())
    values = tokenizer_settings(folder)
    digest.update(json.dumps([_content(values.get(key)) for key in _SETTINGS]).encode())
    return digest.hexdigest()


def _vocabulary_files(folder: Path) -> list[str]:
    patterns = ("tokenizer.model", "tekken.json", "vocab.*", "merges.*")
    return sorted(p.name for pattern in patterns for p in folder.glob(pattern) if p.is_file())


def _content(token: Any) -> Any:
    """A special token is written as a string or as an object that holds it."""
    return token.get("content") if isinstance(token, dict) else token
