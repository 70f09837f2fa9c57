"""The command `convert_by_slicing.py`: the main job's first half, its options the keys of method "slice"."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from lamella.cli import MODEL, OUT, DryRun, Overwrite, run_command
from lamella.command_options import with_fields_of
from lamella.recipe.methods.slice import SliceOptions


@with_fields_of(SliceOptions)
def convert_by_slicing(
    model: Annotated[str | None, typer.Option(help=MODEL, show_default="the embedded SmolLM2-135M")] = None,
    out: Annotated[str | None, typer.Option(help=OUT, show_default="artifacts/moe")] = None,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    **options: Any,
) -> None:
    """Cut a dense model's FFNs into frozen slices and trainable copies; the logits stay the dense model's."""
    chosen = SliceOptions(**options)  # refuses before torch is imported
    from lamella.conversion.command import run_slicing

    run_slicing(model, out, chosen, overwrite=overwrite, dry_run=dry_run)


def main() -> None:
    """Be the entry point of the script."""
    run_command(convert_by_slicing)
