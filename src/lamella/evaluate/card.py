"""What the card of an exported model says of its perplexity, measured when it is exported."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from lamella.architecture.families import sizes_of
from lamella.checkpoint.check import read_config
from lamella.data.sources import open_source
from lamella.evaluate.perplexity import evaluate
from lamella.export.measured import Measured, read_report

# Tokens of a window, where the model has as many positions.
LENGTH = 1024


def measurements(asked: Sequence[str]) -> list[Callable[[Path], Measured]]:
    """One function of the model's folder for each text or report; UserError where there is none, before any model is
    read."""
    return [_of_report(read_report(Path(name))) if name.endswith(".json") else _of_text(name) for name in asked]


def _of_report(measured: Measured) -> Callable[[Path], Measured]:
    return lambda _: measured


def _of_text(data: str) -> Callable[[Path], Measured]:
    open_source(data)

    def measure(folder: Path) -> Measured:
        positions = sizes_of(read_config(folder)).max_positions or LENGTH
        measured = evaluate(str(folder), data, seq_len=min(LENGTH, positions))["model"]
        return Measured.from_report({"data": data, "model": asdict(measured)}, data)

    return measure
