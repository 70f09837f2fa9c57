"""`lamella train` on 2 ranks: one run is killed, hung and signalled in many ways, and ends with the losses of a run
that nothing happened to."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from pydoc_data import topics

import psutil
import pytest

from lamella.data.prepare import prepare
from lamella.run.effective import effective_time
from lamella.run.folder import RunDir
from lamella.run.launch import torchrun_command
from support.models import trainable_moe

pytestmark = [pytest.mark.slow, pytest.mark.faults]
STEPS = 40
TIMEOUT_S = 5
FAULTS = [
    "kill:rank=1,step=6,attempt=0",
    "kill-in-save:rank=1,step=8,attempt=1",
    "kill-agent:rank=0,step=10,attempt=2",
    "hang:rank=1,step=14,attempt=3",
    "signal:rank=1,signal=USR1,step=18,attempt=4",
    "raise:rank=0,step=22,attempt=5",
    # the next attempts are slow enough to be met while they run
    "slow:rank=0,seconds=0.3,attempt=6",
    "kill:rank=0,step=23-30,attempt=7",
    "slow:rank=0,seconds=0.3,attempt=8",
]


def command(folder: Path, name: str, **changes) -> list[str]:
    settings = {
        "model": folder / "model", "out": folder / name, "data": f"[{folder / 'text.md'}]", "seq_len": 32,
        "steps": STEPS, "samples_per_step": 4, "heldout_samples": 0, "tensorboard": "false", "threads_per_rank": 1,
        "save_every_steps": 4, "checkpoint_async": "true", "torchtitan.comm.train_timeout_seconds": TIMEOUT_S,
    } | changes  # fmt: skip
    words = [f"{key}={value}" for key, value in settings.items()]
    return [sys.executable, "-m", "lamella.cli", "train", "--nproc", "2", *words]


def train(folder: Path, name: str, faults: str = "", **changes) -> subprocess.CompletedProcess[str]:
    environment = environment_of(folder, faults)
    return subprocess.run(
        command(folder, name, **changes), env=environment, capture_output=True, text=True, timeout=400, check=False
    )


def environment_of(folder: Path, faults: str) -> dict[str, str]:
    return os.environ | {"LAMELLA_CACHE": str(folder / "cache"), "LAMELLA_FAULT": faults}


def meet(folder: Path, name: str, step: int) -> subprocess.Popen[str]:
    """Start training and wait until it has logged the step."""
    environment = environment_of(folder, ";".join(FAULTS))
    process = subprocess.Popen(
        command(folder, name), env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    run = RunDir(folder / name)
    deadline = time.monotonic() + 120
    while not any(line["step"] >= step for line in run.metrics()):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, f"step {step} was not reached"
        time.sleep(0.1)
    return process


def ranks_of(folder: Path) -> list[psutil.Process]:
    """Everything alive that works for a run in this folder."""
    mine = []
    for process in psutil.process_iter(["cmdline", "status"]):
        words = " ".join(process.info["cmdline"] or [])
        if f"out={folder}" in words and process.info["status"] != psutil.STATUS_ZOMBIE:
            mine.append(process)
    return mine


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The unharmed run, then the harmed one up to its end; what each call said."""
    folder = tmp_path_factory.mktemp("supervised")
    trainable_moe(folder / "model")
    (folder / "text.md").write_text("\n".join(topics.topics[name] for name in sorted(topics.topics)[:20]))
    said = {"unharmed": train(folder, "unharmed")}
    said["faults"] = train(folder, "harmed", ";".join(FAULTS))

    process = meet(folder, "harmed", 25)
    process.send_signal(signal.SIGUSR1)  # torchrun is handed it
    _, errors = process.communicate(timeout=120)
    said["signal"] = subprocess.CompletedProcess([], process.returncode, "", errors)
    said["status after the signal"] = RunDir(folder / "harmed").status()

    said["capped"] = train(folder, "harmed", ";".join(FAULTS), max_restarts_without_progress=0)

    process = meet(folder, "harmed", RunDir(folder / "harmed").status()["step"] + 3)
    process.kill()
    process.communicate()
    time.sleep(5)
    said["orphans"] = ranks_of(folder)
    said["last"] = train(folder, "harmed")
    return folder, said


def test_every_attempt_continued_the_same_run_to_the_bit(runs):
    folder, said = runs
    assert said["unharmed"].returncode == said["last"].returncode == 0, said["last"].stderr
    lines = {name: list(RunDir(folder / name).metrics()) for name in ("unharmed", "harmed")}
    assert [line["step"] for line in lines["harmed"]] == [line["step"] for line in lines["unharmed"]]
    a, b = ([(line["loss"], line["grad_norm"]) for line in lines[name] if line["step"]] for name in lines)
    assert a == b
    assert RunDir(folder / "harmed").status()["state"] == "finished"


def test_each_fault_has_its_class_and_its_cause(runs):
    folder, _ = runs
    faults = RunDir(folder / "harmed").events("fault")
    assert [(f["attempt"], f["failure"]) for f in faults[:6]] == [
        (0, "infra"), (1, "infra"), (2, "infra"), (3, "timeout"), (4, "preempted"), (5, "user_config")
    ]  # fmt: skip
    killed, in_save, agent, hung, _, raised = (f["reason"] for f in faults[:6])
    assert killed.startswith("rank 1 was killed by SIGKILL")
    assert in_save.startswith("rank 1 was killed by SIGKILL")
    assert agent == "torchrun was killed by SIGKILL"
    assert hung.startswith("rank 1 (step 14, data) did not arrive in time")
    assert raised == "ValueError: fault on demand"


def test_the_cause_of_a_failure_is_the_last_thing_said(runs):
    """Rank 0 alone had an exception; rank 1 lost its peer because of it. Such a failure would come again."""
    folder, said = runs
    assert said["faults"].returncode == 1
    *_, cause, more = said["faults"].stderr.splitlines()
    assert cause == "error: user_config at step 22: ValueError: fault on demand"
    assert more == f"(more in {RunDir(folder / 'harmed').log_file(0)})"


def test_an_unfinished_save_is_not_used(runs):
    """Attempt 1 died in the save of step 8; attempt 2 began at step 4. Saves run beside the steps: that of step 4 may
    not have ended when attempt 0 was killed in step 6, and attempt 1 then saved it."""
    folder, _ = runs
    run = RunDir(folder / "harmed")
    began = [e["step"] for e in run.events("running")]
    assert began[0] == 0
    assert began[1] in (0, 4)
    assert began[2] == 4
    assert 8 not in [e["step"] for e in run.events("save") if e["time"] < run.events("start")[2]["time"]]
    assert not list(run.checkpoints.glob("*.tmp"))


def test_a_signal_to_one_rank_loses_no_step(runs):
    folder, said = runs
    run = RunDir(folder / "harmed")
    (preempted,) = [f for f in run.events("fault") if f["attempt"] == 4]
    assert preempted["step"] == 18
    assert run.events("running")[5]["step"] == 18
    assert said["signal"].returncode == 128 + signal.SIGUSR1, said["signal"].stderr
    status = said["status after the signal"]
    assert (status["state"], status["failure"], status["retryable"]) == ("preempted", "preempted", True)
    assert run.events("running")[7]["step"] == status["step"]


def test_too_many_attempts_without_a_checkpoint_end_it(runs):
    said = runs[1]
    assert said["capped"].returncode == 1
    last = said["capped"].stderr.splitlines()
    assert any("after 0 restarts without a new checkpoint: rank 0 was killed by SIGKILL" in line for line in last)
    assert "ChildFailedError" not in said["capped"].stderr  # torchrun's own pages say less


def test_nothing_outlives_a_killed_supervisor(runs):
    assert runs[1]["orphans"] == []


def test_the_effective_time_is_reported(runs):
    folder, said = runs
    measured = effective_time(RunDir(folder / "harmed"))
    assert measured["restarts"] == len(RunDir(folder / "harmed").events("start")) - 1
    assert 0 < measured["effective_s"] < measured["wall_s"]
    assert f"effective training time {measured['share']:.1%}" in said["last"].stderr


def test_data_cut_under_running_ranks_are_named_or_skipped_by_policy(runs):
    folder, _ = runs
    (folder / "texts").mkdir()
    for name in sorted(topics.topics)[:20]:
        (folder / "texts" / f"{name}.md").write_text(topics.topics[name])
    prepare([str(folder / "texts")], folder / "model", folder / "prepared", unit_bytes=20_000)
    first, second, *_ = sorted((folder / "prepared").glob("train-*.shard"))
    settings = {"data": f"[{folder / 'prepared'}]", "steps": 12}

    skipped = train(folder, "skipping", f"cut-file:step=2,file={second}", on_bad_data="skip", **settings)
    assert skipped.returncode == 0, skipped.stderr
    assert [line["step"] for line in RunDir(folder / "skipping").metrics()][-12:] == list(range(1, 13))
    logs = "".join(RunDir(folder / "skipping").log_file(rank).read_text() for rank in (0, 1))
    assert re.search(rf"sample \d+ has nothing to predict: {second}, offset \d+: the file ends there", logs)

    refused = train(folder, "refused", **settings)
    assert refused.returncode == 2
    assert re.match(rf"error: {second}, offset \d+: it has \d+ bytes of \d+; bring it back", refused.stderr)

    second.unlink()
    prepare([str(folder / "texts")], folder / "model", folder / "prepared", unit_bytes=20_000)  # makes it again
    failed = train(folder, "failing", f"cut-file:step=2,file={first}", **settings)
    assert failed.returncode == 1
    status = RunDir(folder / "failing").status()
    assert (status["state"], status["failure"], status["retryable"]) == ("failed", "data", False)
    assert re.search(rf"error: data at step \d+: {first}, offset \d+: the file ends there", failed.stderr)


def test_a_port_in_use_is_what_the_user_reads(runs, tmp_path):
    folder, _ = runs
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        ours = torchrun_command(1, command(folder, "port")[5:])
        ours[ours.index("--standalone")] = f"--master-port={taken.getsockname()[1]}"
        ours.insert(3, "--master-addr=127.0.0.1")
        done = subprocess.run(ours, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode != 0
    assert "address already in use" in done.stderr.lower()


def test_another_world_size_is_refused_with_what_would_do(runs):
    done = train(runs[0], "world", samples_per_step=3)
    assert done.returncode == 2
    assert done.stderr.startswith("error: samples_per_step 3 cannot be shared among 2 ranks")


def test_a_folder_that_cannot_be_written_is_refused_before_anything_starts(runs):
    done = train(runs[0], "x", out="/sys/lamella-run")
    assert done.returncode == 2
    assert "cannot be written" in done.stderr
