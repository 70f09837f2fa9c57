"""Servers on a PostgreSQL that dies: `scripts/with_postgres.py pytest tests/service/test_postgres.py`."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from pydoc_data import topics

import httpx
import pytest

from lamella.run.folder import RunDir
from support.databases import URLS, open_database
from support.models import trainable_moe
from support.service import evaluation, problem, training

pytestmark = [
    pytest.mark.slow,
    pytest.mark.faults,
    pytest.mark.skipif("LAMELLA_TEST_STORE" not in os.environ, reason="scripts/with_postgres.py starts a PostgreSQL"),
]


def control(what: str) -> None:
    """Kill the PostgreSQL as a crash would, or start it."""
    words = json.loads(os.environ["LAMELLA_TEST_STORE_CONTROL"])[what]
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL, cwd="/")


class Server:
    """A `lamella serve` on a store."""

    def __init__(self, folder: Path, home: str, store: str):
        address = folder / home / "address"
        command = [sys.executable, "-m", "lamella.cli", "serve", "--port", "0", "--home", home, "--store", store]
        environment = os.environ | {"LAMELLA_CACHE": str(folder / "cache")}
        self.process = subprocess.Popen(command, cwd=folder, env=environment)
        eventually(address.is_file)
        self.http = httpx.Client(base_url=address.read_text().strip(), timeout=60)

    def run(self, run_id: str) -> dict:
        answer = self.http.get(f"/v1/jobs/{run_id}")
        assert answer.status_code == 200, answer.text
        return answer.json()

    def comes_to(self, run_id: str, state: str) -> dict:
        eventually(lambda: self.run(run_id)["state"] == state)
        return self.run(run_id)


def eventually(true: Callable[[], bool], timeout_s: float = 300) -> None:
    deadline = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.fixture
def servers(tmp_path: Path) -> Iterator[list[Server]]:
    """Two at once, with homes of their own."""
    url = open_database(URLS[1].values[0], tmp_path).url
    found = [Server(tmp_path, home, url) for home in ("first", "second")]
    yield found
    for server in found:
        server.process.terminate()
    for server in found:
        server.process.wait(60)


def test_a_store_that_dies_and_comes_back_loses_and_doubles_no_run(servers: list[Server], tmp_path: Path) -> None:
    """Training goes on meanwhile; both servers say when to ask again, and answer as soon as it is back."""
    trainable_moe(tmp_path / "model")
    (tmp_path / "text.md").write_text("\n".join(topics.topics[name] for name in sorted(topics.topics)[:2]))
    job = training(Path("model"), Path("text.md"), Path("run"), steps=400, save_every_steps=300)
    first, second = servers
    key = {"Idempotency-Key": "once"}
    run_id = first.http.post("/v1/jobs", json=job, headers=key).json()["id"]
    first.comes_to(run_id, "running")
    assert second.run(run_id)["state"] == "running"
    directory = RunDir(tmp_path / "run")
    control("kill")
    try:
        step = directory.status()["step"]
        for server in servers:
            assert server.http.get("/healthz").status_code == 200
            for answer in (
                server.http.get("/v1/jobs"),
                server.http.get("/readyz"),
                server.http.get("/metrics"),
                server.http.get(f"/v1/jobs/{run_id}/events/stream"),
                server.http.post(f"/v1/jobs/{run_id}/cancel"),
                server.http.post("/v1/jobs", json=evaluation("missing/model"), headers={"Idempotency-Key": "again"}),
            ):
                assert "store does not answer" in problem(answer, 503)
                assert re.fullmatch(r"[1-9][0-9]?", answer.headers["retry-after"])
        eventually(lambda: directory.status()["step"] > step + 5)
    finally:
        control("start")
    for server in servers:
        eventually(lambda server=server: server.http.get("/readyz").status_code == 200, 30)
    submitted = [
        server.http.post("/v1/jobs", json=evaluation("missing/model"), headers={"Idempotency-Key": "again"})
        for server in servers
    ]
    assert [answer.status_code for answer in submitted] == [201, 200]
    again = submitted[0].json()["id"]
    assert submitted[1].json()["id"] == again
    assert first.http.post("/v1/jobs", json=job, headers=key).json()["id"] == run_id
    assert second.comes_to(again, "failed")["failure"] == "user_config"
    assert second.comes_to(run_id, "succeeded")["attempt"] == 1
    assert [line["step"] for line in directory.all_metrics()] == list(range(1, 401))
    runs = first.http.get("/v1/jobs").json()["data"]
    assert {run["id"] for run in runs} == {run_id, again}
    events = [event["event"] for event in second.http.get(f"/v1/jobs/{run_id}/events").json()["data"]]
    assert events.count("submitted") == events.count("succeeded") == 1
    assert not {"retry", "lost"} & set(events)


def test_runs_of_two_servers_are_each_started_once(servers: list[Server]) -> None:
    """The attempts of 4 jobs, submitted to one and the other."""
    runs = [servers[i % 2].http.post("/v1/jobs", json=evaluation(f"missing/model-{i}")).json()["id"] for i in range(4)]
    hosts = set()
    for run_id in runs:
        assert servers[0].comes_to(run_id, "failed")["attempt"] == 1
        (attempt,) = servers[1].http.get(f"/v1/jobs/{run_id}/attempts").json()
        hosts.add(attempt["host"])
    assert all(host.endswith(("/first", "/second")) for host in hosts)
