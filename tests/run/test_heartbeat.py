"""Who hangs, in which step, and where: told by the files of ranks that were aborted, and by processes that are gone."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest
import torch

from lamella.recipe.training import Recipe
from lamella.run.folder import RunDir
from lamella.run.heartbeat import Heartbeat, lost_ranks, read_beats, who_hangs
from lamella.run.launch import torchrun_command
from lamella.run.supervise import Supervisor

# Rank 1 hangs in the backward pass of step 3, where it hears no signal; torch's watchdog aborts rank 0.
RANKS = """
import os, signal, sys, time
from pathlib import Path
from lamella.run.folder import RunDir
from lamella.run.heartbeat import Heartbeat, read_beats
run, rank = RunDir(Path(sys.argv[1])), int(os.environ["RANK"])
signal.signal(signal.SIGTERM, signal.SIG_IGN)
heart = Heartbeat(run, rank, every_s=0.1)
for where in ("data", "forward", "backward", "optimizer")[: 4 - rank]:
    heart.enter(where, 3)
while [beat.where for beat in read_beats(run)] != ["optimizer", "backward"]:
    time.sleep(0.1)
if rank == 0:
    run.log_file(0).write_text("[Rank 0] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=7)\\n")
    os.abort()
time.sleep(600)
"""


def new_run(folder: Path) -> tuple[RunDir, Recipe]:
    recipe = Recipe(out=str(folder / "run"), max_restarts_without_progress=0)
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text("{}")
    run = RunDir(folder / "run")
    run.create(recipe, folder / "model")
    return run, recipe


@pytest.mark.slow
def test_an_abort_by_the_watchdog_names_rank_step_and_place(tmp_path, capsys):
    run, recipe = new_run(tmp_path)
    script = tmp_path / "ranks.py"
    script.write_text(RANKS)
    command = torchrun_command(2, [])
    command = [*command[: command.index("-m", 3)], str(script), str(run.path)]
    began = time.monotonic()
    code = Supervisor(recipe, command, dict(os.environ), quiet=True).supervise()
    assert code == 1
    assert time.monotonic() - began < 120  # torchrun alone would wait 600 s for the rank that hangs
    (fault,) = run.events("fault")
    assert (fault["failure"], fault["retryable"]) == ("timeout", True)
    assert fault["reason"].startswith("rank 1 hangs in step 3, backward, for ")
    assert "the others wait in step 3, optimizer; after that rank 0 " in fault["reason"]
    assert fault["reason"] in capsys.readouterr().err
    assert sys.executable in command[0]


def test_what_an_earlier_attempt_said_is_not_this_ones_word(tmp_path):
    from lamella.run.failure import watchdog_spoke

    run, _ = new_run(tmp_path)
    run.log_file(0).write_text("Watchdog caught collective operation timeout\n")
    heart = Heartbeat(run, 0)
    assert not watchdog_spoke(run)
    with run.log_file(0).open("a") as log:
        log.write("Watchdog caught collective operation timeout\n")
    assert watchdog_spoke(run)
    heart.end()


def test_a_rank_that_has_ended_is_not_lost(tmp_path):
    run, _ = new_run(tmp_path)
    child = os.fork()
    if child == 0:
        Heartbeat(run, 1)
        os._exit(0)
    os.waitpid(child, 0)
    heart = Heartbeat(run, 0)
    assert lost_ranks(run) == [1]
    heart.end()
    assert lost_ranks(run) == [1]
    assert [beat.where for beat in read_beats(run)] == ["ended", "start"]


class Event:
    """A marker of a device that comes to it when told."""

    def __init__(self) -> None:
        self.reached = False

    def query(self) -> bool:
        return self.reached


def test_a_device_is_where_its_markers_say_not_where_the_host_is(tmp_path):
    run, _ = new_run(tmp_path)
    heart, events = Heartbeat(run, 0, every_s=0.02), []

    def mark() -> Event:
        events.append(Event())
        return events[-1]

    heart.mark = mark
    for where in ("data", "forward", "backward"):
        heart.enter(where, 5)
    events[0].reached = events[1].reached = True
    deadline = time.monotonic() + 20
    while read_beats(run)[0].place != "step 5, forward":
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert who_hangs(run).startswith("all ranks hang in step 5, forward")
    heart.end()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_that_is_behind_its_host_is_found_behind(tmp_path):
    from lamella.train.trainer import _marker

    run, _ = new_run(tmp_path)
    heart = Heartbeat(run, 0, every_s=0.02)
    heart.mark = _marker
    heart.enter("forward", 1)
    torch.cuda._sleep(4_000_000_000)  # cycles: about two seconds
    began = time.monotonic()
    heart.enter("backward", 1)
    assert time.monotonic() - began < 0.5  # nothing was waited for
    time.sleep(0.3)
    assert read_beats(run)[0].place == "step 1, forward"
    torch.cuda.synchronize()
    time.sleep(0.3)
    assert read_beats(run)[0].place == "step 1, backward"
    heart.end()
