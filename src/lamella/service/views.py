"""What answers look like: runs, events, checkpoints, plans. Imports no torch."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, Field

from lamella.jsons import Json
from lamella.service.jobs import Submission
from lamella.service.problems import WrongKey
from lamella.service.states import Desired, State
from lamella.service.store import Run

Used = tuple[float, float | None]
"""See `Store.used`."""
RunId = Annotated[str, Field(pattern=r"^run-[0-9a-f]{12}$")]


class RunView(BaseModel):
    """A run; times in seconds since 1970."""

    id: str
    kind: str
    name: str
    user: str
    state: State
    desired: Desired
    priority: int
    executor: str
    out: str | None
    gpus: int
    cores: int
    failure: str | None
    """The class: user_config, data, oom, numerics, infra, preempted, timeout or storage."""
    reason: str
    attempt: int
    fruitless: int
    not_before: float
    created: float
    updated: float
    started: float | None
    ended: float | None
    progress: Json
    """progressPercentage, estimatedRemainingSeconds, step, steps, metrics, lastUpdatedTime."""
    parent: str | None
    used_s: float
    """What its attempts that have ended took; waiting and pauses do not count."""
    working_since: float | None
    """When the attempt that is at work began."""

    @classmethod
    def of(cls, run: Run, used: Used) -> RunView:
        """The view of a run."""
        values = {name: value for name, value in vars(run).items() if name not in ("seq", "spec")}
        return cls.model_construct(**values, used_s=used[0], working_since=None if run.is_over else used[1])


class RunDetail(RunView):
    """A run with what was submitted."""

    spec: Json

    @classmethod
    def of(cls, run: Run, used: Used) -> RunDetail:
        """The view of a run."""
        values = {name: value for name, value in vars(run).items() if name != "seq"}
        return cls.model_construct(**values, used_s=used[0], working_since=None if run.is_over else used[1])


class Runs(BaseModel):
    """A page of runs, the newest first."""

    data: list[RunView]
    after: str | None
    """Give it as `after` to get the next page; null: this is the last."""
    total: int | None = None
    """Runs on all pages, where it was asked for."""


class EventView(BaseModel):
    """Something that happened to a run."""

    id: int
    run: str
    time: float
    event: str
    state: str | None
    data: Json


class Events(BaseModel):
    """A page of events, the oldest first."""

    data: list[EventView]
    after: int
    """Give it as `after` to get what comes next."""


class AttemptView(BaseModel):
    """One start of a run."""

    number: int
    host: str
    devices: list[int]
    started: float
    ended: float | None
    code: int | None
    failure: str | None
    reason: str


class Metrics(BaseModel):
    """Lines of metrics as training writes them, in order."""

    stage: str
    stages: list[str]
    data: list[Json]
    offset: int
    """Give it as `offset` to get what is written next."""


class Log(BaseModel):
    """A part of a log."""

    source: str
    sources: list[str]
    text: str
    offset: int
    """Give it as `offset` to get what comes next."""
    size: int


class CheckpointView(BaseModel):
    """A committed checkpoint of a training run."""

    stage: str
    step: int
    path: str
    bytes: int | None
    files: int | None
    time: float | None
    verified: bool | None
    """Whether every file has the bytes that were written; null: it was not asked for."""
    problems: list[str] = []


class CheckView(BaseModel):
    """A job that has measured a model: its logits against the dense model's, or the perplexity of a text."""

    run: str
    kind: str
    state: State
    ended: float | None
    folder: str
    summary: Json
    """verify: passed, checks, failed, worst (the logit difference nearest its bound); evaluate: model, dense."""


class ConversionView(BaseModel):
    """What a conversion made, and what has checked it."""

    path: str
    found: Json
    """source, recipe, parameters, bytes, tensors, layers, notes; empty where the folder has no manifest."""
    checks: list[CheckView]


class ModelView(BaseModel):
    """A folder that a job has made, for others to start from."""

    run: str
    kind: str
    name: str
    path: str
    exists: bool
    ended: float | None
    bytes: int | None
    """Of its weights; null: they are not here."""
    checks: list[CheckView]


class PlanRequest(BaseModel, extra="forbid"):
    """A submission, and what to plan for."""

    submission: Submission
    gpu: Annotated[str, Field(pattern=r"^[A-Za-z0-9 ._-]{1,40}$")] | None = None
    """The kind of GPU; cpu: none; null: H100 where the job has GPUs."""
    price_per_hour: Annotated[float, Field(ge=0, le=1e9, allow_inf_nan=False)] | None = None
    tokens_per_second: Annotated[float, Field(gt=0, le=1e15, allow_inf_nan=False)] | None = None


class PlanView(BaseModel):
    """What a submission would do."""

    kind: str
    command: str
    executor: str
    gpus: int
    cores: int
    out: str | None
    training: Json
    """The plan of each stage: parameters, memory of a rank, time, cost."""
    text: str
    problem: str | None
    """Why training cannot be planned, mostly that its model is not here yet."""
    files: dict[str, str]
    """What would be handed to the executor."""


class CheckedView(BaseModel):
    """Whether a submission would be taken."""

    problem: str
    """What is wrong; empty: nothing."""
    errors: list[WrongKey]
    plan: PlanView | None
    """What it would do, where nothing is wrong."""


class ForkRequest(BaseModel, extra="forbid"):
    """A new run from another one's checkpoint, or beside it."""

    out: Annotated[str, Field(min_length=1, max_length=4096)]
    """The new run's folder."""
    step: Annotated[int, Field(ge=0, le=10**12)] | None = None
    """It starts from this checkpoint of the other run; null: from the other run's own model."""
    changes: Json = {}
    """Keys of the recipe with other values."""
    name: Annotated[str, Field(max_length=200)] = ""


class KeyRequest(BaseModel, extra="forbid"):
    """A new key."""

    user: Annotated[str, Field(pattern=r"^[A-Za-z0-9._@-]{1,100}$")]
    scopes: Annotated[list[Annotated[str, Field(pattern=r"^(read|submit|admin)$")]], Field(min_length=1, max_length=3)]
    run: RunId | None = None
    days: Annotated[float, Field(gt=0, le=36500, allow_inf_nan=False)] | None = None


class KeyView(BaseModel):
    """A key, without what opens anything."""

    id: str
    user: str
    scopes: list[str]
    run: str | None
    created: float
    expires: float | None
    revoked: float | None


class NewKey(KeyView):
    """A key that was just made."""

    key: str
    """It is shown this once."""


class Me(BaseModel):
    """Whose the request is."""

    user: str
    scopes: list[str]
    run: str | None


class Capacities(BaseModel):
    """What the machine of the service has, and how its runs are."""

    gpus: int
    cores: int
    runs: dict[str, int]
    home: str
    roots: list[str]
    version: str
