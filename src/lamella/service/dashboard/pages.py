"""The pages of the dashboard, their own scripts and styles, and the chart library out of an installed package.

The pages hold no data: their scripts read /v1 with the cookie that /login sets. Imports no torch.
"""

from __future__ import annotations

import gzip
import importlib.util
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Annotated

from fastapi import APIRouter, Request
from fastapi import Path as InPath
from fastapi.responses import FileResponse, HTMLResponse, RedirectResponse, Response
from jinja2 import Environment, FileSystemLoader
from pydantic import BaseModel, Field

from lamella.recipe.methods import METHODS
from lamella.service import keys
from lamella.service.context import COOKIE, Ctx
from lamella.service.guard import POLICY
from lamella.service.problems import Refused

FOLDER = Path(__file__).parent
ASSETS = {path.name: path for path in (FOLDER / "assets").iterdir()}
MEDIA = {".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
CHARTS = POLICY.replace("style-src 'self'", "style-src 'self' 'unsafe-inline'")
"""The chart library writes styles into its drawings; scripts stay those of the service."""
COOKIE_S = 30 * 86400
router = APIRouter(include_in_schema=False)


@cache
def _templates() -> Environment:
    return Environment(loader=FileSystemLoader(FOLDER / "templates"), autoescape=True)


def _page(name: str, *, charts: bool = False, **values: str | list[str]) -> HTMLResponse:
    html = _templates().get_template(name).render(version=metadata.version("lamella"), **values)
    return HTMLResponse(html, headers={"Content-Security-Policy": CHARTS} if charts else {})


@router.get("/")
def runs() -> HTMLResponse:
    """All runs, with state, progress and time left."""
    return _page("runs.html")


@router.get("/runs/{run_id}")
def run(run_id: Annotated[str, InPath(pattern=r"^run-[0-9a-f]{12}$")]) -> HTMLResponse:
    """One run: curves, experts, events, logs, checkpoints, plan."""
    return _page("run.html", charts=True, run=run_id)


@router.get("/new")
def new() -> HTMLResponse:
    """The form for a submission, made from the recipes' keys."""
    return _page("new.html", methods=list(METHODS))


@router.get("/compare")
def compare() -> HTMLResponse:
    """Curves and recipes of several runs side by side."""
    return _page("compare.html", charts=True)


@router.get("/models")
def models() -> HTMLResponse:
    """The folders that jobs have made."""
    return _page("models.html")


@router.get("/login")
def login() -> HTMLResponse:
    """The form for a key."""
    return _page("login.html")


class Login(BaseModel, extra="forbid"):
    """A key that a person types."""

    key: Annotated[str, Field(min_length=1, max_length=200)]


@router.post("/login", status_code=204)
def log_in(given: Login, request: Request, service: Ctx) -> Response:
    """Keep the key in a cookie that scripts cannot read."""
    if keys.find(service.store, given.key) is None:
        address = request.client.host if request.client else "unknown"
        if service.wrong_keys.wait(address):
            raise Refused(429, "too many wrong keys; wait a minute", {"Retry-After": "60"})
        raise Refused(401, "the key is not known, or no longer valid")
    answer = Response(status_code=204)
    secure = request.url.scheme == "https"
    answer.set_cookie(COOKIE, given.key, max_age=COOKIE_S, httponly=True, samesite="strict", secure=secure)
    return answer


@router.post("/logout", status_code=204)
def log_out() -> Response:
    """Forget the key."""
    answer = Response(status_code=204)
    answer.delete_cookie(COOKIE, httponly=True, samesite="strict")
    return answer


@router.get("/favicon.ico")
def icon() -> RedirectResponse:
    """The picture that browsers ask for by this name."""
    return RedirectResponse("/assets/icon.svg")


@router.get("/assets/plotly.js")
def charts() -> Response:
    """plotly.js as the package plotly ships it."""
    headers = {"Content-Encoding": "gzip", "Cache-Control": "public, max-age=86400"}
    return Response(_plotly(), media_type=MEDIA[".js"], headers=headers)


@cache
def _plotly() -> bytes:
    """Compressed once: 1.4 MB of 4.8."""
    package = importlib.util.find_spec("plotly")  # its folder; importing it takes a second
    if package is None or package.origin is None:
        raise Refused(404, "the package plotly is missing; install lamella[service]")
    return gzip.compress((Path(package.origin).parent / "package_data" / "plotly.min.js").read_bytes(), 6)


@router.get("/assets/{name}")
def asset(name: str) -> FileResponse:
    """The dashboard's own scripts and styles."""
    if name not in ASSETS:
        raise Refused(404, "there is no such file")
    return FileResponse(ASSETS[name], media_type=MEDIA[ASSETS[name].suffix], headers={"Cache-Control": "no-cache"})
