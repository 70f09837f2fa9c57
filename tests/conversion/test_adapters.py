"""Adapters as experts: what peft saved computes here what it computes there, each on its own tokens."""

import json
import shutil

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

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
from lamella.train.adapters import Pace, learn_adapter, train_routers
from support.models import VOCAB, save_llama, save_tokenizer, tiny_checkpoint

MODULES = ["gate_proj", "up_proj", "down_proj"]
VARIANTS = {
    "plain": {"r": 4, "lora_alpha": 8, "target_modules": MODULES},
    "patterns": {
        "r": 4, "lora_alpha": 8, "target_modules": MODULES, "rank_pattern": {"layers.1.mlp.up_proj": 3, "down_proj": 2},
        "alpha_pattern": {"gate_proj": 5},
    },
    "rslora": {
        "r": 9, "lora_alpha": 8, "use_rslora": True, "target_modules": ["down_proj"], "layers_to_transform": [0],
    },
}  # fmt: skip
WITH_ATTENTION = {"r": 4, "lora_alpha": 8, "target_modules": [*MODULES, "q_proj", "k_proj", "v_proj", "o_proj"]}
ATTENTION = {"r": 3, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"]}
IDS = torch.randint(0, 128, (2, 17), generator=torch.Generator().manual_seed(0))


def save_adapter(dense, out, seed=1, **config):
    """As peft saves it, with a B that is not zero."""
    torch.manual_seed(seed)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(dense), LoraConfig(**config))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.3)
    model.save_pretrained(out)
    return out


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(ids, use_cache=False).logits


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


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return str(save_llama(tmp_path_factory.mktemp("small") / "dense"))


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    for name, line in {"digits": "1234 5678 90 ", "letters": "abc def ghij "}.items():
        lines = (json.dumps({"text": line * 30}) + "\n" for _ in range(60))
        (folder / f"{name}.jsonl").write_text("".join(lines))
    return folder


@pytest.mark.slow
def test_learn_and_route(small, texts, tmp_path):
    pace = Pace(steps=12, lr=5e-3, samples_per_step=2, seq_len=64)
    for name in ("digits", "letters"):
        losses = learn_adapter(small, [str(texts / f"{name}.jsonl")], tmp_path / name, rank=4, alpha=8.0, pace=pace)
        assert losses[-1] < losses[0] - 0.1
    # peft loads what was learned, and computes the same
    convert(small, tmp_path / "mix", AdaptersOptions(adapters=(str(tmp_path / "digits"), str(tmp_path / "letters"))))
    ids, model = IDS % VOCAB, load(tmp_path / "mix")
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(small), tmp_path / "digits").eval()
    model.computing.adapter = 0
    torch.testing.assert_close(logits(model, ids), logits(theirs, ids), atol=2e-5, rtol=1e-4)
    data = {str(texts / "digits.jsonl"): "digits", str(texts / "letters.jsonl"): "letters"}
    route = Pace(steps=40, lr=1e-1, samples_per_step=2, seq_len=64)
    train_routers(str(tmp_path / "mix"), data, tmp_path / "routed", target="router_mlp", pace=route, balance=0.01)
    routed = load(tmp_path / "routed")
    share, tokenizer = {}, AutoTokenizer.from_pretrained(small)
    for index, text in enumerate(("1234 5678 90 " * 4, "abc def ghij " * 4)):
        logits(routed, tokenizer(text, return_tensors="pt")["input_ids"])
        chosen = torch.cat([layer.last_routing.expert_ids_TK for layer in adapter_layers(routed)])
        share[index] = (chosen == index).float().mean().item()
    assert min(share.values()) > 0.8, share
    before = load_file(tmp_path / "mix/model.safetensors")
    for name, tensor in load_file(tmp_path / "routed/model.safetensors").items():
        assert torch.equal(tensor, before[name]) == (".router." not in name and ".adapters." not in name), name
    # the routers alone, from the same place
    train_routers(str(tmp_path / "mix"), data, tmp_path / "alone", pace=Pace(2, 1e-2, 2, 64))
    for name, tensor in load_file(tmp_path / "alone/model.safetensors").items():
        assert torch.equal(tensor, before[name]) == (".router." not in name), name


@pytest.mark.slow
def test_learn_and_route_attention(small, texts, tmp_path):
    pace, digits = Pace(steps=4, lr=5e-3, samples_per_step=2, seq_len=64), str(texts / "digits.jsonl")
    learn_adapter(small, [digits], tmp_path / "both", rank=4, blocks=("mlp", "attention"), pace=pace)
    learn_adapter(small, [digits], tmp_path / "heads", rank=4, blocks=("attention",), pace=pace)
    convert(small, tmp_path / "mix", AdaptersOptions(adapters=(str(tmp_path / "both"), str(tmp_path / "heads"))))
    ids, model = IDS % VOCAB, load(tmp_path / "mix")
    for index, name in enumerate(("both", "heads")):
        theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(small), tmp_path / name).eval()
        model.computing.adapter = index
        torch.testing.assert_close(logits(model, ids), logits(theirs, ids), atol=2e-5, rtol=1e-4)
    before, expected = load_file(tmp_path / "mix/model.safetensors"), {
        "router": (".router.",), "router_mlp": (".router.", ".mlp.adapters."), "attention": (".lora.adapters.",),
        "mlp": (".mlp.adapters.",),
    }  # fmt: skip
    source = tmp_path / "mix"
    for target, parts in expected.items():
        out = tmp_path / target
        train_routers(str(source), {digits: "both"}, out, target=target, pace=Pace(3, 1e-1, 2, 64), dtype="float32")
        for name, tensor in load_file(out / "model.safetensors").items():
            same = torch.equal(tensor, before[name])
            assert same or any(part in name for part in parts), name
            if any(name.endswith(f"{part.rstrip('.')}.{end}") for part in parts for end in ("weight", "up_proj_b")):
                assert not same, (target, name)
        if target == "router":  # adapters alone train behind routers that choose them
            source, before = out, load_file(out / "model.safetensors")


def test_bad_training(small, texts, mix, tmp_path):
    folder, digits = str(mix[3]), str(texts / "digits.jsonl")
    with pytest.raises(UserError, match="is for the adapter 'x', which the model lacks; it has plain"):
        train_routers(folder, {digits: "x"}, tmp_path / "out")
    with pytest.raises(UserError, match="target is 'attention', but the model's adapters are of mlp alone"):
        train_routers(folder, {digits: "plain"}, tmp_path / "out", target="attention")
    with pytest.raises(UserError, match="has no adapters as experts"):
        train_routers(small, {digits: "plain"}, tmp_path / "out")
    with pytest.raises(UserError, match="both must be positive"):
        learn_adapter(small, [digits], tmp_path / "out", rank=0)
    with pytest.raises(UserError, match="steps is 0"):
        Pace(steps=0)
    save_tokenizer(mix[3])
    with pytest.raises(UserError, match="send every token to the zero expert; train them first"):
        train_routers(folder, {digits: "plain"}, tmp_path / "out", target="mlp", pace=Pace(1, 1e-2, 1, 64))
    assert not (tmp_path / "out").exists()
