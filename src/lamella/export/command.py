"""`lamella export`: from a run directory or a converted folder, with progress on a terminal."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from rich.console import Console

from lamella.export import AUTO, TARGETS, export
from lamella.export.trained import materialise


def run(
    source: Path, to: str, out: Path, *, step: int | None, check: bool, overwrite: bool, **options: Any,
) -> None:  # fmt: skip
    """Export and say in a few lines what was made; `options` as in `lamella.export.export`."""
    console, began = Console(), time.perf_counter()
    folder = source
    if to in (AUTO, *TARGETS) and (step is not None or (source / "config.yaml").is_file()):
        with console.status(f"reading the checkpoint of {source}"):
            folder = materialise(source, step)
    with console.status(f"writing {out}" + (" and comparing it with its source" if check else "")):
        report = export(folder, to, out, overwrite=overwrite, check=check, **options)
    seconds = time.perf_counter() - began
    console.print(f"{report.out}: {report.architecture}, {report.bytes_written / 1e9:.2f} GB in {seconds:.1f} s")
    if report.parity is not None:
        console.print(f"Reloaded and held against {folder}: {report.parity}.")
    elif check:
        console.print("Not compared with its source: xllamacpp, which computes GGUF files, is not installed.")
