"""The service itself: keys, schemas, health, metrics for Prometheus. Imports no torch."""

from __future__ import annotations

import time
from importlib import metadata
from typing import Annotated, Literal, get_args

from fastapi import APIRouter, Query, Response
from fastapi import Path as InPath
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.core import GaugeMetricFamily

from lamella.jsons import Json
from lamella.recipe.keys import docstrings
from lamella.recipe.keys import keys as recipe_keys
from lamella.recipe.training import Recipe
from lamella.service import keys
from lamella.service.context import Admin, Ctx, Reader, Service, Who
from lamella.service.jobs import Cluster, Job, Submission
from lamella.service.problems import ALWAYS, Refused, documented
from lamella.service.states import STATES
from lamella.service.views import Capacities, KeyRequest, KeyView, Me, NewKey

router = APIRouter(responses=ALWAYS)
Method = Literal["slice", "partition", "upcycle", "merge", "adapters", "attention"]
SCHEDULER_LATE_S = 30.0


@router.get("/healthz", tags=["operations"])
def healthz() -> dict[str, str]:
    """The process answers."""
    return {"status": "ok"}


@router.get("/readyz", tags=["operations"])
def readyz(service: Ctx) -> dict[str, str]:
    """The store answers, and the scheduler looks after runs; else 503."""
    service.store.last_event()
    late = time.time() - service.scheduler.ticked
    if late > SCHEDULER_LATE_S:
        raise Refused(503, service.scheduler.problem or f"the scheduler has not looked for {late:.0f} s")
    return {"status": "ready"}


@router.get("/metrics", tags=["operations"], response_class=Response, responses={200: {"content": {"text/plain": {}}}})
def prometheus(service: Ctx, _: Reader) -> Response:
    """For Prometheus: runs by state, requests, listeners."""
    families = [*_gauges(service)]
    own = _Fixed(families)
    service.figures.registry.register(own)
    try:
        return Response(generate_latest(service.figures.registry), media_type=CONTENT_TYPE_LATEST)
    finally:
        service.figures.registry.unregister(own)


class _Fixed:
    def __init__(self, families: list[GaugeMetricFamily]):
        self.families = families

    def collect(self) -> list[GaugeMetricFamily]:
        return self.families


def _gauges(service: Service) -> list[GaugeMetricFamily]:
    counts = service.store.counts()
    runs = GaugeMetricFamily("lamella_runs", "Runs by state.", labels=["state"])
    for state in STATES:
        runs.add_metric([state], counts.get(state, 0))
    listeners = GaugeMetricFamily("lamella_event_streams", "Clients that listen to events.", service.hub.listeners)
    age = time.time() - service.scheduler.ticked
    tick = GaugeMetricFamily("lamella_scheduler_age_seconds", "Time since the scheduler last looked.", age)
    return [runs, listeners, tick]


@router.get("/v1/me", tags=["service"])
def me(who: Who) -> Me:
    """Whose the request is, and what its key may."""
    return Me(user=who.user, scopes=sorted(who.scopes), run=who.run)


@router.get("/v1/service", tags=["service"])
def service_itself(service: Ctx, _: Reader) -> Capacities:
    """What the machine has, and how many runs are in each state."""
    capacity = service.place.capacity
    return Capacities(
        gpus=capacity.gpus, cores=capacity.cores, runs=service.store.counts(), home=str(service.place.home),
        roots=[str(folder) for folder in service.roots.folders], version=metadata.version("lamella"),
    )  # fmt: skip


@router.get("/v1/schemas/submission", tags=["service"])
def schema_of_submissions(_: Reader) -> Json:
    """The JSON schema of what can be submitted, with a text for each key."""
    schema = Submission.model_json_schema()
    for section in (*get_args(get_args(Job)[0]), Cluster):
        properties, texts = schema["$defs"][section.__name__]["properties"], docstrings(section)
        for name, field in section.model_fields.items():
            if name in texts:
                properties[field.alias or name]["description"] = texts[name]
    return schema


@router.get("/v1/schemas/train", tags=["service"])
def schema_of_training(_: Reader) -> Json:
    """The JSON schema of a training recipe, and a text for each key."""
    schema = Recipe.model_json_schema()
    return schema | {"keys": [key._asdict() for key in recipe_keys("train")]}


@router.get("/v1/schemas/convert", tags=["service"], responses=documented(422))
def schema_of_conversion(_: Reader, method: Annotated[Method | None, Query()] = None) -> Json:
    """Every key of a conversion recipe, with type, default and text."""
    return {"keys": [key._asdict() for key in recipe_keys("convert", method)]}


@router.get("/v1/keys", tags=["keys"])
def list_keys(service: Ctx, _: Admin) -> list[KeyView]:
    """All keys, without what opens anything."""
    return [KeyView(**vars(key)) for key in keys.listed(service.store)]


@router.post("/v1/keys", tags=["keys"], status_code=201, responses=documented(404))
def create_key(request: KeyRequest, service: Ctx, who: Admin) -> NewKey:
    """Make a key; from the first one on, every request needs one."""
    token, key = keys.create(service.store, request.user, list(request.scopes), request.run, request.days)
    service.store.record(who.user, "create key", None, who.key, made=key.id, owner=key.user, scopes=key.scopes)
    return NewKey(key=token, **vars(key))


@router.delete("/v1/keys/{key_id}", tags=["keys"], status_code=204, responses=documented(404))
def revoke_key(key_id: Annotated[str, InPath(pattern=r"^[0-9a-f]{12}$")], service: Ctx, who: Admin) -> None:
    """The key opens nothing from now on."""
    keys.revoke(service.store, key_id)
    service.store.record(who.user, "revoke key", None, who.key, revoked=key_id)
