"""Run: uv run benchmarks/service_overhead.py [--model small] [--cores 1] [--rounds 8] [--block-s 8] [--json FILE.json]

Step times of one training run (the embedded SmolLM2-135M as experts in every 15th layer, or with `--model small` a
random Llama of width 256, whose many short steps tell more in the same time) while a service, a stream of its events
and an open dashboard look at it, against step times of the same run while all of that stands still. In each
round every arm has its turn, in an order drawn anew: `alone` (service and browser stopped by SIGSTOP), `service` (the
server and an event stream), `dashboard` (headless Chromium on this machine shows the run's page, too). A step counts
where it began and ended within a turn. The ratio is alone over arm: 1 is as fast, 0.99 a hundredth slower; its interval
comes of drawing rounds with replacement.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import httpx
import psutil
from playwright.sync_api import sync_playwright

from lamella.jsons import Json

sys.path.insert(0, str(Path(__file__).parent))
from service_browser import FLAGS
from service_load import start

ARMS = ("alone", "service", "dashboard")
SETTLE_S = 0.3
DRAWS = 2_000
WARM_STEPS = 5
LEAST_STEPS = 3
"""A round counts where every turn has so many."""


def listen(address: str, run: str) -> None:
    """Read the events of a run for ever."""

    def read() -> None:
        stream = httpx.stream("GET", f"{address}/v1/jobs/{run}/events/stream", timeout=None)
        with suppress(httpx.RemoteProtocolError), stream as answer:  # the server ends it when it ends
            for _ in answer.iter_lines():
                pass

    threading.Thread(target=read, daemon=True).start()


def family(process: psutil.Process) -> list[psutil.Process]:
    """A process and all that it has started."""
    return [process, *process.children(recursive=True)]


class Watchers:
    """The server and the browser; each can be made to stand still."""

    def __init__(self, server: psutil.Process, browser: psutil.Process):
        self.server, self.browser = server, browser

    def turn(self, arm: str) -> None:
        """Let those at work that belong to the arm."""
        self.server.send_signal(signal.SIGSTOP if arm == "alone" else signal.SIGCONT)
        for process in family(self.browser):
            process.send_signal(signal.SIGCONT if arm == "dashboard" else signal.SIGSTOP)

    def cpu_s(self) -> tuple[float, float]:
        """CPU seconds of (server, browser) so far."""
        alive = [process.cpu_times() for process in family(self.browser)]
        own = self.server.cpu_times()
        return own.user + own.system, sum(t.user + t.system for t in alive)


def step_times(file: Path, began: float, ended: float) -> list[float]:
    """Seconds of the steps that lie within a turn."""
    times = [json.loads(line)["time"] for line in file.read_text().splitlines()]
    return [b - a for a, b in itertools.pairwise(times) if a >= began and b <= ended]


def take_turns(watchers: Watchers, args: argparse.Namespace, metrics: Path, is_alive: Callable[[], bool]) -> Json:
    """The rounds: [{arm: median seconds of a step}], all steps of each arm, CPU of the watchers by arm."""
    spans, used = list[dict[str, tuple[float, float]]](), {arm: [0.0, 0.0, 0.0] for arm in ARMS}
    for _ in range(args.rounds):
        spans.append({})
        for arm in random.sample(ARMS, len(ARMS)):
            watchers.turn(arm)
            time.sleep(SETTLE_S)
            began, before = time.time(), watchers.cpu_s()
            time.sleep(args.block_s)
            spans[-1][arm] = (began, time.time())
            used[arm] = [
                a + b
                for a, b in zip(used[arm], (args.block_s, *map(float.__sub__, watchers.cpu_s(), before)), strict=True)
            ]
        assert is_alive(), "the training has ended; take more --steps"
    steps = [{arm: step_times(metrics, *span) for arm, span in spans_of.items()} for spans_of in spans]
    return {"steps": steps, "cpu": {arm: (server / s, browser / s) for arm, (s, server, browser) in used.items()}}


def ratios(rounds: list[dict[str, list[float]]], arm: str, rng: random.Random) -> Json:
    """Alone over arm, of the medians of all steps; and where 95% of the ratios of as many drawn rounds lie."""

    def ratio(some: list[dict[str, list[float]]]) -> float:
        alone, its = ([t for times in some for t in times[name]] for name in ("alone", arm))
        return statistics.median(alone) / statistics.median(its)

    drawn = sorted(ratio(rng.choices(rounds, k=len(rounds))) for _ in range(DRAWS))
    low, high = drawn[int(0.025 * DRAWS)], drawn[int(0.975 * DRAWS)]
    return {"ratio": round(ratio(rounds), 4), "low": round(low, 4), "high": round(high, 4)}


def report_of(turns: Json, args: argparse.Namespace) -> Json:
    """The figures."""
    whole = [steps for steps in turns["steps"] if all(len(steps[arm]) >= LEAST_STEPS for arm in ARMS)]
    if not whole:
        counts = [{arm: len(times) for arm, times in steps.items()} for steps in turns["steps"]]
        sys.exit(f"no round has {LEAST_STEPS} steps in every turn, take a longer --block-s: {counts}")
    found: Json = {
        "model": args.model, "cores_of_the_run": args.cores, "cores_of_the_machine": os.cpu_count(),
        "rounds": args.rounds, "rounds_that_count": len(whole),
        "block_s": args.block_s, "load": [round(load, 1) for load in os.getloadavg()],
    }  # fmt: skip
    for arm in ARMS:
        times = sorted(t for steps in whole for t in steps[arm])
        quarter = len(times) // 4
        server, browser = turns["cpu"][arm]
        found[arm] = {
            "steps": len(times), "median_ms": round(1000 * statistics.median(times), 1),
            "quartiles_ms": [round(1000 * times[quarter], 1), round(1000 * times[-quarter - 1], 1)],
            "server_cores": round(server, 4), "browser_cores": round(browser, 4),
        }  # fmt: skip
    rng = random.Random(0)
    found["median_ms_of_turns"] = {
        arm: [round(1000 * statistics.median(steps[arm]), 1) for steps in whole] for arm in ARMS
    }
    return found | {"alone_over": {arm: ratios(whole, arm, rng) for arm in ARMS[1:]}}


def convert(folder: Path, model: str) -> None:
    """Make the model that is trained, in folder/moe."""
    command = [sys.executable, "-m", "lamella.cli", "convert", "layers=every:15", "--out", str(folder / "moe")]
    if model == "small":
        from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM  # imports torch

        from lamella.checkpoint.embedded import embedded_model

        config = LlamaConfig(
            hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=4,
            vocab_size=49_152, tie_word_embeddings=True,
        )  # fmt: skip
        LlamaForCausalLM(config).save_pretrained(folder / "small")
        AutoTokenizer.from_pretrained(embedded_model()).save_pretrained(folder / "small")
        command += ["--model", str(folder / "small")]
    subprocess.run(command, check=True, cwd=folder, stdout=subprocess.DEVNULL)


def measure(folder: Path, args: argparse.Namespace) -> Json:
    """All figures."""
    convert(folder, args.model)
    recipe = {
        "model": str(folder / "moe"), "out": str(folder / "run"), "data": ["python-docs"], "seq_len": args.seq_len,
        "samples_per_step": 1, "steps": args.steps, "heldout_samples": 0, "save_every_steps": args.steps,
        "tensorboard": False,
    }  # fmt: skip
    server, address, _ = start(folder / "home")
    watchers = None
    try:
        job: Json = {"job": {"kind": "train", "recipe": recipe, "ranks": 1}, "cores": args.cores}
        run = httpx.post(f"{address}/v1/jobs", json=job).raise_for_status().json()["id"]

        def state() -> Json:
            return httpx.get(f"{address}/v1/jobs/{run}").json()

        while state()["progress"].get("step", 0) < WARM_STEPS:
            assert state()["state"] not in ("failed", "cancelled"), state()["reason"]
            time.sleep(0.5)
        listen(address, run)
        with sync_playwright() as playwright:
            chromium = shutil.which("chromium") or shutil.which("google-chrome")
            before = set(psutil.Process().children(recursive=True))
            browser = playwright.chromium.launch(executable_path=chromium, args=FLAGS)
            page = browser.new_page()
            page.goto(f"{address}/runs/{run}")
            page.locator("#speed .main-svg").first.wait_for()
            made = set(psutil.Process().children(recursive=True)) - before
            (root,) = [p for p in made if "--headless" in p.cmdline() and not any("--type" in w for w in p.cmdline())]
            watchers = Watchers(psutil.Process(server.pid), root)
            turns = take_turns(watchers, args, folder / "run" / "metrics.jsonl", lambda: root.is_running())
            watchers.turn("dashboard")
            assert page.locator("#state").inner_text().startswith("running")
            browser.close()
        httpx.post(f"{address}/v1/jobs/{run}/cancel").raise_for_status()
        while state()["state"] not in ("cancelled", "failed", "succeeded"):
            time.sleep(0.5)
        return report_of(turns, args)
    finally:
        if watchers is not None:
            server.send_signal(signal.SIGCONT)
        server.terminate()
        server.wait(30)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("smollm2", "small"), default="smollm2")
    parser.add_argument("--cores", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--block-s", type=float, default=8.0)
    parser.add_argument("--seq-len", type=int, default=32)
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="overhead.") as name:
        report = measure(Path(name), args)
    print(json.dumps(report, indent=1))
    if args.json is not None:
        args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
