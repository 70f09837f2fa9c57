"""Merged models as stock transformers loads them: against the formula, tensor by tensor, and the dense model."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from typer.testing import CliRunner

from lamella.cli import app
from support.merging import config, loaded, logits, merge, save_models
from support.models import LLAMA3_ROPE

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Path]]:
    folder = tmp_path_factory.mktemp("models")
    return {family: save_models(folder, family) for family in ("llama", "mistral", "qwen2", "qwen3")}


def expert_of(model: Any, layer: int) -> nn.Module:
    return model.model.layers[layer].mlp


def dense_tensors(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


# (family, changes of the config, class)
CONFIGS: dict[str, tuple[str, dict[str, Any], str]] = {
    "llama": ("llama", {"gate_mode": "random"}, "MixtralForCausalLM"),
    "mistral": ("mistral", {"gate_mode": "uniform_random", "experts_per_token": 1}, "MixtralForCausalLM"),
    "qwen2": ("qwen2", {"gate_mode": "random"}, "Qwen2MoeForCausalLM"),
    "qwen3": ("qwen3", {"gate_mode": "random", "dtype": "bfloat16"}, "Qwen3MoeForCausalLM"),
    "asked for": ("llama", {"gate_mode": "random", "architecture": "QWEN MoE"}, "Qwen2MoeForCausalLM"),
    "parts": ("llama", {"gate_mode": "random", "parts": 4, "parts_per_token": 5}, "MixtralForCausalLM"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_stock_transformers_loads_it_and_every_tensor_is_in_its_place(
    name: str, models: dict[str, list[Path]], tmp_path: Path
) -> None:
    family, changes, architecture = CONFIGS[name]
    merge(config(models[family], **changes), tmp_path / "out")
    model = loaded(tmp_path / "out")
    assert type(model).__name__ == architecture
    written = load_file(tmp_path / "out" / "model.safetensors")
    dense = [dense_tensors(folder) for folder in models[family]]
    dtype = torch.bfloat16 if "dtype" in changes else torch.float32
    for tensor, value in dense[0].items():
        if ".mlp." not in tensor:
            assert torch.equal(written[tensor], value.to(dtype)), tensor
    names = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
    block, parts = ("block_sparse_moe", 4 if name == "parts" else 1) if "Mixtral" in architecture else ("mlp", 1)
    for layer in range(3):
        for e, tensors in enumerate(dense):
            for own, other in names.items():
                value = tensors[f"model.layers.{layer}.mlp.{own}.weight"].to(dtype)
                part = other if block == "block_sparse_moe" else own
                found = [
                    written[f"model.layers.{layer}.{block}.experts.{e * parts + g}.{part}.weight"] for g in range(parts)
                ]
                # the parts' columns carry the scale of the normalised weights
                both = torch.cat(found, dim=1) / parts if own == "down_proj" else torch.cat(found)
                assert torch.equal(both, value)
    rows = model.config.num_local_experts if hasattr(model.config, "num_local_experts") else model.config.num_experts
    assert written[f"model.layers.0.{block}.gate.weight"].shape == (rows, 32)
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {"tokenizer.json", "README.md", "lamella.json"}
    assert not (tmp_path / "out.calibration").exists()


def test_a_layer_computes_the_weighted_sum_of_the_models_ffns(models: dict[str, list[Path]], tmp_path: Path) -> None:
    """By the formula: softmax over all, the best two, normalised; each model's own FFN; the shared one once."""
    shared = [{"source_model": str(models["llama"][2]), "residual_scale": 0.5}]
    merge(config(models["llama"], gate_mode="random", shared_experts=shared), tmp_path / "out")
    model, dense = loaded(tmp_path / "out"), [loaded(folder) for folder in models["llama"]]
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    written = load_file(tmp_path / "out" / "model.safetensors")
    with torch.no_grad():
        p = (x @ written["model.layers.1.mlp.gate.weight"].T).softmax(-1)
        top = p.topk(2)
        wanted = 0.5 * expert_of(dense[2], 1)(x)
        for t in range(5):
            for weight, e in zip(top.values[t] / top.values[t].sum(), top.indices[t].tolist(), strict=True):
                wanted[t] += weight * expert_of(dense[e], 1)(x[t])
        found = expert_of(model, 1)(x[None])[0]
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-5)  # fp32, another order of summation


# Everything that mergekit loses or refuses: biases, rope scaling, tied embeddings, heads of another width.
UPCYCLES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "rope scaling, tied": ("llama", {"rope_parameters": LLAMA3_ROPE, "tie_word_embeddings": True}, {}),
    "wide heads": ("mistral", {"head_dim": 16, "sliding_window": 9}, {}),
    "attention biases": ("llama", {"attention_bias": True}, {}),
    "biases": ("qwen2", {"tie_word_embeddings": True}, {}),
    "norms of heads": ("qwen3", {"head_dim": 16}, {}),
    "parts": ("llama", {}, {"parts": 4}),
    "own form, parts": ("llama", {}, {"parts": 4, "architecture": "lamella"}),
    "of another family": ("granite", {"tie_word_embeddings": True}, {}),
    "gelu": ("gemma", {}, {}),
    "gelu, norms on both sides": ("gemma2", {}, {"parts": 2}),
    "gate and up in one": ("phi3", {}, {"parts": 4}),
    "gate and up in one, norms on both sides": ("glm4", {}, {}),
}


@pytest.mark.parametrize("name", UPCYCLES)
def test_an_upcycle_of_one_model_keeps_its_logits(name: str, tmp_path: Path) -> None:
    import lamella.hf.models  # noqa: F401  registers our own form

    family, changes, options = UPCYCLES[name]
    (dense,) = save_models(tmp_path, family, 1, **changes)
    recipe = {"method": "merge", "model": str(dense), "experts": [{}, {}, {}], "gate_mode": "random"}
    merge(recipe | options, tmp_path / "out")
    difference = (logits(loaded(tmp_path / "out")) - logits(loaded(dense))).abs().max()
    assert difference < 2e-5  # fp32: weights of equal experts add up to 1 within rounding


def test_adapters_are_merged_as_peft_merges_them(models: dict[str, list[Path]], tmp_path: Path) -> None:
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM

    base = models["llama"][0]
    targets = ["gate_proj", "up_proj", "down_proj", "q_proj"]
    lora = LoraConfig(
        r=4, lora_alpha=12, target_modules=targets, use_rslora=True, rank_pattern={"down_proj": 2},
        init_lora_weights=False, task_type="CAUSAL_LM",
    )  # fmt: skip
    torch.manual_seed(0)
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), lora).save_pretrained(tmp_path / "lora")
    merged = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "lora").merge_and_unload()
    values = config([base, base], gate_mode="random")
    values["experts"][1]["source_model"] = f"{base}+{tmp_path / 'lora'}"
    report = merge(values, tmp_path / "out")
    written = load_file(tmp_path / "out" / "model.safetensors")
    for own, other in {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}.items():
        found = written[f"model.layers.2.block_sparse_moe.experts.1.{other}.weight"]
        wanted = getattr(merged.model.layers[2].mlp, own).weight
        torch.testing.assert_close(found, wanted.detach(), atol=1e-6, rtol=1e-6)  # fp32 products of rank 4
        dense = dense_tensors(base)[f"model.layers.2.mlp.{own}.weight"]
        assert (found - dense).abs().max() > 0.01
    assert "more than the FFNs" in report.notes["remarks"][0]


def test_an_adapter_of_gate_and_up_in_one_matrix(tmp_path: Path) -> None:
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM

    (base,) = save_models(tmp_path, "phi3", 1)
    lora = LoraConfig(r=4, lora_alpha=12, target_modules=["gate_up_proj", "down_proj"], init_lora_weights=False)
    torch.manual_seed(0)
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), lora).save_pretrained(tmp_path / "lora")
    merged = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "lora").merge_and_unload()
    values = config([base, base], gate_mode="random", experts_per_token=1)
    values["experts"][1]["source_model"] = f"{base}+{tmp_path / 'lora'}"
    merge(values, tmp_path / "out")
    written = load_file(tmp_path / "out" / "model.safetensors")
    for layer in range(3):
        mlp = merged.model.layers[layer].mlp
        experts = {name.rpartition(".")[2]: t[1] for name, t in written.items() if f"layers.{layer}.mlp.exp" in name}
        gate_up, down = (next(t for name, t in experts.items() if part in name) for part in ("gate_up", "down"))
        torch.testing.assert_close(gate_up, mlp.gate_up_proj.weight.detach(), atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(down, mlp.down_proj.weight.detach(), atol=1e-6, rtol=1e-6)


def test_noise_and_scales(models: dict[str, list[Path]], tmp_path: Path) -> None:
    values = config(models["llama"], gate_mode="random")
    values["experts"][0] |= {"noise_scale": 0.5}
    values["experts"][1] |= {"residual_scale": 0.25}
    merge(values, tmp_path / "out")
    written, block = load_file(tmp_path / "out" / "model.safetensors"), "model.layers.1.block_sparse_moe.experts."
    dense = [dense_tensors(folder) for folder in models["llama"]]
    noise = written[f"{block}0.w3.weight"] - dense[0]["model.layers.1.mlp.up_proj.weight"]
    assert 0.45 < noise.std() < 0.55
    assert torch.equal(written[f"{block}1.w2.weight"], dense[1]["model.layers.1.mlp.down_proj.weight"] * 0.25)
    assert torch.equal(written[f"{block}1.w1.weight"], dense[1]["model.layers.1.mlp.gate_proj.weight"])


def test_random_gates_are_of_the_sizes_that_mergekit_gives_them(models: dict[str, list[Path]], tmp_path: Path) -> None:
    for mode, std in (("random", 1.0), ("uniform_random", 32**-0.5 / 3**0.5)):
        merge(config(models["llama"], gate_mode=mode), tmp_path / mode)
        written = load_file(tmp_path / mode / "model.safetensors")
        rows = torch.cat([written[f"model.layers.{i}.block_sparse_moe.gate.weight"] for i in range(3)])
        assert 0.85 * std < rows.std() < 1.15 * std
        assert (rows.abs().max() <= 32**-0.5) == (mode == "uniform_random")


def test_the_command_takes_a_config_of_mergekit_unchanged(models: dict[str, list[Path]], tmp_path: Path) -> None:
    path = tmp_path / "config.yml"
    path.write_text(json.dumps(config(models["qwen3"])))  # JSON is YAML
    dry = CliRunner().invoke(app, ["convert", str(path), str(tmp_path / "out"), "--dry-run"])
    assert dry.exit_code == 0, dry.output
    assert "model.layers.2.mlp.experts.2.down_proj.weight" in dry.stdout
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.yml"]
    done = CliRunner().invoke(app, ["convert", str(path), str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    assert "Routing: the most likely expert" in done.stdout
    assert "lamella" in (tmp_path / "out" / "README.md").read_text()
    loaded(tmp_path / "out")


def test_random_gates_need_no_torch(models: dict[str, list[Path]], tmp_path: Path) -> None:
    path = tmp_path / "config.yml"
    path.write_text(json.dumps(config(models["llama"], gate_mode="cheap_embed")))
    code = f"import sys; sys.argv = ['lamella', 'convert', {str(path)!r}, {str(tmp_path / 'out')!r}]\n"
    code += "from lamella.cli import app\napp(standalone_mode=False)\n"
    code += "print([name for name in ('torch', 'transformers') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]", done.stdout + done.stderr


def script(name: str) -> Any:
    """A script as a module; it is no part of the package."""
    spec = importlib.util.spec_from_file_location(name, ROOT / f"scripts/{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not module.is_installed():
        pytest.skip("scripts/install_readers.py fetches it")
    return module


@pytest.mark.slow
def test_transformers_4_loads_every_class_and_computes_the_same(models: dict[str, list[Path]], tmp_path: Path) -> None:
    older = script("check_with_transformers_4")
    shared = [{"source_model": str(models["llama"][1]), "positive_prompts": ["all"]}]
    cases = {name: config(models[family], **changes) for name, (family, changes, _) in CONFIGS.items()}
    cases["shared"] = config(models["llama"], shared_experts=shared)
    always = [{"source_model": str(models["qwen2"][i])} for i in (1, 2)]
    cases["two that are always on"] = config(models["qwen2"], shared_experts=always, gate_mode="ridge")
    (scaled,) = save_models(tmp_path, "llama", 1, rope_parameters=LLAMA3_ROPE, tie_word_embeddings=True)
    cases["rope scaling"] = config([scaled, scaled], gate_mode="random")
    jobs = []
    for name, values in cases.items():
        merge(values, tmp_path / "out" / name)
        ids = torch.randint(256, (1, 100), generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            wanted = loaded(tmp_path / "out" / name)(ids).logits[0]
        file = tmp_path / f"{name}.safetensors"
        save_file({"ids": ids, "kept": torch.arange(100), "logits": wanted.contiguous()}, file)
        jobs.append([str(tmp_path / "out" / name), str(file)])
    assert max(older.read_elsewhere(jobs)) < 1e-4  # fp32, other kernels


@pytest.mark.slow
def test_mergekit_gives_the_same_tensors(tmp_path: Path) -> None:
    peer = script("compare_with_mergekit")
    found = peer.compare_all(tmp_path)
    assert {name: differ for name, (differ, _) in found.items() if differ} == {}
    assert min(cosine for _, cosine in found.values()) >= peer.LEAST_COSINE
