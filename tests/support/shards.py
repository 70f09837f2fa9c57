"""Prepared folders of given tokens."""

from __future__ import annotations

from pathlib import Path

from lamella.data.prepare import Batch, finish, write_units
from lamella.data.prepared import Manifest, TokenFolder, open_prepared
from lamella.data.tokenizer import Encoder, Tokens
from support.models import EOS, VOCAB


def write_folder(folder: Path, units: list[list[Tokens]], vocab_size: int = VOCAB, split: str = "train") -> TokenFolder:
    """One shard per unit."""
    manifest = Manifest({}, "0" * 32, vocab_size, EOS)
    results = [(Batch(unit, splits=[split] * len(documents)), documents) for unit, documents in enumerate(units)]
    write_units(folder, manifest, results, Encoder("", EOS, vocab_size))
    finish(folder, manifest, "made up")
    return open_prepared(folder, None)
