"""/v1/jobs, /v1/plans: submit, list, change. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, cast

from fastapi import APIRouter, Header, Query, Response
from fastapi import Path as InPath
from pydantic import ValidationError

from lamella.errors import UserError
from lamella.jsons import Json
from lamella.recipe.result import result_folder
from lamella.service.context import Ctx, Reader, Service, Submitter, run_for
from lamella.service.executors.executor import submission_of
from lamella.service.jobs import Kind, Submission, TrainJob
from lamella.service.keys import Identity
from lamella.service.listing import Sort, Wanted
from lamella.service.planning import new_run, plan_of
from lamella.service.problems import ALWAYS, Refused, documented, found_wrong, listed
from lamella.service.progress import run_dirs
from lamella.service.states import Desired, State
from lamella.service.store import Conflict, Quota, Run
from lamella.service.views import (
    AttemptView,
    CheckedView,
    ForkRequest,
    PlanRequest,
    PlanView,
    RunDetail,
    Runs,
    RunView,
    Used,
)

router = APIRouter(prefix="/v1", tags=["jobs"], responses=ALWAYS)
Id = Annotated[str, InPath(pattern=r"^run-[0-9a-f]{12}$")]
IdempotencyKey = Annotated[str | None, Header(max_length=200, pattern=r"^[\x21-\x7e]+$")]
ONE = documented(404)
CHANGED = documented(404, 409)
NOTHING: Used = (0.0, None)


@router.post("/plans", response_model=PlanView)
def make_plan(request: PlanRequest, service: Ctx, _: Reader) -> Json:
    """What a submission would do: memory, time and cost of training, its command, the files of its executor."""
    service.roots.check(request.submission.strings())
    figures: Json = {"price_per_hour": request.price_per_hour, "tokens_per_second": request.tokens_per_second}
    return plan_of(request.submission, service.place, request.gpu, **figures)


@router.post("/checks", response_model=CheckedView)
def check(submission: Json, service: Ctx, _: Reader) -> Json:
    """Whether a submission would be taken, and what it would do: for forms, where mistakes are no failure."""
    try:
        checked = Submission.model_validate(submission)
        service.roots.check(checked.strings())
        return {"problem": "", "errors": [], "plan": plan_of(checked, service.place)}
    except ValidationError as error:
        what, errors = found_wrong(error.errors())
    except UserError as error:
        what, errors = str(error), listed(error)
    return {"problem": what, "errors": errors, "plan": None}


@router.post("/jobs", status_code=201, responses=documented(409) | {200: {"model": RunDetail}})
def submit(
    submission: Submission,
    service: Ctx,
    who: Submitter,
    response: Response,
    idempotency_key: IdempotencyKey = None,
) -> RunDetail:
    """Check a job, and queue it. With an Idempotency-Key the same request makes one run, however often it comes."""
    run, made = accept(service, submission, who, idempotency_key)
    if not made:
        response.status_code = 200
    return _detail(service, run)


def _detail(service: Service, run: Run) -> RunDetail:
    return RunDetail.of(run, service.store.used([run.id]).get(run.id, NOTHING))


def accept(
    service: Service, submission: Submission, who: Identity, key: str | None = None, parent: str | None = None
) -> tuple[Run, bool]:
    """Check and store a submission: (the run, whether it is new)."""
    if who.run is not None:
        raise Refused(403, "the key is for one run; it submits no other")
    service.roots.check(submission.strings())
    submission.check()
    gpus, cores = submission.needs(service.place.capacity)
    if service.limits.gpus and gpus > service.limits.gpus and not who.may("admin"):
        raise Quota(f"{gpus} GPUs are more than the {service.limits.gpus} that one user may have")
    out = submission.job.out()
    place = None if out is None else str((service.place.cwd / out).resolve())
    new = new_run(submission, who.user, gpus, cores, place, parent)
    limit = 0 if who.may("admin") else service.limits.runs
    run, made = service.store.create(new, key, submission.model_dump(mode="json", by_alias=True), limit)
    if made:
        service.store.record(who.user, "submit", run.id, who.key, kind=run.kind)
        service.scheduler.wake()
    return run, made


@router.get("/jobs", responses=ONE)
def list_runs(
    service: Ctx,
    who: Reader,
    after: Annotated[str | None, Query(pattern=r"^run-[0-9a-f]{12}$")] = None,
    limit: Annotated[int, Query(ge=1, le=500)] = 50,
    state: Annotated[list[State] | None, Query(max_length=20)] = None,
    kind: Kind | None = None,
    user: Annotated[str | None, Query(max_length=100)] = None,
    search: Annotated[str | None, Query(max_length=200)] = None,
    sort: Sort = "submitted",
    ascending: bool = False,
    count: bool = False,
) -> Runs:
    """The newest runs first, or in another order, a page at a time; with `count` how many there are on all pages."""
    if who.run is not None:
        used = service.store.used([who.run])
        run = service.store.get(who.run)
        return Runs(data=[RunView.of(run, used.get(run.id, NOTHING))], after=None, total=1 if count else None)
    wanted = Wanted(state or (), kind, user, search, sort, ascending)
    found = service.store.runs(after, limit + 1, wanted)
    used = service.store.used([run.id for run in found[:limit]])
    return Runs.model_construct(
        data=[RunView.of(run, used.get(run.id, NOTHING)) for run in found[:limit]],
        after=found[limit - 1].id if len(found) > limit else None,
        total=service.store.count(wanted) if count else None,
    )


@router.get("/jobs/{run_id}", responses=ONE)
def show(run_id: Id, service: Ctx, who: Reader) -> RunDetail:
    """A run, with what was submitted."""
    return _detail(service, run_for(service, who, run_id))


@router.get("/jobs/{run_id}/attempts", responses=ONE)
def attempts(run_id: Id, service: Ctx, who: Reader) -> list[AttemptView]:
    """Every start of a run, the first first."""
    run_for(service, who, run_id)
    return [AttemptView.model_validate(vars(a), from_attributes=True) for a in service.store.attempts(run_id)]


def _wish(service: Service, who: Identity, run_id: str, desired: Desired) -> RunDetail:
    run_for(service, who, run_id, change=True)
    run = service.store.wish(run_id, desired, who.user)
    service.store.record(who.user, desired, run_id, who.key)
    service.scheduler.wake()
    return _detail(service, run)


@router.post("/jobs/{run_id}/cancel", responses=CHANGED)
def cancel(run_id: Id, service: Ctx, who: Submitter) -> RunDetail:
    """End a run; training saves a checkpoint first. A run that has ended stays as it is."""
    return _wish(service, who, run_id, "cancelled")


@router.post("/jobs/{run_id}/pause", responses=CHANGED)
def pause(run_id: Id, service: Ctx, who: Submitter) -> RunDetail:
    """Let training save a checkpoint and stop, until it is resumed; or let a queued job wait."""
    return _wish(service, who, run_id, "paused")


@router.post("/jobs/{run_id}/resume", responses=CHANGED)
def resume(run_id: Id, service: Ctx, who: Submitter) -> RunDetail:
    """Queue a paused run again; it goes on from its newest checkpoint."""
    return _wish(service, who, run_id, "running")


@router.post("/jobs/{run_id}/retry", responses=CHANGED)
def retry(run_id: Id, service: Ctx, who: Submitter) -> RunDetail:
    """Queue a run again that failed or was cancelled; training goes on from its newest checkpoint."""
    run_for(service, who, run_id, change=True)
    run = service.store.retry(run_id, who.user)
    service.store.record(who.user, "retry", run_id, who.key)
    service.scheduler.wake()
    return _detail(service, run)


@router.post("/jobs/{run_id}/fork", status_code=201, responses=CHANGED)
def fork(run_id: Id, request: ForkRequest, service: Ctx, who: Submitter) -> RunDetail:
    """A new training run with the weights of a checkpoint, or with changes of the recipe from the same model."""
    run, _ = accept(service, forked(run_for(service, who, run_id), request), who, parent=run_id)
    return _detail(service, run)


def forked(run: Run, request: ForkRequest) -> Submission:
    """The submission of a fork; Conflict where there is nothing to fork."""
    old = submission_of(run)
    if not isinstance(old.job, TrainJob) or "stages" in old.job.recipe:
        raise Conflict(f"{run.id} is no training run of one stage; submit a changed recipe instead")
    recipe = old.job.recipe | request.changes | {"out": request.out}
    if request.step is not None:
        (directory,) = run_dirs(old)
        if request.step not in directory.steps():
            there = ", ".join(map(str, directory.steps())) or "none"
            raise Conflict(f"{run.id} has no checkpoint of step {request.step}; it has {there}")
        recipe["model"] = str(result_folder(Path(directory.path), request.step))
    job = cast(Json, old.model_dump(mode="json", by_alias=True)) | {"name": request.name}
    try:
        return Submission.model_validate(job | {"job": job["job"] | {"recipe": recipe}})
    except ValidationError as error:
        raise Conflict(str(error)) from None
