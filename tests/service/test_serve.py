"""`lamella serve` as a process, real training under it, and `lamella runs` with and without it."""

from __future__ import annotations

import functools
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from pydoc_data import topics

import psutil
import pytest
from typer.testing import CliRunner

from lamella.cli import app
from lamella.errors import UserError
from lamella.recipe.training import make_recipe
from lamella.run.folder import RunDir
from lamella.service import keys
from lamella.service.backup import backup, restore
from lamella.service.client import Client, NoServer
from lamella.service.serve import open_store
from lamella.service.states import TERMINAL
from support.models import save_llama, trainable_moe
from support.service import training


class Server:
    """A `lamella serve` in a folder."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.process = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        (self.folder / "artifacts/service/address").unlink(missing_ok=True)
        environment = os.environ | {"LAMELLA_CACHE": str(self.folder / "cache")}
        command = [sys.executable, "-m", "lamella.cli", "serve", "--port", "0"]
        # A suite that runs in the background ignores Ctrl-C, and so would its children.
        attentive = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
        process = subprocess.Popen(command, cwd=self.folder, env=environment, preexec_fn=attentive)
        deadline = time.monotonic() + 60
        while not (self.folder / "artifacts/service/address").is_file():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        return process

    def kill_and_start_again(self) -> None:
        """kill -9, and a new one on the same store."""
        self.process.kill()
        self.process.wait()
        self.process = self._start()

    def client(self) -> Client:
        """Of the server that runs now."""
        return Client(home=self.folder / "artifacts/service")


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    found = Server(tmp_path)
    yield found
    found.process.terminate()
    found.process.wait(30)


def wait(client: Client, run: str, *states: str, timeout_s: float = 300) -> dict:
    deadline = time.monotonic() + timeout_s
    while (found := client.show(run))["state"] not in states:
        assert found["state"] not in TERMINAL, (found, *client.logs(run))
        assert time.monotonic() < deadline, found
        time.sleep(0.2)
    return found


@pytest.mark.slow
@pytest.mark.faults
def test_training_outlives_the_server_is_paused_and_resumed(server: Server) -> None:
    """Case 18: the server is killed while ranks train; the next one finds them again, and they were never twice."""
    folder = server.folder
    trainable_moe(folder / "model")
    (folder / "text.md").write_text("\n".join(topics.topics[name] for name in sorted(topics.topics)[:2]))
    values = training(Path("model"), Path("text.md"), Path("run"), steps=400, save_every_steps=350)
    client = server.client()
    run = client.submit(values["job"], "once", cores=1)["id"]
    wait(client, run, "running")
    directory = RunDir(folder / "run")
    server.kill_and_start_again()
    client = server.client()
    assert client.submit(values["job"], "once", cores=1)["id"] == run  # its answer might have been lost
    assert client.show(run)["state"] in ("running", "starting")
    client.change(run, "pause")
    assert wait(client, run, "paused")["attempt"] == 1
    step = directory.status()["step"]
    assert directory.steps() == [step]
    assert step < 400
    client.change(run, "resume")
    assert wait(client, run, "succeeded")["attempt"] == 2
    assert [line["step"] for line in directory.all_metrics()] == list(range(1, 401))  # nothing lost, nothing twice
    assert client.checkpoints(run)[-1]["step"] == 400
    assert client.metrics(run)["data"][-1]["step"] == 400
    assert "step 400/400" in "".join(client.logs(run, follow=True))
    assert [e["event"] for e in client.events(run)].count("running") == 4  # as the scheduler and as the trainer say it
    with pytest.raises(UserError, match="another body"):
        client.submit(values["job"] | {"recipe": {}}, "once", cores=1)


class Crafted:
    """Unpickled, it makes a file."""

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.file),)


@pytest.mark.slow
@pytest.mark.faults
def test_a_pickle_in_the_place_of_a_model_is_not_run(server: Server) -> None:
    """Case 27."""
    folder, trap = server.folder, server.folder / "trap"
    save_llama(folder / "dense")
    for file in (folder / "dense").glob("*.safetensors*"):
        file.unlink()
    (folder / "dense/pytorch_model.bin").write_bytes(pickle.dumps(Crafted(trap)))
    client = server.client()
    jobs = [{"kind": "convert", "recipe": {"model": "dense", "out": "moe"}}, {"kind": "evaluate", "folder": "dense"}]
    runs = [client.submit(job, cores=1)["id"] for job in jobs]
    for run in runs:
        assert client.wait(run)["state"] == "failed"
    assert not trap.exists()
    assert not (folder / "moe").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_server_that_was_asked_to_end_is_not_found_any_more(server: Server, number: int, code: int) -> None:
    """And its store can be replaced."""
    client = server.client()
    run = client.submit({"kind": "evaluate", "folder": "missing/model"}, cores=1)["id"]
    server.process.send_signal(number)
    assert server.process.wait(30) == code
    home = server.folder / "artifacts/service"
    with pytest.raises(NoServer):
        Client(home=home)
    assert backup(home, server.folder / "copy.db") == 1
    assert restore(home, server.folder / "copy.db") == 1
    server.process = server._start()
    assert server.client().show(run)["id"] == run


@pytest.mark.parametrize(
    "words",
    [
        ("--store", "postgresql+psycopg://ada:secret@host:port/x"),
        ("--store", "sqlite:///"),
        ("--store", "postgres"),
        ("--root", "nowhere"),
    ],
)
def test_what_a_server_cannot_start_with(words: tuple, tmp_path: Path, monkeypatch) -> None:
    """It is said without the password, and no store is made."""
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["serve", "--port", "0", "--home", "home", *words])
    assert isinstance(done.exception, UserError), done.output
    assert "secret" not in str(done.exception)
    assert not list(tmp_path.glob("home/*"))


@pytest.fixture
def finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    """A run folder as training leaves it, below artifacts/; no server runs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LAMELLA_SERVER", raising=False)
    run = RunDir(Path("artifacts/first"))
    run.log.mkdir(parents=True)
    run.config.write_text(make_recipe({"out": "artifacts/first", "steps": 4, "lr": 1e-3}).to_yaml())
    for step in range(1, 5):
        with run.metrics_file.open("a") as file:
            file.write(
                json.dumps({"step": step, "time": 100.0 + step, "loss": 5 - step / 2, "heldout_loss": None}) + "\n"
            )
    run.event("start", attempt=0)
    run.write_status("finished", 4, 4)
    run.log_file(0).write_text("first line\nlast line\n")
    return run


def call(*words: str, code: int = 0) -> str:
    done = CliRunner().invoke(app, list(words))
    assert done.exit_code == code, done.output + repr(done.exception)
    return done.output


def test_runs_without_a_server(finished: RunDir) -> None:
    assert re.search(r"artifacts/first +train +first +succeeded +step 4 of 4 +3\.000", call("runs", "ls"))
    shown = call("runs", "show", "artifacts/first")
    assert "state       succeeded" in shown
    assert "lr: 0.001" in shown
    assert call("runs", "logs", "artifacts/first") == "first line\nlast line\n"
    assert "succeeded" in call("runs", "watch", "artifacts/first")
    shutil.copytree(finished.path, "artifacts/second")
    Path("artifacts/second/config.yaml").write_text(
        make_recipe({"out": "artifacts/second", "steps": 4, "lr": 2e-3}).to_yaml()
    )
    rows = call("runs", "compare", "artifacts/first", "artifacts/second")
    assert re.search(r"lr +0\.001 +0\.002", rows)
    assert "steps" not in rows
    assert "artifacts/first is succeeded" in call("runs", "cancel", "artifacts/first")


def test_a_plan_is_shown_and_nothing_is_submitted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    said = call("runs", "submit", "method=slice", "out=moe", "--kind", "convert", "--dry-run")
    assert "command           lamella convert" in said
    assert "out: moe" in said
    said = call("runs", "submit", "--kind", "evaluate", "folder=x", "tokens=64", "--dry-run")
    assert "lamella evaluate" in said
    cluster = ["--executor", "slurm", "--cluster", "launch/clusters/8-gpu-node.yaml", "--cluster", "time=01:00:00"]
    said = call("runs", "submit", "--kind", "evaluate", "folder=x", *cluster, "--dry-run")
    assert "#SBATCH --time=01:00:00" in said
    assert not list(tmp_path.rglob("job.json"))


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (("submit", "stepz=3"), "stepz"),
        (("submit", "--kind", "evaluate", "folders=x"), "folders"),
        (("submit", "--kind", "shell", "x=1"), "kind"),
        (("submit", "no.yaml"), "no.yaml"),
        (("submit", "--executor", "moon", "--kind", "convert"), "executor"),
        (("show", "artifacts/none"), "no run directory"),
        (("ls", "--server", "http://127.0.0.1:9"), "does not answer"),
        (("compare", "one"), "two runs"),
    ],
)
def test_what_is_wrong_is_said_in_a_line(words: tuple, complaint: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["runs", *words])
    assert isinstance(done.exception, UserError), done.output
    assert complaint in str(done.exception)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.faults
@pytest.mark.parametrize(
    "text",
    [
        "a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n",
        "steps: !!python/object/apply:os.system ['touch trap']\n",
        "steps: 1\n" + "# " + "x" * 10_000_000,
        b"\xff\xfe steps: 3",
    ],
    ids=["alias bomb", "object", "10 MB", "no UTF-8"],
)
def test_recipes_that_are_none_submit_nothing(text: str | bytes, tmp_path: Path, monkeypatch) -> None:
    """Case 22."""
    monkeypatch.chdir(tmp_path)
    Path("bad.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    done = CliRunner().invoke(app, ["runs", "submit", "bad.yaml"])
    assert isinstance(done.exception, UserError), done.output
    assert [path.name for path in tmp_path.iterdir()] == ["bad.yaml"]


def test_a_job_submitted_without_a_server_runs_beside_it(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    said = call("runs", "submit", "--kind", "evaluate", "folder=missing/model", "--cores", "1")
    run = re.search(r"run-[0-9a-f]{12}", said)
    assert run is not None
    process = Path("artifacts/service/jobs") / run[0] / "attempts/1/process.json"
    deadline = time.monotonic() + 30
    while not process.is_file():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    found = psutil.Process(json.loads(process.read_text())["pid"])
    assert os.getpgid(found.pid) == found.pid  # of its own, so that no Ctrl-C here reaches it
    found.send_signal(signal.SIGKILL)


def test_no_server() -> None:
    with pytest.raises(NoServer, match="lamella serve"):
        Client(home=Path("/nonexistent"))


@pytest.mark.parametrize(
    ("store", "said"),
    [
        ("nonsense://x", "cannot be read"),
        ("mysql://x/y", "mysql is not supported"),
        ("postgresql+psycopg://u:secret@127.0.0.1:1/db", "does not answer"),
        ("sqlite:////proc/nope/x.db", "cannot be made"),
        ("damaged.db", "damaged"),
    ],
)
def test_a_store_that_cannot_be_is_told(store: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "damaged.db").write_text("no database")
    with pytest.raises(UserError, match=said) as refused:
        open_store(tmp_path / "home", store)
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize("days", [0.0, -1.0, 1e9, float("nan"), float("inf")])
def test_a_key_without_a_time_is_refused(days: float, tmp_path: Path) -> None:
    store = open_store(tmp_path, None)
    with pytest.raises(UserError, match="days"):
        keys.create(store, "ada", ["read"], days=days)
    assert not keys.are_needed(store)
