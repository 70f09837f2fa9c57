"""The prompts of the experts, and their tokens: those of the base model's tokenizer, with BOS where it has one.

As a script it answers a list of texts with their tokens, without torch, which takes a third of the time.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from lamella.architecture.reading import hide_torch
from lamella.checkpoint.folder import write_json
from lamella.checkpoint.source import Checkpoint
from lamella.conversion.merge.parts import Merge
from lamella.errors import UserError
from lamella.jsons import Json
from lamella.recipe.methods.merge import MergeOptions, Prompted

_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "tekken.json", "vocab.json")
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
    with tempfile.TemporaryDirectory() as name:
        source.copy_sidecars(Path(name))
        write_json(Path(name) / "config.json", source.config)
        texts = [prompt.text for prompt in prompts]
        if "transformers" in sys.modules:
            answered = answer(name, texts)
        else:
            command, asked = [sys.executable, "-m", __name__, name], json.dumps(texts)
            done = subprocess.run(command, input=asked, capture_output=True, text=True)
            if done.returncode:
                reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
                raise UserError(f"the tokenizer of {source.name} cannot be used: {reason}")
            answered = json.loads(done.stdout.splitlines()[-1])
    found = []
    for prompt, ids in zip(prompts, answered["ids"], strict=True):
        num_bos = answered["num_bos"]
        ids = ids[: prompt.max_tokens and prompt.max_tokens + num_bos]
        if len(ids) <= num_bos:
            raise UserError(f"a prompt has no tokens: {prompt.text[:60]!r}; write a text")
        if len(ids) > max_positions:
            raise UserError(f"a prompt has {len(ids)} tokens, but the model {max_positions} positions; shorten it")
        found.append(Tokens(prompt.expert, prompt.positive, ids, num_bos))
    return found


def answer(folder: str, texts: list[str]) -> Json:
    """{ids, num_bos}: each text behind BOS, without any other special token, as mergekit has it."""
    from transformers import AutoTokenizer
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        bos = tokenizer.bos_token or ""
        ids = tokenizer([bos + text for text in texts], add_special_tokens=False).input_ids
    finally:
        logging.set_verbosity(level)
    return {"ids": ids, "num_bos": int(bool(bos))}


if __name__ == "__main__":
    hide_torch()
    print(json.dumps(answer(sys.argv[1], json.load(sys.stdin))))
