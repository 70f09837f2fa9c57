"""launch/slurm/train.sbatch on this machine: when a job is queued again, and when it ends."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from pydoc_data import topics

import pytest

from lamella.recipe.files import arguments
from lamella.recipe.stages import prepare_stages
from lamella.run.folder import RunDir
from lamella.run.slurm import REQUEUE, after, before
from support.models import trainable_moe

ROOT = Path(__file__).parents[2]
JOB = "7"
# What stands for the cluster: one node of two ranks, and this interpreter's environment.
COMMANDS = {
    "uv": f"""shift 2; [ "$1" = torchrun ] && set -- python -m torch.distributed.run "${{@:2}}"
        shift; exec {sys.executable} "$@" """,
    "srun": """touch "$FOLDER/srun"; shift; exec "$@" """,
    "scontrol": """[ "$1" = show ] && echo localhost || echo "$@" >> "$FOLDER/requeued" """,
}


@pytest.fixture
def cluster(tmp_path):
    (tmp_path / "bin").mkdir()
    for name, script in COMMANDS.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{script}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    return tmp_path


def submit(folder: Path, *words: str, job: int, restarts: int, fault: str = "") -> tuple[int, bool, str]:
    """(exit code, whether the job was queued again, stderr) of one attempt."""
    environment = os.environ | {
        "PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "FOLDER": str(folder), "LAMELLA_FAULT": fault,
        "LAMELLA_CACHE": str(folder / "cache"), "SLURM_JOB_ID": str(job), "SLURM_RESTART_COUNT": str(restarts),
        "SLURM_JOB_NODELIST": "localhost", "SLURM_NNODES": "1", "SLURM_GPUS_ON_NODE": "2", "SLURM_CPUS_PER_TASK": "2",
    }  # fmt: skip
    (folder / "requeued").unlink(missing_ok=True)
    done = subprocess.run(
        ["bash", "launch/slurm/train.sbatch", *words],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    requeued = (folder / "requeued").is_file()
    assert not requeued or (folder / "requeued").read_text() == f"requeue {job}\n"
    return done.returncode, requeued, done.stderr


@pytest.mark.slow
@pytest.mark.faults
def test_a_job_is_queued_again_as_long_as_there_is_progress(cluster):
    trainable_moe(cluster / "model")
    (cluster / "text.md").write_text("\n".join(topics.topics[name] for name in sorted(topics.topics)[:2]))
    words = [
        f"model={cluster / 'model'}", f"out={cluster / 'run'}", f"data=[{cluster / 'text.md'}]", "seq_len=32",
        "steps=8", "samples_per_step=4", "heldout_samples=0", "save_every_steps=4", "tensorboard=false",
        "resume=never", "max_restarts_without_progress=1",
    ]  # fmt: skip
    job = 7000 + os.getpid() % 1000  # its port
    code, requeued, said = submit(cluster, *words, job=job, restarts=0, fault="signal:rank=1,step=2")
    assert (code, requeued) == (0, True), said
    assert RunDir(cluster / "run").status()["state"] == "preempted"
    kill = "kill:rank=1,step=3"
    code, requeued, said = submit(cluster, *words, job=job, restarts=1, fault=kill)
    assert (code, requeued) == (0, True), said
    code, requeued, said = submit(cluster, *words, job=job, restarts=2, fault=kill)
    assert (code, requeued) == (1, False), said
    assert re.search(r"error: infra at step \d after 1 restarts without a new checkpoint: ", said), said
    status = RunDir(cluster / "run").status()
    assert (status["state"], status["failure"], status["retryable"]) == ("failed", "infra", True)
    code, requeued, said = submit(cluster, *words, job=job, restarts=3)
    assert (code, requeued) == (0, False), said
    run = RunDir(cluster / "run")
    assert [e["step"] for e in run.events("running")] == [0, 2, 2, 2]
    assert [line["step"] for line in run.metrics()] == list(range(1, 9))
    assert run.status()["state"] == "finished"


@pytest.mark.parametrize(("fails", "code", "waits"), [(0, 0, []), (2, 0, ["15", "60"]), (9, 1, ["15", "60", "240"])])
def test_a_controller_that_is_away_is_asked_again(tmp_path: Path, fails: int, code: int, waits: list[str]) -> None:
    """The job is to be queued again just then."""
    commands = {
        "uv": """case "$*" in *"slurm after"*) exit 75;; esac""",
        "srun": "exit 1",
        "sleep": """echo "$1" >> "$FOLDER/slept" """,
        "scontrol": f"""[ "$1" = show ] && echo localhost && exit
            echo "$@" >> "$FOLDER/asked"; [ "$(wc -l < "$FOLDER/asked")" -gt {fails} ]""",
    }
    (tmp_path / "bin").mkdir()
    for name, script in commands.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{script}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    found, _, said = submit(tmp_path, job=7, restarts=0)
    slept = tmp_path / "slept"
    assert (found, slept.read_text().split() if slept.exists() else []) == (code, waits), said
    assert len((tmp_path / "asked").read_text().splitlines()) == min(fails, 3) + 1


def test_bad_input_ends_the_job_before_anything_starts(cluster):
    code, requeued, said = submit(cluster, "stepz=4", job=1, restarts=0)
    assert (code, requeued) == (2, False)
    assert said == "error: the recipe has errors:\n  unknown key 'stepz' (did you mean 'steps'?)\n"
    assert not (cluster / "srun").exists()


@pytest.fixture
def words(tmp_path) -> list[str]:
    trainable_moe(tmp_path / "model")
    return [f"model={tmp_path / 'model'}", f"out={tmp_path / 'run'}", "data=[python-docs]", "seq_len=32"]


def started(words: list[str], stage: int = 0) -> RunDir:
    recipe = prepare_stages(*arguments(words))[stage]
    run = RunDir(Path(recipe.out))
    run.create(recipe, Path(words[0].removeprefix("model=")))
    return run


def attempt(words: list[str], run: RunDir, state: str, job: str = JOB, **failure) -> int:
    """The verdict on an attempt that began and left this status."""
    before(words, 1)
    assert run.status()["state"] in ("none", "starting", "finished")
    if state != "starting":
        run.write_status(state, 3, 10, **failure)
    return after(words, 1, job)


@pytest.mark.parametrize(
    ("state", "failure", "verdict"),
    [
        ("finished", {}, 0),
        ("stopped", {}, 0),
        ("preempted", {"failure": "preempted", "retryable": True}, REQUEUE),
        ("running", {}, REQUEUE),  # killed without a word, with its node
        ("starting", {}, REQUEUE),
    ],
)
def test_the_state_decides(words, state, failure, verdict):
    run = started(words)
    run.write_status("preempted", 3, 10)  # by the attempt before, and not to be taken for this one's
    assert attempt(words, run, state, **failure) == verdict
    assert (run.status()["state"] == "failed") == (state in ("running", "starting"))


@pytest.mark.parametrize(("retryable", "verdict"), [(True, REQUEUE), (False, 1)])
def test_what_would_fail_again_is_not_tried_again(words, retryable, verdict, capsys):
    run = started(words)
    before(words, 1)
    report = (
        '{"time": 1, "rank": 0, "step": 5, "failure": "storage", "retryable": %s, "reason": "no", "follows": false}'
    )
    (run.log / "failure-rank-0.json").write_text(report % str(retryable).lower())
    assert after(words, 1, JOB) == verdict
    assert "storage at step 5: no" in capsys.readouterr().err
    assert run.status()["retryable"] == retryable


def test_failures_count_until_there_is_a_new_checkpoint(words):
    run = started(words)
    words = [*words, "max_restarts_without_progress=1"]
    assert attempt(words, run, "running") == REQUEUE
    run.event("save", step=4)
    assert attempt(words, run, "running") == REQUEUE
    assert attempt(words, run, "preempted") == REQUEUE  # no failure
    assert attempt(words, run, "running") == 1
    assert attempt(words, run, "running", job="8") == REQUEUE  # a person has queued it anew
    assert attempt(words, run, "running", job="8") == 1


def test_what_ends_before_there_is_a_run_is_not_tried_again(words, capsys):
    before(words, 1)
    assert after(words, 1, JOB) == 1
    assert capsys.readouterr().err == "error: user_config at step 0: srun ended with exit code 1\n"


def test_of_several_stages_the_first_unfinished_one_decides(words, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("{stages: [{name: a, steps: 5}, {name: b, steps: 5}], warmup_steps: 0}")
    words = [*words, str(recipe)]
    first, second = started(words, 0), started(words, 1)
    first.write_status("finished", 5, 5)
    assert attempt(words, second, "preempted") == REQUEUE
    assert attempt(words, second, "finished") == 0
    assert first.status()["state"] == "finished"
