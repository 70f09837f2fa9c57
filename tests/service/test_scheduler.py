"""What is desired against what is observed: real processes, killed in every way; no run is lost, doubled or orphaned.

The quick tests run `tests/support/small_job.py` in the place of `lamella train`; the slow one trains.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from pathlib import Path

import psutil
import pytest
from sqlalchemy import update

from lamella.run.folder import RunDir
from lamella.service import progress
from lamella.service import scheduler as scheduling
from lamella.service.context import Service
from lamella.service.executors import local
from lamella.service.executors.executor import Place, Seen, Unreachable
from lamella.service.jobs import Submission
from lamella.service.planning import new_run as from_submission
from lamella.service.queue import claim
from lamella.service.scheduler import Scheduler
from lamella.service.schema import hosts
from lamella.service.store import Attempt, Run
from support import small_job
from support.service import service_in, settle, training, until

pytestmark = [pytest.mark.slow, pytest.mark.faults]
JOB = Path(small_job.__file__)


@pytest.fixture
def service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Service:
    """One whose training jobs count steps in place of training."""

    def small(run: Run, place: Place) -> list[str]:
        return [sys.executable, str(JOB), str(place.folder(run.id) / "recipe.yaml")]

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(local, "command_of", small)
    monkeypatch.setattr(Scheduler, "_check_folders", lambda *_: None)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(JOB.parents[1]), *sys.path]))
    return service_in(tmp_path / "home")


def submit(service: Service, **recipe: object) -> str:
    out = f"run-{time.monotonic_ns()}"
    submission = Submission.model_validate(training(Path("m"), Path("t"), Path(out), **recipe))
    place = str(Path(out).resolve())
    return service.store.create(from_submission(submission, "ada", 0, 1, place))[0].id


def directory(service: Service, run_id: str) -> RunDir:
    return RunDir(Path(service.store.get(run_id).out or ""))


def processes(run_id: str) -> list[psutil.Process]:
    """Everything that was started for a run and lives."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(local.JOB_ID) == run_id and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found


def at_step(service: Service, run_id: str, step: int) -> None:
    """Wait until the job has counted so far."""
    deadline = time.monotonic() + 60
    while not (steps := counted(service, run_id)) or steps[-1][0] < step:
        assert time.monotonic() < deadline, service.store.get(run_id)
        service.scheduler.tick()
        time.sleep(0.05)


def counted(service: Service, run_id: str) -> list[tuple[int, int]]:
    """(step, process) in the order in which they were counted."""
    file = directory(service, run_id).log / "steps.txt"
    lines = file.read_text().splitlines() if file.is_file() else []
    return [(int(step), int(pid)) for step, pid, _ in (line.split() for line in lines)]


def check_one_after_the_other(service: Service, run_id: str, steps: int) -> None:
    """No two processes counted at once, and the last step was counted once."""
    pids = [pid for _, pid in counted(service, run_id)]
    changes = [pid for before, pid in zip([0, *pids], pids, strict=False) if before != pid]
    assert len(changes) == len(set(changes))
    assert [step for step, _ in counted(service, run_id)].count(steps) == 1
    assert all_end(run_id)


def all_end(run_id: str) -> bool:
    """Nothing of a run lives; whoever wrote that it ended gets a moment to end itself."""
    return not psutil.wait_procs(processes(run_id), timeout=5)[1]


def events(service: Service, run_id: str) -> list[str]:
    return [event.event for event in service.store.events(run_id=run_id)]


def test_a_run_from_queue_to_success(service: Service) -> None:
    run_id = submit(service)
    run = settle(service, run_id)
    assert run.state == "succeeded"
    assert run.progress["progressPercentage"] == 100
    assert run.progress["metrics"]["loss"] == pytest.approx(1 / 6)
    assert events(service, run_id)[:3] == ["submitted", "queued", "start"]
    assert events(service, run_id).count("save") == 3  # what the trainer reports is there, too
    check_one_after_the_other(service, run_id, 6)


def test_another_scheduler_adopts_what_runs(service: Service, tmp_path: Path) -> None:
    """Case 18: the first scheduler is gone without a word; its process goes on, and is not started again."""
    run_id = submit(service, steps=40)
    at_step(service, run_id, 2)
    (first,) = {pid for _, pid in counted(service, run_id)}
    again = service_in(tmp_path / "home")
    assert settle(again, run_id).state == "succeeded"
    assert {pid for _, pid in counted(again, run_id)} == {first}
    assert [attempt.number for attempt in again.store.attempts(run_id)] == [1]


def test_a_scheduler_that_dies_between_taking_and_starting(service: Service, tmp_path: Path) -> None:
    """The run was taken, and nobody says that it was started; two others start it, once."""
    run_id = submit(service, steps=20)
    service.store.move(service.store.get(run_id), "queued", "queued")
    taken = claim(service.store, service.scheduler.host, service.place.capacity)
    assert taken is not None
    service.scheduler.executors["local"].submit(*taken)  # the handle was not stored
    others = [service_in(tmp_path / "home") for _ in range(2)]
    run = until(
        service.store,
        run_id,
        lambda run: run.is_over,
        60,
        lambda: [other.scheduler.tick() for other in others] and None,
    )
    assert run.state == "succeeded"
    assert len({pid for _, pid in counted(service, run_id)}) == 1
    check_one_after_the_other(service, run_id, 20)


@pytest.mark.parametrize("who", ["supervisor", "command", "all"])
def test_killed_processes_are_seen_and_the_run_goes_on(service: Service, who: str) -> None:
    run_id = submit(service, steps=30)
    at_step(service, run_id, 5)
    found = {("attempt" if "lamella.service.attempt" in p.cmdline() else "command"): p for p in processes(run_id)}
    for name, process in found.items():
        if who == "all" or (who == "supervisor") == (name == "attempt"):
            process.kill()
    run = settle(service, run_id)
    assert (run.state, run.attempt) == ("succeeded", 2)
    assert [attempt.failure for attempt in service.store.attempts(run_id)] == ["infra", None]
    check_one_after_the_other(service, run_id, 30)


def test_a_crash_loop_ends_at_the_cap_and_says_its_class(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """Case 21: each attempt dies at the same step, without a new checkpoint."""
    monkeypatch.setenv("SMALL_JOB_CRASH_AT", "3")
    run_id = submit(service, save_every_steps=2)
    run = settle(service, run_id)
    assert (run.state, run.failure) == ("failed", "infra")
    assert run.attempt == 1 + 1 + scheduling.ATTEMPTS_WITHOUT_PROGRESS  # the first one did save
    assert run.fruitless == scheduling.ATTEMPTS_WITHOUT_PROGRESS + 1
    monkeypatch.delenv("SMALL_JOB_CRASH_AT")
    assert service.store.retry(run_id).fruitless == 0
    assert settle(service, run_id).state == "succeeded"


def test_progress_between_crashes_is_no_loop(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SMALL_JOB_STEP_S", "0.1")
    run_id = submit(service, steps=24, save_every_steps=2)
    for step in (4, 8, 12, 16, 20):
        at_step(service, run_id, step)
        for process in processes(run_id):
            process.kill()
    run = settle(service, run_id)
    assert (run.state, run.attempt) == ("succeeded", 6)


def test_pause_and_resume(service: Service) -> None:
    run_id = submit(service, steps=30)
    at_step(service, run_id, 5)
    assert service.store.wish(run_id, "paused").state == "pausing"
    until(service.store, run_id, lambda run: run.state == "paused", 30, service.scheduler.tick)
    paused_at = counted(service, run_id)[-1][0]
    assert 5 <= paused_at < 30
    assert all_end(run_id)
    service.scheduler.tick()
    assert service.store.get(run_id).state == "paused"
    service.store.wish(run_id, "running")
    assert settle(service, run_id).state == "succeeded"
    assert [step for step, _ in counted(service, run_id)] == list(range(1, 31))  # nothing lost, nothing twice


@pytest.mark.parametrize("when", ["validating", "queued", "taken", "starting", "running", "ended"])
def test_cancel_at_any_time(service: Service, when: str) -> None:
    """Case 20."""
    run_id = submit(service, steps=6 if when == "ended" else 400)
    if when == "queued":
        service.store.move(service.store.get(run_id), "queued", "queued")
    elif when == "taken":
        service.scheduler.tick()
    elif when == "starting":
        until(service.store, run_id, lambda run: bool(processes(run_id)), 30, service.scheduler.tick)
    elif when == "running":
        at_step(service, run_id, 3)
    elif when == "ended":
        settle(service, run_id)
    for _ in range(3):
        service.store.wish(run_id, "cancelled")
    run = settle(service, run_id)
    assert run.state == ("succeeded" if when == "ended" else "cancelled")
    ends = [e.state for e in service.store.events(run_id=run_id) if e.state in ("succeeded", "cancelled", "failed")]
    assert len([end for end, before in zip(ends, [None, *ends], strict=False) if end != before]) == 1
    assert all_end(run_id)


def test_a_process_that_does_not_end_is_killed(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduling, "STOP_S", 0.5)
    run_id = submit(service, steps=400)
    at_step(service, run_id, 2)
    for process in processes(run_id):
        process.send_signal(signal.SIGSTOP)
    service.store.wish(run_id, "cancelled")
    assert settle(service, run_id).state == "cancelled"
    assert all_end(run_id)


def test_what_an_earlier_run_reported_in_the_folder_is_not_this_ones(service: Service) -> None:
    first = submit(service)
    settle(service, first)
    out = directory(service, first)
    submission = Submission.model_validate(training(Path("m"), Path("t"), out.path, steps=8))
    second = service.store.create(from_submission(submission, "ada", 0, 1, str(out.path)))[0].id
    assert settle(service, second).state == "succeeded"
    assert events(service, second).count("save") == 1


def silence(service: Service, host: str) -> None:
    """Nobody has heard of a host for long."""
    with service.store.database.writing() as connection:
        connection.execute(update(hosts).where(hosts.c.host == host).values(looked=time.time() - 1000))


def look_now(scheduler: Scheduler) -> None:
    scheduler._said = -1e9
    scheduler.tick()


def test_a_run_of_a_host_that_vanished_is_lost_and_found_again(service: Service, tmp_path: Path) -> None:
    """Two hosts share a store; the scheduler of one is not heard of, while its processes go on."""
    run_id = submit(service, steps=40)
    service.scheduler.host = "vanished"
    at_step(service, run_id, 2)
    other = service_in(tmp_path / "home").scheduler
    other.host = "another"
    look_now(other)
    assert service.store.get(run_id).state == "running"
    silence(service, "vanished")
    look_now(other)
    run = service.store.get(run_id)
    assert run.state == "lost"
    assert "vanished is not heard of" in run.reason
    look_now(service.scheduler)  # it was only away
    assert service.store.get(run_id).state == "running"
    look_now(other)
    assert settle(service, run_id).state == "succeeded"
    assert events(service, run_id).count("found") == 1
    check_one_after_the_other(service, run_id, 40)


def test_a_run_of_a_host_that_vanished_is_cancelled_by_another_and_ended_when_it_comes_back(
    service: Service, tmp_path: Path
) -> None:
    run_id = submit(service, steps=400)
    service.scheduler.host = "vanished"
    at_step(service, run_id, 2)
    other = service_in(tmp_path / "home").scheduler
    other.host = "another"
    silence(service, "vanished")
    look_now(other)
    assert service.store.wish(run_id, "cancelled").state == "cancelling"
    look_now(other)
    run = service.store.get(run_id)
    assert run.state == "cancelled"
    assert "may run there still" in run.reason
    assert processes(run_id)
    look_now(service.scheduler)
    assert all_end(run_id)
    assert service.store.attempts(run_id)[0].ended is not None


def test_what_runs_on_a_cluster_is_looked_after_by_another_host(service: Service, tmp_path: Path) -> None:
    """The attempt goes on, as the same one: nothing is handed to the cluster a second time."""

    class Cluster(local.Local):
        """Runs jobs here, and is called slurm."""

        submitted = 0

        def submit(self, run: Run, attempt: Attempt) -> dict:
            Cluster.submitted += 1
            return super().submit(run, attempt)

    submission = Submission.model_validate(training(Path("m"), Path("t"), Path("far"), steps=30, samples_per_step=8))
    submission = submission.model_copy(update={"executor": "slurm"})
    run_id = service.store.create(from_submission(submission, "ada", 0, 0, str(Path("far").resolve())))[0].id
    for scheduler in (service.scheduler, other := service_in(tmp_path / "home").scheduler):
        scheduler.executors["slurm"] = Cluster(service.place)
    service.scheduler.host, other.host = "vanished", "another"
    at_step(service, run_id, 2)
    silence(service, "vanished")
    look_now(other)
    assert service.store.attempts(run_id)[0].host == "another"
    run = until(service.store, run_id, lambda run: run.is_over, 60, other.tick)
    assert (run.state, run.attempt, Cluster.submitted) == ("succeeded", 1, 1)
    assert "adopted" in events(service, run_id)


def test_a_cluster_that_does_not_answer_is_waited_for(service: Service) -> None:
    """No answer is no news: nothing is started twice, and after a while the run is lost until it is heard of."""
    answers = True

    class Cluster(local.Local):
        """Runs jobs here, is called slurm, and does not always answer."""

        def look(self, run: Run, attempt: Attempt) -> Seen:
            return super().look(run, attempt) if answers else Seen("unknown", reason="no route to the controller")

        def submit(self, run: Run, attempt: Attempt) -> dict:
            if not answers:
                raise Unreachable("no route to the controller")
            return super().submit(run, attempt)

    service.scheduler.executors["slurm"] = Cluster(service.place)
    submission = Submission.model_validate(training(Path("m"), Path("t"), Path("far"), steps=60, samples_per_step=8))
    submission = submission.model_copy(update={"executor": "slurm"})
    answers = False
    run_id = service.store.create(from_submission(submission, "ada", 0, 0, str(Path("far").resolve())))[0].id
    until(service.store, run_id, lambda run: run.state == "starting", 20, service.scheduler.tick)
    answers = True
    at_step(service, run_id, 2)
    until(service.store, run_id, lambda run: run.state == "running", 20, service.scheduler.tick)
    answers = False
    with pytest.MonkeyPatch.context() as impatient:
        impatient.setattr(progress, "STALE_S", 0.5)
        lost = until(service.store, run_id, lambda run: run.state == "lost", 20, service.scheduler.tick)
    assert "no route to the controller" in lost.reason
    answers = True
    run = until(service.store, run_id, lambda run: run.is_over, 60, service.scheduler.tick)
    assert (run.state, run.attempt) == ("succeeded", 1)
    check_one_after_the_other(service, run_id, 60)


def test_two_homes_on_one_machine_do_not_start_each_others_runs(service: Service, tmp_path: Path) -> None:
    """They share a store: what one has started, the other one cannot see, and so must leave alone."""
    run_id = submit(service, steps=40)
    at_step(service, run_id, 2)
    elsewhere = service_in(tmp_path / "elsewhere", store=service.store.database.url).scheduler
    assert elsewhere.host != service.scheduler.host
    for _ in range(3):
        look_now(elsewhere)
    assert service.store.get(run_id).state == "running"
    silence(service, service.scheduler.host)
    look_now(elsewhere)
    assert service.store.get(run_id).state == "lost"
    assert settle(service, run_id).state == "succeeded"
    check_one_after_the_other(service, run_id, 40)
    assert len(service.store.attempts(run_id)) == 1


def test_what_a_version_started_that_named_no_home_is_found_again(
    service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_id = submit(service, steps=40)
    new_name, service.scheduler.host = service.scheduler.host, socket.gethostname()
    at_step(service, run_id, 2)
    service.scheduler.host = new_name
    silence(service, socket.gethostname())
    look_now(service.scheduler)
    assert settle(service, run_id).state == "succeeded"
    assert events(service, run_id).count("adopted") == 1
    check_one_after_the_other(service, run_id, 40)
