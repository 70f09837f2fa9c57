"""Run as a process: what `lamella train` does to its folder, without a model, so that a scheduler's tests are quick.

    python tests/support/small_job.py RECIPE.yaml

It counts steps, each of `step_s` seconds, saves every `save_every_steps`, goes on from the newest save, saves and ends
on SIGTERM, and writes status, metrics and events as a run directory has them. A step that is counted twice after no
kill, or by two processes at once, shows in log/steps.txt.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

from lamella.recipe.files import parse_yaml
from lamella.run.folder import RunDir, write_atomic


def main(recipe_file: str) -> int:
    """The exit code of `lamella train`."""
    recipe = parse_yaml(Path(recipe_file).read_text(), recipe_file)
    run, steps, every = RunDir(Path(recipe["out"])), int(recipe["steps"]), int(recipe["save_every_steps"])
    run.log.mkdir(parents=True, exist_ok=True)
    asked: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: asked.append(number))
    saved = run.path / "saved.json"
    step = json.loads(saved.read_text())["step"] if saved.is_file() else 0
    run.event("start", attempt=len(run.events("start")))
    run.write_status("running", step, steps)
    while step < steps:
        time.sleep(float(os.environ.get("SMALL_JOB_STEP_S", "0.05")))
        step += 1
        with (run.log / "steps.txt").open("a") as log:
            log.write(f"{step} {os.getpid()} {time.time()}\n")
        with run.metrics_file.open("a") as file:
            file.write(json.dumps({"step": step, "time": time.time(), "loss": 1 / step, "heldout_loss": None}) + "\n")
        if step == int(os.environ.get("SMALL_JOB_CRASH_AT", "0")):
            os.kill(os.getpid(), signal.SIGKILL)
        if step % every == 0 or step == steps or asked:
            write_atomic(saved, json.dumps({"step": step}))
            run.event("save", step=step, seconds=0.0)
        if asked and step < steps:
            run.write_status("preempted", step, steps)
            return 143
    run.write_status("finished", step, steps)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
