"""torchrun itself on 3 ranks: a run is stopped by a signal, continued by `lamella train`, and is then finished."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from pydoc_data import topics

import pytest
import torch

from lamella.run.folder import RunDir
from support.models import trainable_moe

pytestmark = pytest.mark.slow
TRAIN = Path(__file__).parents[2] / "train.py"
STEPS = 400


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    folder = tmp_path_factory.mktemp("launch")
    trainable_moe(folder / "model")
    (folder / "text.md").write_text("\n".join(topics.topics[name] for name in sorted(topics.topics)[:50]))
    words = [f"model={folder / 'model'}", f"out={folder / 'run'}", f"data=[{folder / 'text.md'}]", "seq_len=32"]
    words += [
        f"steps={STEPS}",
        "samples_per_step=3",
        "heldout_samples=3",
        "heldout_every_steps=1000",
        "tensorboard=false",
    ]
    environment = os.environ | {"LAMELLA_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    return folder, words, environment


def wait_for_step(run: RunDir, step: int, process: subprocess.Popen) -> None:
    for _ in range(1200):
        if any(line["step"] >= step for line in run.metrics()):
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    raise AssertionError("no step in 2 minutes")


@pytest.mark.faults
def test_signal_saves_and_resume_finishes(setting):
    folder, words, environment = setting
    run = RunDir(folder / "run")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=3", str(TRAIN), *words]
    process = subprocess.Popen(torchrun, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for_step(run, 3, process)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=120)
    status = run.status()
    assert status["state"] == "preempted"
    assert 3 <= status["step"] < STEPS
    assert run.steps() == [status["step"]]  # no step is lost

    stop = status["step"] + 5
    command = [sys.executable, "-m", "lamella.cli", "train", "--nproc", "3", *words, f"stop_at_step={stop}"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    steps = [line for line in done.stdout.splitlines() if line.startswith("step ")]
    assert steps[0].startswith(f"step {status['step'] + 1}/{STEPS}  loss ")
    assert done.stdout.splitlines()[-1] == f"stopped: {run.path} at step {stop} of {STEPS}"
    assert [line["step"] for line in run.metrics()] == list(range(stop + 1))

    # a run that is not to be resumed is left as it is
    before = {path: path.stat().st_mtime_ns for path in run.path.rglob("*") if path.is_file()}
    command = [*torchrun, "resume=never"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode != 0
    assert done.stderr.count("holds a run already; set out= to another folder") == 1
    assert before == {path: path.stat().st_mtime_ns for path in run.path.rglob("*") if path.is_file()}


@pytest.mark.faults
def test_a_signal_before_the_first_step_ends_all_ranks_at_once(setting):
    """Rank 0 converts while the others wait: with nothing to save, none may wait for one that is gone."""
    folder, words, environment = setting
    place = folder / "early"
    place.mkdir()
    words = [word for word in words if not word.startswith(("model=", "out="))]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=3", str(TRAIN)]
    process = subprocess.Popen(
        [*torchrun, *words], env=environment, cwd=place, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline().startswith("There is no artifacts/moe yet"), process.communicate()
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=20)  # torchrun would kill what is left after 30 s
    assert process.returncode != 0
    assert [path.name for path in place.glob("artifacts/*")] == []


ONLY_THE_RANKS_FIND = {
    "torchtitan.training.gc_freqq=3": (
        "error: the recipe's torchtitan section has errors:\n"
        "  unknown key 'training.gc_freqq' (did you mean 'gc_freq'?)\n"
    ),
    **{
        f"offload={kind}": (
            f"error: offload: {kind} moves a GPU's weights to main memory, and there is no GPU here; "
            "set offload: none\n"
        )
        for kind in ("cpu", "frozen")
    },
}


@pytest.mark.parametrize("bad", ONLY_THE_RANKS_FIND)
def test_what_only_the_ranks_find_is_one_line_too(setting, bad):
    if bad.startswith("offload=") and torch.cuda.is_available():
        pytest.skip("there is a GPU to offload from")
    folder, words, environment = setting
    words = [*words, f"out={folder / 'other'}", "samples_per_step=2", bad]
    command = [sys.executable, "-m", "lamella.cli", "train", "--nproc", "2", *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 2
    assert done.stderr == ONLY_THE_RANKS_FIND[bad]
    assert not (folder / "other").exists()
