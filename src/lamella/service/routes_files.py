"""What runs have written: events, logs, metrics, checkpoints, models. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from fastapi import APIRouter, Header, Query
from sse_starlette import EventSourceResponse

from lamella.errors import UserError
from lamella.jsons import Json
from lamella.run.folder import RunDir
from lamella.service.context import Ctx, Reader, Service, run_for
from lamella.service.conversions import bytes_of, checks_of, conversion_of, read_json
from lamella.service.executors.executor import submission_of
from lamella.service.listing import Wanted
from lamella.service.problems import ALWAYS, Refused
from lamella.service.progress import present, run_dirs
from lamella.service.routes_jobs import ONE, Id
from lamella.service.store import NotFound, Run
from lamella.service.streams import finite as finite_line
from lamella.service.streams import follow, read_log, respond
from lamella.service.views import CheckpointView, CheckView, ConversionView, Events, EventView, Log, Metrics, ModelView

router = APIRouter(prefix="/v1", tags=["files"], responses=ALWAYS)
Number = Annotated[int, Query(ge=0, le=2**62)]
Page = Annotated[int, Query(ge=1, le=1000)]
LastId = Annotated[str | None, Header(alias="Last-Event-ID", pattern=r"^[0-9]{1,19}$")]
Stage = Annotated[str | None, Query(max_length=200)]
STREAM: dict[int | str, Json] = {
    200: {"content": {"text/event-stream": {}}, "description": "Server-sent events; ids are for Last-Event-ID"}
}
MODELS = 200


@router.get("/events")
def events(service: Ctx, who: Reader, after: Number = 0, limit: Page = 200) -> Events:
    """Events of all runs, in the order in which they happened."""
    return _events(service, after, who.run, limit)


@router.get("/jobs/{run_id}/events", responses=ONE)
def events_of_run(run_id: Id, service: Ctx, who: Reader, after: Number = 0, limit: Page = 200) -> Events:
    """Events of one run; what the trainer reports (saves, faults, restarts) too."""
    run_for(service, who, run_id)
    return _events(service, after, run_id, limit)


def _events(service: Service, after: int, run_id: str | None, limit: int) -> Events:
    found = [EventView(**vars(event)) for event in service.store.events(after, run_id, limit)]
    return Events(data=found, after=found[-1].id if found else after)


@router.get("/events/stream", response_class=EventSourceResponse, responses=STREAM)
async def stream(service: Ctx, who: Reader, after: Number | None = None, last: LastId = None) -> EventSourceResponse:
    """Events of all runs as they happen; `after`, or Last-Event-ID, goes on after an event."""
    return respond(service.hub.stream(_place(last, after, service.hub.last), who.run))


@router.get("/jobs/{run_id}/events/stream", response_class=EventSourceResponse, responses=STREAM | ONE)
async def stream_of_run(
    run_id: Id, service: Ctx, who: Reader, after: Number = 0, last: LastId = None
) -> EventSourceResponse:
    """Events of one run: those that were, and then those that come."""
    run_for(service, who, run_id)
    return respond(service.hub.stream(_place(last, after, 0), run_id))


def _place(last: str | None, after: int | None, otherwise: int) -> int:
    """Where a stream begins; the header of a client that comes back stands over the address."""
    if last is not None:
        if int(last) > 2**62:
            raise Refused(422, "Last-Event-ID is the number of an event")
        return int(last)
    return otherwise if after is None else after


def logs_of(service: Service, run: Run) -> dict[str, Path]:
    """Source -> file of everything that a run prints."""
    found = {"job": service.place.log(run.id)}
    for directory in run_dirs(submission_of(run)):
        stage = "" if len(found) == 1 else f"{directory.path.name}/"
        for file in sorted(directory.log.glob("rank-*.log")):
            found[f"{stage}{file.stem}"] = file
    return found


def _log(service: Service, run: Run, source: str) -> Path:
    known = logs_of(service, run)
    if source not in known:
        raise NotFound(f"{run.id} has no log {source!r}; it has {', '.join(known)}")
    return known[source]


@router.get("/jobs/{run_id}/logs", responses=ONE)
def logs(
    run_id: Id,
    service: Ctx,
    who: Reader,
    source: Annotated[str, Query(max_length=300)] = "job",
    offset: Number | None = None,
    limit: Annotated[int, Query(ge=16, le=1_000_000)] = 65_536,
) -> Log:
    """A part of a log: from an offset in bytes on, or its end."""
    run = run_for(service, who, run_id)
    file = _log(service, run, source)
    size = file.stat().st_size if file.is_file() else 0
    begin = max(0, size - limit) if offset is None else offset
    text, after = read_log(file, begin, limit)
    return Log(source=source, sources=list(logs_of(service, run)), text=text, offset=after, size=size)


@router.get("/jobs/{run_id}/logs/stream", response_class=EventSourceResponse, responses=STREAM | ONE)
def log_stream(
    run_id: Id,
    service: Ctx,
    who: Reader,
    source: Annotated[str, Query(max_length=300)] = "job",
    offset: Number = 0,
    last: LastId = None,
) -> EventSourceResponse:
    """A log as it is written, until the run has ended; ids are offsets in bytes."""
    file = _log(service, run_for(service, who, run_id), source)
    return respond(follow(file, _place(last, offset, 0), service.store, run_id))


def _stage(run: Run, name: str | None) -> tuple[RunDir | None, list[RunDir]]:
    runs = run_dirs(submission_of(run))
    if name is None:
        return present(runs), runs
    chosen = next((directory for directory in runs if directory.path.name == name), None)
    if chosen is None:
        raise NotFound(f"{run.id} has no stage {name!r}")
    return chosen, runs


@router.get("/jobs/{run_id}/metrics", responses=ONE)
def metrics(
    run_id: Id,
    service: Ctx,
    who: Reader,
    stage: Stage = None,
    offset: Number = 0,
    limit: Page = 1000,
    points: Annotated[int | None, Query(ge=2, le=10_000)] = None,
) -> Metrics:
    """Lines of metrics from an offset on; with `points` lines from all over the run, evenly thinned."""
    chosen, runs = _stage(run_for(service, who, run_id), stage)
    if chosen is None:
        return Metrics(stage="", stages=[], data=[], offset=0)
    lines, after = _lines(chosen.metrics_file, offset, None if points else limit)
    if points and len(lines) > points:
        lines = [lines[round(i * (len(lines) - 1) / (points - 1))] for i in range(points)]
    names = [directory.path.name for directory in runs]
    return Metrics.model_construct(stage=chosen.path.name, stages=names, data=lines, offset=after)


def _lines(file: Path, offset: int, limit: int | None) -> tuple[list[Json], int]:
    found: list[Json] = []
    if not file.is_file():
        return found, offset
    with file.open("rb") as stream:
        stream.seek(offset)
        for raw in stream:
            if not raw.endswith(b"\n") or (limit is not None and len(found) >= limit):
                break
            offset += len(raw)
            if (line := finite_line(raw)) is not None:
                found.append(line)
    return found, offset


@router.get("/jobs/{run_id}/checkpoints", responses=ONE)
def checkpoints(
    run_id: Id, service: Ctx, who: Reader, verify: Annotated[int | None, Query(ge=0, le=2**62)] = None
) -> list[CheckpointView]:
    """The committed checkpoints of a training run; `verify` reads every byte of the one of that step."""
    runs = run_dirs(submission_of(run_for(service, who, run_id)))
    return [_checkpoint(directory, step, verify == step) for directory in runs for step in _steps(directory)]


def _steps(directory: RunDir) -> list[int]:
    try:
        return directory.steps()
    except UserError:
        return []


def _checkpoint(directory: RunDir, step: int, verify: bool) -> CheckpointView:
    store = directory.store()
    view = CheckpointView(
        stage=directory.path.name, step=step, path=store.path(step), bytes=None, files=None, time=None, verified=None
    )
    try:
        files = store.manifest(step)["files"]
    except (OSError, ValueError, KeyError) as error:
        view.verified, view.problems = False, [f"its manifest cannot be read: {error}"]
        return view
    view.files, view.bytes = len(files), sum(int(file["bytes"]) for file in files.values())
    view.time = next((e["time"] for e in reversed(directory.events("save")) if e.get("step") == step), None)
    if verify:
        view.problems = list(store.problems(step))
        view.verified = not view.problems
    return view


@router.get("/jobs/{run_id}/result", responses=ONE)
def result(run_id: Id, service: Ctx, who: Reader) -> Json:
    """The figures of a verification or an evaluation that has ended; empty before, and for other jobs."""
    return read_json(service.place.folder(run_for(service, who, run_id).id) / "result.json")


@router.get("/jobs/{run_id}/conversion", responses=ONE)
def conversion(run_id: Id, service: Ctx, who: Reader) -> ConversionView:
    """What a conversion made (tensors, layers, sizes, what calibration found), and the jobs that have checked it."""
    run = run_for(service, who, run_id)
    if run.kind != "convert" or run.out is None:
        raise NotFound(f"{run.id} is no conversion")
    folder = Path(run.out)
    checks = [CheckView(**check) for check in checks_of(service.store, service.place, folder)]
    seen = checks if who.run is None else []  # a key for one run sees no other
    return ConversionView(path=run.out, found=conversion_of(folder), checks=seen)


@router.get("/models")
def models(service: Ctx, who: Reader) -> list[ModelView]:
    """The folders that conversions, trainings and exports have made, the newest first."""
    if who.run is not None:
        raise Refused(403, "the key is for one run")
    made = [run for run in service.store.runs(limit=MODELS, wanted=Wanted(["succeeded"])) if run.out is not None]
    checks: dict[str, list[CheckView]] = {}
    for check in checks_of(service.store, service.place):
        checks.setdefault(check["folder"], []).append(CheckView(**check))
    return [
        ModelView(
            run=run.id, kind=run.kind, name=run.name, path=run.out or "", exists=Path(run.out or "").exists(),
            ended=run.ended, bytes=bytes_of(Path(run.out or "")), checks=checks.get(run.out or "", []),
        )
        for run in made
    ]  # fmt: skip
