"""Errors as application/problem+json (RFC 9457): every answer that is no success looks alike. Imports no torch."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.responses import Response

from lamella.errors import UserError
from lamella.jsons import Json
from lamella.service.database import Unavailable
from lamella.service.store import Conflict, NotFound, Quota

log = logging.getLogger("lamella.service")
MEDIA = "application/problem+json"
TITLES = {
    400: "Bad request", 401: "No valid key", 403: "Not allowed", 404: "Not found", 405: "No such method",
    409: "Conflict", 413: "Too large", 415: "Not JSON", 422: "Wrong input", 429: "Too many requests",
    500: "A fault of the service", 503: "Not available now",
}  # fmt: skip


class WrongKey(BaseModel):
    """One of the things that are wrong with the input."""

    key: str
    problem: str


class Problem(BaseModel):
    """What went wrong, and what to do about it."""

    type: str = "about:blank"
    title: str
    status: int
    detail: str
    errors: list[WrongKey] = []


class Refused(Exception):
    """An answer with this status."""

    def __init__(self, status: int, detail: str, headers: dict[str, str] | None = None):
        super().__init__(detail)
        self.status, self.detail, self.headers = status, detail, headers or {}


def problem(
    status: int, detail: str, errors: list[Json] | None = None, headers: dict[str, str] | None = None
) -> Response:
    """The answer."""
    values: Json = {"type": "about:blank", "title": TITLES.get(status, "Error"), "status": status, "detail": detail}
    body = json.dumps(values | {"errors": errors or []})
    return Response(body, status, headers, MEDIA)


def documented(*statuses: int) -> dict[int | str, Json]:
    """What an OpenAPI document says of them."""
    content = {MEDIA: {"schema": {"$ref": "#/components/schemas/Problem"}}}
    return {status: {"description": TITLES[status], "content": content} for status in statuses}


ALWAYS = documented(400, 401, 403, 413, 422, 429, 503)


def handle_problems(app: FastAPI) -> None:
    """Every error of the app as a problem."""
    app.add_exception_handler(Refused, _refused)
    app.add_exception_handler(UserError, _user_error)
    app.add_exception_handler(Unavailable, _unavailable)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(Exception, _fault)


def _refused(_: Request, error: Exception) -> Response:
    assert isinstance(error, Refused)
    return problem(error.status, error.detail, headers=error.headers)


def _user_error(_: Request, error: Exception) -> Response:
    kinds = {NotFound: 404, Conflict: 409, Quota: 403}
    status = next((status for kind, status in kinds.items() if isinstance(error, kind)), 422)
    return problem(status, str(error), listed(error) if status == 422 else [])


def listed(error: Exception) -> list[Json]:
    """[{"key", "problem"}] of an error that lists what is wrong line by line below its first one."""
    lines = [line.strip() for line in str(error).splitlines()]
    return [{"key": _key_of(line), "problem": line} for line in lines[1:]]


def found_wrong(found: Iterable[Mapping[str, Any]], skipped: int = 0) -> tuple[str, list[Json]]:
    """(all in a line, [{"key", "problem"}]) of pydantic's errors; so many parts of their places are not the user's."""
    errors = []
    for one in found:
        key = ".".join(str(part) for part in one["loc"][skipped:])
        errors.append({"key": key, "problem": str(one["msg"])})
    what = "; ".join(f"{e['key']}: {e['problem']}" if e["key"] else e["problem"] for e in errors)
    return what[:4000], errors


def _key_of(line: str) -> str:
    """The key that a line of the recipe's checker is about: `lr: ...`, or `unknown key 'stepz' ...`."""
    if line.startswith("unknown key "):
        return line.split("'")[1]
    head, colon, _ = line.partition(": ")
    return head if colon and " " not in head else ""


def _unavailable(_: Request, error: Exception) -> Response:
    return problem(503, str(error), headers={"Retry-After": "2"})


def _invalid(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    what, errors = found_wrong(error.errors(), skipped=1)
    return problem(422, what, errors)


def _http(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return problem(error.status_code, str(error.detail), headers=dict(error.headers or {}))


def _fault(request: Request, error: Exception) -> Response:
    if isinstance(error, OSError):
        log.error("%s %s: %s", request.method, request.url.path, error)
        return problem(
            503, f"the service cannot read or write its files: {error.strerror}", headers={"Retry-After": "5"}
        )
    log.exception("%s %s", request.method, request.url.path, exc_info=error)
    return problem(500, "something is wrong with the service; its log says what")
