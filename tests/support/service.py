"""A service without a port, on a store of its own; its scheduler is asked to look, or runs beside it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from httpx import Response

from lamella.service.context import Service
from lamella.service.serve import Settings, make_service
from lamella.service.states import TERMINAL
from lamella.service.store import NewRun, Run, Store


def service_in(home: Path, **settings: object) -> Service:
    """Of 2 cores and no GPU; the current folder is the root of all paths."""
    return make_service(replace(Settings(home=home, cores=2, backoff_s=0.05), **settings))


def new_run(user: str = "ada", **values: object) -> NewRun:
    """A small job."""
    fields = {"kind": "evaluate", "user": user, "spec": evaluation(), "cores": 1} | values
    return NewRun(**fields)


def evaluation(folder: str = "missing/model") -> dict:
    """The submission of an evaluation that ends at once: its model is not there."""
    return {"job": {"kind": "evaluate", "folder": folder}, "cores": 1}


def training(model: Path, text: Path, out: Path, **recipe: object) -> dict:
    """The submission of a small training run of one rank."""
    values = {
        "model": str(model), "out": str(out), "data": [str(text)], "seq_len": 32, "samples_per_step": 2, "steps": 6,
        "heldout_samples": 0, "tensorboard": False, "save_every_steps": 2,
    }  # fmt: skip
    return {"job": {"kind": "train", "recipe": values | recipe, "ranks": 1}, "cores": 1}


def settle(service: Service, run_id: str, timeout_s: float = 120) -> Run:
    """The run once it has ended."""
    return until(service.store, run_id, lambda run: run.state in TERMINAL, timeout_s, service.scheduler.tick)


def until(
    store: Store,
    run_id: str,
    done: Callable[[Run], bool],
    timeout_s: float = 120,
    meanwhile: Callable[[], None] | None = None,
) -> Run:
    """The run once it is so."""
    deadline = time.monotonic() + timeout_s
    while not done(run := store.get(run_id)):
        assert time.monotonic() < deadline, run
        if meanwhile is not None:
            meanwhile()
        time.sleep(0.1)
    return run


def problem(response: Response, status: int) -> str:
    """The detail of an answer that says what is wrong."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    values = response.json()
    assert values["status"] == status
    assert values["title"]
    return values["detail"]
