"""Documents -> token ids, and which of them are learned. Nothing here imports torch before a tokenizer is loaded:
the workers of `lamella data prepare` are started with an `Encoder` alone."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash

from lamella.architecture.tokenizer_files import tokenizer_settings
from lamella.data.records import Edge
from lamella.errors import UserError

# What of tokenizer_config.json changes the ids; the rest differs between versions of transformers.
_SETTINGS = ("eos_token", "bos_token", "add_bos_token", "add_eos_token")


class Around(NamedTuple):
    """Where a text is a piece of a document: its edges, and whether they are the document's."""

    begin: Edge
    end: Edge
    is_first: bool
    is_last: bool
    begins: bool
    """Whether a document begins with it in the stream of tokens: the first piece, or the first that is kept."""


class Text(NamedTuple):
    """A document, rendered. Plain text is learned as a whole; of a conversation, the assistant's answers."""

    text: str
    learned: tuple[tuple[int, int], ...] | None = None
    """Spans of characters; None: plain text."""
    around: Around | None = None
    """Of a piece of a plain document; None: it is whole."""


class Tokens(NamedTuple):
    """A document's ids (uint16 or uint32) and, of a conversation, for each id whether it is to be predicted (bool)."""

    ids: np.ndarray
    learned: np.ndarray | None = None
    goes_on: bool = False
    """Whether they continue the document before them."""


@dataclass(frozen=True)
class Encoder:
    """Tokenises rendered documents; can be pickled.

    Plain text gets the special tokens that the tokenizer itself adds (BOS, for some), and EOS at its end. A
    conversation is as its template rendered it, nothing added.

    Pieces of a document become the tokens of the whole: each is tokenised within what stands around it. They differ
    from those only where a token depends on more than that, as within a word or a row of spaces of some thousand
    characters; there the piece is tokenised by itself, so that no character is lost or comes twice.
    """

    tokenizer_json: str
    eos_id: int
    vocab_size: int
    """More than the largest id."""

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(np.uint16 if self.vocab_size <= 1 << 16 else np.uint32)

    def __call__(self, texts: Iterable[Text]) -> list[Tokens]:
        texts = list(texts)
        pieces = iter(self._pieces([t for t in texts if t.around is not None]))
        plain = iter(self._plain([t.text for t in texts if t.learned is None and t.around is None]))
        chats = iter(self._chats([t for t in texts if t.learned is not None]))
        kinds = (pieces if t.around is not None else plain if t.learned is None else chats for t in texts)
        return [next(kind) for kind in kinds]

    def marked(self, text: Text) -> list[tuple[str, bool]]:
        """The text in stretches of tokens that are all learned, or all not; as many tokens as `__call__` gives, EOS
        of a plain text and what the tokenizer adds to it aside."""
        if text.learned is None:
            return [(text.text, True)]
        encoding = self._tokenizer().encode(text.text, add_special_tokens=False)
        flags = learned_tokens(encoding.offsets, text.learned, text.text)
        parts: list[tuple[str, bool]] = [] if len(flags) else [(text.text, False)]
        at = 0
        for i, (_, end) in enumerate(encoding.offsets):
            if i + 1 < len(flags) and flags[i + 1] == flags[i]:
                continue
            end = len(text.text) if i + 1 == len(flags) else max(end, at)
            parts.append((text.text[at:end], bool(flags[i])))
            at = end
        return parts

    def _plain(self, texts: list[str]) -> list[Tokens]:
        rows = [encoding.ids for encoding in self._tokenizer().encode_batch_fast(texts)]
        return [Tokens(self._array(ids if ids and ids[-1] == self.eos_id else [*ids, self.eos_id])) for ids in rows]

    def _chats(self, texts: list[Text]) -> list[Tokens]:
        encodings = self._encoded([t.text for t in texts])
        return [
            Tokens(self._array(e.ids), learned_tokens(e.offsets, text.learned or (), text.text))
            for e, text in zip(encodings, texts, strict=True)
        ]

    def _pieces(self, texts: list[Text]) -> list[Tokens]:
        if not texts:
            return []
        prefix, suffix = self._added()
        pieces = []
        for text, ids in zip(texts, self._own_ids(texts), strict=True):
            assert text.around is not None
            _, _, is_first, is_last, begins = text.around
            ids = [*(prefix if is_first else ()), *ids, *(suffix if is_last else ())]
            if is_last and (not ids or ids[-1] != self.eos_id):
                ids.append(self.eos_id)
            pieces.append(Tokens(self._array(ids), goes_on=not begins))
        return pieces

    def _own_ids(self, texts: list[Text]) -> Iterator[list[int]]:
        """The ids of the whole that begin within each piece. Where two pieces meet, both read what is around that
        place in the same way, and give a token that crosses it to the first of them."""
        edges = [edge for t in texts if t.around is not None for edge in t.around[:2]]
        offsets = [encoding.offsets for encoding in self._encoded([edge.before + edge.after for edge in edges])]
        shifts = [crossing(o, len(edge.before)) for o, edge in zip(offsets, edges, strict=True)]
        owned = []
        for i, text in enumerate(texts):
            begin, end = edges[2 * i : 2 * i + 2]
            first, last = shifts[2 * i : 2 * i + 2]
            whole = begin.before + text.text + end.after
            at, to = len(begin.before) + first, len(begin.before) + len(text.text) + last
            owned.append((whole[:at], whole[at:to], whole[to:]))
        for parts, encoding in zip(owned, self._encoded(["".join(parts) for parts in owned]), strict=True):
            before, own, after = parts
            tries = ((before, after), ("", after), (before, ""), ("", ""))
            for i, (left, right) in enumerate(tries):
                encoding = encoding if i == 0 else self._encoded([left + own + right])[0]
                ids = tokens_within(encoding.offsets, len(left), len(left) + len(own))
                if ids is not None:
                    yield encoding.ids[ids]
                    break

    def _encoded(self, texts: list[str]) -> list[Any]:
        return self._tokenizer().encode_batch(texts, add_special_tokens=False)

    def _added(self) -> tuple[list[int], list[int]]:
        """The special tokens that the tokenizer puts before and behind a text."""
        bare, full = (self._tokenizer().encode("a", add_special_tokens=added).ids for added in (False, True))
        first = next((i for i in range(len(full) - len(bare) + 1) if full[i : i + len(bare)] == bare), len(full))
        return full[:first], full[first + len(bare) :]

    def _array(self, ids: list[int]) -> np.ndarray:
        return np.asarray(ids, dtype=self.dtype)

    def _tokenizer(self) -> Any:
        """Built once per process: the dataclass is frozen and pickled without it."""
        if "_built" not in self.__dict__:
            from tokenizers import Tokenizer

            tokenizer = Tokenizer.from_str(with_whole_offsets(self.tokenizer_json))
            tokenizer.no_truncation()
            tokenizer.no_padding()
            self.__dict__["_built"] = tokenizer
        return self.__dict__["_built"]

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_built"}


def with_whole_offsets(tokenizer_json: str) -> str:
    """The same tokenizer, whose offsets take in a token's spaces: with `trim_offsets` one that consists of spaces
    lies nowhere. The ids do not depend on it."""
    if not re.search(r'"trim_offsets"\s*:\s*true', tokenizer_json):
        return tokenizer_json
    return json.dumps(_untrimmed(json.loads(tokenizer_json)))


def _untrimmed(part: Any) -> Any:
    if isinstance(part, dict):
        vocabulary = "vocab" in part or "merges" in part
        return part if vocabulary else {k: k != "trim_offsets" and _untrimmed(v) for k, v in part.items()}
    return [_untrimmed(entry) for entry in part] if isinstance(part, list) else part


def crossing(offsets: list[tuple[int, int]], at: int) -> int:
    """How many characters behind `at` a token ends that begins before it; 0: none does."""
    return max((end - at for begin, end in offsets if begin < at < end), default=0)


def tokens_within(offsets: list[tuple[int, int]], begin: int, end: int) -> slice | None:
    """The tokens of characters `begin` to `end`; None where a token runs across one of the two."""
    if not offsets:
        return slice(0, 0)
    begins, ends = np.asarray(offsets).T
    first, last = (int(i) for i in np.searchsorted(begins, [begin, end]))
    crosses = (ends[:first] > begin).any() or (ends[first:last] > end).any()
    return None if crosses else slice(first, last)


def learned_tokens(offsets: list[tuple[int, int]], spans: tuple[tuple[int, int], ...], text: str = "") -> np.ndarray:
    """Tokens that begin within one of the ascending spans and end there, or in the spaces behind it, which a marker of
    the turn's end may take in (bool); one that crosses into a span is the prompt's."""
    if not spans or not offsets:
        return np.zeros(len(offsets), dtype=bool)
    begins, ends = np.asarray(offsets).T
    span_begins, span_ends = np.asarray(spans).T
    with_spaces = np.asarray([end + _leading_spaces(text, end) for end in span_ends])
    span = np.searchsorted(span_begins, begins, side="right") - 1
    return (span >= 0) & (begins < span_ends[span]) & (ends <= with_spaces[span])


def _leading_spaces(text: str, at: int) -> int:
    end = at
    while end < len(text) and text[end].isspace():
        end += 1
    return end - at


class DocumentTokenizer:
    """The fast tokenizer of a folder or hub name. BOS comes only where the tokenizer itself adds it; EOS always."""

    def __init__(self, name: str | Path):
        from transformers import AutoTokenizer

        import lamella.hf.models  # noqa: F401  else a converted folder's tokenizer asks to trust the folder's code

        if is_path(str(name)) and not Path(name).is_dir():
            raise UserError(f"there is no folder {name}; pass that of a model with its tokenizer")
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(str(name))
            backend = getattr(self.tokenizer, "backend_tokenizer", None)
            ids = self.tokenizer.get_vocab().values()
        except UserError:
            raise
        except Exception as error:  # the Rust library raises nothing narrower for a damaged tokenizer.json
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            raise UserError(
                f"no tokenizer in {name} ({reason}); pass the folder of a model with its tokenizer"
            ) from error
        if self.tokenizer.eos_token_id is None:
            raise UserError(f"the tokenizer of {name} has no end-of-text token; set eos_token in tokenizer_config.json")
        if backend is None:
            raise UserError(f"the tokenizer of {name} is no fast one; save it with a tokenizer.json")
        # ids may be far above the number of tokens
        self.encoder = Encoder(backend.to_str(), self.tokenizer.eos_token_id, max([*ids, len(self.tokenizer) - 1]) + 1)

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
