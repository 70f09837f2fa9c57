"""Adapters as experts: what peft saved computes here what it computes there, each on its own tokens."""

import json
import shutil

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lamella.architecture.model import trainable_sizes
from lamella.architecture.peft import WEIGHTS
from lamella.architecture.rows import names_of
from lamella.checkpoint.source import read_config
from lamella.conversion import convert
from lamella.errors import UserError
from lamella.export import export
from lamella.export.adapters import merge_experts, write_peft_adapters
from lamella.hf.adapters import adapter_blocks, adapter_layers
from lamella.hf.models import load
from lamella.moe.adapters import (
    AdapterFFNWeights,
    LowRank,
    all_experts,
    all_low_rank,
    own_low_rank,
    own_tokens,
    route_adapters,
    straight_through,
)
from lamella.recipe.methods.adapters import AdaptersOptions, takes_adapters
from support.adapters import ATTENTION, IDS, VARIANTS, WITH_ATTENTION, logits, save_adapter
from support.models import tiny_checkpoint


@pytest.fixture(scope="module")
def mix(tmp_path_factory):
    """(dense, adapters, model with all of them, its folder)"""
    folder = tmp_path_factory.mktemp("adapters")
    dense = tiny_checkpoint(folder / "dense")
    adapters = [
        save_adapter(dense, folder / name, seed, **config) for seed, (name, config) in enumerate(VARIANTS.items())
    ]
    out = folder / "mix"
    convert(dense, out, AdaptersOptions(adapters=tuple(map(str, adapters))))
    return dense, adapters, load(out), out


def test_untrained_routers_leave_the_dense_bits(mix):
    dense, _, model, _ = mix
    assert torch.equal(logits(model), logits(AutoModelForCausalLM.from_pretrained(dense)))
    assert json.loads((mix[3] / "config.json").read_text())["adapters"]["names"] == list(VARIANTS)
    assert all((layer.last_routing.expert_ids_TK == 3).all() for layer in adapter_layers(model))


@pytest.mark.parametrize("index", range(3))
def test_each_adapter_computes_what_it_does_in_peft(mix, index):
    dense, adapters, model, _ = mix
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(dense), adapters[index]).eval()
    model.computing.adapter = index
    ours = logits(model)
    model.computing.adapter = None
    torch.testing.assert_close(ours, logits(theirs), atol=2e-5, rtol=1e-4)  # fp32, the scale applied elsewhere
    assert (ours - logits(model)).abs().max() > 0.01


@pytest.mark.parametrize("family", names_of(takes_adapters))
def test_every_family(family, tmp_path):
    dense = tiny_checkpoint(tmp_path / "dense", family)
    adapter = save_adapter(dense, tmp_path / "one", **VARIANTS["plain"])
    convert(dense, tmp_path / "mix", AdaptersOptions(adapters=(str(adapter),)))
    model, stock = load(tmp_path / "mix"), AutoModelForCausalLM.from_pretrained(dense)
    assert torch.equal(logits(model), logits(stock))
    model.computing.adapter = 0
    theirs = PeftModel.from_pretrained(stock, adapter).eval()
    torch.testing.assert_close(logits(model), logits(theirs), atol=2e-5, rtol=1e-4)


@pytest.fixture(scope="module", params=names_of(takes_adapters))
def with_attention(request, tmp_path_factory):
    """(dense, two adapters of attention, one of FFNs too, the model's folder)"""
    folder = tmp_path_factory.mktemp(request.param)
    dense = tiny_checkpoint(folder / "dense", request.param)
    adapters = [
        save_adapter(dense, folder / "both", 1, **WITH_ATTENTION), save_adapter(dense, folder / "qv", 2, **ATTENTION),
    ]  # fmt: skip
    convert(dense, folder / "mix", AdaptersOptions(adapters=tuple(map(str, adapters))))
    return dense, adapters, folder / "mix"


def test_adapters_of_attention(with_attention, tmp_path):
    dense, adapters, folder = with_attention
    model, stock = load(folder), AutoModelForCausalLM.from_pretrained(dense)
    assert torch.equal(logits(model), logits(stock))
    assert write_peft_adapters(folder, tmp_path / "out") == ["both", "qv"]
    for index, adapter in enumerate(adapters):
        model.computing.adapter = index
        ours = logits(model)
        for saved in (adapter, tmp_path / "out" / adapter.name):
            theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(dense), saved).eval()
            torch.testing.assert_close(ours, logits(theirs), atol=2e-5, rtol=1e-4)
    with pytest.raises(UserError, match="has adapters of attention, which no expert of an FFN can hold"):
        merge_experts(folder, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("top_k", [1, 2])
def test_routed_attention_is_that_of_its_own_tokens(with_attention, top_k):
    """Each projection is W x + the sum of w_e B_e A_e x, in both paths, and the cache holds what a token chose."""
    model = load(with_attention[2])
    torch.manual_seed(4)
    seen = {}
    for block in adapter_blocks(model):
        block.router.weight.data.normal_()
        block.router.selection_bias.zero_()
        object.__setattr__(block.config, "num_experts_per_tok", top_k)
    attention = model.model.layers[0].self_attn
    attention.register_forward_pre_hook(lambda _, args, kw: seen.update(x=kw["hidden_states"]), with_kwargs=True)
    attention.k_proj.register_forward_hook(lambda _, args, out: seen.update(k=out))
    wanted = logits(model)
    x_TD, routing = seen["x"].flatten(0, 1), attention.lora.last_routing
    assert len(routing.expert_ids_TK.unique()) == 3
    low = attention.lora.adapters.low_rank("k_proj")
    k = F.linear(x_TD, attention.k_proj.weight, attention.k_proj.bias)
    for t, (ids, weights) in enumerate(zip(routing.expert_ids_TK.tolist(), routing.weights_TK, strict=True)):
        for e, weight in zip(ids, weights, strict=True):
            k[t] += 0 if e == 2 else weight * (low.b[e] @ (low.a[e] @ x_TD[t]))
    torch.testing.assert_close(seen["k"].flatten(0, 1), k, atol=1e-5, rtol=1e-5)
    in_training = model(IDS, use_cache=False).logits  # every expert for every token
    torch.testing.assert_close(in_training, wanted, atol=2e-5, rtol=1e-4)
    with torch.no_grad():
        cache = model(IDS[:, :9], use_cache=True).past_key_values
        rest = model(IDS[:, 9:], past_key_values=cache).logits
    torch.testing.assert_close(rest, wanted[:, 9:], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("top_k", [1, 2, 4])
@torch.no_grad()
def test_low_rank_sums_in_all_their_paths(top_k):
    x_TD, weights, probs_TE, routing = random_layer(top_k)
    low = weights.low_up
    wanted = torch.stack([
        sum((w * (low.b[e] @ low.a[e] @ x) for e, w in zip(ids.tolist(), ws, strict=True) if e < 3), torch.zeros(24))
        for x, ids, ws in zip(x_TD, routing.expert_ids_TK, routing.weights_TK, strict=True)
    ])  # fmt: skip
    for grouped in (False, True):
        torch.testing.assert_close(own_low_rank(x_TD, low, routing, grouped), wanted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        all_low_rank(x_TD, low, straight_through(probs_TE, routing)), wanted, atol=1e-5, rtol=1e-5
    )


def by_definition(x_TD, w: AdapterFFNWeights, routing):
    """y = FFN(x) + sum of w_e (FFN_e(x) - FFN(x)), a token and an expert at a time."""

    def ffn(x, e):
        def matrix(linear, low):
            return linear.weight if e == len(low.a) else linear.weight + low.b[e] @ low.a[e]

        gate, up = F.linear(x, matrix(w.gate, w.low_gate)), F.linear(x, matrix(w.up, w.low_up))
        return F.linear(F.silu(gate) * up, matrix(w.down, w.low_down))

    zero, rows = len(w.low_gate.a), []
    for x, ids, weights in zip(x_TD, routing.expert_ids_TK, routing.weights_TK, strict=True):
        base = ffn(x, zero)
        rows.append(base + sum(p * (ffn(x, e) - base) for e, p in zip(ids.tolist(), weights, strict=True)))
    return torch.stack(rows)


def random_layer(top_k):
    torch.manual_seed(0)
    D, f, N, r = 16, 24, 3, 8
    linears = (torch.nn.Linear(D, f, bias=False), torch.nn.Linear(D, f, bias=False), torch.nn.Linear(f, D, bias=False))
    lows = [LowRank(torch.randn(N, r, i) * 0.2, torch.randn(N, o, r) * 0.2) for i, o in ((D, f), (D, f), (f, D))]
    x_TD = torch.randn(40, D)
    probs_TE = (torch.randn(40, N + 1) * 2).softmax(-1)
    return x_TD, AdapterFFNWeights(*linears, *lows), probs_TE, route_adapters(probs_TE, torch.zeros(N + 1), top_k)


@pytest.mark.parametrize("top_k", [1, 2, 4])
@torch.no_grad()
def test_both_paths_compute_the_definition(top_k):
    x_TD, weights, probs_TE, routing = random_layer(top_k)
    wanted = by_definition(x_TD, weights, routing)
    assert len(routing.expert_ids_TK.unique()) == 4
    for grouped in (False, True):
        torch.testing.assert_close(own_tokens(x_TD, weights, routing, grouped), wanted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        all_experts(x_TD, weights, straight_through(probs_TE, routing)), wanted, atol=1e-5, rtol=1e-5
    )


def test_straight_through_compares_all_experts():
    x_TD, weights, probs_TE, routing = random_layer(1)
    logits_TE = probs_TE.detach().log().requires_grad_()
    all_experts(x_TD, weights, straight_through(logits_TE.softmax(-1), routing)).square().sum().backward()
    assert (logits_TE.grad.abs() > 0).all()  # not of the chosen ones alone


def test_merged_experts_and_the_stock_export(mix, tmp_path):
    _, _, model, folder = mix
    trained = tmp_path / "trained"
    torch.manual_seed(3)
    for layer in adapter_layers(model):
        layer.router.weight.data.normal_()
        layer.router.selection_bias.zero_()
    shutil.copytree(folder, trained)
    model.save_pretrained(trained)
    shutil.copy(folder / "config.json", trained)
    wanted = logits(model)
    assert len(torch.cat([layer.last_routing.expert_ids_TK for layer in adapter_layers(model)]).unique()) == 4
    merge_experts(trained, tmp_path / "merged")
    torch.testing.assert_close(logits(load(tmp_path / "merged")), wanted, atol=1e-4, rtol=1e-4)  # fp32, W + BA once
    result = export(tmp_path / "merged", "mixtral", tmp_path / "mixtral")
    assert result.architecture == "MixtralForCausalLM"
    torch.testing.assert_close(
        logits(AutoModelForCausalLM.from_pretrained(tmp_path / "mixtral")), wanted, atol=1e-4, rtol=1e-4
    )
    with pytest.raises(UserError, match="has adapters as experts; merge them first"):
        export(trained, "mixtral", tmp_path / "other")


def test_adapters_go_back_to_peft(mix, tmp_path):
    dense, _, model, folder = mix
    assert write_peft_adapters(folder, tmp_path / "out") == list(VARIANTS)
    for index, name in enumerate(VARIANTS):
        theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(dense), tmp_path / "out" / name).eval()
        model.computing.adapter = index
        torch.testing.assert_close(logits(model), logits(theirs), atol=2e-5, rtol=1e-4)
    model.computing.adapter = None
    routers = load_file(tmp_path / "out/routers.safetensors")
    assert routers["model.layers.0.mlp.router.weight"].shape == (4, 32)


BAD = {
    "dora": ({"use_dora": True}, "it uses DoRA, which is not carried"),
    "bias": ({"bias": "lora_only"}, r"it trained biases \(bias 'lora_only'\)"),
    "parameters": ({"target_parameters": ["mlp.experts"]}, "it uses target_parameters"),
    "kind": ({"peft_type": "IA3"}, "its peft_type is 'IA3'"),
    "rank": ({"r": 5}, r"lora_A of model.layers.0.mlp.\w+ is \[4, \d+\], and the model and rank 5 need \[5, \d+\]"),
    "no rank": ({"r": None}, "r is None; it must be a whole number"),
    "target": ({"target_modules": ["gate_proj", "lm_head"]}, "it should change lm_head, of which it holds no tensor"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_adapters(case, mix, tmp_path):
    changes, message = BAD[case]
    dense, adapters, _, _ = mix
    shutil.copytree(adapters[0], tmp_path / "bad")
    config = tmp_path / "bad/adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | changes))
    with pytest.raises(UserError, match=message):
        convert(dense, tmp_path / "out", AdaptersOptions(adapters=(str(tmp_path / "bad"),)))
    assert not (tmp_path / "out").exists()


def test_other_bad_adapters(mix, tmp_path):
    dense, adapters, _, folder = mix

    def refused(message, *paths, **more):
        with pytest.raises(UserError, match=message):
            convert(
                more.pop("model", dense), tmp_path / "out", AdaptersOptions(adapters=tuple(map(str, paths)), **more)
            )
        assert not (tmp_path / "out").exists()

    refused("needs adapters: a list of folders")
    refused("an adapter is listed twice", adapters[0], adapters[0])
    refused("holds no adapter_config.json", dense)
    refused("top_k is 5; it must be 1 to 2", adapters[0], top_k=5)
    wider = tiny_checkpoint(tmp_path / "wider", intermediate_size=64)
    refused(r"made for .*dense, cannot be used: lora_A of .* is \[4, 48\]", adapters[0], model=wider)
    refused("it changes layer 1, and the model has 1 layers", adapters[0],
            model=tiny_checkpoint(tmp_path / "short", num_hidden_layers=1))  # fmt: skip
    refused("gpt2 cannot take adapters", adapters[0], model=tiny_checkpoint(tmp_path / "gpt2", "gpt2"))
    with_head = save_adapter(dense, tmp_path / "head", r=4, target_modules=["lm_head", "up_proj"])
    refused("it changes lm_head", with_head)
    tensors = load_file(adapters[0] / WEIGHTS)
    shutil.copytree(adapters[0], tmp_path / "half")
    save_file(dict(list(tensors.items())[1:]), tmp_path / "half" / WEIGHTS)
    refused("is missing", tmp_path / "half")
    (tmp_path / "half" / WEIGHTS).write_bytes(b"no")
    refused("is no safetensors file", tmp_path / "half")
    with pytest.raises(UserError, match="adapters as experts are trained by `lamella adapters route`"):
        trainable_sizes(read_config(folder))
