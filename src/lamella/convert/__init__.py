"""Dense checkpoint in, MoE checkpoint out, tensor by tensor: plan from the headers, then stream."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lamella.convert.checkpoint import Checkpoint
from lamella.convert.options import SliceOptions
from lamella.convert.plan import Plan
from lamella.convert.sidecars import write_sidecars
from lamella.convert.slice import plan_slices
from lamella.convert.write import appearing_folder, check_output, write_tensors
from lamella.errors import UserError, did_you_mean

METHODS: dict[str, Callable[[Checkpoint, SliceOptions], Plan]] = {"slice": plan_slices}
DEFAULT_OUT = Path("artifacts/moe")


@dataclass(frozen=True)
class ConversionReport:
    out: Path
    wall_s: float
    peak_rss_mib: float
    """Peak resident memory of the whole process, interpreter and libraries included."""
    bytes_written: int
    """Bytes of weights."""


def plan_conversion(
    model: str | Path | None = None, options: SliceOptions | None = None, method: str = "slice"
) -> tuple[Checkpoint, Plan]:
    """Open a dense model (see `Checkpoint.open`) and plan its conversion; reads headers only, writes nothing."""
    if method not in METHODS:
        raise UserError(f"unknown method {method!r}{did_you_mean(method, METHODS)}; known: {', '.join(METHODS)}")
    source = Checkpoint.open(model)
    return source, METHODS[method](source, options or SliceOptions())


def convert(
    model: str | Path | None = None,
    out: str | Path = DEFAULT_OUT,
    options: SliceOptions | None = None,
    *,
    method: str = "slice",
    overwrite: bool = False,
    on_plan: Callable[[Plan], None] = lambda _: None,
    on_bytes: Callable[[int], None] = lambda _: None,
) -> ConversionReport:
    """Convert a dense model into a folder that transformers' Auto classes load.

    Args:
        model: folder, .gguf file or hub name; None: the embedded model.
        out: the folder to make; parents are made too.
        on_plan: called with the plan before anything is written.
        on_bytes: called from several threads with the number of bytes just written.

    Raises:
        UserError: bad input, before anything is written; or the disk became full, and nothing is kept.
    """
    options, out, began = options or SliceOptions(), Path(out), time.perf_counter()
    check_output(out, overwrite)  # before a model is downloaded
    source, plan = plan_conversion(model, options, method)
    check_output(out, overwrite, plan.total_bytes, {tensor.path for tensor in source.tensors.values()})
    on_plan(plan)
    with appearing_folder(out) as folder:
        source.copy_sidecars(folder)
        hashes = write_tensors(plan, folder, on_bytes)
        write_sidecars(folder, source, plan, method, options, hashes)
    return ConversionReport(out, time.perf_counter() - began, peak_rss_mib(), plan.total_bytes)


def peak_rss_mib() -> float:
    """Peak resident memory of this process so far, MiB (Linux)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    raise AssertionError("/proc/self/status has no VmHWM")
