"""The HTTP application: routes, errors, guards. `lamella serve` runs it, tests call it without a port. No torch."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from importlib import metadata

from fastapi import FastAPI

from lamella.jsons import Json
from lamella.service import routes_files, routes_jobs, routes_service
from lamella.service.context import Service
from lamella.service.dashboard import pages
from lamella.service.guard import LOOPBACK, Guard, Rates
from lamella.service.problems import Problem, handle_problems

RATE, BURST = 100.0, 200.0
"""Requests a second of one address, and how many at once."""


class App(FastAPI):
    """An application whose OpenAPI document says what errors look like."""

    def openapi(self) -> Json:
        """The document."""
        document = super().openapi()
        schemas = document.setdefault("components", {}).setdefault("schemas", {})
        if "Problem" not in schemas:
            schema = Problem.model_json_schema(ref_template="#/components/schemas/{model}")
            schemas.update(schema.pop("$defs", {}))
            schemas["Problem"] = schema
        return document


def make_app(
    service: Service, *, hosts: tuple[str, ...] = LOOPBACK, rate: float = RATE, schedule: bool = True
) -> FastAPI:
    """The application of a service.

    Args:
        hosts: names by which it may be called; empty: any.
        rate: requests a second of one address.
        schedule: run the scheduler beside it; else runs are only stored.
    """
    app = App(
        title="lamella", version=metadata.version("lamella"), lifespan=_lifespan(service, schedule), docs_url=None,
        redoc_url=None, description="Submit, watch, cancel and resume conversions and training runs.",
    )  # fmt: skip
    app.state.service = service
    handle_problems(app)
    for routes in (routes_jobs, routes_files, routes_service, pages):
        app.include_router(routes.router)
    app.add_middleware(Guard, hosts=hosts, rates=Rates(rate, 2 * rate), figures=service.figures)
    return app


def _lifespan(service: Service, schedule: bool) -> Callable[[FastAPI], AbstractAsyncContextManager[None]]:
    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await service.hub.start()
        reading = asyncio.create_task(service.hub.run())
        thread = threading.Thread(target=service.scheduler.run, name="scheduler", daemon=True)
        if schedule:
            thread.start()
        yield
        service.scheduler.stop()
        service.hub.close()
        reading.cancel()
        with suppress(asyncio.CancelledError):
            await reading
        if schedule:
            await asyncio.to_thread(thread.join, 10)

    return lifespan
