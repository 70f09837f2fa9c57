"""Method "partition", from a recipe to a folder that loads: exact with all experts active, for every partition."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from lamella.calibrate import CalibrationOptions, calibration_tokens, store
from lamella.calibrate.guard import Verdict
from lamella.calibrate.layerwise import document_mask
from lamella.checkpoint.source import Checkpoint
from lamella.cli import app
from lamella.conversion import SliceOptions, convert
from lamella.conversion.partition import PARTITIONS, ROUTERS
from lamella.errors import UserError
from lamella.hf.models import load
from lamella.moe.balancing import expert_counts, max_violation
from lamella.recipe.conversion import load_conversion, make_conversion
from support.models import KIN, VOCAB, WIDELY_TESTED
from support.partitioning import CALIBRATION, dense_model, partition
from support.tiers import slow_but

# Little text: the calibration's own tests look at how it is gathered.
EXACT = 2e-5  # fp32, logits of order 1, another order of the sums over the neurons


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAMELLA_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


def logits(folder: Path) -> torch.Tensor:
    tokens = torch.arange(3, 43).view(2, 20) * 5 % VOCAB
    with torch.no_grad():
        return load(folder, torch.float32)(tokens).logits


@pytest.mark.parametrize("family", slow_but(WIDELY_TESTED, "llama", "gpt2"))
@pytest.mark.parametrize("neurons", PARTITIONS)
def test_all_experts_active_are_the_dense_model(tmp_path: Path, family: str, neurons: str) -> None:
    dense = dense_model(tmp_path / "dense", family)
    out = partition(dense, tmp_path / "moe", "active=4", f"neurons={neurons}", "shared=1", "router=random")
    assert (logits(out) - logits(dense)).abs().max() < EXACT
    assert json.loads((out / "config.json").read_text())["moe"]["shared_intermediate_size"] == 12


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("gate", ["unit", "normalised", "softmax"])
def test_every_router_and_gate_loads_and_routes(tmp_path: Path, router: str, gate: str) -> None:
    dense = dense_model(tmp_path / "dense")
    words = ["active=2", "neurons=coactivation", "shared=0", f"router={router}", f"gate={gate}", "balance=null"]
    out = partition(dense, tmp_path / "moe", *words)
    assert torch.isfinite(logits(out)).all()
    moe = load(out)
    moe(torch.arange(3, 43)[None])
    for layer in moe.moe_layers:
        assert layer.last_routing.expert_ids_TK.shape == (40, 2)
        # unit gates are exactly 1; the others are 1 as far as the logits, of standard deviation 0.1, are equal
        weights = layer.last_routing.weights_TK
        assert weights.eq(1).all() if gate == "unit" else (weights - 1).abs().max() < 0.5


def test_softmax_weights_take_the_scale_factor(tmp_path: Path) -> None:
    dense = dense_model(tmp_path / "dense")
    words = ("active=2", "neurons=contiguous", "shared=0", "router=random", "gate=softmax", "scale_factor=3")
    moe = load(partition(dense, tmp_path / "moe", *words))
    moe(torch.arange(3, 43)[None])
    sums = moe.moe_layers[0].last_routing.weights_TK.sum(-1)
    torch.testing.assert_close(sums, torch.full_like(sums, 3.0))


def test_dense_layers_and_other_tensors_are_the_same_bytes(tmp_path: Path) -> None:
    dense = dense_model(tmp_path / "dense", sharded=True)
    out = partition(dense, tmp_path / "moe", "active=2", "first_dense=1", "last_dense=1")
    source = {k: v for file in dense.glob("*.safetensors") for k, v in load_file(file).items()}
    made = load_file(out / "model.safetensors")
    assert json.loads((out / "config.json").read_text())["moe"]["moe_layers"] == [1]
    for name, tensor in source.items():
        if "layers.1.mlp" not in name:
            assert torch.equal(made[name], tensor), name
    assert not any("layers.1.mlp.up_proj" in name for name in made)


def test_one_file_and_several_give_the_same(tmp_path: Path) -> None:
    single, sharded = dense_model(tmp_path / "a"), dense_model(tmp_path / "b", sharded=True)
    made = [
        load_file(partition(m, tmp_path / f"{m.name}-moe", "active=2") / "model.safetensors") for m in (single, sharded)
    ]
    assert made[0].keys() == made[1].keys()
    assert all(torch.equal(tensor, made[1][name]) for name, tensor in made[0].items())


@pytest.mark.parametrize("output", ["refit", "bias", "align"])
def test_the_output_has_the_dense_mean_on_the_calibration_text(tmp_path: Path, output: str) -> None:
    """With one converted layer, whose input is the dense model's: calibration text = the text that is measured."""
    from lamella.calibrate import CalibrationOptions, calibration_tokens
    from lamella.checkpoint.source import Checkpoint
    from lamella.conversion.partition.reconstruct import token_weights

    dense = dense_model(tmp_path / "dense")
    out = partition(dense, tmp_path / "moe", "active=2", "layers=0", f"output={output}", "shared=1")
    options = CalibrationOptions(num_tokens=256, sequence_length=64)
    tokens = calibration_tokens(Checkpoint.open(dense), options)
    seen = {}
    for name in (dense, out):
        model = load(name)
        model.model.layers[0].mlp.register_forward_hook(lambda m, a, y, name=name: seen.update({name: y}))
        with torch.no_grad():
            model(tokens.ids_NL, position_ids=tokens.positions_NL)
    expected, got = (seen[name].flatten(0, 1) for name in (dense, out))
    scale = expected.std()
    weight_T1 = token_weights(expected)[:, None] if output == "refit" else 1.0
    assert ((expected - got) * weight_T1).mean(0).abs().max() < 1e-4 * scale
    if output == "align":
        assert ((expected.std(0) - got.std(0)).abs() < 1e-3 * scale).all()


def test_balance_bounds_the_violation(tmp_path: Path) -> None:
    from lamella.calibrate import CalibrationOptions, calibration_tokens
    from lamella.checkpoint.source import Checkpoint
    from lamella.moe.balancing import expert_counts, max_violation

    dense = dense_model(tmp_path / "dense")
    out = partition(dense, tmp_path / "moe", "active=2", "layers=0", "shared=0", "balance=0.1", "output=plain")
    tokens = calibration_tokens(Checkpoint.open(dense), CalibrationOptions(num_tokens=256, sequence_length=64))
    model = load(out)
    model(tokens.ids_NL, position_ids=tokens.positions_NL)
    assert max_violation(expert_counts(model.moe_layers[0].last_routing.expert_ids_TK, 4)) <= 0.1


@pytest.mark.parametrize("metric", ["perplexity", "kl"])
def test_the_guard_puts_layers_back_and_says_why(tmp_path: Path, metric: str) -> None:
    dense, verdicts = dense_model(tmp_path / "dense"), []
    least = 1.0 if metric == "perplexity" else 0.0

    def words(per_layer: float) -> list[str]:
        guard = json.dumps({"metric": metric, "per_layer": per_layer, "total": 100, "tokens": 128})
        return ["active=1", "shared=0", "neurons=random", "router=random", "output=plain", f"guard={guard}"]

    partition(dense, tmp_path / "loose", *words(100), on_verdict=verdicts.append)
    assert [(v.layer, v.kept) for v in verdicts] == [(0, True), (1, True), (2, True)]
    steps = [v.after / v.before if metric == "perplexity" else v.after - v.before for v in verdicts]
    worst = max(range(3), key=steps.__getitem__)
    assert steps[worst] > least
    again: list[Verdict] = []
    budget = max(least, steps[worst] - 1e-6)
    out = partition(dense, tmp_path / "tight", *words(budget), on_verdict=again.append)
    reasons = {v.layer: v.reason for v in again}
    assert "over the budget per layer" in reasons[worst]
    kept = json.loads((out / "config.json").read_text())["moe"]["moe_layers"]
    assert kept == [layer for layer, reason in reasons.items() if not reason]
    assert json.loads((out / "lamella.json").read_text())["guard"] == [v._asdict() for v in again]


@torch.no_grad()
@pytest.mark.parametrize("family", ["granite", "gemma2"])
def test_what_the_guard_measures_is_what_transformers_computes(tmp_path: Path, family: str) -> None:
    """Where what an FFN adds is scaled or normed, and logits are scaled or capped."""
    dense, verdicts = dense_model(tmp_path / "dense", family, **KIN[family]), []
    guard = "guard={metric: kl, per_layer: 100, total: 1000, tokens: 128}"
    words = ("active=1", "shared=0", "neurons=random", "router=random", "output=plain", guard)
    out = partition(dense, tmp_path / "moe", *words, on_verdict=verdicts.append)
    options = CalibrationOptions(num_tokens=128, sequence_length=64)
    tokens = calibration_tokens(Checkpoint.open(dense), options)
    p, q = (
        load(folder, torch.float32)(tokens.ids_NL, position_ids=tokens.positions_NL).logits.log_softmax(-1)
        for folder in (dense, out)
    )
    expected = (p.exp() * (p - q)).sum(-1).mean().item()
    assert verdicts[-1].after == pytest.approx(expected, rel=1e-4)
    assert expected > 1e-4


def test_a_guard_that_keeps_nothing_is_an_error(tmp_path: Path) -> None:
    dense = dense_model(tmp_path / "dense")
    guard = "guard={metric: kl, per_layer: 0, total: 0, tokens: 128}"
    with pytest.raises(UserError, match="every layer would stay dense"):
        partition(dense, tmp_path / "moe", "active=1", "neurons=random", "router=random", "shared=0", guard)
    assert not (tmp_path / "moe").exists()


def test_an_interrupted_calibration_is_taken_up_again(tmp_path: Path) -> None:
    dense = dense_model(tmp_path / "dense")
    whole = partition(dense, tmp_path / "whole", "active=2")
    phases: list[tuple[str, int]] = []

    def interrupt(step: Any) -> None:
        phases.append((step.phase, step.layer))
        if step.phase == "method" and sum(phase == "method" for phase, _ in phases) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        partition(dense, tmp_path / "moe", "active=2", on_progress=interrupt)
    assert not (tmp_path / "moe").exists()
    done = [layer for phase, layer in phases if phase == "method"]
    phases.clear()
    out = partition(dense, tmp_path / "moe", "active=2", on_progress=lambda s: phases.append((s.phase, s.layer)))
    assert phases.count(("method", done[0])) == 2  # split and fitted; what thinning it out costs is known
    assert (out / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dense", "moe", "whole"]


def test_sequential_calibration_differs_only_after_the_first_layer(tmp_path: Path) -> None:
    dense = dense_model(tmp_path / "dense")
    words = ("active=2", "shared=0", "neurons=coactivation")
    plain, sequential = (
        load_file(partition(dense, tmp_path / name, *words, f"sequential={name}") / "model.safetensors")
        for name in ("false", "true")
    )
    name = "model.layers.{}.mlp.router.weight"
    assert torch.equal(plain[name.format(0)], sequential[name.format(0)])
    assert not torch.equal(plain[name.format(1)], sequential[name.format(1)])


@pytest.mark.parametrize(
    ("family", "changes"),
    [("llama", {}), ("opt", {"do_layer_norm_before": False, "word_embed_proj_dim": 16})],
    ids=["llama", "opt, post-norm"],
)
def test_balance_holds_in_the_converted_model(tmp_path: Path, family: str, changes: dict[str, Any]) -> None:
    """On the text it was set on, in every layer: the layers below are the converted ones there, too."""
    dense = dense_model(tmp_path / "dense", family, **changes)
    words = ["active=2", "shared=0", "balance=0.1"]
    out = partition(dense, tmp_path / "moe", *words)
    assert max(loads(out)) <= 0.1 + 2 / 128  # a token or two may flip by rounding


def loads(folder: Path) -> list[float]:
    """MaxVio of each layer on the calibration text."""
    options = load_conversion(None, ["method=partition", CALIBRATION]).options
    tokens = calibration_tokens(Checkpoint.open(folder.parent / "dense"), options.calibration)
    model = load(folder, torch.float32)
    mask = document_mask(tokens.positions_NL) if model.config.model_type == "lamella_opt" else None
    with torch.no_grad():
        model(input_ids=tokens.ids_NL, attention_mask=mask, position_ids=tokens.positions_NL)
    routings = [layer.last_routing for layer in model.moe_layers]
    return [max_violation(expert_counts(routing.expert_ids_TK, 4)).item() for routing in routings]


def damaged(dense: Path) -> Path:
    tensors = load_file(dense / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][0, 0] = float("nan")
    save_file(tensors, dense / "model.safetensors", metadata={"format": "pt"})
    return dense


def test_what_calibration_would_find_late_is_said_at_once(tmp_path: Path) -> None:
    dense = dense_model(tmp_path / "dense")
    with pytest.raises(UserError, match="seed is -1"):
        partition(dense, tmp_path / "out", "active=2", "calibration.seed=-1")
    with pytest.raises(UserError, match="made of gate projections"):
        partition(dense_model(tmp_path / "gpt2", "gpt2"), tmp_path / "out", "active=2", "router=analytic")
    with pytest.raises(UserError, match=r"1\.mlp\.down_proj\.weight holds NaN .*the checkpoint is damaged"):
        partition(damaged(dense), tmp_path / "out", "active=2", "router=ridge", "neurons=coactivation")
    assert not (tmp_path / "out").exists()


def test_values_beyond_float16_are_refused(tmp_path: Path) -> None:
    dense = dense_model(tmp_path / "dense")
    tensors = load_file(dense / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][0, 0] = 1e5
    save_file(tensors, dense / "model.safetensors", metadata={"format": "pt"})
    words = ["active=4", "shared=0", "neurons=contiguous", "router=random", "dtype=float16"]
    with pytest.raises(UserError, match=r"down_proj\.weight holds values beyond float16's range"):
        partition(dense, tmp_path / "out", *words)


def test_calibration_may_be_named_alone(tmp_path: Path) -> None:
    """In a recipe, in a word, as an option of the command, and from Python."""
    (tmp_path / "recipe.yaml").write_text("method: partition\ncalibration: text.md\n")
    for recipe in (
        load_conversion(tmp_path / "recipe.yaml"),
        load_conversion(None, ["method=partition", "calibration=text.md"]),
        make_conversion({"method": "partition", "calibration": Path("text.md")}),
        load_conversion(tmp_path / "recipe.yaml", ["calibration.num_tokens=1024"]),
    ):
        assert recipe.options.calibration.data == "text.md"
    dense = dense_model(tmp_path / "dense")
    words = ["method=partition", "parts=4", "active=2", f"model={dense}", f"out={tmp_path / 'moe'}", CALIBRATION]
    done = CliRunner().invoke(app, ["convert", *words, "--calibration", str(tmp_path / "missing.md")])
    assert isinstance(done.exception, UserError)
    assert "missing.md" in str(done.exception)
    assert not (tmp_path / "moe").exists()


def test_loads_are_even_on_the_calibration_text_by_default(tmp_path: Path) -> None:
    """As the default asks for, within what two of 128 tokens are."""
    dense = dense_model(tmp_path / "dense")
    assert max(loads(partition(dense, tmp_path / "moe", "active=2", "shared=0"))) <= 0.01 + 2 / 128


def test_damage_is_not_called_float16s_range(tmp_path: Path) -> None:
    words = ["active=4", "shared=0", "neurons=contiguous", "router=random", "dtype=float16"]
    with pytest.raises(UserError, match=r"down_proj\.weight holds NaN .*the checkpoint is damaged"):
        partition(damaged(dense_model(tmp_path / "dense")), tmp_path / "out", *words)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["gate=unit"], "the logits are the dense model's"),
        (["gate=normalised", "scale_factor=4"], "the logits are the dense model's"),
        (["gate=normalised", "scale_factor=1"], "scaled by 1: the logits differ"),
        (["gate=normalised", "router=random"], "nearly the dense model's"),
    ],
)
def test_the_card_says_what_the_logits_are(tmp_path: Path, words: list[str], said: str) -> None:
    dense = dense_model(tmp_path / "dense")
    out = partition(dense, tmp_path / "out", "active=4", "shared=0", "neurons=contiguous", "router=zero", *words)
    assert said in (out / "README.md").read_text()
    difference = (logits(out) - logits(dense)).abs().max()
    assert (difference < EXACT) == (said == "the logits are the dense model's")


def test_only_its_own_calibration_is_removed(tmp_path: Path) -> None:
    dense, other = dense_model(tmp_path / "dense"), tmp_path / "out.calibration"
    other.mkdir()
    (other / "notes.txt").touch()
    convert(dense, tmp_path / "out", SliceOptions(slices=4))
    assert (other / "notes.txt").exists()
    partition(dense, tmp_path / "calibrated", "active=2")
    assert not (tmp_path / "calibrated.calibration").exists()


def test_a_disk_that_fills_up_in_calibration_is_one_line_and_loses_nothing(tmp_path: Path, monkeypatch) -> None:
    dense, saved = dense_model(tmp_path / "dense"), []

    def save(tensors: dict[str, torch.Tensor], path: Path) -> None:
        if len(saved) == 2:
            raise SafetensorError("Error while serializing: No space left on device")
        saved.append(path)
        save_file(tensors, path)

    monkeypatch.setattr(store, "save_file", save)
    with pytest.raises(UserError, match=r"cannot be written .*No space left.*call again"):
        partition(dense, tmp_path / "out", "active=2")
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    assert len(list((tmp_path / "out.calibration").glob("layer-*.safetensors"))) == 2
