"""Jobs for SkyPilot: the rendered tasks, and what is made of the command's answers.

A program that answers as `sky` 0.14.1 does takes its place here (tests/support/sky.py).
`scripts/check_with_skypilot.py` holds every rendered task, the words of each command, the states and the record of a
job against the real library.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import yaml

from lamella.errors import UserError
from lamella.installation import shipped
from lamella.recipe.files import parse_yaml, read_recipe_text
from lamella.service.context import Service
from lamella.service.executors.executor import Place, Unreachable
from lamella.service.executors.skypilot import SkyPilot, jobs_in, seen_in
from lamella.service.jobs import Submission
from lamella.service.planning import draft
from lamella.service.planning import new_run as from_submission
from lamella.service.queue import Capacity
from lamella.service.store import Run
from support.service import settle, until
from support.sky import Sky

CLUSTERS = shipped("clusters/*.yaml")
PLACE = Place(Path("/shared/lab/artifacts/service"), Path("/shared/lab"), Capacity(0, 2))
TRAINING = {
    "kind": "train",
    "recipe": {"model": "moe", "out": "run", "checkpoint_folder": "s3://lab/run", "data": ["it's $(text)"]},
}
JOBS = {
    "convert": {"kind": "convert", "recipe": {"model": "org/model", "out": "moe"}},
    "evaluate": {"kind": "evaluate", "folder": "-strange name"},
    "export": {"kind": "export", "source": "run", "to": "gguf", "out": "ex port"},
}


def submission(job: dict, **cluster: object) -> Submission:
    if job["kind"] == "train":
        ranks = int(str(cluster.get("nodes", 1))) * max(1, int(str(cluster.get("gpus_per_node", 8))))
        job = job | {"recipe": {"samples_per_step": ranks} | job["recipe"]}
    made = Submission.model_validate({"job": job, "executor": "skypilot", "cluster": cluster})
    made.check()
    return made


def task_of(job: dict, **cluster: object) -> dict:
    return yaml.safe_load(SkyPilot(PLACE).render(draft(submission(job, **cluster), 0, 0), 1)["task.yaml"])


@pytest.mark.parametrize("kind", ["train", *JOBS])
@pytest.mark.parametrize("file", CLUSTERS)
def test_a_task_asks_for_the_machines_of_the_cluster(file: str, kind: str) -> None:
    cluster = parse_yaml(read_recipe_text(Path(file)), file) | {"spot": True, "bucket": "s3://lab/ada"}
    task = task_of((JOBS | {"train": TRAINING})[kind], **cluster)
    assert task["num_nodes"] == (cluster["nodes"] if kind == "train" else 1)
    gpus = cluster["gpus_per_node"] if kind == "train" else 1
    assert task["resources"]["accelerators"] == f"{cluster.get('gpu', 'H100')}:{gpus}"
    assert task["resources"]["use_spot"] is True
    assert subprocess.run(["bash", "-n"], input=task["run"], text=True, check=False).returncode == 0


def test_training_with_its_folder_in_a_bucket() -> None:
    """Machines come and go: the bucket is the folder in which it runs, and pip gets what its URL needs."""
    task = task_of(TRAINING, nodes=2, bucket="s3://lab/ada")
    assert task["file_mounts"] == {"/lamella": {"source": "s3://lab/ada", "mode": "MOUNT_CACHED"}}
    lines = task["run"].splitlines()
    assert lines.index("cd /lamella") < next(i for i, line in enumerate(lines) if "torchrun" in line)
    assert task["setup"].split()[-1] == "s3fs"
    recipe = yaml.safe_load(task["envs"]["LAMELLA_RECIPE"])
    assert recipe["checkpoint_folder"] == "s3://lab/run"
    assert recipe["data"] == ["it's $(text)"]
    assert task["resources"]["job_recovery"] == {"strategy": "EAGER_NEXT_REGION", "max_restarts_on_errors": 3}
    assert "file_mounts" not in task_of(TRAINING)


def test_the_script_of_a_rank_starts_one_process_a_node_without_gpus(tmp_path: Path) -> None:
    """SkyPilot says SKYPILOT_NUM_GPUS_PER_NODE=0 there; torchrun would start none."""
    torchrun = tmp_path / "torchrun"
    torchrun.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\ncat /tmp/recipe.yaml\n')
    torchrun.chmod(0o755)
    for gpus, expected in ((0, 1), (3, 3)):
        task = task_of(TRAINING, nodes=2, gpus_per_node=gpus)
        environment = task["envs"] | {
            "PATH": f"{tmp_path}:/usr/bin:/bin", "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "SKYPILOT_NUM_NODES": "2",
            "SKYPILOT_NODE_RANK": "1", "SKYPILOT_NUM_GPUS_PER_NODE": str(gpus),
        }  # fmt: skip
        run = task["run"].replace("/tmp/recipe.yaml", str(tmp_path / "recipe.yaml"))
        torchrun.write_text(torchrun.read_text().replace("/tmp/recipe.yaml", str(tmp_path / "recipe.yaml")))
        said = subprocess.run(["bash", "-c", run], env=environment, capture_output=True, text=True, check=True).stdout
        assert {"--nnodes=2", "--node-rank=1", "--master-addr=10.0.0.1", f"--nproc-per-node={expected}"} <= set(
            said.splitlines()
        )
        assert yaml.safe_load(said[said.index("samples_per_step") :])["out"] == "run"


@pytest.mark.parametrize(
    ("job", "cluster", "complaint"),
    [
        ({"kind": "train", "recipe": {"out": "run"}}, {}, "checkpoint_folder"),
        ({"kind": "train", "recipe": {"out": "run", "checkpoint_folder": "here"}}, {}, "checkpoint_folder"),
        (JOBS["convert"], {}, "bucket"),
        (JOBS["export"], {}, "bucket"),
        ({"kind": "convert", "recipe": {"out": "/moe"}}, {"bucket": "s3://lab"}, "/moe"),
    ],
)
def test_what_would_go_with_the_machine_is_refused(job: dict, cluster: dict, complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        submission(job, **cluster)


def test_a_job_that_keeps_what_it_makes_is_taken() -> None:
    for job, cluster in (
        (JOBS["convert"], {"bucket": "gs://lab-models"}),
        ({"kind": "convert", "recipe": {"out": "s3://lab/moe"}}, {}),
        (JOBS["evaluate"], {}),
    ):
        submission(job, **cluster)
    with pytest.raises(ValueError, match="pattern"):
        submission(JOBS["convert"], bucket="s3://lab/$(id)")


@pytest.mark.parametrize(
    ("status", "expected", "failure"),
    [
        ("PENDING", ("waiting", None), None),
        ("STARTING", ("waiting", None), None),
        ("RECOVERING", ("waiting", None), None),
        ("ManagedJobStatus.RUNNING", ("running", None), None),
        ("CANCELLING", ("running", None), None),
        ("SUCCEEDED", ("ended", 0), None),
        ("FAILED", ("ended", 1), None),
        ("CANCELLED", ("ended", 143), None),
        ("FAILED_NO_RESOURCE", ("ended", 1), "infra"),
        ("FAILED_PRECHECKS", ("ended", 1), "user_config"),
    ],
)
def test_states(status: str, expected: tuple, failure: str | None) -> None:
    seen = seen_in(status, "no H100 anywhere")
    assert (seen.state, seen.code) == expected
    assert (seen.failure or {}).get("failure") == failure
    if failure:
        assert seen.failure == {"failure": failure, "reason": f"SkyPilot: {status}, no H100 anywhere"}


def test_jobs_are_read_behind_what_sky_says_of_its_own_server() -> None:
    said = "\x1b[2mFailed to connect to SkyPilot API server. Starting a local server.\x1b[0m\n[\n  {}\n]\n"
    assert jobs_in(said) == [{}]
    with pytest.raises(Unreachable, match="no JSON"):
        jobs_in("a new version of SkyPilot is here\n")


@pytest.fixture
def sky(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Sky:
    found = Sky(tmp_path)
    monkeypatch.setenv("PATH", str(found.bin), prepend=":")
    return found


def submit(service: Service, job: dict, **cluster: object) -> str:
    made = submission(job, **cluster)
    return service.store.create(from_submission(made, "ada", 0, 0))[0].id


def look_until(service: Service, run_id: str, *states: str) -> Run:
    return until(service.store, run_id, lambda run: run.state in states, 60, service.scheduler.tick)


def test_the_first_job_of_all_starts_runs_and_ends(service: Service, sky: Sky) -> None:
    """Before it SkyPilot has no controller whose queue could be asked."""
    run_id = submit(service, JOBS["evaluate"])
    look_until(service, run_id, "starting")
    until(service.store, run_id, lambda _: bool(sky.state["jobs"]), 60, service.scheduler.tick)
    sky.write(log="(run-1, pid=7) loading\n")
    sky.becomes("RUNNING")
    look_until(service, run_id, "running")
    sky.write(log="(run-1, pid=7) loading\n(run-1, pid=7) perplexity 9.5\n")
    sky.becomes("SUCCEEDED")
    assert settle(service, run_id).state == "succeeded"
    assert service.place.log(run_id).read_text() == "(run-1, pid=7) loading\n(run-1, pid=7) perplexity 9.5\n"
    assert sky.launches == 1


def test_a_machine_that_is_taken_begins_a_log_anew(service: Service, sky: Sky) -> None:
    run_id = submit(service, JOBS["evaluate"])
    until(service.store, run_id, lambda _: bool(sky.state["jobs"]), 60, service.scheduler.tick)
    sky.becomes("RUNNING")
    sky.write(log="first machine\n")
    until(service.store, run_id, lambda _: service.place.log(run_id).is_file(), 60, service.scheduler.tick)
    sky.becomes("RECOVERING")
    sky.write(log="second machine\n")
    sky.becomes("SUCCEEDED")
    settle(service, run_id)
    assert service.place.log(run_id).read_text() == "first machine\n--- it was started anew\nsecond machine\n"


def test_a_stopped_controller_is_asked_again_and_nothing_is_launched_twice(service: Service, sky: Sky) -> None:
    """It stops when it has had nothing to do for a while; the job has ended by then."""
    run_id = submit(service, JOBS["evaluate"])
    until(service.store, run_id, lambda _: bool(sky.state["jobs"]), 60, service.scheduler.tick)
    sky.becomes("FAILED_PRECHECKS", failure_reason="no cloud is set up")
    sky.write(controller=False)
    run = settle(service, run_id)
    assert (run.state, run.failure) == ("failed", "user_config")
    assert "no cloud is set up" in run.reason
    assert sky.launches == 1


@pytest.mark.parametrize(
    "broken",
    [
        "sky.exceptions.ApiServerConnectionError: Could not connect to SkyPilot API server at http://127.0.0.1:46580.",
        "urllib3.exceptions.MaxRetryError: HTTPSConnectionPool: Max retries exceeded with url: /jobs/queue/v2",
    ],
)
def test_a_server_that_does_not_answer_loses_and_doubles_nothing(service: Service, sky: Sky, broken: str) -> None:
    sky.write(broken=broken)
    run_id = submit(service, JOBS["evaluate"])
    until(service.store, run_id, lambda _: len(sky.state["calls"]) > 2, 60, service.scheduler.tick)
    assert service.store.get(run_id).state == "starting"
    sky.write(broken="")
    until(service.store, run_id, lambda _: bool(sky.state["jobs"]), 60, service.scheduler.tick)
    sky.becomes("RUNNING")
    look_until(service, run_id, "running")
    sky.write(broken=broken)
    before = len(sky.state["calls"])
    until(service.store, run_id, lambda _: len(sky.state["calls"]) > before + 1, 60, service.scheduler.tick)
    assert service.store.get(run_id).state == "running"
    sky.write(broken="")
    sky.becomes("SUCCEEDED")
    assert settle(service, run_id).state == "succeeded"
    assert sky.launches == 1


def test_a_run_is_cancelled(service: Service, sky: Sky) -> None:
    run_id = submit(service, TRAINING)
    until(service.store, run_id, lambda _: bool(sky.state["jobs"]), 60, service.scheduler.tick)
    sky.becomes("RUNNING")
    look_until(service, run_id, "running")
    service.store.wish(run_id, "cancelled")
    assert settle(service, run_id).state == "cancelled"
    assert sky.state["jobs"][0]["status"] == "CANCELLED"


def test_a_job_that_sky_has_forgotten_is_launched_again(service: Service, sky: Sky) -> None:
    run_id = submit(service, JOBS["evaluate"])
    until(service.store, run_id, lambda _: bool(sky.state["jobs"]), 60, service.scheduler.tick)
    sky.write(jobs=[], controller=False)
    until(service.store, run_id, lambda _: bool(sky.state["jobs"]), 60, service.scheduler.tick)
    assert [attempt.failure for attempt in service.store.attempts(run_id)] == ["infra", None]


def test_without_sky_it_is_said(service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    run = settle(service, submit(service, JOBS["evaluate"]))
    assert (run.state, run.failure) == ("failed", "user_config")
    assert "`sky` is not on this machine" in run.reason
