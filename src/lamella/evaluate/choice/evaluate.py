"""One task, several models: each answers all questions, one model in memory at a time."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast, get_args

from torch import Tensor
from transformers import AutoTokenizer

from lamella.architecture.moe import Mode
from lamella.errors import UserError, check_choice, did_you_mean
from lamella.evaluate.checkpoints import (
    adapter_of,
    free_device_memory,
    is_converted,
    model_path,
    open_checkpoint,
    parse_device,
    parse_dtype,
    without_weights,
)
from lamella.evaluate.choice.accuracy import Accuracy, Answer, accuracy, accuracy_by_domain, answer_questions
from lamella.evaluate.choice.continuations import continuations
from lamella.evaluate.choice.expert_use import ExpertUse
from lamella.evaluate.choice.questions import Question, limited, read_questions
from lamella.evaluate.choice.scoring import ModelScorer, Scorer
from lamella.evaluate.choice.sets import SETS, dataset_rows, file_rows, set_questions
from lamella.evaluate.served.measure import Served, tokenizer_of
from lamella.evaluate.served.names import is_served, load_tokenizer

EMBEDDED_SET = "continuations"
HARNESS_PREFIX = "harness:"


@dataclass(frozen=True)
class TaskResult:
    """What one model reached."""

    overall: Accuracy
    domains: dict[str, Accuracy]
    answers: list[Answer]
    """Of each question, in their order."""
    expert_use: dict[str, Tensor]
    """[layers, experts] of each domain, see `ExpertUse.shares`; empty of a dense model."""
    wall_s: float
    """Of the scoring alone, without loading."""


def is_harness_task(task: str) -> bool:
    """Whether it is neither a file nor a set of ours, so that lm-evaluation-harness must know it."""
    name = task.partition("=")[0].partition(":")[0]
    if task.startswith(HARNESS_PREFIX) or task.endswith((".yaml", ".yml")):
        return True
    return name != EMBEDDED_SET and name not in SETS and not _is_file_name(task)


def _is_file_name(task: str) -> bool:
    return Path(task).suffix in (".jsonl", ".json", ".txt") or "/" in task or Path(task).is_file()


def load_task(task: str, limit: int | None = None) -> list[Question]:
    """The questions of a task of ours.

    Args:
        task: a JSONL file of our format; "continuations", from embedded text; a name of SETS, with a configuration
            behind a colon if it is not to be the usual one, from the `datasets` library; or NAME=FILE, a .parquet or
            .jsonl file with the columns of the set NAME.
        limit: at most this many questions of each domain.

    Raises:
        UserError: no such task; a broken file, line or row.
    """
    if limit is not None and limit < 1:
        raise UserError(f"a limit of {limit} leaves no question; ask for at least 1 of each domain")
    name, is_file, file = task.partition("=")
    name, _, config = name.partition(":")
    if task == EMBEDDED_SET:
        questions = continuations()
    elif name in SETS:
        rows = file_rows(Path(file)) if is_file else dataset_rows(name, config or None)
        questions = set_questions(name, rows, config or None)
    elif is_file and not _is_file_name(task):
        raise UserError(f"no such set of questions: {name}{did_you_mean(name, SETS)}; it must be {', '.join(SETS)}")
    else:
        questions = read_questions(Path(task).expanduser())
    if not questions:
        raise UserError(f"{task} holds no question")
    return limited(questions, limit)


def evaluate_task(
    folder: str,
    task: str | Sequence[Question],
    *,
    dense: str | None = None,
    beside: Sequence[str] = (),
    limit: int | None = None,
    mode: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
    tokenizer: str | None = None,
    on_model: Callable[[str], None] = lambda _: None,
) -> dict[str, TaskResult]:
    """What each model reaches, by its name as it was given.

    Args:
        folder, dense, beside: models, see `lamella.evaluate.checkpoints.model_path`; GGUF files and endpoints, too, see
            `lamella.evaluate.served.names`.
        task: see `load_task`; or questions.
        limit: at most this many questions of each domain.
        mode: what the MoE layers of `folder` compute; None: as the model stands.
        tokenizer: of the models that are served: the folder of the model that they were made of.
        on_model: told the name of the model that is loaded next.

    Raises:
        UserError: no such model or task, a broken one, a mode for a model without experts.
    """
    names = list(dict.fromkeys([folder, *([] if dense is None else [dense]), *beside]))
    questions = load_task(task, limit) if isinstance(task, str) else limited(list(task), limit)
    check_choice("mode", mode, (None, *get_args(Mode)))
    parse_dtype(dtype), parse_device(device)
    served = {name: tokenizer_of(name, tokenizer, {"--mode": mode}) for name in names if is_served(name)}
    if tokenizer is not None and not served:
        tokenizer_of(folder, tokenizer, {})
    for name in names:  # what is wrong with any is said before the first is loaded
        if name in served:
            continue
        shape = without_weights(name)
        adapter_of(shape, name)
        if mode is not None and name == folder and not is_converted(shape):
            raise UserError(f"{folder} is a dense model, so it has no mode; leave --mode out")
    results = {}
    for name in names:
        on_model(name)
        if name in served:
            results[name] = _answered(Served(name, load_tokenizer(served[name])), questions)
            continue
        own_mode = cast("Mode | None", mode) if name == folder else None
        results[name] = _one_model(name, questions, own_mode, dtype, device)
        free_device_memory()
    return results


def _one_model(name: str, questions: list[Question], mode: Mode | None, dtype: str, device: str) -> TaskResult:
    model, tokenizer = open_checkpoint(name, dtype, device), AutoTokenizer.from_pretrained(model_path(name))
    if mode is not None:
        assert is_converted(model)
        model.set_mode(mode)
    use = ExpertUse(model, questions)
    result = _answered(ModelScorer(model, tokenizer, use if use.layers else None), questions)
    return replace(result, expert_use=use.shares()) if use.layers else result


def _answered(scorer: Scorer, questions: list[Question]) -> TaskResult:
    began = time.perf_counter()
    answers = answer_questions(scorer, questions)
    wall_s = time.perf_counter() - began
    return TaskResult(accuracy(answers), accuracy_by_domain(answers), answers, {}, wall_s)
