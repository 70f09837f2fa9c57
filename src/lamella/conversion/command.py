"""`lamella convert` for people: progress, what was made, and what to do next."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeRemainingColumn

from lamella.architecture.converted import converted_layers
from lamella.architecture.layout import ffn_layout
from lamella.checkpoint.folder import check_output
from lamella.checkpoint.plan import WritePlan
from lamella.checkpoint.remote import is_remote
from lamella.checkpoint.source import Checkpoint
from lamella.conversion import (
    DEFAULT_OUT,
    ConversionReport,
    SliceOptions,
    convert,
    entry_of,
    peak_rss_mib,
    plan_conversion,
)
from lamella.conversion.plan import ConversionPlan
from lamella.conversion.sidecars import holds_conversion
from lamella.errors import UserError
from lamella.installation import command as typed
from lamella.recipe.conversion import ConversionRecipe
from lamella.recipe.methods.common import MethodOptions

if TYPE_CHECKING:
    from lamella.conversion.parts import Part


def run_slicing(
    model: str | None, out: str | Path | None, options: SliceOptions, *, overwrite: bool = False, dry_run: bool = False
) -> None:
    """Slice, or with `dry_run` print the plan. UserError before anything is written.

    `out` None is the default folder, which other commands make too: holding this very conversion, it is kept.
    """
    if out is None:
        out = DEFAULT_OUT
        if not (overwrite or dry_run) and holds_conversion(out, Checkpoint.open(model), options):
            print(f"{out} holds this conversion already. Next: {_verify(model, out)}")
            return
    run(model, out, options, overwrite=overwrite, dry_run=dry_run)


def run_recipe(
    recipe: ConversionRecipe, model: str | None, out: str | None, *, overwrite: bool = False, dry_run: bool = False
) -> None:
    """Convert by a recipe; `model` and `out` take the place of its own."""
    run(model or recipe.model, out or recipe.out or DEFAULT_OUT, recipe.options, overwrite=overwrite, dry_run=dry_run)


def run_part(recipe: ConversionRecipe, model: str | None, out: str | None, part: str | None, overwrite: bool) -> None:
    """Make one part of a conversion, such as "3/16", or with `part` None finish one whose parts are all there."""
    if overwrite:
        raise UserError("parts never replace a model, which other machines may be writing; remove it first")
    from lamella.conversion.parts import Part

    place, number = str(out or recipe.out or DEFAULT_OUT), None if part is None else Part.parse(part)
    _run_part(model or recipe.model, place, recipe.options, number)


def _run_part(model: str | None, out: str, options: MethodOptions, part: Part | None) -> None:
    from lamella.conversion.parts import write_part  # imports torch

    with progress_bar("Converting") as display:
        report = write_part(
            plan_conversion(model, options), options, out, part, on_plan=display.on_plan, on_bytes=display.on_bytes
        )
    made = f"{report.made} shards made, {report.found} were there"
    if not report.is_whole:
        rest = "the last part to be made finishes the model" if part else "make their parts first"
        print(f"{out}: {made}; {report.missing} of other parts are missing: {rest}")
        return
    speed = f"{report.bytes_written / 1e9:.2f} GB in {report.wall_s:.1f} s, peak memory {peak_rss_mib():,.0f} MiB"
    print(f"{out}: {made}, {speed}. The model is whole")


def run(model: str | None, out: str | Path, options: MethodOptions, *, overwrite: bool, dry_run: bool) -> None:
    """Convert into a folder, or shard by shard to a URL."""
    if is_remote(out) and not dry_run:
        if overwrite:
            raise UserError(f"a model in a remote folder is not replaced; remove {out} first")
        from lamella.conversion.parts import Part

        _run_part(model, str(out), options, Part())
        return
    out = Path(out)
    if dry_run:
        plan = plan_conversion(model, options)
        listing = plan.listing
        check_output(out, overwrite, listing.total_bytes, plan.files)
        print(f"{listing.describe()}\n{_summary(plan, options)}: nothing was written to {out}")
        for remark in listing.notes.get("remarks", []):
            print(f"To know: {remark}.")
        if plan.remark:
            print(f"Until it is converted: {plan.remark}.")
        return
    with progress_bar("Converting") as display:
        report = convert(
            model, out, options, overwrite=overwrite, on_plan=display.on_plan, on_bytes=display.on_bytes,
            on_progress=display.on_progress, on_verdict=_print_verdict,
        )  # fmt: skip
    for line in _found(report):
        print(line)
    print(f"{_result(report, options)}. Next: {_next(model, report, options)}")


@contextmanager
def progress_bar(label: str) -> Iterator[Display]:
    """A bar with bytes per second and the time left, and one per phase of a calibration. Without a terminal a
    calibration prints lines."""
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TextColumn("{task.fields[speed]}"))
    console = Console(stderr=True)
    with Progress(
        *columns, TimeRemainingColumn(), console=console, transient=True, disable=not console.is_terminal
    ) as p:
        yield Display(p, label)


SECONDS_PER_LINE = 10


class Display:
    """The callbacks of `convert`."""

    def __init__(self, progress: Progress, label: str):
        self._progress, self._label = progress, label
        self._bytes = progress.add_task(label, total=None, visible=False, speed="")
        self._phases: dict[str, TaskID] = {}
        self._line_due = time.monotonic() + SECONDS_PER_LINE

    def on_plan(self, plan: WritePlan) -> None:
        self._progress.update(self._bytes, total=plan.total_bytes, visible=True)

    def on_bytes(self, count: int) -> None:
        speed = next(task.speed for task in self._progress.tasks if task.id == self._bytes) or 0
        self._progress.update(self._bytes, advance=count, speed=f"{speed / 1e9:.2f} GB/s")

    def on_progress(self, step: Any) -> None:
        """`step`: a lamella.calibrate.CalibrationStep."""
        if step.phase not in self._phases:
            description = f"Calibrating: {step.phase}"
            self._phases[step.phase] = self._progress.add_task(description, total=step.num_layers, speed="")
        speed = f"{step.tokens_per_s:,.0f} tokens/s"
        self._progress.update(self._phases[step.phase], advance=1, speed=speed)
        if self._progress.disable and (now := time.monotonic()) >= self._line_due:
            self._line_due = now + SECONDS_PER_LINE
            what = "step" if step.phase == "heal" else "layer"
            place = f"{step.phase}, {what} {step.layer + 1} of {step.num_layers}"
            print(f"calibrating: {place}, {speed}", file=sys.stderr, flush=True)


def _print_verdict(verdict: Any) -> None:
    end = "converted" if verdict.kept else f"stays dense: {verdict.reason}"
    print(f"layer {verdict.layer}: {verdict.before:.4g} -> {verdict.after:.4g}, {end}", flush=True)


def _summary(plan: ConversionPlan, options: MethodOptions) -> str:
    entry = entry_of(plan, plan.listing, options)
    layers = f"{len(converted_layers(entry))} of {ffn_layout(plan.source.config).num_layers} layers"
    return f"{plan.source.name}, {layers} with {_experts(entry)}, gate {entry['gate']}"


def _experts(moe: dict[str, Any]) -> str:
    if "names" in moe:
        return f"the adapters {', '.join(moe['names'])} and a zero expert, {moe['num_experts_per_tok']} active"
    if "num_frozen_experts" not in moe:
        return f"attention of {moe['num_experts']} experts, {moe['num_experts_per_tok']} of them active"
    if moe["num_frozen_experts"]:
        return f"{moe['num_frozen_experts']} frozen slices and {moe['num_trainable_experts']} trainable copies"
    shared = f" and {moe['shared_intermediate_size']} shared neurons" if moe["shared_intermediate_size"] else ""
    return f"{moe['num_trainable_experts']} experts, {moe['num_experts_per_tok']} of them active{shared}"


def _found(report: ConversionReport) -> Iterator[str]:
    """What a merge found: what to know of the model, and how its routers send the prompts."""
    for remark in report.notes.get("remarks", []):
        yield f"To know: {remark}."
    gates = report.notes.get("gates", {})
    if "layers" in gates:
        from lamella.conversion.merge.report import table

        yield table(gates)
        yield f"Routing: {gates['summary']}."


def _result(report: ConversionReport, options: MethodOptions) -> str:
    speed = report.bytes_written / 1e9 / report.wall_s
    return (
        f"Made {report.out} by method {options.method}: {_experts(report.moe)} per layer, "
        f"{report.bytes_written / 1e9:.2f} GB in {report.wall_s:.1f} s ({speed:.2f} GB/s), "
        f"peak memory {report.peak_rss_mib:,.0f} MiB"
    )


def _next(model: str | None, report: ConversionReport, options: MethodOptions) -> str:
    """The command that says how good the conversion is."""
    if options.method == "slice":
        return _verify(model, report.out)
    return typed(shlex.join(["lamella", "evaluate", str(report.out)]))


def _verify(model: str | None, out: Path) -> str:
    """The command that compares a conversion with its dense model; what is the default is not said."""
    dense = [] if model is None else ["--dense", model]
    moe = [] if out == DEFAULT_OUT else ["--moe", str(out)]
    return typed(shlex.join(["lamella", "verify", *dense, *moe]))
