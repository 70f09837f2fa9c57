"""Perplexities for a model card: from reports of `lamella evaluate --json`, or measured for the purpose."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lamella.checkpoint.check import read_json
from lamella.errors import UserError
from lamella.jsons import Json

# Reports that lie in the folder of a model or run under this name go into the card unasked.
REPORTS = "perplexity*.json"


@dataclass(frozen=True)
class Measured:
    """The perplexity of a model on one text."""

    data: str
    """The text, as `--data` of `lamella evaluate` names it."""
    perplexity: float
    tokens: int
    """Scored tokens."""
    dense: float | None = None
    """The perplexity of the dense model on the same tokens; None where it was not measured."""

    @classmethod
    def from_report(cls, report: Json, where: str) -> Measured:
        """UserError where the report is not one of `lamella evaluate --json`."""
        try:
            model, dense = report["model"], report.get("dense")
            beside = float(dense["perplexity"]) if isinstance(dense, dict) else None
            return cls(str(report["data"]), float(model["perplexity"]), int(model["tokens"]), beside)
        except (KeyError, TypeError, ValueError):
            raise UserError(f"{where} is no report of `lamella evaluate DIR --json {where}`") from None

    def describe(self) -> str:
        """For people, one line."""
        beside = "" if self.dense is None else f"; dense {self.dense:.4f}"
        return f"{self.data}: {self.perplexity:.4f} over {self.tokens:,} tokens{beside}"


def read_report(file: Path) -> Measured:
    """UserError where there is no such report."""
    return Measured.from_report(read_json(file, f"{file} does not exist"), str(file))


def reports_beside(*folders: Path) -> list[Measured]:
    """Of every report that lies in one of the folders, in the order of their names."""
    return [read_report(file) for folder in folders for file in sorted(folder.glob(REPORTS))]
