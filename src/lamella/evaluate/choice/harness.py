"""Tasks of lm-evaluation-harness, by its Python API; log-likelihoods come from the scoring of this room.

Its own class for transformers models does everything else: prompts, tokens, few-shot examples, generation, metrics.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from yaml import YAMLError

from lamella.errors import UserError, did_you_mean
from lamella.evaluate.checkpoints import free_device_memory, model_path, open_checkpoint, without_weights
from lamella.evaluate.choice.evaluate import EMBEDDED_SET, HARNESS_PREFIX
from lamella.evaluate.choice.sets import SETS
from lamella.evaluate.choice.shared_prefixes import TokenPair, log_likelihoods_of_tokens

if TYPE_CHECKING:
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager


@dataclass(frozen=True)
class HarnessResult:
    """What one model reached: {task or group: {measure: (value, standard error or NaN)}}."""

    tasks: dict[str, dict[str, tuple[float, float]]]
    wall_s: float
    """With the building of the prompts."""


def evaluate_harness_task(
    folder: str,
    task: str,
    *,
    dense: str | None = None,
    beside: Sequence[str] = (),
    limit: int | None = None,
    dtype: str = "auto",
    device: str = "auto",
    on_model: Callable[[str], None] = lambda _: None,
) -> dict[str, HarnessResult]:
    """What each model reaches, by its name as it was given, one model in memory at a time.

    Args:
        folder, dense, beside: models, see `lamella.evaluate.checkpoints.model_path`.
        task: a task, group or tag of the harness, "harness:" in front of it or not; or a YAML file of one.
        limit: at most this many questions of each task.
        on_model: told the name of the model that is loaded next.

    Raises:
        UserError: the harness is not installed, does not know the task, or cannot load its data; no such model.
    """
    manager, name = _task_manager(task.removeprefix(HARNESS_PREFIX))
    names = list(dict.fromkeys([folder, *([] if dense is None else [dense]), *beside]))
    for model in names:
        without_weights(model)
    results = {}
    for model in names:
        on_model(model)
        lm = _language_model(open_checkpoint(model, dtype, device), AutoTokenizer.from_pretrained(model_path(model)))
        results[model] = _run(lm, name, manager, limit)
        del lm
        free_device_memory()
    return results


def _task_manager(task: str) -> tuple[TaskManager, str]:
    """The harness' tasks, and what to ask of them; UserError where the task is not among them."""
    try:
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise UserError(
            f"no such task: {task!r} is neither a file, nor {EMBEDDED_SET}, nor {', '.join(SETS)}; for the tasks of "
            "lm-evaluation-harness install it: pip install 'lamella[tasks]'"
        ) from None
    if task.endswith((".yaml", ".yml")):
        if not Path(task).is_file():
            raise UserError(f"cannot read the task file {task}: there is none")
        return TaskManager(), task
    manager = TaskManager()
    if task not in manager.all_tasks:
        known = [EMBEDDED_SET, *SETS, *manager.all_tasks]
        raise UserError(
            f"no such task: {task!r} is neither a file, nor {EMBEDDED_SET}, nor {', '.join(SETS)}, nor a task of "
            f"lm-evaluation-harness{did_you_mean(task, known)}"
        )
    return manager, task


def _language_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> HFLM:
    """The model as the harness wants it."""
    from lm_eval.models.huggingface import HFLM

    class SharedPrefixes(HFLM):
        """The harness' class with the log-likelihoods of this room."""

        def _loglikelihood_tokens(
            self,
            requests: list[tuple[tuple[str, str], list[int], list[int]]],
            disable_tqdm: bool = False,
            override_bs: int | None = None,
        ) -> list[tuple[float, bool]]:
            pairs = [TokenPair(tuple(context), tuple(continuation)) for _, context, continuation in requests]
            return log_likelihoods_of_tokens(model, pairs)

    return SharedPrefixes(pretrained=model, tokenizer=tokenizer, batch_size=1)


def _run(lm: HFLM, task: str, manager: TaskManager, limit: int | None) -> HarnessResult:
    from lm_eval import simple_evaluate

    began = time.perf_counter()
    try:
        found = simple_evaluate(lm, tasks=[task], task_manager=manager, limit=limit, log_samples=False)
    except (OSError, ValueError, KeyError, YAMLError) as error:  # no data, or a YAML file that is none
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"lm-evaluation-harness cannot run {task}: {reason}") from error
    assert found is not None  # None is for ranks other than 0
    tasks = found["results"] | found.get("groups", {})
    return HarnessResult({name: _measures(values) for name, values in tasks.items()}, time.perf_counter() - began)


def _measures(values: dict[str, object]) -> dict[str, tuple[float, float]]:
    """{measure: (value, standard error)} of the harness' keys, such as 'acc,none' and 'acc_stderr,none'."""
    found = {}
    for key, value in values.items():
        measure, _, kind = key.partition(",")
        if isinstance(value, float) and not measure.endswith("_stderr"):
            error = values.get(f"{measure}_stderr,{kind}")
            found[measure] = (value, error if isinstance(error, float) else math.nan)
    return found
