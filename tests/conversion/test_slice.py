"""Conversion: what is written, bit by bit, and that the logits stay the dense model's."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import xxhash

from lamella.architecture.moe import DENSE_BIAS
from lamella.conversion import SliceOptions, convert, plan_conversion
from lamella.errors import UserError
from lamella.export import export
from lamella.hf.models import load
from lamella.recipe.methods.common import parse_layers
from support.models import LLAMA3_ROPE, WIDELY_TESTED, tiny_checkpoint
from support.slicing import dense_ffn, moe_prefix, sliced_by_hand
from support.tensors import bits_equal, read_all

# Logits of the tiny models reach about 4. Slicing only reorders sums of at most 48 terms per FFN in each of 3 layers:
# a few float32 roundings (4 * 2**-23 = 5e-7) at every step, which the norms and the head may add up.
FP32_BOUND = 1e-5
# Of keys that transformers 5 spells anew: written beside the newer ones for older readers.
OLDER_SPELLINGS = {"rope_theta", "rope_scaling", "torch_dtype"}
FFN = ("gate_proj", "up_proj", "down_proj")


def assert_same_tensors(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert [name for name in a if not bits_equal(a[name], b[name])] == []


def assert_sliced(
    dense: dict[str, torch.Tensor], moe: dict[str, torch.Tensor], layer: int, slices: int, family: str = "llama"
) -> None:
    prefix, ffn = moe_prefix(family, layer), dense_ffn(dense, family, layer)
    for name, expected in sliced_by_hand(ffn, family, slices).items():
        frozen, copy = (moe[f"{prefix}experts.{kind}_{name}"] for kind in ("frozen", "trainable"))
        assert bits_equal(frozen, expected)
        assert copy.dtype == frozen.dtype
        assert copy.shape == frozen.shape
        assert not torch.equal(copy, frozen)
    output_bias = [tensor for name, tensor in ffn.items() if name.endswith(("fc2.bias", "c_proj.bias"))]
    assert [name for name in moe if name == f"{prefix}output_bias"] == [f"{prefix}output_bias"] * len(output_bias)
    assert all(bits_equal(moe[f"{prefix}output_bias"], tensor) for tensor in output_bias)


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(0, 128, (2, 32), generator=torch.Generator().manual_seed(0))


def logits(folder: Path, tokens: torch.Tensor, mode: str | None = None) -> torch.Tensor:
    model = load(folder, torch.float32)
    if mode:
        model.set_mode(mode)
    with torch.no_grad():
        return model(tokens).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sharded", [False, True], ids=["single", "sharded"])
@pytest.mark.parametrize("family", WIDELY_TESTED)
def test_every_family(family: str, sharded: bool, dtype: torch.dtype, tmp_path: Path, tokens: torch.Tensor) -> None:
    dense = tiny_checkpoint(tmp_path / "dense", family, sharded, dtype)
    report = convert(dense, tmp_path / "moe", SliceOptions(slices=4))
    source, moe = read_all(dense), read_all(tmp_path / "moe")
    rest = set(source)
    for layer in range(3):
        assert_sliced(source, moe, layer, 4, family)
        assert not moe[f"{moe_prefix(family, layer)}router.weight"].any()
        assert bits_equal(moe[f"{moe_prefix(family, layer)}router.selection_bias"], torch.full((4,), DENSE_BIAS))
        rest -= set(dense_ffn(source, family, layer))
    assert len(rest) > 3 * 4
    assert all(bits_equal(source[name], moe[name]) for name in rest)
    assert report.bytes_written == sum(t.nbytes for t in moe.values())

    reference = logits(dense, tokens)
    for mode in ("dense", "routed"):
        assert (logits(tmp_path / "moe", tokens, mode) - reference).abs().max() <= FP32_BOUND
    assert (logits(tmp_path / "moe", tokens, "learned") - reference).abs().max() > 100 * FP32_BOUND  # noise was added

    export(tmp_path / "moe", "dense", tmp_path / "back", check=False)
    assert_same_tensors(read_all(tmp_path / "back"), source)
    back, config = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("back", "dense"))
    assert back == config | {key: back[key] for key in OLDER_SPELLINGS & back.keys()}


VARIANTS = {
    "tied": ("llama", {"tie_word_embeddings": True}),
    "llama3 rope": ("llama", {"rope_parameters": LLAMA3_ROPE}),
    "attention bias": ("llama", {"attention_bias": True}),
    "qwen3 attention bias": ("qwen3", {"attention_bias": True}),
    "qwen2 tied": ("qwen2", {"tie_word_embeddings": True}),
    "own head_dim": ("mistral", {"head_dim": 16}),
    "sliding window": ("mistral", {"sliding_window": 8}),
    "all heads": ("llama", {"num_key_value_heads": 4}),
    "gpt2 tied, gelu": ("gpt2", {"tie_word_embeddings": True, "activation_function": "gelu"}),
    "gpt2, other attention": ("gpt2", {"scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True}),
    "opt tied, gelu": ("opt", {"tie_word_embeddings": True, "activation_function": "gelu"}),
    "opt-350m": ("opt", {"tie_word_embeddings": True, "do_layer_norm_before": False, "word_embed_proj_dim": 16}),
    "opt, narrow embedding": ("opt", {"word_embed_proj_dim": 16}),
    "opt, old": ("opt", {"_remove_final_layer_norm": True}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_are_carried(variant: str, tmp_path: Path, tokens: torch.Tensor) -> None:
    family, changes = VARIANTS[variant]
    dense = tiny_checkpoint(tmp_path / "dense", family, **changes)
    convert(dense, tmp_path / "moe", SliceOptions(slices=4))
    assert (logits(tmp_path / "moe", tokens) - logits(dense, tokens)).abs().max() <= FP32_BOUND
    export(tmp_path / "moe", "dense", tmp_path / "back", check=False)
    assert_same_tensors(read_all(tmp_path / "back"), read_all(dense))
    config = json.loads((tmp_path / "moe/config.json").read_text())
    dense_config = json.loads((dense / "config.json").read_text())
    assert {key: config[key] for key in dense_config} | {"architectures": 0, "model_type": 0} == dense_config | {
        "architectures": 0,
        "model_type": 0,
    }
    assert ("lm_head.weight" in read_all(tmp_path / "moe")) is not dense_config.get("tie_word_embeddings", True)


def test_older_config_with_rope_scaling(tmp_path: Path, tokens: torch.Tensor) -> None:
    """transformers 4 wrote rope_theta and rope_scaling; both must reach the converted model."""
    dense = tiny_checkpoint(tmp_path / "dense", rope_parameters=LLAMA3_ROPE)
    expected = logits(dense, tokens)
    config = json.loads((dense / "config.json").read_text())
    rope = config.pop("rope_parameters")
    config |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope, "torch_dtype": config.pop("dtype")}
    (dense / "config.json").write_text(json.dumps(config))
    convert(dense, tmp_path / "moe", SliceOptions(slices=4))
    assert (logits(tmp_path / "moe", tokens) - expected).abs().max() <= FP32_BOUND
    without = {**config, "rope_scaling": None}
    (dense / "config.json").write_text(json.dumps(without))
    assert (logits(dense, tokens) - expected).abs().max() > 100 * FP32_BOUND  # so the test can fail


def test_a_tied_head_and_rope_frequencies_may_be_stored_along(tmp_path: Path, tokens: torch.Tensor) -> None:
    from safetensors.torch import load_file, save_file

    dense = tiny_checkpoint(tmp_path / "dense", tie_word_embeddings=True)
    tensors = load_file(dense / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.rand(4)
    save_file(tensors, dense / "model.safetensors", metadata={"format": "pt"})
    convert(dense, tmp_path / "moe", SliceOptions(slices=4))
    assert (logits(tmp_path / "moe", tokens) - logits(dense, tokens)).abs().max() <= FP32_BOUND
    export(tmp_path / "moe", "dense", tmp_path / "back", check=False)
    assert_same_tensors(read_all(tmp_path / "back"), tensors)


@pytest.mark.parametrize(("top_k", "gate"), [(None, "sigmoid"), (None, "softmax"), (3, "sigmoid")])
def test_flat_routing(top_k: int | None, gate: str, tmp_path: Path, tokens: torch.Tensor) -> None:
    dense = tiny_checkpoint(tmp_path / "dense")
    convert(dense, tmp_path / "moe", SliceOptions(slices=4, routing="flat", gate=gate, top_k=top_k))
    moe = read_all(tmp_path / "moe")
    assert moe["model.layers.0.mlp.router.weight"].shape == (8, 32)
    assert moe["model.layers.0.mlp.router.selection_bias"].tolist() == [0.0] * 4 + [DENSE_BIAS] * 4
    difference = (logits(tmp_path / "moe", tokens) - logits(dense, tokens)).abs().max()
    assert (difference <= FP32_BOUND) == (top_k is None)
    assert ("differ from the dense" in (tmp_path / "moe/README.md").read_text()) == (top_k is not None)


@pytest.mark.parametrize("name", ["bfloat16", "float16", "float32"])
def test_dtype_casts_every_tensor(name: str, tmp_path: Path) -> None:
    dense = tiny_checkpoint(tmp_path / "dense")
    dtype = getattr(torch, name)
    convert(dense, tmp_path / "moe", SliceOptions(slices=4, dtype=name))
    source, moe = read_all(dense), read_all(tmp_path / "moe")
    assert {key: tensor.dtype for key, tensor in moe.items() if not key.endswith("selection_bias")} == {
        key: dtype for key in moe if not key.endswith("selection_bias")
    }
    assert moe["model.layers.0.mlp.router.selection_bias"].dtype == torch.float32
    assert_sliced({key: tensor.to(dtype) for key, tensor in source.items()}, moe, 1, 4)
    assert json.loads((tmp_path / "moe/config.json").read_text())["dtype"] == name
    assert load(tmp_path / "moe").dtype == dtype


@pytest.mark.parametrize(
    ("text", "expected"),
    [("all", range(12)), ("every:4", [0, 4, 8]), ("0, 3,5-9", [0, 3, 5, 6, 7, 8, 9]), ("2-2,1", [1, 2])],
)
def test_parse_layers(text: str, expected: list[int]) -> None:
    assert parse_layers(text, 12) == tuple(expected)


@pytest.mark.parametrize("text", ["", "x", "12", "3-2", "0-12", "every:0", "every:x", "-1", "1,,2"])
def test_unknown_layers(text: str) -> None:
    with pytest.raises(UserError, match="layers"):
        parse_layers(text, 12)


def test_layers_left_dense(tmp_path: Path, tokens: torch.Tensor) -> None:
    dense = tiny_checkpoint(tmp_path / "dense")
    convert(dense, tmp_path / "moe", SliceOptions(slices=4, layers="0,2"))
    source, moe = read_all(dense), read_all(tmp_path / "moe")
    for part in FFN:
        name = f"model.layers.1.mlp.{part}.weight"
        assert bits_equal(source[name], moe[name])
    assert not any(name.startswith("model.layers.1.mlp.experts") for name in moe)
    assert (logits(tmp_path / "moe", tokens) - logits(dense, tokens)).abs().max() <= FP32_BOUND
    export(tmp_path / "moe", "dense", tmp_path / "back", check=False)
    assert_same_tensors(read_all(tmp_path / "back"), source)


def test_manifest_hashes_every_tensor(tmp_path: Path) -> None:
    dense = tiny_checkpoint(tmp_path / "dense", dtype=torch.bfloat16, sharded=True)
    convert(dense, tmp_path / "moe", SliceOptions(slices=4, seed=7))
    manifest, moe = json.loads((tmp_path / "moe/lamella.json").read_text()), read_all(tmp_path / "moe")
    assert manifest["tensors"].keys() == moe.keys()
    for name, entry in manifest["tensors"].items():
        assert entry["shape"] == list(moe[name].shape)
        assert entry["xxh3_128"] == xxhash.xxh3_128(moe[name].contiguous().view(torch.uint8).numpy()).hexdigest(), name
    assert manifest["recipe"] == {"method": "slice"} | SliceOptions(slices=4, seed=7).to_dict()
    assert manifest["source"]["files"] == {p.name: p.stat().st_size for p in dense.glob("*.safetensors")}


def test_equal_inputs_give_equal_files(tmp_path: Path) -> None:
    dense = tiny_checkpoint(tmp_path / "dense")
    for name in ("a", "b"):
        convert(dense, tmp_path / name, SliceOptions(slices=4))
    files = {path.name for path in (tmp_path / "a").iterdir()}
    assert {"config.json", "lamella.json", "model.safetensors", "README.md", "modeling_lamella.py"} <= files
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


def test_shards_and_index(tmp_path: Path, tokens: torch.Tensor) -> None:
    import dataclasses

    from lamella.checkpoint.write import write_json, write_tensors

    dense = tiny_checkpoint(tmp_path / "dense", dtype=torch.bfloat16)
    plan = plan_conversion(dense, SliceOptions(slices=4)).listing
    (tmp_path / "moe").mkdir()
    small = dataclasses.replace(plan, max_shard_bytes=20_000)
    write_tensors(small, tmp_path / "moe")
    write_json(tmp_path / "moe/config.json", plan.config)
    index = json.loads((tmp_path / "moe/model.safetensors.index.json").read_text())
    moe = read_all(tmp_path / "moe")
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in moe.values())
    assert index["weight_map"].keys() == moe.keys()
    assert len(set(index["weight_map"].values())) == len(list((tmp_path / "moe").glob("*.safetensors"))) > 3
    assert (logits(tmp_path / "moe", tokens) - logits(dense, tokens)).abs().max() <= FP32_BOUND


def test_files_beside_the_weights_are_copied_untouched(tmp_path: Path) -> None:
    dense = tiny_checkpoint(tmp_path / "dense")
    (dense / "tokenizer.json").write_bytes(b'{ "odd":  "spacing" }')
    (dense / "chat_template.jinja").write_bytes(b"{{ messages }}\r\n")
    (dense / "README.md").write_text("---\nlicense: llama3.1\n---\n# Tiny\n")
    convert(dense, tmp_path / "moe", SliceOptions(slices=4))
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json"):
        assert (tmp_path / "moe" / name).read_bytes() == (dense / name).read_bytes()
    assert "license: llama3.1\n" in (tmp_path / "moe/README.md").read_text()
    assert json.loads((tmp_path / "moe/lamella.json").read_text())["source"]["licence"] == "llama3.1"


@pytest.mark.slow
def test_auto_classes_with_remote_code(tmp_path: Path) -> None:
    """In a fresh process that has not imported lamella."""
    convert(tiny_checkpoint(tmp_path / "dense", "qwen3"), tmp_path / "moe", SliceOptions(slices=4))
    code = (
        "import sys; from transformers import AutoConfig, AutoModelForCausalLM\n"
        f"config = AutoConfig.from_pretrained({str(tmp_path / 'moe')!r}, trust_remote_code=True)\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(tmp_path / 'moe')!r}, trust_remote_code=True)\n"
        "print(type(config).__name__, type(model).__name__, len(model.moe_layers))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "LamellaQwen3Config LamellaQwen3ForCausalLM 3", done.stderr


def test_overwrite_replaces_the_whole_folder(tmp_path: Path) -> None:
    dense = tiny_checkpoint(tmp_path / "dense")
    convert(dense, tmp_path / "moe", SliceOptions(slices=4))
    (tmp_path / "moe/stale.txt").write_text("old")
    convert(dense, tmp_path / "moe", SliceOptions(slices=8), overwrite=True)
    assert not (tmp_path / "moe/stale.txt").exists()
    assert json.loads((tmp_path / "moe/config.json").read_text())["moe"]["num_frozen_experts"] == 8
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "moe"]


def test_back_to_dense_after_training(tmp_path: Path) -> None:
    """Trained attention is kept, trained experts are left out, the frozen slices are the original FFN."""
    dense = tiny_checkpoint(tmp_path / "dense")
    convert(dense, tmp_path / "moe", SliceOptions(slices=4))
    model = load(tmp_path / "moe")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 1
    model.save_pretrained(tmp_path / "trained")
    with pytest.raises(UserError, match=r"its router chooses trained copies .* --mode dense takes it without them"):
        export(tmp_path / "trained", "dense", tmp_path / "back")
    assert not (tmp_path / "back").exists()
    export(tmp_path / "trained", "dense", tmp_path / "back", mode="dense", check=False)
    source, back = read_all(dense), read_all(tmp_path / "back")
    assert source.keys() == back.keys()
    for name in source:
        assert torch.equal(back[name], source[name] if ".mlp." in name else source[name] + 1), name


def test_the_command_reports_what_it_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from lamella.conversion.command import run_slicing as run

    dense, out = tiny_checkpoint(tmp_path / "dense"), tmp_path / "moe"
    run(str(dense), out, SliceOptions(slices=4, layers="1"), dry_run=True)
    plan = capsys.readouterr().out
    assert not out.exists()
    run(str(dense), out, SliceOptions(slices=4, layers="1"))
    assert "4 frozen slices and 4 trainable copies" in capsys.readouterr().out
    moe = read_all(out)
    listed = {line.split()[0]: line for line in plan.splitlines() if line.startswith("  ")}
    assert listed.keys() == moe.keys()
    assert all(str(list(tensor.shape)) in listed[name] for name, tensor in moe.items())
    assert f"{len(moe)} tensors, {sum(t.numel() for t in moe.values()):,} parameters" in plan
    assert "1 of 3 layers with 4 frozen slices" in plan


def test_interrupted_or_full_disk_keeps_nothing(tmp_path: Path) -> None:
    import errno

    dense = tiny_checkpoint(tmp_path / "dense")

    def full(count: int) -> None:
        raise OSError(errno.ENOSPC, "no space left")

    def interrupted(count: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(UserError, match="became full; nothing was kept"):
        convert(dense, tmp_path / "a/moe", SliceOptions(slices=4), on_bytes=full)
    with pytest.raises(KeyboardInterrupt):
        convert(dense, tmp_path / "moe", SliceOptions(slices=4), on_bytes=interrupted)
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


def test_progress_counts_every_byte(tmp_path: Path) -> None:
    counts: list[int] = []
    report = convert(
        tiny_checkpoint(tmp_path / "dense"), tmp_path / "moe", SliceOptions(slices=4), on_bytes=counts.append
    )
    assert sum(counts) == report.bytes_written
    assert report.peak_rss_mib > 100  # an interpreter with torch is larger
    assert report.wall_s > 0
