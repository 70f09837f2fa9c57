"""Dense checkpoint in, MoE checkpoint out, tensor by tensor: plan from the headers, then stream."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from lamella.checkpoint.plan import WritePlan
from lamella.checkpoint.source import Checkpoint
from lamella.checkpoint.write import appearing_folder, check_output, write_tensors
from lamella.conversion.sidecars import write_sidecars
from lamella.conversion.slice import plan_slices
from lamella.conversion.upcycle import plan_upcycle
from lamella.conversion.work import Work
from lamella.recipe.methods.slice import Options, SliceOptions

DEFAULT_OUT = Path("artifacts/moe")


def _plan_partition(source: Checkpoint, options: Any, work: Work) -> WritePlan:
    from lamella.conversion.partition.calibrated import (
        plan_calibrated,  # imports transformers, which slicing does without
    )

    return plan_calibrated(source, options, work)


def _plan_attention(source: Checkpoint, options: Any, work: Work) -> WritePlan:
    from lamella.conversion.attention.plan import plan_attention

    return plan_attention(source, options, work)


def _open_for_attention(model: str | Path | None) -> Checkpoint:
    from lamella.conversion.attention.plan import open_dense_or_converted

    return open_dense_or_converted(model)


class Method(NamedTuple):
    plan: Callable[[Checkpoint, Any, Work], WritePlan]
    open: Callable[[str | Path | None], Checkpoint] = Checkpoint.open


METHODS = {
    "slice": Method(lambda source, options, work: plan_slices(source, options)),
    "partition": Method(_plan_partition),
    "upcycle": Method(lambda source, options, work: plan_upcycle(source, options)),
    "attention": Method(_plan_attention, _open_for_attention),
}


@dataclass(frozen=True)
class ConversionReport:
    out: Path
    wall_s: float
    peak_rss_mib: float
    """Peak resident memory of the whole process, interpreter and libraries included."""
    bytes_written: int
    """Bytes of weights."""
    moe: dict[str, Any]
    """The `moe` entry of the new config, or its `attention_moe`."""
    notes: dict[str, Any] = field(default_factory=dict)
    """What the method found: a guard's verdicts."""


def plan_conversion(
    model: str | Path | None = None, options: Options | None = None, work: Work | None = None
) -> tuple[Checkpoint, WritePlan]:
    """Open a dense model (see `Checkpoint.open`) and plan its conversion; without `work` it reads headers only."""
    options = options or SliceOptions()
    method = METHODS[options.method]
    source = method.open(model)
    return source, method.plan(source, options, work or Work(None))


def convert(
    model: str | Path | None = None,
    out: str | Path = DEFAULT_OUT,
    options: Options | None = None,
    *,
    overwrite: bool = False,
    on_plan: Callable[[WritePlan], None] = lambda _: None,
    on_bytes: Callable[[int], None] = lambda _: None,
    on_progress: Callable[[Any], None] = lambda _: None,
    on_verdict: Callable[[Any], None] = lambda _: None,
) -> ConversionReport:
    """Convert a dense model into a folder that transformers' Auto classes load.

    Args:
        model: folder, .gguf file or hub name; None: the embedded model. Method "attention" takes a converted one, too.
        out: the folder to make; parents are made too. A calibration keeps its results in OUT.calibration, for the
            next call if this one is interrupted, and removes it at the end.
        options: of the method, whose name they carry; None: slices.
        on_plan: called with the plan before anything is written into `out`.
        on_bytes: called from several threads with the number of bytes just written.
        on_progress, on_verdict: see `Work`.

    Raises:
        UserError: bad input, before anything is written; or the disk became full, and nothing is kept.
    """
    options, out, began = options or SliceOptions(), Path(out), time.perf_counter()
    check_output(out, overwrite)  # before a model is downloaded
    work = Work(out.with_name(f"{out.name}.calibration"), on_progress, on_verdict)
    source, sizes = plan_conversion(model, options)
    check_output(out, overwrite, sizes.total_bytes, {tensor.path for tensor in source.tensors.values()})
    plan = METHODS[options.method].plan(source, options, work)
    on_plan(plan)
    with appearing_folder(out) as folder:
        source.copy_sidecars(folder)
        hashes = write_tensors(plan, folder, on_bytes)
        write_sidecars(folder, source, plan, options, hashes)
    if plan.scratch is not None:
        shutil.rmtree(plan.scratch, ignore_errors=True)
    return ConversionReport(
        out, time.perf_counter() - began, peak_rss_mib(), plan.total_bytes, plan.config[options.entry], plan.notes
    )


def peak_rss_mib() -> float:
    """Peak resident memory of this process so far, MiB (Linux)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    raise AssertionError("/proc/self/status has no VmHWM")
