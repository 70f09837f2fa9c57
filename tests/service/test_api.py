"""The HTTP API, without a port: what it takes, what it refuses, and how."""

from __future__ import annotations

import logging
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from lamella.errors import UserError
from lamella.service import keys
from lamella.service.app import make_app
from lamella.service.context import Service
from lamella.service.database import Database
from lamella.service.listing import Wanted
from lamella.service.paths import Roots
from lamella.service.serve import Settings, is_loopback, serve
from support.service import evaluation, problem

pytestmark = pytest.mark.faults
TRAIN = {"job": {"kind": "train", "recipe": {"steps": 3}}}


def test_submit_list_and_change(client: TestClient) -> None:
    made = client.post("/v1/jobs", json=TRAIN | {"name": "first", "priority": 3})
    assert made.status_code == 201
    run = made.json()
    assert (run["state"], run["desired"], run["priority"], run["cores"]) == ("validating", "running", 3, 2)
    assert run["spec"]["job"]["recipe"] == {"steps": 3}
    for i in range(3):
        client.post("/v1/jobs", json=evaluation(f"m/{i}"))
    page = client.get("/v1/jobs", params={"limit": 3}).json()
    rest = client.get("/v1/jobs", params={"limit": 3, "after": page["after"]}).json()
    assert [len(page["data"]), len(rest["data"]), rest["after"]] == [3, 1, None]
    assert rest["data"][0]["id"] == run["id"]
    assert [r["name"] for r in client.get("/v1/jobs", params={"search": "firs"}).json()["data"]] == ["first"]
    place = f"/v1/jobs/{run['id']}"
    assert client.post(f"{place}/pause").json()["state"] == "paused"
    assert client.post(f"{place}/pause").json()["state"] == "paused"
    assert client.post(f"{place}/resume").json()["state"] == "queued"
    assert client.post(f"{place}/cancel").json()["state"] == "cancelled"
    assert client.post(f"{place}/cancel").json()["state"] == "cancelled"  # case 20
    assert "tried again" in problem(client.post(f"{place}/pause"), 409)
    assert client.post(f"{place}/retry").json()["state"] == "queued"
    assert "only a run that failed" in problem(client.post(f"{place}/retry"), 409)
    page = client.get(f"{place}/events").json()
    assert [e["event"] for e in page["data"]] == ["submitted", "pause", "resume", "cancel", "retry"]
    assert client.get(f"{place}/events", params={"after": page["after"]}).json()["data"] == []
    assert "no run run-000000000000" in problem(client.get("/v1/jobs/run-000000000000"), 404)


def test_one_key_is_one_run(client: TestClient) -> None:
    headers = {"Idempotency-Key": "again"}
    first = client.post("/v1/jobs", json=evaluation(), headers=headers)
    second = client.post("/v1/jobs", json=evaluation(), headers=headers)
    assert (first.status_code, second.status_code) == (201, 200)
    assert first.json()["id"] == second.json()["id"]
    problem(client.post("/v1/jobs", json=evaluation("other"), headers=headers), 409)


@pytest.mark.parametrize(
    ("body", "keys_told"),
    [
        ({"job": {"kind": "train", "recipe": {"stepz": 1, "lrr": 2}}}, {"stepz", "lrr"}),
        ({"job": {"kind": "train", "recipe": {"steps": "many", "lr": True}}}, {"steps", "lr"}),
        ({"job": {"kind": "convert", "recipe": {"method": "slices"}}}, set()),
        ({"job": {"kind": "shell", "command": "ls"}}, {"job"}),
        ({"job": {"kind": "evaluate", "folder": "x", "command": "ls"}, "nice": 1}, {"job.evaluate.command", "nice"}),
        ({"job": {"kind": "export", "source": "x", "to": "tar", "out": "y"}}, {"job.export.to"}),
        ({}, {"job"}),
        ([], set()),
    ],
)
def test_wrong_input_is_told_at_once_and_nothing_is_stored(
    client: TestClient, body: object, keys_told: set[str]
) -> None:
    """Case 22."""
    answer = client.post("/v1/jobs", json=body)
    assert problem(answer, 422)
    assert keys_told <= {error["key"] for error in answer.json()["errors"]}
    assert client.get("/v1/jobs").json()["data"] == []


@pytest.mark.parametrize(
    ("content", "status"),
    [
        (b"{" * 100_000, 422),
        (b'{"job": ' * 20_000 + b"1" + b"}" * 20_000, 422),
        (b"\xff\xfe{}", 422),
        (b'{"job": {"kind": "train"}}' + b" " * 1_100_000, 413),
        (b"a: &a [1]\nb: *a\n", 422),
        (b'{"job": {"kind": "train", "recipe": {"steps": 1e400}}}', 422),
        (b'{"job": {"kind": "evaluate", "folder": "x"}, "priority": 9999999999999999999999}', 422),
    ],
)
def test_bodies_that_are_no_requests(client: TestClient, content: bytes, status: int) -> None:
    """Case 22: too deep, too large, no UTF-8, YAML, numbers that no column holds."""
    answer = client.post("/v1/jobs", content=content, headers={"Content-Type": "application/json"})
    assert answer.status_code in (status, 400), answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    assert client.get("/v1/jobs").json()["data"] == []


def test_a_body_without_a_length_is_measured(client: TestClient) -> None:
    def parts() -> Iterator[bytes]:
        for _ in range(200):
            yield b" " * 10_000

    answer = client.post("/v1/jobs", content=parts(), headers={"Content-Type": "application/json"})
    assert answer.status_code in (400, 413)


@pytest.mark.parametrize(
    "recipe",
    [
        {"out": "../elsewhere"},
        {"out": "/etc/lamella"},
        {"model": "/etc/ssh"},
        {"out": "link/run"},
        {"data": ["file:///etc/passwd"]},
        {"data": ["link/secret.txt"]},
        {"data": [{"source": "../../etc/passwd#text", "weight": 1.0}, {"source": "python-docs", "weight": 1.0}]},
        {"checkpoint_folder": "file:///tmp/x"},
        {"checkpoint_folder": "simplecache::s3://b/x"},
        {"checkpoint_folder": "ftp://h/x"},
        {"model": "a\x00b"},
        {"model": "~root/m"},
        {"torchtitan": {"job": {"dump_folder": "/var/x"}}},
        {"distil": {"teacher": "/var/x"}, "objective": "distil"},
        {"out": "x" * 5000},
        {"out": "home/jobs"},
        {"out": "."},
    ],
)
def test_files_elsewhere_are_refused(client: TestClient, tmp_path: Path, recipe: dict) -> None:
    """Case 23: the roots are the folder of the server, and no link leads out of it."""
    (tmp_path / "link").symlink_to("/var")
    answer = client.post("/v1/jobs", json={"job": {"kind": "train", "recipe": recipe}})
    assert "names files that it may not" in problem(answer, 422)
    problem(client.post("/v1/plans", json={"submission": {"job": {"kind": "train", "recipe": recipe}}}), 422)
    assert client.get("/v1/jobs").json()["data"] == []


def test_names_inside_of_the_roots_are_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "inner").symlink_to(tmp_path / "data")
    good = ["python-docs", "HuggingFaceFW/fineweb-edu:sample-10BT", "data", "inner/x", str(tmp_path / "data/a#text")]
    Roots.of([tmp_path]).check([("data", name) for name in good] + [("checkpoint_folder", "s3://bucket/run")])
    with pytest.raises(UserError, match="outside"):
        Roots.of([tmp_path / "data"]).check([("out", "artifacts/run")])


def test_keys(service: Service, client: TestClient, caplog: pytest.LogCaptureFixture) -> None:
    """Case 24."""
    caplog.set_level(logging.DEBUG)
    mine = client.post("/v1/jobs", json=evaluation()).json()["id"]
    tokens = {}
    for name, options in {
        "reader": {"scopes": ["read"]}, "ada": {"scopes": ["submit"]}, "root": {"scopes": ["admin"]},
        "old": {"scopes": ["admin"], "days": 1e-9}, "one": {"scopes": ["read"], "run": mine},
    }.items():  # fmt: skip
        tokens[name], _ = keys.create(service.store, name, **options)

    def call(name: str, method: str, path: str, **more: object) -> int:
        headers = {"Authorization": f"Bearer {tokens.get(name, name)}"} if name else {}
        answer = client.request(method, path, headers=headers, **more)
        assert tokens.get(name, "-") not in answer.text
        return answer.status_code

    assert problem(client.get("/v1/jobs"), 401)
    for wrong in ("", "nonsense", tokens["ada"][:-1] + "x", "old", f"lamella_{'0' * 12}_{'a' * 43}"):
        assert call(wrong, "GET", "/v1/jobs") == 401, wrong
    assert call("reader", "GET", "/v1/jobs") == 200
    assert call("reader", "POST", "/v1/jobs", json=evaluation()) == 403
    assert call("reader", "GET", "/v1/keys") == 403
    assert call("ada", "POST", "/v1/jobs", json=evaluation("a")) == 201
    assert call("ada", "POST", f"/v1/jobs/{mine}/cancel") == 403  # another user's
    assert call("root", "POST", f"/v1/jobs/{mine}/cancel") == 200
    other = service.store.runs(wanted=Wanted(user="ada"))[0].id
    assert call("one", "GET", f"/v1/jobs/{mine}") == 200
    assert call("one", "GET", f"/v1/jobs/{other}") == 403
    assert call("one", "GET", f"/v1/jobs/{other}/logs") == 403
    assert call("one", "GET", "/v1/models") == 403
    key_id = tokens["ada"].split("_")[1]
    assert call("root", "DELETE", f"/v1/keys/{key_id}") == 204
    assert call("ada", "GET", "/v1/jobs") == 401
    secrets = [token.split("_", 2)[2] for token in tokens.values()]
    store_bytes = b"".join(file.read_bytes() for file in service.place.home.glob("lamella.db*"))
    for secret in secrets:
        assert secret not in caplog.text
        assert secret.encode() not in store_bytes
    assert client.get("/healthz").status_code == 200


def test_wrong_keys_are_slowed_down(service: Service, client: TestClient) -> None:
    keys.create(service.store, "ada", ["read"])
    codes = [client.get("/v1/jobs", headers={"Authorization": "Bearer wrong"}).status_code for _ in range(30)]
    assert codes[0] == 401
    assert codes[-1] == 429


def test_an_address_that_others_reach_needs_a_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Case 25."""
    monkeypatch.chdir(tmp_path)
    for host in ("0.0.0.0", "::", "192.0.2.1", "example.org"):
        assert not is_loopback(host)
        with pytest.raises(UserError, match="lamella access create"):
            serve(Settings(home=tmp_path / "home", host=host, port=0))
    assert all(is_loopback(host) for host in ("127.0.0.1", "127.1.2.3", "::1", "localhost"))


def test_every_answer_has_a_policy_and_json_is_never_a_page(client: TestClient) -> None:
    """Case 26: markup in a name comes back as JSON, which no browser takes for a page."""
    name = "<script>alert(1)</script>"
    made = client.post("/v1/jobs", json=evaluation() | {"name": name})
    assert made.json()["name"] == name
    for answer in (made, client.get("/v1/jobs"), client.get("/v1/nothing"), client.get(f"/v1/{name}")):
        assert "json" in answer.headers["content-type"]
        assert answer.headers["x-content-type-options"] == "nosniff"
        policy = answer.headers["content-security-policy"]
        assert "script-src 'self'" in policy
        assert "unsafe" not in policy


def test_pages_of_other_sites_cannot_call(client: TestClient) -> None:
    evil = client.post("/v1/jobs", json=TRAIN, headers={"Origin": "https://evil.example"})
    assert "another site" in problem(evil, 403)
    assert "not called" in problem(client.get("/v1/jobs", headers={"Host": "evil.example"}), 400)
    same = client.post("/v1/jobs", json=TRAIN, headers={"Origin": "http://testserver"})
    assert same.status_code == 201


def test_too_many_requests(service: Service) -> None:
    with TestClient(make_app(service, hosts=(), rate=5, schedule=False)) as client:
        answers = [client.get("/healthz") for _ in range(20)]
    assert answers[-1].status_code == 429
    assert int(answers[-1].headers["retry-after"]) >= 1


@pytest.mark.parametrize(
    "submission",
    [
        {"job": {"kind": "train", "recipe": {"samples_per_step": 9}, "ranks": 9}},
        {"job": {"kind": "evaluate", "folder": "m"}, "cores": 3},
    ],
)
def test_more_than_the_machine_has_is_refused_at_once(client: TestClient, submission: dict) -> None:
    """Case 30."""
    assert "more than" in problem(client.post("/v1/jobs", json=submission), 422)


def test_quota(service: Service, client: TestClient) -> None:
    """Case 30."""
    token, _ = keys.create(service.store, "ada", ["submit"])
    headers = {"Authorization": f"Bearer {token}"}
    for i in range(5):
        assert client.post("/v1/jobs", json=evaluation(f"m/{i}"), headers=headers).status_code == 201
    assert "as many as one user may have" in problem(client.post("/v1/jobs", json=evaluation(), headers=headers), 403)


def test_a_store_that_does_not_answer_is_503(tmp_path: Path, service: Service, client: TestClient) -> None:
    """Case 29: another process holds the store."""
    service.store.database.close()
    service.store.database = Database(str(tmp_path / "home" / "lamella.db"), busy_s=0.2)
    other = sqlite3.connect(tmp_path / "home" / "lamella.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    answer = client.post("/v1/jobs", json=evaluation())
    assert "locked" in problem(answer, 503)
    assert answer.headers["retry-after"]
    other.execute("ROLLBACK")
    other.close()
    assert client.post("/v1/jobs", json=evaluation()).status_code == 201


def test_plan_and_schemas(client: TestClient, tmp_path: Path) -> None:
    submission = {"job": {"kind": "convert", "recipe": {"out": "moe"}}}
    plan = client.post("/v1/plans", json={"submission": submission}).json()
    assert plan["command"].startswith("lamella convert ")
    assert plan["files"]["recipe.yaml"] == "out: moe\n"
    missing = {"submission": {"job": {"kind": "train", "recipe": {"model": "none", "out": "run"}}}}
    assert "none" in client.post("/v1/plans", json=missing).json()["problem"]
    training = client.get("/v1/schemas/train").json()
    assert training["properties"]["steps"]
    assert any(key["name"] == "steps" and key["text"] for key in training["keys"])
    assert client.get("/v1/schemas/submission").json()["properties"]["job"]
    assert not list(tmp_path.glob("home/jobs/*"))


def test_metrics_for_prometheus(client: TestClient) -> None:
    client.post("/v1/jobs", json=evaluation())
    text = client.get("/metrics").text
    assert 'lamella_runs{state="validating"} 1.0' in text
    assert 'lamella_http_answers_total{method="POST",route="/v1/jobs",status="201"} 1.0' in text
    assert client.get("/readyz").status_code == 503  # no scheduler runs here


@pytest.mark.slow
def test_the_service_imports_no_torch_and_starts_fast(tmp_path: Path) -> None:
    """What a server does before it listens, on an empty home; the bound of 2 s is for an idle machine."""
    code = (
        "import time, sys; began = time.perf_counter()\n"
        "from lamella.service.serve import *\n"
        f"service = make_service(Settings(home=Path({str(tmp_path)!r})))\n"
        "make_app(service).openapi(); service.scheduler.tick()\n"
        "heavy = [n for n in ('torch', 'transformers', 'datasets', 'pyarrow', 'scipy') if n in sys.modules]\n"
        "print(heavy, time.process_time())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    heavy, seconds = done.stdout.rsplit(" ", 1)
    assert heavy == "[]"
    assert float(seconds) < 4


def test_a_check_says_what_is_wrong_and_what_would_be_done(client: TestClient) -> None:
    good = client.post("/v1/checks", json=evaluation()).json()
    assert (good["problem"], good["errors"]) == ("", [])
    assert "lamella evaluate" in good["plan"]["command"]
    for submission, keys_of in (
        ({"job": {"kind": "evaluate"}}, {"job.evaluate.folder"}),
        ({"job": {"kind": "train", "recipe": {"steps": "many", "lr": -1}}}, {"steps", "lr"}),
        (evaluation() | {"executor": "slurm", "cluster": {"nodes": 0}}, {"cluster.nodes"}),
        (evaluation("/etc/passwd"), {"folder"}),
        ({}, {"job"}),
    ):
        answer = client.post("/v1/checks", json=submission)
        assert answer.status_code == 200
        wrong = answer.json()
        assert {error["key"] for error in wrong["errors"]} == keys_of
        assert wrong["problem"]
        assert wrong["plan"] is None
    assert client.get("/v1/jobs").json()["data"] == []
