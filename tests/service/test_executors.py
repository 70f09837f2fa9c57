"""What executors render, held against the schemas that others publish."""

from __future__ import annotations

import json
import subprocess
from dataclasses import replace
from pathlib import Path

import kubernetes_validate
import pytest
import yaml
from kubeflow_trainer_api.models import TrainerV1alpha1TrainJob

from lamella.installation import shipped
from lamella.recipe.files import parse_yaml, read_recipe_text
from lamella.service.executors import EXECUTORS
from lamella.service.executors import kubernetes as on_kubernetes
from lamella.service.executors.executor import Place
from lamella.service.jobs import Submission
from lamella.service.planning import draft
from lamella.service.queue import Capacity
from lamella.service.store import Run

CLUSTERS = shipped("clusters/*.yaml")
PLACE = Place(Path("/shared/lab/artifacts/service"), Path("/shared/lab"), Capacity(0, 2))
JOBS = {
    "convert": {"kind": "convert", "recipe": {"model": "org/model", "out": "moe"}},
    "evaluate": {"kind": "evaluate", "folder": "-strange name", "data": "python-docs"},
    "export": {
        "kind": "export",
        "source": "run",
        "to": "gguf",
        "out": "ex port",
        "dtype": "BF16",
        "step": 5,
        "check": False,
    },
}


def submission(executor: str, cluster: dict, job: dict) -> Run:
    made = Submission.model_validate({"job": job, "executor": executor, "cluster": cluster, "name": "x"})
    made.check()
    return replace(draft(made, 0, 0), user="ada@example.org")


def trained_on(executor: str, file: str, **more: object) -> tuple[Run, dict]:
    cluster = parse_yaml(read_recipe_text(Path(file)), file) | more
    ranks = cluster["nodes"] * cluster["gpus_per_node"]
    recipe = {"model": "m", "out": "run", "samples_per_step": ranks, "data": ["it's $(text)"], "seq_len": 64}
    return submission(executor, cluster, {"kind": "train", "recipe": recipe}), cluster


def rendered(run: Run) -> dict[str, str]:
    return EXECUTORS[run.executor](PLACE).render(run, 1)


@pytest.mark.parametrize("file", CLUSTERS)
def test_slurm_scripts(file: str) -> None:
    run, cluster = trained_on("slurm", file, account="lab")
    files = rendered(run)
    script = files["job.sbatch"]
    assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0
    options = dict(
        line.removeprefix("#SBATCH --").partition("=")[::2]
        for line in script.splitlines()
        if line.startswith("#SBATCH")
    )
    assert options["nodes"] == str(cluster["nodes"])
    gpus = str(cluster["gpus_per_node"])
    assert options["gpus-per-node"] == (f"{cluster['gpu']}:{gpus}" if "gpu" in cluster else gpus)
    assert options["time"] == cluster["time"]
    assert (options["account"], options["signal"]) == ("lab", "TERM@300")
    assert "requeue" in options
    assert script.count("\nsrun ") == 1
    assert "-m lamella.worker" in script
    assert "localhost" not in script
    assert yaml.safe_load(files["recipe.yaml"])["data"] == ["it's $(text)"]


@pytest.mark.parametrize("kind", JOBS)
def test_other_jobs_on_slurm_quote_what_was_said(kind: str) -> None:
    script = rendered(submission("slurm", {"gpus_per_node": 0}, JOBS[kind]))["job.sbatch"]
    assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0
    assert "#SBATCH --no-requeue" in script
    last = script.strip().splitlines()[-1]
    words = subprocess.run(
        ["bash", "-c", f"srun() {{ printf '%s\\n' \"$@\"; }}; {last}"], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert words[4] == kind
    if kind == "evaluate":
        assert words[-2:] == ["--", "-strange name"]
    if kind == "export":
        assert "--out=ex port" in words
        assert {"--step=5", "--no-check", "--dtype=BF16", "--to=gguf"} <= set(words)


@pytest.mark.parametrize("volume", [None, "shared-data"])
@pytest.mark.parametrize("file", CLUSTERS)
def test_train_jobs_are_what_kubeflow_knows(file: str, volume: str | None) -> None:
    """Its models take unknown keys silently: what they give back must be what was given."""
    run, cluster = trained_on("kubernetes", file, volume=volume, namespace="team")
    manifest = yaml.safe_load(rendered(run)["job.yaml"])
    made = TrainerV1alpha1TrainJob.from_dict(manifest)
    assert made is not None
    assert json.loads(made.to_json()) == manifest
    trainer = manifest["spec"]["trainer"]
    assert (trainer["numNodes"], trainer["numProcPerNode"]) == (cluster["nodes"], cluster["gpus_per_node"])
    assert trainer["resourcesPerNode"]["limits"]["nvidia.com/gpu"] == str(cluster["gpus_per_node"])
    recipe = next(entry["value"] for entry in trainer["env"] if entry["name"] == "LAMELLA_RECIPE")
    assert yaml.safe_load(recipe)["out"] == "run"
    assert ("runtimePatches" in manifest["spec"]) == (volume is not None)


@pytest.mark.parametrize("kind", JOBS)
def test_other_jobs_on_kubernetes_pass_the_published_schema(kind: str) -> None:
    run = submission("kubernetes", {"volume": "shared-data"}, JOBS[kind])
    manifest = yaml.safe_load(rendered(run)["job.yaml"])
    kubernetes_validate.validate(manifest, "1.37", strict=True)
    manifest["spec"]["backOffLimit"] = 1
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(manifest, "1.37", strict=True)


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        ({}, ("waiting", None)),
        ({"jobsStatus": [{"name": "node", "active": 2}]}, ("running", None)),
        ({"active": 1}, ("running", None)),
        ({"conditions": [{"type": "Complete", "status": "True"}]}, ("ended", 0)),
        ({"conditions": [{"type": "Failed", "status": "True", "reason": "x"}]}, ("ended", 1)),
        ({"conditions": [{"type": "Suspended", "status": "True"}]}, ("ended", 143)),
        ({"conditions": [{"type": "Suspended", "status": "False"}], "active": 1}, ("running", None)),
    ],
)
def test_states_of_kubernetes(status: dict, expected: tuple) -> None:
    seen = on_kubernetes.seen_in(status)
    assert (seen.state, seen.code) == expected


def test_no_word_of_a_submission_reaches_a_shell_unquoted() -> None:
    """Settings of a cluster that could be more than a name are refused; everything else is quoted."""
    for bad in (
        {"partition": "a; rm -rf /"},
        {"account": "$(id)"},
        {"image": "a b"},
        {"time": "1;1"},
        {"cloud": "a\nb"},
    ):
        with pytest.raises(ValueError, match="pattern"):
            Submission.model_validate({"job": JOBS["convert"], "executor": "slurm", "cluster": bad})
    run = submission("skypilot", {}, JOBS["evaluate"])
    assert "'-strange name'" in yaml.safe_load(rendered(run)["task.yaml"])["run"]
