"""`lamella evaluate DIR --task TASK` for people: progress, tables, a picture, a JSON report."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table
from transformers.utils import logging as transformers_logging

from lamella.errors import UserError
from lamella.evaluate.checkpoints import (
    check_json_path,
    without_weights,
    write_json,
)
from lamella.evaluate.choice.accuracy import Accuracy
from lamella.evaluate.choice.evaluate import TaskResult, evaluate_task, is_harness_task
from lamella.evaluate.choice.expert_use import draw_expert_use, routed_layers
from lamella.evaluate.choice.harness import HarnessResult, evaluate_harness_task
from lamella.evaluate.served.measure import check_model
from lamella.evaluate.served.names import is_served
from lamella.jsons import Json


def run_task(
    folder: str,
    task: str,
    *,
    dense: str | None,
    beside: Sequence[str],
    limit: int | None,
    mode: str | None,
    dtype: str,
    device: str,
    tokenizer: str | None,
    json_path: Path | None,
    picture: Path | None,
) -> None:
    """Measure and print; see `lamella.evaluate.choice.evaluate.evaluate_task`.

    Args:
        picture: the experts that each domain uses are drawn in this file.

    Raises:
        UserError: see there; a picture of a task of the harness.
    """
    check_json_path(json_path)
    check_json_path(picture)
    if picture is not None:
        _check_picture(picture, folder)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    names = (folder, *([] if dense is None else [dense]), *beside)
    for name in names:
        check_model(name)  # what is wrong with it is the only thing said
    with Console(stderr=True).status(f"evaluating {folder}") as status:

        def on_model(name: str) -> None:
            status.update(f"evaluating {name}")

        if is_harness_task(task):
            _check_harness(names, picture, mode)
            of_harness = evaluate_harness_task(
                folder, task, dense=dense, beside=beside, limit=limit, dtype=dtype, device=device, on_model=on_model
            )
            table, report = _harness_table(task, of_harness), {k: asdict(r) for k, r in of_harness.items()}
            tables = [table]
        else:
            results = evaluate_task(
                folder, task, dense=dense, beside=beside, limit=limit, mode=mode, dtype=dtype, device=device,
                tokenizer=tokenizer, on_model=on_model,
            )  # fmt: skip
            tables, report = _tables(task, results), {name: _report(result) for name, result in results.items()}
            if picture is not None:
                draw_expert_use(results[folder].expert_use, picture, f"{folder}: {task}")
    console = Console()
    for table in tables:
        (console if console.is_terminal else Console(width=160)).print(table)
    if json_path is not None:
        write_json(json_path, {"folder": folder, "task": task, "limit": limit, "models": report})


def _check_harness(names: Sequence[str], picture: Path | None, mode: str | None) -> None:
    if picture is not None or mode is not None:
        raise UserError("--picture and --mode have no effect with a task of lm-evaluation-harness")
    for name in names:
        if is_served(name):
            raise UserError(f"{name} is served, and tasks of lm-evaluation-harness are for folders; take a set of ours")


def _check_picture(picture: Path, folder: str) -> None:
    if picture.suffix not in (".png", ".svg", ".pdf"):
        raise UserError(f"cannot draw {picture}: its name must end with .png, .svg or .pdf")
    if is_served(folder) or not routed_layers(without_weights(folder)):
        raise UserError(f"{folder} has no experts in its FFNs, so there is nothing to draw; leave --picture out")


def _report(result: TaskResult) -> Json:
    """What is written: figures, each question's likelihoods, the use of experts; NaN is null."""
    use = {domain: shares.tolist() for domain, shares in result.expert_use.items()}
    domains = {domain: _finite(asdict(figures)) for domain, figures in result.domains.items()}
    answers = [asdict(answer) for answer in result.answers]
    return {"wall_s": result.wall_s, "overall": _finite(asdict(result.overall)), "domains": domains} | {
        "expert_use": use,
        "answers": answers,
    }


def _finite(figures: Json) -> Json:
    return {name: None if isinstance(x, float) and math.isnan(x) else x for name, x in figures.items()}


def _tables(task: str, results: dict[str, TaskResult]) -> list[Table]:
    """All questions, and where there are several domains, each of them."""
    overall = Table(title=f"Multiple choice: {task}")
    overall.add_column("model")
    for column in ("questions", "acc", "acc_norm", "acc_bytes", "s"):
        overall.add_column(column, justify="right")
    for name, result in results.items():
        figures = [str(result.overall.questions), *(_figure(result.overall, m) for m in ("acc", "acc_norm"))]
        overall.add_row(name, *figures, _figure(result.overall, "acc_bytes"), f"{result.wall_s:.1f}")
    first = next(iter(results.values()))
    if len(first.domains) == 1:
        return [overall]
    by_domain = Table(title="By domain")
    by_domain.add_column("domain")
    by_domain.add_column("questions", justify="right")
    for name in results:
        for measure in ("acc", "acc_norm"):
            by_domain.add_column(f"{measure}\n{name}", justify="right")
    for domain, figures_of_first in first.domains.items():
        cells = [_figure(r.domains[domain], m) for r in results.values() for m in ("acc", "acc_norm")]
        by_domain.add_row(domain, str(figures_of_first.questions), *cells)
    return [overall, by_domain]


def _figure(figures: Accuracy, measure: str) -> str:
    return _with_error(getattr(figures, measure), getattr(figures, f"{measure}_stderr"))


def _with_error(value: float, error: float) -> str:
    return f"{value:.4f}" if math.isnan(error) else f"{value:.4f} ± {error:.4f}"


def _harness_table(task: str, results: dict[str, HarnessResult]) -> Table:
    table = Table(title=f"lm-evaluation-harness: {task}")
    table.add_column("task")
    table.add_column("measure")
    for name in results:
        table.add_column(name, justify="right")
    for task_name, measures in next(iter(results.values())).tasks.items():
        for measure in measures:
            values = [result.tasks[task_name].get(measure, (math.nan, math.nan)) for result in results.values()]
            table.add_row(task_name, measure, *(_with_error(*value) for value in values))
    return table
