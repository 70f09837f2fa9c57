"""What a target of the export is: the row that a format has in the table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lamella.architecture.moe import Mode
from lamella.checkpoint.plan import WritePlan
from lamella.checkpoint.source import SIDECARS
from lamella.checkpoint.spelling import both_spellings
from lamella.checkpoint.write import write_json, write_tensors
from lamella.errors import UserError
from lamella.export.model import ConvertedModel

if TYPE_CHECKING:
    from lamella.export.check import Checked

Write = Callable[[WritePlan, Path, Callable[[int], None]], None]
Check = Callable[[Path, Path, Mode, int | None], "Checked | None"]


@dataclass(frozen=True)
class Options:
    """What only some formats can be told."""

    dtype: str | None = None
    """Of the weights in a GGUF file, such as "Q8_0"; None: the model's own."""
    tokenizer: Path | None = None
    """A GGUF file whose tokenizer is copied; None: made from the model's tokenizer.json."""


def write_stock(plan: WritePlan, folder: Path, on_bytes: Callable[[int], None]) -> None:
    """Safetensors files and config.json."""
    write_tensors(plan, folder, on_bytes)
    write_json(folder / "config.json", both_spellings(plan.config))


def check_stock(source: Path, exported: Path, mode: Mode, tokens: int | None) -> Checked:
    """As `lamella.export.check.check_reloaded`, which needs torch."""
    from lamella.export.check import check_reloaded

    return check_reloaded(source, exported, mode, tokens)


@dataclass(frozen=True)
class Target:
    """A format that others read."""

    needs: Callable[[ConvertedModel], list[str]]
    """What the model has that the format cannot hold, as clauses; none: it holds the model exactly."""
    plan: Callable[[ConvertedModel, Options], WritePlan]
    """The tensors and the description of a model that fits. `notes["tricks"]` says what a reader should know."""
    mode: Mode = "routed"
    """What of the converted model it computes."""
    write: Write = write_stock
    check: Check = check_stock
    """None as its answer: what reads the format is not installed."""
    sidecars: tuple[str, ...] = SIDECARS
    """Files of the model that are copied along."""


def stock(plan: Callable[[ConvertedModel], WritePlan]) -> Callable[[ConvertedModel, Options], WritePlan]:
    """The plan of a transformers class, which has no options."""

    def planned(model: ConvertedModel, options: Options) -> WritePlan:
        if options != Options():
            raise UserError("dtype and tokenizer are for --to gguf; other targets keep the model's own")
        return plan(model)

    return planned
