"""`lamella export`: from a run directory or a converted folder, with progress on a terminal."""

from __future__ import annotations

import time
from pathlib import Path

from rich.console import Console

from lamella.export import TARGETS, export
from lamella.export.trained import materialise


def run(
    source: Path, to: str, out: Path, *, step: int | None, check: bool, check_tokens: int | None, overwrite: bool
) -> None:
    """Export and say in two lines what was made."""
    console, began = Console(), time.perf_counter()
    folder = source
    if to in TARGETS and (step is not None or (source / "config.yaml").is_file()):
        with console.status(f"reading the checkpoint of {source}"):
            folder = materialise(source, step)
    with console.status(f"writing {out}" + (" and comparing it with its source" if check else "")):
        report = export(folder, to, out, overwrite=overwrite, check=check, check_tokens=check_tokens)
    seconds = time.perf_counter() - began
    console.print(f"{report.out}: {report.architecture}, {report.bytes_written / 1e9:.2f} GB in {seconds:.1f} s")
    if report.max_abs_logit_diff is not None:
        console.print(f"Reloaded: max |logit difference| to {folder} {report.max_abs_logit_diff:.2e} (fp32).")
        console.print(f"Compared: {report.covered}.")
