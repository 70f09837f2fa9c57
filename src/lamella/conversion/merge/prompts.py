"""The prompts of the experts, and their tokens: those of the base model's tokenizer, with BOS where it has one.

As a script it says what transformers makes of a folder's tokenizer, without torch, which takes a third of the time.
What it said is kept: then only the library `tokenizers` is needed.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from lamella.architecture.kept import Kept
from lamella.architecture.reading import hide_torch
from lamella.checkpoint.folder import write_json
from lamella.checkpoint.source import Checkpoint
from lamella.conversion.merge.parts import Merge
from lamella.errors import UserError
from lamella.jsons import Json
from lamella.recipe.methods.merge import MergeOptions, Prompted

_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "tekken.json", "vocab.json")
_MOST_TOKENIZERS = 16
"""Kept in the cache; each has some megabytes."""
_CHARACTERS_PER_TOKEN = 8
"""A text is cut to so many before it is tokenised; more than that are cut off again."""


class Prompt(NamedTuple):
    """A text that should, or should not, be routed to an expert."""

    expert: int
    """Index of the expert; shared experts follow the others."""
    positive: bool
    text: str
    max_tokens: int | None = None


class Tokens(NamedTuple):
    """A prompt in tokens."""

    expert: int
    positive: bool
    ids: list[int]
    num_bos: int
    """Tokens at the beginning that are no text: 1 or 0."""


def read_prompts(merge: Merge) -> list[Prompt]:
    """All prompts of the experts, and of the shared ones; UserError where a file or text is not there."""
    found = []
    for index, expert in enumerate(merge.all_experts):
        said = expert.said
        found += [Prompt(index, True, text) for text in said.positive_prompts or []]
        found += [Prompt(index, True, text, merge.options.prompt_tokens) for text in _taken(said, merge.options)]
        found += [Prompt(index, False, text) for text in said.negative_prompts or []]
    return found


def _taken(said: Prompted, options: MergeOptions) -> list[str]:
    if said.prompts_from is None:
        return []
    path, count = Path(said.prompts_from), options.prompts_per_expert
    if path.suffix in (".txt", ".jsonl") and path.is_file():
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        texts = lines if path.suffix == ".txt" else [_field(path, i, line) for i, line in enumerate(lines, 1)]
        found = texts[:count]
    else:
        from itertools import islice

        from lamella.data.sources import documents

        size = options.prompt_tokens * _CHARACTERS_PER_TOKEN
        found = [text[:size] for text in islice(documents(said.prompts_from, "train"), count)]
    if not found:
        raise UserError(f"{said.prompts_from} holds no prompts; give a text with at least one line")
    return found


def _field(path: Path, number: int, line: str) -> str:
    try:
        record = json.loads(line)
        text = record.get("prompt") or record.get("text")
    except (ValueError, AttributeError, RecursionError):
        text = None
    if not isinstance(text, str):
        raise UserError(f'{path}, line {number}: it must be an object with "prompt" or "text"')
    return text


def check_tokenizer(source: Checkpoint) -> None:
    """UserError where prompts cannot be read."""
    with tempfile.TemporaryDirectory() as name:
        source.copy_sidecars(Path(name))
        if not any((Path(name) / file).is_file() for file in _TOKENIZERS):
            raise UserError(
                f"{source.name} has no tokenizer, so its prompts cannot be read; put its tokenizer.json beside the "
                "weights, or take gate_mode random"
            )


def tokenised(source: Checkpoint, prompts: list[Prompt], max_positions: int) -> list[Tokens]:
    """The prompts in the base model's tokens.

    Raises:
        UserError: a prompt that is empty, or longer than the model's positions.
    """
    num_bos, answered = _encoded(source, [prompt.text for prompt in prompts])
    found = []
    for prompt, ids in zip(prompts, answered, strict=True):
        ids = ids[: prompt.max_tokens and prompt.max_tokens + num_bos]
        if len(ids) <= num_bos:
            raise UserError(f"a prompt has no tokens: {prompt.text[:60]!r}; write a text")
        if len(ids) > max_positions:
            raise UserError(f"a prompt has {len(ids)} tokens, but the model {max_positions} positions; shorten it")
        found.append(Tokens(prompt.expert, prompt.positive, ids, num_bos))
    return found


def _encoded(source: Checkpoint, texts: list[str]) -> tuple[int, list[list[int]]]:
    """(1 if the tokenizer has BOS, else 0; each text behind it, without any other special token, as mergekit has it)"""
    from tokenizers import Tokenizer

    kept = Kept("tokenizers", __file__, _MOST_TOKENIZERS)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source.copy_sidecars(folder)
        write_json(folder / "config.json", source.config)
        question = [part for path in _files(folder) for part in (path.name.encode(), path.read_bytes())]
        told = kept.get(question)
        if not isinstance(told, dict) or not told.keys() >= {"backend", "bos"}:
            told = answer(name) if "transformers" in sys.modules else _ask_elsewhere(name, source.name)
            kept.put(question, told)
        marked = [told["bos"] + text for text in texts]
        if told["backend"] is None:
            from transformers import AutoTokenizer

            ids = AutoTokenizer.from_pretrained(name)(marked, add_special_tokens=False).input_ids
            return int(bool(told["bos"])), ids
    tokenizer = Tokenizer.from_str(told["backend"])
    tokenizer.no_truncation()
    tokenizer.no_padding()
    encodings = tokenizer.encode_batch(marked, add_special_tokens=False)
    return int(bool(told["bos"])), [encoding.ids for encoding in encodings]


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _ask_elsewhere(folder: str, name: str) -> Json:
    done = subprocess.run([sys.executable, "-m", __name__, folder], capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise UserError(f"the tokenizer of {name} cannot be used: {reason}")
    return json.loads(done.stdout.splitlines()[-1])


def answer(folder: str) -> Json:
    """{backend, bos}: what transformers makes of a tokenizer's files, as the library `tokenizers` has it (None for one
    that it does not know), and the text of its BOS."""
    from transformers import AutoTokenizer
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    finally:
        logging.set_verbosity(level)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return {"backend": None if backend is None else backend.to_str(), "bos": tokenizer.bos_token or ""}


if __name__ == "__main__":
    hide_torch()
    print(json.dumps(answer(sys.argv[1])))
