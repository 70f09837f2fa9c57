"""Run: uv run tests/moe_logit_match.py [--dense D --moe M]      (pytest collects the tests below)

Does the converted model give the dense model's logits? Exit code 0 if so, 1 if not, 2 for bad input.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lamella.checkpoint.embedded import embedded_model
from lamella.cli import run_command, verify
from lamella.conversion import SliceOptions, convert
from lamella.errors import UserError
from lamella.evaluate.differences import Difference
from lamella.evaluate.logit_match import Check, floor_bounds, fp32_bounds, greedy_check, logit_match
from lamella.hf.models import load
from lamella.recipe.conversion import load_conversion
from lamella.recipe.methods.upcycle import UpcycleOptions
from support.models import save_llama
from support.tiers import slow_but

TINY_TOKENS = {"float32": 512, "bfloat16": 512}


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> Path:
    return save_llama(tmp_path_factory.mktemp("dense") / "model")


def converted(dense: Path, folder: Path, **options) -> Path:
    convert(dense, folder, SliceOptions(slices=4, **options))
    return folder


def failed(checks: list[Check]) -> list[Check]:
    return [check for check in checks if not check.passed]


@pytest.mark.parametrize(
    "options",
    slow_but([{}, {"routing": "flat"}, {"gate": "softmax"}, {"layers": "1"}, {"noise": 0.5}], {}),
    ids=str,
)
def test_a_conversion_has_the_dense_logits(dense, tmp_path, options):
    checks = logit_match(str(dense), str(converted(dense, tmp_path / "moe", **options)), tokens=TINY_TOKENS)
    assert failed(checks) == []
    modes = {check.what for check in checks if check.bound is not None}
    assert {"dense", "routed"} <= modes
    assert ("random, no noise" in modes) == (options.get("routing") != "flat")
    greedy = [check.figure for check in checks if check.name.startswith("greedy") and check.dtype == "float32"]
    assert greedy == [64] * len(greedy)
    assert len(greedy) >= 2
    # The bf16 bound is no bound if the floor it comes from is nothing, or as large as the logits.
    floors = [check for check in checks if check.what.startswith("floor") and check.name.startswith("max")]
    assert [check.dtype for check in floors] == ["float32", "bfloat16"]
    assert 1e-3 < floors[1].figure < 1
    assert floors[0].figure < 1e-4


@pytest.mark.parametrize("damage", slow_but(["frozen_down_proj", "frozen_gate_up_proj", "norm"], "norm"))
@pytest.mark.parametrize("dtype", slow_but(["float32", "bfloat16"], "float32"))
def test_a_wrong_tensor_is_seen(dense, tmp_path, damage, dtype):
    """One slice of one layer half as large, or one norm: every mode fails, in both dtypes."""
    moe = converted(dense, tmp_path / "moe")
    model = load(moe)
    with torch.no_grad():
        if damage == "norm":
            model.model.layers[1].input_layernorm.weight *= 1.5
        else:
            getattr(model.model.layers[1].mlp.experts, damage)[2] *= 0.5
    model.save_pretrained(moe)
    checks = failed(logit_match(str(dense), str(moe), tokens={dtype: 512}))
    assert {check.what for check in checks} == {"dense", "routed", "random, no noise"}


@pytest.mark.parametrize(("steps", "passes"), [(0, True), (1, True), (2, True), (6, False)])
def test_tokens_that_bfloat16_cannot_tell_apart_may_be_swapped(steps, passes):
    """A logit near 2 is written down in steps of 2^-6, which the mean over smaller logits does not show."""
    floor = Difference(max_abs=0.03, sum_abs=0.4, same_top1=256, tokens=256, vocabulary=4, max_logit=4.0)
    logits_LV = torch.tensor([[0.0, 3.0, 1.0], [2.0 + steps * 2**-6, 2.0, 1.0]])
    checked = greedy_check("bfloat16", "dense", ([1, 0], logits_LV), [1, 1], floor_bounds([floor]))
    assert checked.figure == 1
    assert checked.passed is passes, checked.reason
    assert not greedy_check("float32", "dense", ([1, 0], logits_LV), [1, 1], fp32_bounds(64, 2, floor)).passed


@pytest.mark.slow
def test_a_trained_router_is_checked_without_it(dense, tmp_path):
    moe = converted(dense, tmp_path / "moe")
    model = load(moe)
    with torch.no_grad():
        model.model.layers[0].mlp.router.weight += 0.1
    model.save_pretrained(moe)
    checks = logit_match(str(dense), str(moe), tokens={"float32": 512})
    assert failed(checks) == []
    assert {check.what for check in checks if check.bound} == {"dense", "random, no noise"}


def test_other_models_are_refused(dense, tmp_path):
    moe = converted(dense, tmp_path / "moe")
    other = save_llama(tmp_path / "other", layers=3)
    with pytest.raises(UserError, match="num_hidden_layers is 2 in the MoE and 3 in the dense model"):
        logit_match(str(other), str(moe), tokens={"float32": 512})
    with pytest.raises(UserError, match="is a dense model; pass a converted one"):
        logit_match(str(dense), str(dense), tokens={"float32": 512})
    convert(dense, tmp_path / "upcycled", UpcycleOptions(experts=2))
    with pytest.raises(UserError, match="has neither frozen slices nor all experts active with unit gates"):
        logit_match(str(dense), str(tmp_path / "upcycled"), tokens={"float32": 512})


ALL_ACTIVE = {
    "partition": ["method=partition", "parts=4", "active=4", "shared=1", "neurons=random", "router=random"],
    "attention": ["method=attention"],
    "attention of a sliced model": ["method=attention"],
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ALL_ACTIVE)
def test_all_experts_active_match(dense, kind, tmp_path):
    source = converted(dense, tmp_path / "sliced") if "sliced" in kind else dense
    convert(source, tmp_path / "moe", load_conversion(None, ALL_ACTIVE[kind]).options)
    checks = logit_match(str(dense), str(tmp_path / "moe"), tokens=TINY_TOKENS)
    assert failed(checks) == []
    assert "routed" in {check.what for check in checks if check.bound is not None}
    model = load(tmp_path / "moe")
    name = (
        "model.layers.1.self_attn.o_proj.weight"
        if "attention" in kind
        else "model.layers.1.mlp.experts.trainable_down_proj"
    )
    with torch.no_grad():
        model.get_parameter(name)[..., 0] *= 1.5
    model.save_pretrained(tmp_path / "moe")
    assert failed(logit_match(str(dense), str(tmp_path / "moe"), tokens={"float32": 512}))


@pytest.mark.slow
def test_chosen_attention_experts_are_not_asked_to_match_when_routed(dense, tmp_path):
    options = load_conversion(None, ["method=attention", "top_k=1", "router=random"]).options
    convert(converted(dense, tmp_path / "sliced"), tmp_path / "moe", options)
    checks = logit_match(str(dense), str(tmp_path / "moe"), tokens={"float32": 512})
    assert failed(checks) == []
    assert "routed" not in {check.what for check in checks}
    convert(dense, tmp_path / "alone", options)
    with pytest.raises(UserError, match="has neither frozen slices nor all experts active"):
        logit_match(str(dense), str(tmp_path / "alone"), tokens={"float32": 512})


def run_script(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, __file__, *arguments], capture_output=True, text=True, timeout=900)


@pytest.mark.slow
def test_the_script(dense, tmp_path):
    moe, report = converted(dense, tmp_path / "moe"), tmp_path / "report.json"
    pair = ("--dense", str(dense), "--moe", str(moe), "--tokens", "512", "--json", str(report))
    done = run_script(*pair)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "matches" in done.stdout
    values = json.loads(report.read_text())
    assert values["passed"] is True
    assert len(values["checks"]) > 20

    model = load(moe)
    with torch.no_grad():
        model.model.layers[1].mlp.experts.frozen_down_proj[2] *= 0.5
    model.save_pretrained(moe)
    done = run_script(*pair)
    assert done.returncode == 1
    assert "does NOT match" in done.stdout
    done = run_script(*pair, "--device", "tpu")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1:] == ["error: device is 'tpu'; it must be auto, cpu or cuda"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--moe", "/missing/moe"), "no such model: /missing/moe"),
        (("--json", "/missing/folder/report.json"), "cannot write /missing/folder/report.json"),
        (("--tokens", "10"), "10 and 256 tokens in windows of 256"),
        (("--seq-len", "32"), "512 and 256 tokens in windows of 32"),
        (("--device", "tpu"), "device is 'tpu'"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, message, dense, monkeypatch, capfd):
    with_moe = arguments if "--moe" in arguments else ("--moe", str(dense), *arguments)
    monkeypatch.setattr(sys, "argv", ["moe_logit_match.py", "--dense", str(dense), *with_moe])
    with pytest.raises(SystemExit, match="2"):
        run_command(verify)
    said = capfd.readouterr()
    assert said.err.splitlines()[-1].startswith(f"error: {message}")
    assert "Traceback" not in said.err


@pytest.mark.slow
def test_the_embedded_model(tmp_path):
    """SmolLM2-135M, float32: at most 1e-3 and 64 of 64 greedy tokens."""
    convert(None, tmp_path / "moe")
    checks = logit_match(str(embedded_model()), str(tmp_path / "moe"), tokens={"float32": 256})
    assert failed(checks) == []
    matched = [check for check in checks if check.bound is not None and not check.what.startswith("dense, ")]
    assert max(check.figure for check in matched if check.name.startswith("max")) <= 1e-3
    assert [check.figure for check in matched if check.name.startswith("greedy")] == [64, 64, 64]


if __name__ == "__main__":
    sys.argv[1:1] = ["--no-ratios"]  # or `lamella verify` itself
    run_command(verify)
