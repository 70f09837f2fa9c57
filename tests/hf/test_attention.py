"""Attention experts in real models of every family: the dense logits, the definition, generation, files, exports.

Shapes: B sequences, L tokens.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache

from lamella.architecture.moe import AttentionMoEConfig
from lamella.calibrate import CalibrationOptions, calibration_tokens
from lamella.checkpoint.tensors import read_header
from lamella.conversion import SliceOptions, convert
from lamella.conversion.attention.plan import open_dense_or_converted
from lamella.conversion.attention.router import ridge_router
from lamella.errors import UserError
from lamella.export import export
from lamella.hf.cache import RaggedLayer
from lamella.hf.models import load
from lamella.moe.balancing import expert_counts, max_violation
from lamella.recipe.methods.attention import AttentionOptions
from support.models import save_llama, tiny_checkpoint

# Logits of the tiny models reach about 4: sums of 32 fp32 terms in another order in 3 layers, a few roundings
# (4 * 2**-23 = 5e-7) at every step, which the norms and the head may add up.
FP32_BOUND = 1e-5
# every kind of attention tensor and mask that a family may have
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True},
    "mistral": {"sliding_window": 6},
    "qwen2": {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
    "qwen3": {},
}
LAYERS = "0,2"
CALIBRATION = CalibrationOptions(num_tokens=600, sequence_length=60)


@pytest.fixture(params=FAMILIES)
def dense(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return tiny_checkpoint(tmp_path / "dense", request.param, **FAMILIES[request.param])


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return tiny_checkpoint(tmp_path / "dense")


def converted(source: Path, name: str = "experts", **options: Any) -> Path:
    out = source.parent / name
    convert(source, out, AttentionOptions(**{"layers": LAYERS} | options))
    return out


def uneven(source: Path, **options: Any) -> Any:
    """4 experts, 2 chosen; the last of them by no token."""
    model: Any = load(converted(source, experts=4, top_k=2, router="random", **options))
    for layer in model.attention_experts:
        layer.router.selection_bias[3] = -100
    return model


def tokens(B: int = 2, L: int = 20) -> Tensor:
    return torch.randint(3, 128, (B, L), generator=torch.Generator().manual_seed(0))


def left_padded() -> dict[str, Tensor]:
    mask = torch.ones(2, 20, dtype=torch.long)
    mask[1, :9] = 0
    return {"input_ids": tokens(), "attention_mask": mask}


@torch.no_grad()
def logits(model: Any, ids: Tensor, **kwargs: Any) -> Tensor:
    return model(ids, use_cache=False, **kwargs).logits


def set_path(model: Any, path: str) -> Any:
    model.computing.attention_path = path
    return model


@pytest.mark.parametrize("experts", [2, 4])
def test_all_experts_are_the_dense_model(dense: Path, experts: int) -> None:
    model = load(converted(dense, experts=experts))
    expected = logits(load(dense), tokens())
    assert (logits(model, tokens()) - expected).abs().max() < FP32_BOUND
    assert (logits(set_path(model, "masked"), tokens()) - expected).abs().max() < FP32_BOUND


@pytest.mark.parametrize("gate", ["unit", "softmax", "sigmoid"])
def test_fewer_experts_are_the_masked_definition(dense: Path, gate: str) -> None:
    model, padded = uneven(dense, gate=gate), left_padded()
    real = padded["attention_mask"].bool()
    for kwargs in ({}, {"attention_mask": padded["attention_mask"]}):
        got = logits(set_path(model, "routed"), tokens(), **kwargs)
        expected = logits(set_path(model, "masked"), tokens(), **kwargs)
        assert (got - expected)[real].abs().max() < FP32_BOUND
        assert got.isfinite().all()
    assert not (model.attention_experts[0].last_routing.expert_ids_TK == 3).any()


def test_mode_dense_is_the_dense_model(llama: Path) -> None:
    model = uneven(llama)
    expected = logits(load(llama), tokens())
    assert (logits(model, tokens()) - expected).abs().max() > 1e-2  # routing does matter here
    model.set_mode("dense")
    assert (logits(model, tokens()) - expected).abs().max() < FP32_BOUND


def test_packed_documents_do_not_see_each_other(dense: Path) -> None:
    model, ids = uneven(dense), tokens(B=1)
    positions = torch.cat([torch.arange(8), torch.arange(12)])[None]
    alone = torch.cat([logits(model, ids[:, :8]), logits(model, ids[:, 8:])], dim=1)
    assert (logits(model, ids, position_ids=positions) - alone).abs().max() < FP32_BOUND


GREEDY = {"max_new_tokens": 16, "do_sample": False, "eos_token_id": None, "pad_token_id": 2}


@pytest.mark.parametrize("beams", [1, 3])
def test_generation_with_the_ragged_cache(dense: Path, beams: int) -> None:
    """Past the sliding window, from left-padded prompts, with an expert that no token chose."""
    model, kwargs = uneven(dense), GREEDY | {"num_beams": beams}
    for inputs in ({"input_ids": tokens()}, left_padded()):
        with_cache = model.generate(**inputs, **kwargs)
        assert with_cache.shape == (2, 36)
        assert torch.equal(with_cache, model.generate(**inputs, use_cache=False, **kwargs))


@torch.no_grad()
def test_the_cache_holds_routed_tokens_alone(llama: Path) -> None:
    model = uneven(llama)
    cache = model(**left_padded(), use_cache=True).past_key_values
    ragged, growing = cache.layers[0], cache.layers[1]
    assert isinstance(ragged, RaggedLayer)
    assert ragged.get_seq_length() == growing.get_seq_length() == 20
    routing = model.attention_experts[0].last_routing
    real = left_padded()["attention_mask"].flatten().bool()
    heads = {(t, e // 2) for t, ids in enumerate(routing.expert_ids_TK.tolist()) if real[t] for e in ids}
    assert ragged.keys.shape == ragged.values.shape == (len(heads), 8)
    # 2 key/value heads for 40 tokens, padding included, would be 80 keys
    assert len(heads) < growing.keys.numel() // 8 == 80
    # keys and values in float32, and per key three int32 and a bool for each expert of its head
    assert ragged.nbytes == len(heads) * (2 * 8 * 4 + 3 * 4 + 2)


@torch.no_grad()
def test_a_sliding_window_drops_keys(tmp_path: Path) -> None:
    model = uneven(tiny_checkpoint(tmp_path / "dense", "mistral", sliding_window=6))
    layer = model(tokens(), use_cache=True).past_key_values.layers[0]
    assert layer.get_seq_length() == 20
    assert layer.stored.time_N.min() == 15  # with the next token, a window of 6


@torch.no_grad()
def test_a_conversation_and_a_cropped_cache_go_on_as_from_the_start(llama: Path) -> None:
    model, ids = uneven(llama), tokens()
    expected = logits(model, ids)
    cache = DynamicCache()
    parts = [model(part, past_key_values=cache, use_cache=True).logits for part in ids.split([7, 1, 12], dim=1)]
    assert (torch.cat(parts, dim=1) - expected).abs().max() < FP32_BOUND
    cache.crop(-5)
    again = model(ids[:, 15:], past_key_values=cache, use_cache=True).logits
    assert (again - expected[:, 15:]).abs().max() < FP32_BOUND
    cache.reset()
    assert (model(ids, past_key_values=cache, use_cache=True).logits - expected).abs().max() < FP32_BOUND


@torch.no_grad()
def test_sequences_of_a_cache_can_be_repeated_and_chosen(llama: Path) -> None:
    model, ids = uneven(llama), tokens()
    cache = model(ids[:, :12], use_cache=True).past_key_values
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([3, 0]))
    swapped = ids.flip(0)
    got = model(swapped[:, 12:], past_key_values=cache, use_cache=True).logits
    assert (got - logits(model, swapped)[:, 12:]).abs().max() < FP32_BOUND


def test_bfloat16(dense: Path) -> None:
    """As near to the float32 logits as the dense model in bfloat16 is, within a factor for other roundings."""
    expected, folder = logits(load(dense), tokens()), converted(dense, experts=4)
    theirs, ours = (
        (logits(load(path, dtype=torch.bfloat16), tokens()) - expected).abs().max() for path in (dense, folder)
    )
    assert ours < 3 * theirs
    model: Any = load(folder, dtype=torch.bfloat16)
    assert model.attention_experts[0].router.selection_bias.dtype == torch.float32
    assert model.generate(tokens(), **GREEDY).shape == (2, 36)


def test_gradients_reach_router_and_projections(llama: Path) -> None:
    model: Any = load(converted(llama, experts=2, top_k=1, gate="sigmoid", router="random"))
    model.train()
    model(tokens(), labels=tokens(), use_cache=False).loss.backward()
    attention = model.attention_experts[0]
    for parameter in (attention.router.weight, attention.q_proj.weight, attention.k_proj.weight):
        assert parameter.grad is not None
        assert parameter.grad.abs().sum() > 0


def test_files(dense: Path) -> None:
    """Dense tensors byte for byte, routers beside them; loads again as saved, without this package's Auto import."""
    folder = converted(dense, experts=4, top_k=3, router="random", seed=5)
    before, after = read_header(dense / "model.safetensors"), read_header(folder / "model.safetensors")
    for name, tensor in before.items():
        assert torch.equal(tensor.read(0, tensor.numel), after[name].read(0, tensor.numel))
    routers = {
        f"model.layers.{i}.self_attn.router.{n}" for i in (0, 2) for n in ("weight", "gate_scale", "selection_bias")
    }
    assert after.keys() - before.keys() == routers
    config = json.loads((folder / "config.json").read_text())
    assert config["moe"] is None
    assert AttentionMoEConfig.from_dict(config["attention_moe"]) == AttentionMoEConfig((0, 2), 4, 3)
    manifest = json.loads((folder / "lamella.json").read_text())
    assert manifest["recipe"]["method"] == "attention"
    assert manifest["tensors"].keys() == after.keys()
    model = load(folder)
    model.save_pretrained(folder.parent / "again")
    again = AutoModelForCausalLM.from_pretrained(folder.parent / "again")
    assert torch.equal(logits(again, tokens()), logits(model, tokens()))
    assert converted(dense, "twin", experts=4, top_k=3, router="random", seed=5)
    for file in ("model.safetensors", "lamella.json", "README.md"):
        assert (folder / file).read_bytes() == (folder.parent / "twin" / file).read_bytes()


@pytest.mark.slow
def test_generates_at_once_with_remote_code(llama: Path) -> None:
    folder = converted(llama, experts=2, top_k=1, router="random")
    code = (
        "import sys, torch; from transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
        "ids = torch.tensor([[5, 6, 7]])\n"
        "print(model.generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=None).tolist())"
    )
    out = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=True).stdout
    expected = load(folder).generate(torch.tensor([[5, 6, 7]]), **GREEDY | {"max_new_tokens": 4})
    assert json.loads(out) == expected.tolist()


def test_sliced_ffns_and_attention_experts(dense: Path) -> None:
    """Both at once; the dense model comes back bit for bit."""
    sliced = dense.parent / "sliced"
    convert(dense, sliced, SliceOptions(slices=4))
    folder = converted(sliced, "both", experts=4)
    expected = logits(load(dense), tokens())
    model: Any = load(folder)
    assert len(model.moe_layers) == 3
    assert (logits(model, tokens()) - expected).abs().max() < FP32_BOUND
    fewer = converted(sliced, "fewer", experts=4, top_k=2, router="random")
    assert_dense_again(fewer, dense)


def test_glm4_moe_holds_it_while_the_attention_is_the_dense_one(llama: Path) -> None:
    sliced = llama.parent / "sliced"
    convert(llama, sliced, SliceOptions(slices=4))
    report = export(converted(sliced, "all", experts=4), "glm4-moe", llama.parent / "glm")
    assert report.max_abs_logit_diff is not None
    assert report.max_abs_logit_diff < FP32_BOUND
    for name, options in {"fewer": {"top_k": 1, "router": "random"}, "weighed": {"gate": "softmax"}}.items():
        with pytest.raises(UserError, match="no attention experts"):
            export(converted(sliced, name, **options), "glm4-moe", llama.parent / "no")


def test_dense_again_without_sliced_ffns(dense: Path) -> None:
    folder = converted(dense, experts=2, top_k=1, router="random")
    assert_dense_again(folder, dense)
    with pytest.raises(UserError, match="experts in the FFNs"):
        export(folder, "glm4-moe", dense.parent / "no")


def assert_dense_again(folder: Path, dense: Path) -> None:
    report = export(folder, "dense", dense.parent / "dense-again")
    assert report.max_abs_logit_diff is not None
    before, after = (read_header(path / "model.safetensors") for path in (dense, report.out))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(tensor.read(0, tensor.numel), after[name].read(0, tensor.numel))
    config, back = (json.loads((path / "config.json").read_text()) for path in (dense, report.out))
    older = {"rope_theta", "rope_scaling", "torch_dtype"} & back.keys()  # beside the newer ones, for older readers
    assert back == config | {key: back[key] for key in older}


def test_ridge_finds_a_linear_rule() -> None:
    """Norms that are linear in the input, but for noise: the largest are found on tokens not seen."""
    generator = torch.Generator().manual_seed(0)
    rule, intercept = torch.randn(4, 16, generator=generator), torch.tensor([0.0, 1.0, 0.0, 3.0])
    x = torch.randn(600, 16, generator=generator)
    norms = x @ rule.T + intercept + 0.1 * torch.randn(600, 4, generator=generator)
    start = ridge_router(x[:500], norms[:500], num_chosen=2)
    scores = x[500:] @ start.weight_ED.T + start.bias_E
    agree = scores.topk(2).indices.sort().values == norms[500:].topk(2).indices.sort().values
    assert agree.float().mean() > 0.9  # all but near ties of size 0.1 in norms of size 4


def test_the_router_starts_so_that_no_expert_is_dead_by_default() -> None:
    assert AttentionOptions().router_start(4, 4) == "zero"  # all chosen
    assert AttentionOptions().router_start(4, 2) == "ridge"
    assert AttentionOptions(gate="softmax").router_start(4, 2) == "random"
    assert AttentionOptions(router="zero").router_start(4, 2) == "zero"


def test_ridge_router_from_text(tmp_path: Path) -> None:
    source = save_llama(tmp_path / "dense")
    folder = converted(source, layers="all", top_k=1, calibration=CALIBRATION)
    assert "router start `ridge`" in (folder / "README.md").read_text()
    model: Any = load(folder)
    for layer in model.attention_experts:
        assert layer.router.weight.abs().sum() > 0
        assert (layer.router.gate_scale == 0).all()
    assert logits(model, tokens()).isfinite().all()


@pytest.mark.parametrize("kind", ["dense", "sliced"])
def test_balance_bounds_the_violation_on_the_calibration_text(tmp_path: Path, kind: str) -> None:
    """In a layer behind others, dense or sliced ones."""
    source, violations = save_llama(tmp_path / "dense"), []
    if kind == "sliced":
        convert(source, tmp_path / "sliced", SliceOptions(slices=4, noise=0.5))
        source = tmp_path / "sliced"
    for balance in (None, 0.05):
        options = AttentionOptions(layers="1", top_k=1, router="ridge", calibration=CALIBRATION, balance=balance)
        convert(source, tmp_path / f"{balance}", options)
        model: Any = load(tmp_path / f"{balance}")
        seen = calibration_tokens(open_dense_or_converted(source), CALIBRATION)
        with torch.no_grad():
            model(seen.ids_NL, position_ids=seen.positions_NL)
        (layer,) = model.attention_experts
        violations.append(max_violation(expert_counts(layer.last_routing.expert_ids_TK, 2)).item())
    assert violations[1] <= 0.05 < violations[0]


@torch.no_grad()
def test_caches_and_masks_that_cannot_be_held(llama: Path) -> None:
    folder = converted(llama)
    model = load(folder)
    with pytest.raises(UserError, match="StaticLayer"):
        model.generate(tokens(), cache_implementation="static", **GREEDY)
    with pytest.raises(UserError, match="not \\[2, 2, 20, 20\\]"):
        model(tokens(), attention_mask=torch.ones(2, 2, 20, 20, dtype=torch.bool), use_cache=False)
    filled = DynamicCache()
    filled.update(torch.ones(1, 2, 3, 8), torch.ones(1, 2, 3, 8), 0)
    with pytest.raises(UserError, match="filled by another model"):
        model(tokens(B=1), past_key_values=filled)
    eager = load(folder, attn_implementation="eager")
    expected = logits(model, tokens(), attention_mask=left_padded()["attention_mask"])
    got = logits(eager, tokens(), attention_mask=left_padded()["attention_mask"])
    real = left_padded()["attention_mask"].bool()
    assert (got - expected)[real].abs().max() < FP32_BOUND
