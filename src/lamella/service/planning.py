"""What a submission would do, before anything is started. Imports no torch."""

from __future__ import annotations

import shlex

from lamella.errors import UserError
from lamella.jsons import Json
from lamella.plan.command import plan_stages
from lamella.service.executors import EXECUTORS
from lamella.service.executors.executor import Place, command_of
from lamella.service.jobs import Submission, TrainJob
from lamella.service.store import NewRun, Run

DRAFT = "run-000000000000"


def plan_of(
    submission: Submission,
    place: Place,
    gpu: str | None = None,
    price_per_hour: float | None = None,
    tokens_per_second: float | None = None,
) -> Json:
    """{"kind", "command", "gpus", "cores", "training": {stage: values}, "text", "files"}.

    Args:
        gpu: the kind that training is planned for, `cpu` for none; None: H100 where the job has GPUs.
        price_per_hour, tokens_per_second: see `lamella.plan.report.plan_values`.

    Raises:
        UserError: what is wrong with the job, all at once.
    """
    submission.check()
    gpus, cores = submission.needs(place.capacity)
    run = draft(submission, gpus, cores)
    plans, text, problem = dict[str, Json](), "", None
    if isinstance(submission.job, TrainJob):
        stages, ranks = submission.job.stages(), submission.ranks(place.capacity)
        has_gpus = gpus > 0 or (submission.executor != "local" and submission.cluster.gpus_per_node > 0)
        figures: Json = {"price_per_hour": price_per_hour, "tokens_per_second": tokens_per_second}
        try:
            plans, texts = plan_stages(stages, stages, gpu or ("H100" if has_gpus else "cpu"), ranks, **figures)
            text = "\n\n".join(texts.values())
        except UserError as error:  # mostly a model that is not here yet
            problem = str(error)
    command = shlex.join(["lamella", *command_of(run, place)[3:]]).replace(DRAFT, "RUN")
    return {
        "kind": run.kind, "command": command, "executor": run.executor,
        "gpus": gpus, "cores": cores, "out": submission.job.out(), "training": plans, "text": text,
        "problem": problem, "files": EXECUTORS[run.executor](place).render(run, 1),
    }  # fmt: skip


def draft(submission: Submission, gpus: int, cores: int) -> Run:
    """The run that a submission would become."""
    new = new_run(submission, "nobody", gpus, cores)
    more: Json = {
        "seq": 0, "id": DRAFT, "state": "validating", "desired": "running", "failure": None, "reason": "",
        "attempt": 0, "fruitless": 0, "not_before": 0.0, "created": 0.0, "updated": 0.0, "started": None,
        "ended": None, "progress": {},
    }  # fmt: skip
    return Run(**vars(new), **more)


def new_run(
    submission: Submission, user: str, gpus: int, cores: int, out: str | None = None, parent: str | None = None
) -> NewRun:
    """What the store keeps of a submission."""
    return NewRun(
        kind=submission.job.kind, user=user, spec=submission.model_dump(mode="json", by_alias=True),
        name=submission.name, priority=submission.priority, executor=submission.executor, out=out, gpus=gpus,
        cores=cores, parent=parent,
    )  # fmt: skip
