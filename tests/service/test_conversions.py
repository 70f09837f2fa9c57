"""What a conversion's page says: what was made, from the manifest, and what has checked it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import get_args

import pytest
from starlette.testclient import TestClient

from lamella.conversion import SliceOptions, convert
from lamella.export import TARGETS
from lamella.export.gguf.quantise import K_QUANTS
from lamella.export.gguf.write import DTYPES
from lamella.moe.matrices import ROUNDED_DTYPES
from lamella.recipe.methods import METHODS
from lamella.service.context import Service
from lamella.service.conversions import conversion_of
from lamella.service.executors.executor import Seen
from lamella.service.jobs import ExportJob, Stored, Submission
from lamella.service.progress import ending_of
from lamella.service.routes_service import Method
from support.models import save_llama
from support.service import problem, settle


def verification(**values: object) -> dict:
    """A submission that compares the tiny model of `made` with its dense one."""
    job = {"kind": "verify", "moe": "moe", "dense": "dense", "data": "text.txt", "seq_len": 64, "tokens": 64}
    return {"job": job | {"bf16_tokens": 64, "ratios": False} | values, "cores": 1}


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """A tiny conversion, and a text to compare on."""
    save_llama(tmp_path / "dense")
    convert(tmp_path / "dense", tmp_path / "moe", SliceOptions(slices=4))
    (tmp_path / "text.txt").write_text("".join(f"Line {i} of a text about slices.\n" for i in range(2000)))
    return tmp_path / "moe"


def test_what_was_made_is_what_the_files_hold(made: Path) -> None:
    from safetensors import safe_open

    found = conversion_of(made)
    with safe_open(made / "model.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert found["tensors"] == len(tensors)
    assert found["parameters"] == sum(t.numel() for t in tensors.values())
    assert found["bytes"] == sum(t.numel() * t.element_size() for t in tensors.values())
    assert [layer["layer"] for layer in found["layers"]] == [0, 1]
    frozen = sum(t.numel() for name, t in tensors.items() if "layers.0." in name and ".frozen_" in name)
    assert found["layers"][0]["parameters"]["frozen experts"] == frozen > 0
    assert found["layers"][0]["parameters"]["trainable experts"] == frozen
    assert found["layers"][0]["bytes"] == sum(
        t.numel() * t.element_size() for name, t in tensors.items() if "layers.0." in name
    )
    assert conversion_of(made.parent) == {}
    (made / "lamella.json").write_text("[")
    assert conversion_of(made) == {}


@pytest.mark.slow
def test_a_verification_is_a_job_and_stands_beside_its_conversion(
    client: TestClient, service: Service, made: Path
) -> None:
    recipe = {"model": "dense", "out": "moe", "method": "slice", "slices": 4}
    job = {"job": {"kind": "convert", "recipe": recipe, "overwrite": True}, "cores": 1}
    conversion = client.post("/v1/jobs", json=job).json()["id"]
    assert settle(service, conversion).state == "succeeded"
    assert client.get(f"/v1/jobs/{conversion}/conversion").json()["checks"] == []

    good = client.post("/v1/jobs", json=verification()).json()["id"]
    assert settle(service, good).state == "succeeded"
    result = client.get(f"/v1/jobs/{good}/result").json()
    view = client.get(f"/v1/jobs/{conversion}/conversion").json()
    (check,) = view["checks"]
    assert (check["run"], check["kind"], check["summary"]["passed"]) == (good, "verify", True)
    assert check["summary"]["checks"] == sum(c["bound"] is not None for c in result["checks"])
    assert check["summary"]["worst"] in result["checks"]
    assert view["found"]["recipe"]["slices"] == 4

    from safetensors.torch import load_file, save_file

    tensors = load_file(made / "model.safetensors")
    name = next(name for name in tensors if "frozen_down" in name)
    save_file(tensors | {name: tensors[name] + 0.05}, made / "model.safetensors", {"format": "pt"})
    bad = client.post("/v1/jobs", json=verification()).json()["id"]
    run = settle(service, bad)
    assert (run.state, run.failure) == ("failed", "numerics")
    assert "not the dense model's" in run.reason
    assert run.attempt == 1
    (model,) = client.get("/v1/models").json()
    assert [check["summary"]["passed"] for check in model["checks"]] == [False, True]
    assert model["bytes"] == (made / "model.safetensors").stat().st_size
    assert problem(client.get(f"/v1/jobs/{good}/conversion"), 404)


def test_windows_that_do_not_fit_are_refused(client: TestClient) -> None:
    assert "windows of 128" in problem(client.post("/v1/jobs", json=verification(seq_len=128)), 422)
    assert problem(client.post("/v1/jobs", json=verification(seq_len=32)), 422)
    assert client.get("/v1/jobs").json()["data"] == []


def test_the_api_knows_every_method_and_every_target(client: TestClient) -> None:
    assert set(get_args(Method)) == set(METHODS)
    assert set(get_args(ExportJob.model_fields["to"].annotation)) == {"auto", *TARGETS}
    assert set(get_args(Stored)) == {*DTYPES, *K_QUANTS, *(name.upper() for name in ROUNDED_DTYPES)}
    sections = client.get("/v1/schemas/submission").json()["$defs"]
    for name in ("TrainJob", "ConvertJob", "VerifyJob", "EvaluateJob", "ExportJob", "Cluster"):
        properties = sections[name]["properties"]
        assert [key for key, value in properties.items() if key != "kind" and "description" not in value] == [], name
    for method in METHODS:
        answer = client.get(f"/v1/schemas/convert?method={method}").json()
        assert all(key["text"] for key in answer["keys"]), method


def test_what_a_command_says_of_its_failure_is_its_class() -> None:
    said = {"failure": "numerics", "retryable": False, "reason": "the logits of moe are not the dense model's"}
    ending = ending_of(Submission.model_validate(verification()), Seen("ended", 1, said))
    assert (ending.failure, ending.retryable) == ("numerics", False)
    assert json.dumps(said["reason"]) == json.dumps(ending.reason)
