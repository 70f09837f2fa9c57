"""The service from Python:

    import lamella
    client = lamella.Client()                        # the server of this folder, or http://... and a key
    run = client.submit({"kind": "train", "recipe": {"model": "artifacts/moe", "steps": 20}})
    client.wait(run["id"])

Imports no torch.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import httpx

from lamella.errors import UserError
from lamella.jsons import Json
from lamella.service.paths import ADDRESS, HOME
from lamella.service.states import TERMINAL

SERVER, KEY = "LAMELLA_SERVER", "LAMELLA_KEY"
TIMEOUT_S = 120.0
POLL_S = 1.0


class NoServer(UserError):
    """Nobody answers."""


class Client:
    """A server's runs, as plain values; each method is one request, and raises UserError with what the server said.

    Args:
        url: of the server; None: $LAMELLA_SERVER, or where the server of this folder says that it listens.
        key: None: $LAMELLA_KEY; a server on loopback may need none.
    """

    def __init__(self, url: str | None = None, key: str | None = None, home: Path = HOME):
        found = url or os.environ.get(SERVER) or _address(home)
        if found is None:
            raise NoServer(f"no server runs in {home}; start one with `lamella serve`, or set {SERVER} to its address")
        token = key or os.environ.get(KEY)
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        self.url = found
        self._http = httpx.Client(base_url=found, headers=headers, timeout=TIMEOUT_S)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._http.close()

    def alive(self) -> None:
        """NoServer unless one answers."""
        self._send("GET", "/healthz")

    def plan(self, job: Json, **options: object) -> Json:
        """What a submission would do; options as of `submit`."""
        return self._call("POST", "/v1/plans", {"submission": {"job": job} | options})

    def submit(self, job: Json, key: str | None = None, **options: object) -> Json:
        """Queue a job: the run.

        Args:
            job: {"kind": "train", "recipe": {...}}, or of another kind; see GET /v1/schemas/submission.
            key: with the same key the same job is queued once, however often it is submitted.
            options: name, priority, cores, executor, cluster.
        """
        headers = {} if key is None else {"Idempotency-Key": key}
        return self._call("POST", "/v1/jobs", {"job": job} | options, headers)

    def runs(self, limit: int = 50, after: str | None = None, state: list[str] | None = None) -> list[Json]:
        """The newest runs first."""
        params = {"limit": limit, "after": after, "state": state}
        return self._get("/v1/jobs", params)["data"]

    def show(self, run: str) -> Json:
        """A run, with what was submitted."""
        return self._get(f"/v1/jobs/{run}")

    def change(self, run: str, what: str) -> Json:
        """cancel, pause, resume or retry a run."""
        return self._call("POST", f"/v1/jobs/{run}/{what}")

    def fork(self, run: str, out: str, step: int | None = None, changes: Json | None = None) -> Json:
        """A new run from a checkpoint of another one, or from the same model with changes."""
        return self._call("POST", f"/v1/jobs/{run}/fork", {"out": out, "step": step, "changes": changes or {}})

    def events(self, run: str, after: int = 0) -> list[Json]:
        """What happened to a run."""
        return self._get(f"/v1/jobs/{run}/events", {"after": after, "limit": 1000})["data"]

    def metrics(self, run: str, offset: int = 0) -> Json:
        """{"data": lines of metrics, "offset": for the next call, ...}"""
        return self._get(f"/v1/jobs/{run}/metrics", {"offset": offset})

    def checkpoints(self, run: str) -> list[Json]:
        """The checkpoints of a training run."""
        response = self._send("GET", f"/v1/jobs/{run}/checkpoints")
        return list(response.json())

    def logs(self, run: str, source: str = "job", follow: bool = False) -> Iterator[str]:
        """The end of a log; with `follow` all of it, and what is written until the run has ended."""
        if not follow:
            yield self._get(f"/v1/jobs/{run}/logs", {"source": source})["text"]
            return
        offset, broken = 0, 0
        while True:
            try:
                for event, data in self._stream(f"/v1/jobs/{run}/logs/stream", {"source": source, "offset": offset}):
                    offset, broken = int(data["offset"]), 0
                    if event == "end":
                        return
                    yield data["text"]
            except httpx.TransportError as error:  # the stream goes on where it broke off
                broken += 1
                if broken > 5:
                    raise NoServer(f"{self.url} does not answer: {error}") from None
                time.sleep(POLL_S)

    def wait(self, run: str, every_s: float = POLL_S) -> Json:
        """The run, once it has ended."""
        while (found := self.show(run))["state"] not in TERMINAL:
            time.sleep(every_s)
        return found

    def _get(self, path: str, params: Json | None = None) -> Json:
        given = {name: value for name, value in (params or {}).items() if value is not None}
        return dict(self._send("GET", path, params=given).json())

    def _call(self, method: str, path: str, body: Json | None = None, headers: dict[str, str] | None = None) -> Json:
        return dict(self._send(method, path, body=body, headers=headers).json())

    def _send(
        self,
        method: str,
        path: str,
        params: Json | None = None,
        body: Json | None = None,
        headers: dict[str, str] | None = None,
    ) -> httpx.Response:
        try:
            response = self._http.request(method, path, params=params, json=body, headers=headers)
        except httpx.TransportError as error:
            raise NoServer(f"{self.url} does not answer: {error}") from None
        _raise(response)
        return response

    def _stream(self, path: str, params: Json) -> Iterator[tuple[str, Json]]:
        with self._http.stream("GET", path, params=params) as response:
            if response.is_error:
                response.read()
            _raise(response)
            event, data = "message", ""
            for line in response.iter_lines():
                name, _, value = line.partition(": ")
                if name == "event":
                    event = value
                elif name == "data":
                    data += value
                elif not line and data:
                    yield event, json.loads(data)
                    event, data = "message", ""


def _raise(response: httpx.Response) -> None:
    if response.is_error:
        try:
            detail = response.json()["detail"]
        except (ValueError, KeyError, TypeError):
            detail = f"the server answered {response.status_code}"
        raise UserError(str(detail))


def _address(home: Path) -> str | None:
    """Where the server of this home says that it listens."""
    try:
        return (home / ADDRESS).read_text().strip() or None
    except OSError:
        return None
