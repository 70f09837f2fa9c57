"""`lamella export`: from a run directory or a converted folder, with progress on a terminal."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from lamella.export import AUTO, TARGETS, export
from lamella.export.measured import Measured, reports_beside
from lamella.export.target import Options
from lamella.export.trained import materialise


def run(
    source: Path, to: str, out: Path, *, step: int | None, check: bool, overwrite: bool,
    measure: Sequence[Callable[[Path], Measured]] = (), **options: Any,
) -> None:  # fmt: skip
    """Export and say in a few lines what was made.

    Args:
        measure: each is given the model's folder and says what stands in the model card.
        options: as in `lamella.export.export`.
    """
    console, began = Console(), time.perf_counter()
    Options.parse(options.get("dtype"), None, options.get("max_shard_size"))  # refuses before anything is read
    folder = source
    if to in (AUTO, *TARGETS) and (step is not None or (source / "config.yaml").is_file()):
        with console.status(f"reading the checkpoint of {source}"):
            folder = materialise(source, step)
    measured = [*reports_beside(*dict.fromkeys((source, folder))), *(one(folder) for one in measure)]
    with console.status(f"writing {out}" + (" and comparing it with its source" if check else "")):
        report = export(folder, to, out, overwrite=overwrite, check=check, measured=measured, **options)
    seconds = time.perf_counter() - began
    console.print(f"{report.out}: {report.architecture}, {report.bytes_written / 1e9:.2f} GB in {seconds:.1f} s")
    if report.parity is not None:
        console.print(f"Reloaded and held against {folder}: {report.parity}.")
    elif check:
        console.print("Not compared with its source: xllamacpp, which computes GGUF files, is not installed.")
