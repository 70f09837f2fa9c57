"""Whether SkyPilot takes what lamella renders for it: every task is loaded by its own library, offline.

Run: uv run --no-sync scripts/check_with_skypilot.py

SkyPilot pins older libraries than lamella needs, so it is looked for in an environment of its own: the one that
$LAMELLA_SKYPILOT names, or the one whose `sky` is on the PATH. Exit code: 77 where there is none. To make one:

    uv venv skypilot && VIRTUAL_ENV=skypilot uv pip install 'skypilot[kubernetes]==0.14.1'     # 520 MB
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import yaml

from lamella.installation import shipped
from lamella.recipe.files import parse_yaml, read_recipe_text
from lamella.service.executors.executor import Place
from lamella.service.executors.skypilot import CODES, FAILURES, TASK, WAITING, SkyPilot, seen_in
from lamella.service.jobs import Submission
from lamella.service.planning import draft
from lamella.service.queue import Capacity

MISSING = 77
USED = ("job_name", "status", "failure_reason")
CATALOG = """AcceleratorName,Clouds\nH100,"['AWS', 'Kubernetes']"\n"""
"""SkyPilot would fetch its list of accelerators."""
BUCKET = "s3://lab-models/ada"
JOBS = {
    "train": {"kind": "train", "recipe": {"model": "moe", "out": "run", "checkpoint_folder": "s3://lab-models/run"}},
    "convert": {"kind": "convert", "recipe": {"model": "org/model", "out": "moe"}},
    "evaluate": {"kind": "evaluate", "folder": "moe", "data": "python-docs"},
    "export": {"kind": "export", "source": "run", "to": "gguf", "out": "ex port"},
}
READ = """
import json, sys, sky
from sky.client.cli import command
from sky.jobs.state import ManagedJobStatus
from sky.schemas.api.responses import ManagedJobRecord

def what(file):
    task = sky.Task.from_yaml(file)
    (resources,) = task.resources
    task.validate(skip_file_mounts=True)
    mounts = {place: (storage.source, storage.mode.value) for place, storage in task.storage_mounts.items()}
    return {
        "name": task.name, "nodes": task.num_nodes, "envs": task.envs, "setup": task.setup, "run": task.run,
        "accelerators": resources.accelerators, "cpus": resources.cpus, "spot": resources.use_spot,
        "recovery": resources.job_recovery, "cloud": str(resources.cloud), "mounts": mounts,
    }

def problem(take):
    try:
        take()
    except Exception as error:
        return str(error) or repr(error)

def parse(words):
    return problem(lambda: command.cli.commands[words[0]].commands[words[1]].make_context(words[1], list(words[2:])))

BAD = {"source": "s3://bucket", "mode": "CACHED"}
commands = {" ".join(words): parse(words) for words in json.loads(sys.argv[2])}
refused = {
    "a wrong key": problem(lambda: sky.Task.from_yaml_config({"num_nodez": 2, "run": "true"})),
    "a wrong mode": problem(lambda: sky.Task.from_yaml_config({"file_mounts": {"/a": BAD}})),
    "a wrong option": parse(["jobs", "queue", "--outputs=json"]),
}
record = ManagedJobRecord(job_name="a", status=ManagedJobStatus.RUNNING, failure_reason="b")
print("FOUND " + json.dumps({
    "refused": refused, "tasks": {file: what(file) for file in json.loads(sys.argv[1])}, "commands": commands,
    "statuses": {status.value: status.is_terminal() for status in ManagedJobStatus},
    "record": record.model_dump(mode="json"), "version": sky.__version__,
}))
"""


def python_of_skypilot() -> Path | None:
    """The interpreter that has SkyPilot; None where there is none."""
    named = os.environ.get("LAMELLA_SKYPILOT")
    sky = Path(named) / "bin/sky" if named else Path(shutil.which("sky") or "/nowhere")
    return sky.resolve().with_name("python") if sky.is_file() else None


def tasks() -> Iterator[tuple[str, Submission, str]]:
    """(what it is, what was submitted, the rendered task) of every cluster's settings and kind of job."""
    executor = SkyPilot(Place(Path("/shared/service"), Path("/shared"), Capacity(0, 2)))
    clusters = {Path(file).stem: parse_yaml(read_recipe_text(Path(file)), file) for file in shipped("clusters/*.yaml")}
    clusters |= {
        "spot-on-a-cloud": {"nodes": 2, "gpus_per_node": 8, "gpu": "H100", "spot": True, "cloud": "aws"},
        "no-gpu": {"nodes": 2, "gpus_per_node": 0, "cores_per_node": 4, "cloud": "kubernetes"},
    }
    for name, cluster in clusters.items():
        for kind, job in JOBS.items():
            values = {"job": job, "executor": "skypilot", "cluster": cluster | {"bucket": BUCKET}}
            submission = Submission.model_validate(values)
            if kind == "train":
                recipe = job["recipe"] | {"samples_per_step": submission.cluster.ranks, "data": ["it's $(text)"]}
                submission = Submission.model_validate(values | {"job": job | {"recipe": recipe}})
            submission.check()
            yield f"{name}-{kind}", submission, executor.render(draft(submission, 0, 0), 1)[TASK]


def expected(submission: Submission, text: str) -> dict[str, object]:
    """What SkyPilot should have understood."""
    cluster, trains, task = submission.cluster, submission.job.kind == "train", yaml.safe_load(text)
    accelerators = {cluster.gpu or "H100": cluster.gpus_per_node if trains else 1} if cluster.gpus_per_node else None
    clouds = {"aws": "AWS", "kubernetes": "Kubernetes", None: "None"}
    return {
        "name": task["name"], "nodes": cluster.nodes if trains else 1, "envs": task["envs"], "setup": task["setup"],
        "run": task["run"], "accelerators": accelerators, "cpus": f"{cluster.cores_per_node}+",
        "spot": cluster.spot, "cloud": clouds[cluster.cloud],
        "recovery": {"strategy": "EAGER_NEXT_REGION", "max_restarts_on_errors": 3 if trains else 0},
        "mounts": {"/lamella": [BUCKET, "MOUNT_CACHED"]},
    }  # fmt: skip


def differences(found: dict[str, dict[str, object]], wanted: dict[str, dict[str, object]]) -> list[str]:
    """A line for everything that SkyPilot understood otherwise."""
    return [
        f"{name}: {key} is {found[name][key]!r}, and should be {value!r}"
        for name, values in wanted.items()
        for key, value in values.items()
        if found[name][key] != value
    ]


def of_statuses(statuses: dict[str, bool]) -> list[str]:
    """A line for each state of SkyPilot's that lamella takes for an end and is none, or the other way round."""
    known = CODES.keys() | FAILURES.keys() | WAITING
    wrong = [
        f"{name}: is an end: {ends}" for name, ends in statuses.items() if (seen_in(name).state == "ended") != ends
    ]
    return wrong + [f"SkyPilot has no state {name}" for name in sorted(known - statuses.keys())]


def main() -> int:
    """0: it takes them as they are meant."""
    python = python_of_skypilot()
    if python is None:
        print("no SkyPilot here; see the head of this script", file=sys.stderr)
        return MISSING
    commands = [
        ["jobs", "queue", "--all", "--verbose", "--output=json", "--refresh"],
        ["jobs", "launch", "--yes", "--detach-run", "--name=run-1", "task.yaml"],
        ["jobs", "cancel", "--yes", "--name=run-1"],
        ["jobs", "logs", "--no-follow", "--tail=0", "--name=run-1"],
    ]
    with tempfile.TemporaryDirectory(prefix="skypilot.") as folder:
        wanted, files = {}, []
        for name, submission, text in tasks():
            file = Path(folder) / f"{name}.yaml"
            file.write_text(text)
            files.append(str(file))
            wanted[str(file)] = expected(submission, text)
        catalog = Path(folder) / ".sky/catalogs/v8/common/accelerators.csv"
        catalog.parent.mkdir(parents=True)
        catalog.write_text(CATALOG)
        home = {"HOME": folder, "SKYPILOT_DISABLE_USAGE_COLLECTION": "1"}
        words = [str(python), "-c", READ, json.dumps(files), json.dumps(commands)]
        clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        done = subprocess.run(words, env=clean | home, capture_output=True, text=True, check=False)
    answer = next((line for line in done.stdout.splitlines() if line.startswith("FOUND ")), None)
    if answer is None:
        print(f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}", file=sys.stderr)
        return 1
    found = json.loads(answer.removeprefix("FOUND "))
    wrong = differences(found["tasks"], wanted) + of_statuses(found["statuses"])
    wrong += [f"sky {words}: {problem}" for words, problem in found["commands"].items() if problem is not None]
    wrong += [
        f"a job's record has no {key}" for key in ("job_name", "status", "failure_reason") if key not in found["record"]
    ]
    print("\n".join(wrong) or f"SkyPilot {found['version']} takes {len(files)} tasks, {len(commands)} commands")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
