"""GPT-2 and OPT, converted: old files' names, what is refused, generation, training's gradients, logit match."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file

from lamella.architecture.moe import MoEConfig
from lamella.checkpoint.tensors import read_header
from lamella.checkpoint.transposed import matrices, transposed
from lamella.conversion import SliceOptions, convert
from lamella.errors import UserError
from lamella.evaluate.logit_match import logit_match
from lamella.evaluate.perplexity import evaluate
from lamella.export import export
from lamella.hf.models import CONVERTED_MODELS, load
from support.models import TWO_MATRIX, VOCAB, save_tokenizer, tiny_checkpoint
from support.slicing import dense_ffn, moe_prefix, sliced_by_hand

FAMILIES = list(TWO_MATRIX)
FP32_BOUND = 1e-5  # see test_convert
IDS = torch.randint(3, 128, (2, 24), generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def dense(family: str, tmp_path: Path) -> Path:
    return tiny_checkpoint(tmp_path / "dense", family)


@pytest.fixture
def moe(dense: Path, tmp_path: Path) -> Path:
    convert(dense, tmp_path / "moe", SliceOptions(slices=4))
    return tmp_path / "moe"


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


def as_on_the_hub(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Names from inside the decoder, and GPT-2's masks, as the files of the first releases have them."""
    renamed = {name.removeprefix("transformer.").removeprefix("model."): t for name, t in tensors.items()}
    if "wte.weight" in renamed:
        for layer in range(3):
            renamed[f"h.{layer}.attn.bias"] = torch.ones(1, 1, 16, 16, dtype=torch.uint8).tril()
            renamed[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    return renamed


def test_names_without_prefix_give_the_same_conversion(dense: Path, moe: Path, tmp_path: Path) -> None:
    original, expected = load_file(dense / "model.safetensors"), logits(load(dense))
    rewrite(dense, as_on_the_hub)
    assert torch.equal(logits(load(dense)), expected)
    assert not any(name.startswith(("transformer.", "model.")) for name in load_file(dense / "model.safetensors"))
    convert(dense, tmp_path / "again", SliceOptions(slices=4))
    assert (tmp_path / "again/model.safetensors").read_bytes() == (moe / "model.safetensors").read_bytes()
    export(tmp_path / "again", "dense", tmp_path / "back", check=False)
    back = load_file(tmp_path / "back/model.safetensors")
    assert back.keys() == original.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in original.items())


def test_a_tensor_under_both_names_is_refused(tmp_path: Path) -> None:
    dense = tiny_checkpoint(tmp_path / "dense", "gpt2")
    rewrite(dense, lambda tensors: tensors | {"ln_f.bias": tensors["transformer.ln_f.bias"].clone()})
    with pytest.raises(UserError, match=r"not of this architecture: ln_f\.bias"):
        convert(dense, tmp_path / "moe", SliceOptions(slices=4))


REFUSED = {
    "cross attention": ("gpt2", {"add_cross_attention": True}, "add_cross_attention"),
    "gelu_fast": ("gpt2", {"activation_function": "gelu_fast"}, "did you mean 'gelu'"),
    "no width": ("gpt2", {"n_embd": None}, "lacks n_embd"),
    "inner width": ("gpt2", {"n_inner": "x"}, "lacks n_inner"),
    "other depth": ("gpt2", {"n_layer": 2}, r"not of this architecture: transformer\.h\.2"),
    "endless layers": ("gpt2", {"n_layer": 1 << 70}, "at most 10000"),
    "quantised": ("gpt2", {"quantization_config": {"quant_method": "awq"}}, "quantised"),
    "no biases": ("opt", {"enable_bias": False}, "enable_bias is false"),
    "no affine norms": ("opt", {"layer_norm_elementwise_affine": False}, "layer_norm_elementwise_affine is false"),
    "no positions": ("opt", {"max_position_embeddings": 0}, "lacks max_position_embeddings"),
    "other width": ("opt", {"ffn_dim": 44}, r"fc1\.weight is \[48, 32\] instead of \[44, 32\]"),
    "no decoder": ("opt", {"architectures": ["OPTForSequenceClassification"]}, "only OPTForCausalLM"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case: str, tmp_path: Path) -> None:
    family, changes, message = REFUSED[case]
    dense = tiny_checkpoint(tmp_path / "dense", family)
    config = json.loads((dense / "config.json").read_text())
    (dense / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(UserError, match=message):
        convert(dense, tmp_path / "moe", SliceOptions(slices=4))
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


def test_no_gguf_no_stock_moe_and_no_training(moe: Path, family: str, tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "tiny.gguf", family)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(UserError, match="not read from GGUF; convert the model's safetensors"):
        convert(tmp_path / "tiny.gguf", tmp_path / "out")
    with pytest.raises(UserError, match=f"those of {family} have two matrices; possible here: dense"):
        export(moe, "glm4-moe", tmp_path / "out")
    titan = pytest.importorskip("lamella.titan.config")
    with pytest.raises(UserError, match=f"model_type '{family}' cannot be trained"):
        titan.decoder_config(moe)
    assert not (tmp_path / "out").exists()


def test_export_reloads_the_dense_model(dense: Path, moe: Path, tmp_path: Path) -> None:
    report = export(moe, "dense", tmp_path / "back")
    assert report.architecture == json.loads((dense / "config.json").read_text())["architectures"][0]
    assert report.max_abs_logit_diff is not None
    assert report.max_abs_logit_diff <= FP32_BOUND
    assert torch.equal(logits(load(tmp_path / "back")), logits(load(dense)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("padded", [False, True])
def test_generation_with_cache_is_the_dense_models(dense: Path, moe: Path, padded: bool, dtype: str) -> None:
    mask = torch.ones_like(IDS)
    if padded:
        mask[0, :7] = 0
    texts = []
    for folder in (dense, moe):
        model: Any = load(folder, getattr(torch, dtype))
        for use_cache in (True, False):
            texts.append(
                model.generate(
                    IDS, attention_mask=mask, max_new_tokens=24, do_sample=False, eos_token_id=None, use_cache=use_cache
                )
            )
    assert texts[0].shape == (2, 48)
    if dtype == "float32":
        assert all(torch.equal(text, texts[0]) for text in texts)
    else:  # sums in another order: the first tokens, at least, are not tied
        assert all(torch.equal(text[:, :26], texts[0][:, :26]) for text in texts)


def test_saved_and_loaded_it_is_the_same_model(moe: Path, family: str, tmp_path: Path) -> None:
    model: Any = load(moe)
    assert type(model) is CONVERTED_MODELS[family]
    trains = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert trains == {n for n, _ in model.named_parameters() if ".experts.frozen_" in n}
    assert len(trains) == 3 * 3  # up, its bias and down of three layers
    model.save_pretrained(tmp_path / "saved")
    saved: Any = load(tmp_path / "saved")
    assert torch.equal(logits(saved), logits(model))
    assert saved.state_dict().keys() == model.state_dict().keys()
    code = (moe / "modeling_lamella.py").read_text()
    assert f"import {type(model).config_class.__name__}, {type(model).__name__}" in code


def test_tied_embeddings_stay_tied(family: str, tmp_path: Path) -> None:
    dense = tiny_checkpoint(tmp_path / "dense", family, tie_word_embeddings=True)
    convert(dense, tmp_path / "moe", SliceOptions(slices=4))
    model: Any = load(tmp_path / "moe")
    assert model.get_input_embeddings().weight is model.lm_head.weight


def test_paths_and_modes(dense: Path, moe: Path) -> None:
    model: Any = load(moe)
    expected = logits(load(dense))
    for path in ("auto", "loop"):
        model.set_expert_path(path)
        assert (logits(model) - expected).abs().max() <= FP32_BOUND
    with pytest.raises(UserError, match="have 'loop' alone"):
        model.set_expert_path("grouped")
    model.set_mode("learned")
    assert (logits(model) - expected).abs().max() > 100 * FP32_BOUND


def test_gradients_reach_what_trains(moe: Path, family: str) -> None:
    model: Any = load(moe)
    model.set_mode("random")
    torch.manual_seed(0)
    model(IDS, labels=IDS).loss.backward()
    for layer in range(3):
        for name, parameter in model.named_parameters():
            if name.startswith(moe_prefix(family, layer)):
                assert (parameter.grad is not None) == ("trainable" in name or name.endswith("output_bias")), name


@pytest.mark.parametrize("part", ["up_proj", "up_bias", "down_proj"])
def test_copies_have_the_asked_noise_whatever_the_cut(part: str, family: str, tmp_path: Path) -> None:
    dense = tiny_checkpoint(tmp_path / "dense", family, **{"hidden_size": 64, TWO_MATRIX[family]: 3072})
    noise = {}
    for slices in (4, 8):
        convert(dense, tmp_path / f"moe{slices}", SliceOptions(slices=slices, noise=0.25, layers="1"))
        moe = load_file(tmp_path / f"moe{slices}/model.safetensors")
        frozen, copy = (moe[f"{moe_prefix(family, 1)}experts.{kind}_{part}"] for kind in ("frozen", "trainable"))
        by_hand = sliced_by_hand(dense_ffn(load_file(dense / "model.safetensors"), family, 1), family, slices)
        assert torch.equal(frozen, by_hand[part])
        noise[slices] = (copy - frozen).transpose(0, 1).flatten() if part == "down_proj" else (copy - frozen).flatten()
        # 3,072 samples at least: the sample std of a Gaussian scatters by 1/sqrt(2n) = 1.3%; four times that
        assert noise[slices].std() / frozen.std() == pytest.approx(0.25, rel=0.05)
    if part != "down_proj":
        assert torch.equal(noise[4], noise[8])
    else:
        f4, f8 = (noise[s].view(64, s, -1).flatten(1) for s in (4, 8))
        assert torch.equal(f4, f8)


def test_zero_noise_and_flat_routing_of_some_layers(dense: Path, family: str, tmp_path: Path) -> None:
    options = SliceOptions(slices=4, noise=0, routing="flat", layers="0,2", dtype="bfloat16")
    convert(dense, tmp_path / "moe", options)
    moe = load_file(tmp_path / "moe/model.safetensors")
    assert not any(name.startswith(f"{moe_prefix(family, 1)}experts") for name in moe)
    for name in [name for name in moe if "frozen" in name]:
        assert torch.equal(moe[name], moe[name.replace("frozen", "trainable")])
    reference = load(dense, torch.bfloat16)
    assert (logits(load(tmp_path / "moe")) - logits(reference)).abs().max() < 0.1  # logits up to 4, rounded to 8 bits


def test_any_range_of_a_transposed_matrix(tmp_path: Path) -> None:
    matrix = torch.arange(7 * 5, dtype=torch.bfloat16).view(7, 5)
    stack = torch.arange(3 * 4 * 2, dtype=torch.float32).view(3, 4, 2)
    save_file({"w": matrix, "s": stack}, tmp_path / "w.safetensors")
    header = read_header(tmp_path / "w.safetensors")
    flat, source = matrix.T.reshape(-1), transposed(header["w"])
    assert source.shape == (5, 7)
    for start in range(35):
        for count in range(1, 36 - start):
            assert torch.equal(source.read(start, count), flat[start : start + count])
    for part, expected in zip(matrices(header["s"]), stack, strict=True):
        assert torch.equal(part.read(0, part.numel).view(part.shape), expected)
    with open(tmp_path / "w.safetensors", "r+b") as file:
        file.truncate(header["w"].begin + 20)
    with pytest.raises(UserError, match="early"):
        source.read(10, 5)


def partitioned(family: str, folder: Path) -> Any:
    """A model of experts that all train beside a shared one, every tensor random."""
    dense = load(tiny_checkpoint(folder / "dense", family))
    layers = {2: {"num_trainable_experts": 4, "shared_intermediate_size": 16}}
    moe = MoEConfig(
        0, 5, 8, 2, (0, 2), "flat", "unit", router="analytic", shared_intermediate_size=8, output_bias=True,
        gated=False, activation="gelu", per_layer=layers,
    )  # fmt: skip
    cls = CONVERTED_MODELS[family]
    values = {key: value for key, value in dense.config.to_dict().items() if key != "model_type"}
    torch.manual_seed(0)
    model: Any = cls(cls.config_class(**values | {"moe": moe.to_dict()}))
    with torch.no_grad():
        for layer in model.moe_layers:
            for parameter in layer.parameters():
                parameter.normal_(std=0.1)
    return model.eval()


def test_partitioned_layers(family: str, tmp_path: Path) -> None:
    model = partitioned(family, tmp_path)
    shapes = {n.removeprefix(moe_prefix(family, 2)): tuple(t.shape) for n, t in model.state_dict().items()}
    assert shapes["experts.trainable_up_proj"] == (4, 8, 32)
    assert shapes["shared.up_proj"] == (16, 32)
    assert shapes["shared.up_bias"] == (16,)
    model.save_pretrained(tmp_path / "saved")
    loaded: Any = load(tmp_path / "saved")
    assert torch.equal(logits(loaded), logits(model))
    loaded(IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in loaded.moe_layers[0].shared.parameters())
    assert all(p.grad is not None for p in loaded.moe_layers[1].experts.parameters())
    with pytest.raises(UserError, match="no frozen slices"):
        export(tmp_path / "saved", "dense", tmp_path / "back", check=False)


@pytest.fixture
def with_text(family: str, tmp_path: Path) -> tuple[str, str]:
    """(dense, converted) with a tokenizer."""
    dense = tiny_checkpoint(tmp_path / "dense", family, vocab_size=VOCAB, max_position_embeddings=512)
    save_tokenizer(dense)
    convert(dense, tmp_path / "moe", SliceOptions(slices=4))
    return str(dense), str(tmp_path / "moe")


@pytest.mark.slow
def test_the_logit_match_passes_and_sees_damage(with_text: tuple[str, str], family: str) -> None:
    tokens = {"float32": 512, "bfloat16": 512}
    checks = logit_match(*with_text, tokens=tokens)
    assert [dataclasses.asdict(check) for check in checks if not check.passed] == []
    assert {"dense", "routed", "random, no noise"} <= {check.what for check in checks if check.bound is not None}
    floors = [check.figure for check in checks if check.what.startswith("floor") and check.name.startswith("max")]
    assert 0 < floors[0] < 1e-4
    assert 1e-4 < floors[1] < 1

    def damage(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        tensors[f"{moe_prefix(family, 1)}experts.frozen_up_bias"][2] *= 0.5
        return tensors

    rewrite(Path(with_text[1]), damage)
    failed = {check.what for check in logit_match(*with_text, tokens={"float32": 512}) if not check.passed}
    assert failed == {"dense", "routed", "random, no noise"}


def test_evaluate(with_text: tuple[str, str], tmp_path: Path) -> None:
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": f"A line of text, number {i}. " * 4}) + "\n" for i in range(60)))
    dense, moe = with_text
    results = evaluate(moe, str(text), dense, split=None, max_tokens=512, seq_len=128)
    # fp32, another order of summation
    assert results["model"].nats_per_token == pytest.approx(results["dense"].nats_per_token, rel=1e-5)
