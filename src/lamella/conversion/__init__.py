"""Dense checkpoint in, MoE checkpoint out, tensor by tensor: plan from the headers, then stream."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from lamella.checkpoint.folder import appearing_folder, check_output
from lamella.checkpoint.plan import WritePlan
from lamella.checkpoint.source import Checkpoint
from lamella.conversion.plan import ConversionPlan, Workspace, Write
from lamella.conversion.sidecars import write_sidecars
from lamella.jsons import Json
from lamella.recipe.methods import METHODS
from lamella.recipe.methods.common import MethodOptions
from lamella.recipe.methods.slice import SliceOptions

if TYPE_CHECKING:
    from lamella.calibrate import CalibrationStep
    from lamella.calibrate.guard import Verdict

DEFAULT_OUT = Path("artifacts/moe")


@dataclass(frozen=True)
class ConversionReport:
    out: Path
    wall_s: float
    peak_rss_mib: float
    """Peak resident memory of the whole process, interpreter and libraries included."""
    bytes_written: int
    """Bytes of weights."""
    moe: Json
    """The `moe` entry of the new config, or its `attention_moe`."""
    notes: Json = field(default_factory=dict)
    """What the method found: a guard's verdicts."""


def plan_conversion(model: str | Path | None = None, options: MethodOptions | None = None) -> ConversionPlan:
    """Open a model (see `Checkpoint.open`) and list what its conversion will write; reads headers only."""
    options = options or SliceOptions()
    module, _, name = METHODS[options.method].plan.partition(":")
    return getattr(import_module(module), name)(model, options)


def convert(
    model: str | Path | None = None,
    out: str | Path = DEFAULT_OUT,
    options: MethodOptions | None = None,
    *,
    overwrite: bool = False,
    on_plan: Callable[[WritePlan], None] = lambda _: None,
    on_bytes: Callable[[int], None] = lambda _: None,
    on_progress: Callable[[CalibrationStep], None] = lambda _: None,
    on_verdict: Callable[[Verdict], None] = lambda _: None,
) -> ConversionReport:
    """Convert a dense model into a folder that transformers' Auto classes load.

    Args:
        model: folder, .gguf file or hub name; None: the embedded model. Method "attention" takes a converted one, too.
        out: the folder to make; parents are made too. A calibration keeps its results in OUT.calibration, for the
            next call if this one is interrupted, and removes it at the end.
        options: of the method, whose name they carry; None: slices.
        on_plan: called with the plan before anything is written into `out`.
        on_bytes: called from several threads with the number of bytes just written.
        on_progress, on_verdict: see `Workspace`.

    Raises:
        UserError: bad input, before anything is written; or the disk became full, and nothing is kept.
    """
    options, out, began = options or SliceOptions(), Path(out), time.perf_counter()
    check_output(out, overwrite)  # before a model is downloaded
    planned = plan_conversion(model, options)
    check_output(out, overwrite, planned.listing.total_bytes, planned.files)
    plan = planned.decided(Workspace(out.with_name(f"{out.name}.calibration"), on_progress, on_verdict))
    on_plan(plan)
    with appearing_folder(out) as folder:
        (planned.write or _written(planned.source, options))(plan, folder, on_bytes)
    if plan.scratch is not None:
        shutil.rmtree(plan.scratch, ignore_errors=True)
    return ConversionReport(
        out, time.perf_counter() - began, peak_rss_mib(), plan.total_bytes, entry_of(planned, plan, options), plan.notes
    )


def entry_of(planned: ConversionPlan, plan: WritePlan, options: MethodOptions) -> Json:
    """What the method adds to config.json, whether the new config has a place for it or not."""
    return plan.config.get(options.entry, planned.entry)


def _written(source: Checkpoint, options: MethodOptions) -> Write:
    """Writes a folder of our own form: its tensors are hashed for the manifest."""

    def write(plan: WritePlan, folder: Path, on_bytes: Callable[[int], None]) -> None:
        from lamella.checkpoint.write import write_tensors

        source.copy_sidecars(folder)
        hashes = write_tensors(plan, folder, on_bytes)
        write_sidecars(folder, source, plan, options, hashes)

    return write


def peak_rss_mib() -> float:
    """Peak resident memory of this process so far, MiB (Linux)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    raise AssertionError("/proc/self/status has no VmHWM")
