"""The tokenizer in a GGUF file: copied from another GGUF file, or made from a model's tokenizer.json.

llama.cpp knows a byte-level BPE by its vocabulary, its merges and the name of the pattern that splits text into words.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lamella.checkpoint.check import read_json
from lamella.errors import UserError
from lamella.export.gguf.write import Typed
from lamella.export.model import ConvertedModel
from lamella.jsons import Json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BEFORE_DIGITS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_AFTER_DIGITS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = _BEFORE_DIGITS + r"\p{N}{1,3}" + _AFTER_DIGITS
_QWEN2 = _BEFORE_DIGITS + r"\p{N}" + _AFTER_DIGITS
# How tokenizer.json splits text into words -> llama.cpp's name of it.
_PATTERNS: dict[tuple[str | None, ...], str] = {
    ("words",): "gpt-2",
    ("digits", "words"): "smollm",
    (_LLAMA3,): "llama-bpe",
    (_QWEN2,): "qwen2",
}
_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5  # llama.cpp's token types


def tokenizer_metadata(model: ConvertedModel, copied_from: Path | None) -> Json:
    """The `tokenizer.*` entries of the file.

    Raises:
        UserError: no tokenizer, one that llama.cpp does not know, or one with more tokens than the model.
    """
    if copied_from is not None:
        found = _copied(copied_from)
    elif (model.folder / "tokenizer.json").is_file():
        found = _built(model.folder, model.dense_hf.vocab_size)
    else:
        raise UserError(f"{model.folder} has no tokenizer.json; pass --tokenizer FILE.gguf to copy a tokenizer from it")
    tokens = found["tokenizer.ggml.tokens"]
    count = len(tokens.value if isinstance(tokens, Typed) else tokens)
    if count != model.dense_hf.vocab_size:
        raise UserError(
            f"the tokenizer has {count} tokens, the model {model.dense_hf.vocab_size}; pass --tokenizer with the GGUF "
            "file of the model that this one was made of"
        )
    return found


def _copied(path: Path) -> Json:
    from gguf import GGUFReader, GGUFValueType

    if not path.is_file():
        raise UserError(f"{path} does not exist; --tokenizer takes a GGUF file")
    try:
        reader = GGUFReader(path)
    except (ValueError, IndexError, KeyError, OverflowError) as error:  # what it raises on truncated or foreign files
        raise UserError(f"{path} is truncated or not a GGUF file ({error})") from None
    entries: Json = {}
    for key, field in reader.fields.items():
        if key.startswith("tokenizer."):
            items = field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
            entries[key] = Typed(field.contents(), field.types[0], items)
    if "tokenizer.ggml.tokens" not in entries:
        raise UserError(f"{path} holds no tokenizer")
    return entries


def _built(folder: Path, vocab_size: int) -> Json:
    from transformers import AutoTokenizer

    import lamella.hf.models  # noqa: F401  # else transformers asks whether to run the code in the folder

    saved = read_json(folder / "tokenizer.json", "")
    pattern = _pattern(saved)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    tokens, types = _vocabulary(saved, vocab_size)
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in saved["model"]["merges"]]
    if not merges:
        raise _unknown("it has no merges")
    entries: Json = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pattern,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": merges,
    }
    return entries | _special(tokenizer)


def _vocabulary(saved: Json, vocab_size: int) -> tuple[list[str], list[int]]:
    """Tokens and their types by id; ids of the model that the tokenizer lacks are padding."""
    by_id = {i: (token, _NORMAL) for token, i in saved["model"]["vocab"].items()}
    for added in saved.get("added_tokens", []):
        by_id[added["id"]] = (added["content"], _CONTROL if added["special"] else _USER_DEFINED)
    count = max(vocab_size, max(by_id, default=0) + 1)
    rows = [by_id.get(i, (f"[PAD{i}]", _UNUSED)) for i in range(count)]
    return [token for token, _ in rows], [kind for _, kind in rows]


def _special(tokenizer: PreTrainedTokenizerBase) -> Json:
    ids = {"bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id, "padding": tokenizer.pad_token_id}
    ids["unknown"] = tokenizer.unk_token_id
    entries: Json = {f"tokenizer.ggml.{name}_token_id": id for name, id in ids.items() if id is not None}
    encoded = tokenizer("a").input_ids
    entries["tokenizer.ggml.add_bos_token"] = bool(encoded) and encoded[0] == tokenizer.bos_token_id
    entries["tokenizer.ggml.add_eos_token"] = bool(encoded) and encoded[-1] == tokenizer.eos_token_id
    if isinstance(tokenizer.chat_template, str):
        entries["tokenizer.chat_template"] = tokenizer.chat_template
    return entries


def _pattern(saved: Json) -> str:
    """llama.cpp's name of how text is split; UserError where it has none."""
    model = saved.get("model", {})
    if model.get("type") != "BPE" or model.get("byte_fallback"):
        raise _unknown(f"it is {model.get('type')}, not a byte-level BPE")
    steps = saved.get("pre_tokenizer") or {}
    steps = steps.get("pretokenizers", [steps])
    pattern = tuple(_step(step) for step in steps if not _only_bytes(step))
    name = _PATTERNS.get(pattern)
    if name is None:
        raise _unknown(f"its pre_tokenizer is {json.dumps(saved.get('pre_tokenizer'))[:200]}")
    if model.get("ignore_merges") and name != "llama-bpe":
        raise _unknown("it ignores merges")
    return name


def _only_bytes(step: Json) -> bool:
    return step.get("type") == "ByteLevel" and not step.get("use_regex", True) and not step.get("add_prefix_space")


def _step(step: Json) -> str | None:
    kind = step.get("type")
    if kind == "ByteLevel" and not step.get("add_prefix_space"):
        return "words"
    if kind == "Digits" and step.get("individual_digits"):
        return "digits"
    if kind == "Split" and step.get("behavior") == "Isolated" and not step.get("invert"):
        return step.get("pattern", {}).get("Regex")
    return None


def _unknown(reason: str) -> UserError:
    return UserError(
        f"llama.cpp has no name for this tokenizer ({reason}); pass --tokenizer FILE.gguf to copy one from a GGUF file"
    )
