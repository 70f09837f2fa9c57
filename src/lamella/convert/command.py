"""`lamella convert` for people: progress, what was made, and what to do next."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from lamella.convert import DEFAULT_OUT, ConversionReport, SliceOptions, convert, plan_conversion
from lamella.convert.checkpoint import Checkpoint
from lamella.convert.plan import Plan
from lamella.convert.sidecars import holds_conversion
from lamella.convert.write import check_output


def run(
    model: str | None, out: Path | None, options: dict[str, Any], *, overwrite: bool = False, dry_run: bool = False
) -> None:
    """Convert, or with `dry_run` print the plan. UserError before anything is written.

    `out` None is the default folder, which other commands make too: holding this very conversion, it is kept.
    """
    chosen = SliceOptions(**options)
    if out is None:
        out = DEFAULT_OUT
        if not (overwrite or dry_run) and holds_conversion(out, Checkpoint.open(model), "slice", chosen):
            print(f"{out} holds this conversion already. Next: uv run tests/moe_logit_match.py")
            return
    if dry_run:
        source, plan = plan_conversion(model, chosen)
        check_output(out, overwrite, plan.total_bytes, {tensor.path for tensor in source.tensors.values()})
        print(f"{plan.describe()}\n{_summary(source, plan)}: nothing was written to {out}")
        return
    with progress_bar("Converting") as (on_plan, on_bytes):
        report = convert(model, out, chosen, overwrite=overwrite, on_plan=on_plan, on_bytes=on_bytes)
    print(_result(report, chosen))


@contextmanager
def progress_bar(label: str) -> Iterator[tuple[Callable[[Plan], None], Callable[[int], None]]]:
    """(on_plan, on_bytes) for `convert`: a bar with bytes per second and the time left, on a terminal only."""
    columns = (TextColumn(label), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(label, total=None)
        yield lambda plan: progress.update(task, total=plan.total_bytes), lambda count: progress.advance(task, count)


def _summary(source: Checkpoint, plan: Plan) -> str:
    moe = plan.config["moe"]
    layers = f"{len(moe['moe_layers'])} of {plan.config['num_hidden_layers']} layers"
    return (
        f"{source.name}, {layers} with {moe['num_frozen_experts']} slices and as many copies, routing {moe['routing']}"
    )


def _result(report: ConversionReport, options: SliceOptions) -> str:
    speed = report.bytes_written / 1e9 / report.wall_s
    return (
        f"Made {report.out}: {options.slices} frozen slices and {options.slices} trainable copies per layer, "
        f"{report.bytes_written / 1e9:.2f} GB in {report.wall_s:.1f} s ({speed:.2f} GB/s), "
        f"peak memory {report.peak_rss_mib:,.0f} MiB. Next: uv run tests/moe_logit_match.py"
    )
