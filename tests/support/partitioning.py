"""Tiny dense models, and their partitions by a recipe in words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lamella.conversion import convert
from lamella.recipe.conversion import load_conversion
from support.models import VOCAB, save_tokenizer, tiny_checkpoint

CALIBRATION = "calibration={num_tokens: 256, sequence_length: 64}"


def dense_model(folder: Path, family: str = "llama", sharded: bool = False, **changes: Any) -> Path:
    tiny_checkpoint(folder, family, sharded, vocab_size=VOCAB, **changes)
    return save_tokenizer(folder)


def partition(dense: Path, out: Path, *words: str, **callbacks: Any) -> Path:
    """Four parts, and what the words say."""
    recipe = load_conversion(None, ["method=partition", "parts=4", CALIBRATION, *words])
    convert(dense, out, recipe.options, **callbacks)
    return out
