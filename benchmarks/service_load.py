"""Run: uv run benchmarks/service_load.py [--runs 10000] [--streams 200] [--seconds 20] [--no-trainer] [--out FILE.json]

A server with many runs in its store and many clients that listen to events, some of which do not read; and one client
that lists, sorts, shows and searches meanwhile, while events come. Beside it stands a real training run, whose ranks
are stopped (SIGSTOP) once they train: an idle trainer that the scheduler looks after. Prints the times of the answers,
how long a stream waits for an event, and the server's memory and CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse
from pathlib import Path

import httpx
import psutil
from sqlalchemy import insert

from lamella.jsons import Json
from lamella.service.database import Database
from lamella.service.schema import events, runs
from lamella.service.store import Store

STATES = ("succeeded", "succeeded", "succeeded", "failed", "cancelled")
PATHS = (
    "/v1/jobs?limit=50", "/v1/jobs?limit=200", "/v1/jobs?state=failed", "/v1/jobs?search=run%2077", "/v1/jobs/{run}",
    "/v1/jobs/{run}/events", "/v1/service", "/v1/jobs?limit=50&after={run}",
    "/v1/jobs?limit=50&sort=name&ascending=true&count=true", "/v1/jobs?limit=50&sort=state&after={run}",
)  # fmt: skip
DEAD_SHARE = 0.25
"""So many of the streams never read what they get."""
START_S = 60


def fill(home: Path, count: int) -> list[str]:
    """A store with so many runs that have ended, four events each; the ids."""
    home.mkdir()
    database = Database(str(home / "lamella.db"))
    database.migrate()
    ids = [f"run-{i:012x}" for i in range(count)]
    spec: Json = {"job": {"kind": "train", "recipe": {"model": "m", "out": "o", "steps": 1000}, "ranks": 8}}
    rows = [
        {
            "id": run, "kind": "train", "name": f"run {i}", "user": f"user-{i % 20}", "state": STATES[i % len(STATES)],
            "desired": "running", "priority": 0, "executor": "local", "spec": spec, "out": f"/data/{i}", "gpus": 0,
            "cores": 1, "failure": None, "reason": "", "attempt": 1, "fruitless": 0, "not_before": 0.0,
            "created": 1.0 * i, "updated": 1.0 * i, "started": 1.0 * i, "ended": 1.0 * i, "parent": None,
            "progress": {"step": 1000, "steps": 1000, "progressPercentage": 100.0, "metrics": {"loss": 2.5}},
        }
        for i, run in enumerate(ids)
    ]  # fmt: skip
    happened = [
        {"run": run, "time": 1.0 * i, "event": event, "state": event, "data": {}}
        for i, run in enumerate(ids)
        for event in ("validating", "queued", "starting", "running")
    ]
    with database.writing() as connection:
        connection.execute(insert(runs), rows)
        connection.execute(insert(events), happened)
    database.close()
    return ids


def start(home: Path) -> tuple[subprocess.Popen[bytes], str, float]:
    """(the server, its address, seconds until it listened). Jobs may use the folder that holds its home."""
    began = time.monotonic()
    command = [sys.executable, "-m", "lamella.cli", "serve", "--home", str(home), "--port", "0", "--rate", "100000"]
    server = subprocess.Popen(command, cwd=home.parent, stdout=subprocess.DEVNULL)
    while not (home / "address").is_file():
        assert server.poll() is None
        assert time.monotonic() - began < START_S
        time.sleep(0.02)
    address = (home / "address").read_text().strip()
    while httpx.get(f"{address}/healthz").status_code != 200:
        time.sleep(0.02)
    return server, address, time.monotonic() - began


class IdleTrainer:
    """A training run of the embedded model whose ranks stand still."""

    def __init__(self, folder: Path, address: str):
        command = [sys.executable, "-m", "lamella.cli", "convert", "layers=every:15", "--out", str(folder / "moe")]
        subprocess.run(command, check=True, cwd=folder, stdout=subprocess.DEVNULL)
        recipe = {
            "model": str(folder / "moe"), "out": str(folder / "trained"), "data": ["python-docs"], "seq_len": 32,
            "samples_per_step": 1, "steps": 100_000, "heldout_samples": 0, "tensorboard": False,
        }  # fmt: skip
        job: Json = {"job": {"kind": "train", "recipe": recipe, "ranks": 1}, "cores": 1}
        self.url = f"{address}/v1/jobs/{httpx.post(f'{address}/v1/jobs', json=job).raise_for_status().json()['id']}"
        while httpx.get(self.url).json()["progress"].get("step", 0) < 1:
            assert self.state() not in ("failed", "lost")
            time.sleep(0.5)
        run = self.url.rpartition("/")[2]
        found = [(process, words(process)) for process in psutil.process_iter()]
        self.ranks = [p for p, said in found if "lamella.worker" in said and any(run in word for word in said)]
        assert self.ranks
        for rank in self.ranks:
            rank.suspend()

    def state(self) -> str:
        """The state of the run."""
        return str(httpx.get(self.url).json()["state"])

    def end(self) -> None:
        """Let the ranks save and end."""
        for rank in self.ranks:
            rank.resume()
        httpx.post(f"{self.url}/cancel").raise_for_status()
        while self.state() not in ("cancelled", "failed"):
            time.sleep(0.5)


def words(process: psutil.Process) -> list[str]:
    """The command of a process; none of one that has ended."""
    try:
        return process.cmdline()
    except psutil.Error:
        return []


class Listeners:
    """Connections to the stream of all events; the dead ones never read."""

    def __init__(self, address: str, count: int):
        place = urllib.parse.urlsplit(address)
        self.sockets = []
        self.waits_s: list[float] = []
        self.received = 0
        for number in range(count):
            connection = socket.create_connection((place.hostname or "", place.port or 0))
            if number < count * DEAD_SHARE:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.sendall(f"GET /v1/events/stream HTTP/1.1\r\nHost: {place.netloc}\r\n\r\n".encode())
            self.sockets.append(connection)
        self.alive = self.sockets[int(count * DEAD_SHARE) :]
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        import selectors

        selector = selectors.DefaultSelector()
        for connection in self.alive:
            connection.setblocking(False)
            selector.register(connection, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select(0.5):
                raw = key.fileobj.recv(1 << 16)  # type: ignore[union-attr]
                now = time.time()
                for line in raw.splitlines():
                    if line.startswith(b"data: ") and b'"sent": ' in line:
                        self.received += 1
                        self.waits_s.append(now - float(line.partition(b'"sent": ')[2].partition(b"}")[0]))


def ask(address: str, ids: list[str], seconds: float, pause_s: float) -> dict[str, list[float]]:
    """Path -> the seconds that each answer took."""
    took: dict[str, list[float]] = {path: [] for path in PATHS}
    until, number = time.monotonic() + seconds, 0
    with httpx.Client(base_url=address) as client:
        while time.monotonic() < until:
            path = PATHS[number % len(PATHS)]
            run = ids[(number * 7919) % len(ids)]
            began = time.perf_counter()
            client.get(path.replace("{run}", run)).raise_for_status()
            took[path].append(time.perf_counter() - began)
            number += 1
            time.sleep(pause_s)
    return took


def write_events(store: Store, ids: list[str], stop: threading.Event, every_s: float) -> None:
    """Events of some runs, until told to stop."""
    number = 0
    while not stop.wait(every_s):
        store.note(ids[number % len(ids)], "note", {"sent": time.time()})
        number += 1


def percentile(values: list[float], part: float) -> float:
    """In milliseconds."""
    ordered = sorted(values)
    return round(1000 * ordered[min(len(ordered) - 1, int(part * len(ordered)))], 1)


def measure(home: Path, args: argparse.Namespace) -> Json:
    """All figures."""
    ids = fill(home, args.runs)
    server, address, start_s = start(home)
    process, stop = psutil.Process(server.pid), threading.Event()
    store = Store(Database(str(home / "lamella.db")))
    try:
        trainer = IdleTrainer(home.parent, address) if args.trainer else None
        before_mib = process.memory_info().rss / 2**20
        listeners = Listeners(address, args.streams)
        writer = threading.Thread(target=write_events, args=(store, ids, stop, 0.2), daemon=True)
        writer.start()
        cpu_before = sum(process.cpu_times()[:2])
        took = ask(address, ids, args.seconds, 0.02)
        cpu_s = sum(process.cpu_times()[:2]) - cpu_before
        memory_mib = process.memory_info().rss / 2**20
        gauge = httpx.get(f"{address}/metrics").text
        stop.set()
        writer.join()
        if trainer is not None:
            trainer.end()
    finally:
        server.terminate()
        server.wait(30)
    everything = [seconds for path in took.values() for seconds in path]
    connected = next(line for line in gauge.splitlines() if line.startswith("lamella_event_streams "))
    return {
        "runs": args.runs, "idle_trainer": args.trainer, "streams": args.streams,
        "streams_connected": float(connected.split()[1]),
        "streams_that_do_not_read": int(args.streams * DEAD_SHARE), "requests": len(everything),
        "p50_ms": percentile(everything, 0.5), "p95_ms": percentile(everything, 0.95),
        "p99_ms": percentile(everything, 0.99),
        "p95_ms_by_path": {path: percentile(values, 0.95) for path, values in took.items()},
        "events_received": listeners.received,
        "event_wait_ms": round(1000 * statistics.median(listeners.waits_s), 1) if listeners.waits_s else None,
        "start_s": round(start_s, 2), "memory_before_mib": round(before_mib), "memory_mib": round(memory_mib),
        "server_cores": round(cpu_s / args.seconds, 3), "load": [round(load, 1) for load in os.getloadavg()],
    }  # fmt: skip


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=10_000)
    parser.add_argument("--streams", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--trainer", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="load.") as name:
        report = measure(Path(name) / "home", args)
    print(json.dumps(report, indent=1))
    if args.out is not None:
        args.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
