"""What the routes share: the store, the scheduler, and whose a request is. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from fastapi import Depends, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from lamella.service import keys
from lamella.service.executors.executor import Place
from lamella.service.guard import Figures, Rates
from lamella.service.keys import Identity, Scope
from lamella.service.paths import Roots
from lamella.service.problems import Refused
from lamella.service.scheduler import Scheduler
from lamella.service.store import Run, Store
from lamella.service.streams import Hub

COOKIE = "lamella_key"
FAILED_A_MINUTE = 20


@dataclass(frozen=True)
class Limits:
    """What one user may have."""

    runs: int = 0
    """Runs that have not ended; 0: as many as come."""
    gpus: int = 0
    """GPUs for one run; 0: all of the machine."""


@dataclass(frozen=True)
class Service:
    """Everything that answers need."""

    store: Store
    place: Place
    scheduler: Scheduler
    hub: Hub
    roots: Roots
    limits: Limits = Limits()
    figures: Figures = field(default_factory=Figures)
    wrong_keys: Rates = field(default_factory=lambda: Rates(FAILED_A_MINUTE / 60, FAILED_A_MINUTE))


def service_of(request: Request) -> Service:
    """The service that the app was made for."""
    service: Service = request.app.state.service
    return service


Ctx = Annotated[Service, Depends(service_of)]
_bearer = HTTPBearer(auto_error=False, description="A key, made by `lamella access create`; none needed before that.")


def identity_of(
    request: Request,
    service: Ctx,
    bearer: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)],
) -> Identity:
    """Whose the request is, by its key; without any keys in the store, whoever started the service.

    Raises:
        Refused: 401 without a valid key, 429 after too many wrong ones.
    """
    token = bearer.credentials if bearer is not None else request.cookies.get(COOKIE)
    if token is None and not keys.are_needed(service.store):
        return Identity(keys.local_user(), frozenset({"admin"}))
    found = keys.find(service.store, token) if token else None
    if found is None:
        address = request.client.host if request.client else "unknown"
        if token and service.wrong_keys.wait(address):
            raise Refused(429, "too many wrong keys; wait a minute", {"Retry-After": "60"})
        detail = "give a valid key: Authorization: Bearer KEY; `lamella access create` makes one"
        raise Refused(401, detail, {"WWW-Authenticate": "Bearer"})
    return found


Who = Annotated[Identity, Depends(identity_of)]


def _with(identity: Identity, scope: Scope) -> Identity:
    if not identity.may(scope):
        raise Refused(403, f"the key does not have the scope {scope}")
    return identity


def reader(identity: Who) -> Identity:
    """Who may read."""
    return _with(identity, "read")


def submitter(identity: Who) -> Identity:
    """Who may submit and change runs."""
    return _with(identity, "submit")


def admin(identity: Who) -> Identity:
    """Who may everything."""
    return _with(identity, "admin")


Reader = Annotated[Identity, Depends(reader)]
Submitter = Annotated[Identity, Depends(submitter)]
Admin = Annotated[Identity, Depends(admin)]


def run_for(service: Service, identity: Identity, run_id: str, change: bool = False) -> Run:
    """The run, where the key may see it, or change it.

    Raises:
        NotFound, Refused: no such run; a key for another run, or a run of another user.
    """
    if identity.run not in (None, run_id):
        raise Refused(403, "the key is for another run")
    run = service.store.get(run_id)
    if change and run.user != identity.user and not identity.may("admin"):
        raise Refused(403, f"{run_id} is a run of {run.user}; only that user or an admin may change it")
    return run
