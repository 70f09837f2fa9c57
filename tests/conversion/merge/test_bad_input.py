"""Bad input of a merge: one clear error, exit code 2, and nothing written."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from lamella.cli import app, main
from support.merging import config, save_models

pytestmark = pytest.mark.faults
Config = dict[str, Any]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return save_models(tmp_path_factory.mktemp("models"))


def expert(**changes: Any) -> Callable[[Config, Path], None]:
    def change(values: Config, folder: Path) -> None:
        values["experts"][1] |= changes

    return change


def top(**changes: Any) -> Callable[[Config, Path], None]:
    return lambda values, folder: values.update(changes)


def other_model(**changes: Any) -> Callable[[Config, Path], None]:
    def change(values: Config, folder: Path) -> None:
        (model,) = save_models(folder / "other", changes.pop("family", "llama"), 1, **changes)
        values["experts"][1]["source_model"] = str(model)

    return change


def damaged(damage: Callable[[Path], object], base: bool = False) -> Callable[[Config, Path], None]:
    def change(values: Config, folder: Path) -> None:
        (model,) = save_models(folder / "other", "llama", 1)
        damage(model)
        if base:
            values["base_model"] = str(model)
        else:
            values["experts"][1]["source_model"] = str(model)

    return change


def cut(model: Path) -> None:
    cut_file(model / "model.safetensors")


def adapter(**changes: Any) -> Callable[[Config, Path], None]:
    """An adapter's config; it says what is wrong before the weights are looked at."""

    def change(values: Config, folder: Path) -> None:
        (folder / "lora").mkdir()
        settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 8} | changes
        (folder / "lora" / "adapter_config.json").write_text(json.dumps(settings))
        values["experts"][1]["source_model"] += f"+{folder / 'lora'}"

    return change


def adapter_weights(names: dict[str, tuple[int, ...]], **changes: Any) -> Callable[[Config, Path], None]:
    """An adapter with tensors of these names, behind the layer's, and shapes."""

    def change(values: Config, folder: Path) -> None:
        adapter(**changes)(values, folder)
        prefix = "base_model.model.model.layers.0."
        tensors = {prefix + name: torch.zeros(shape) for name, shape in names.items()}
        save_file(tensors, folder / "lora" / "adapter_model.safetensors")

    return change


UP_A, UP_B = "mlp.up_proj.lora_A.weight", "mlp.up_proj.lora_B.weight"


def in_shards(damage: Callable[[Path], object]) -> Callable[[Path], None]:
    """Weights in two files with an index, the second of them damaged."""

    def apply(model: Path) -> None:
        tensors, shards = load_file(model / "model.safetensors"), [{}, {}]
        weight_map = {}
        for i, (name, tensor) in enumerate(tensors.items()):
            shards[i % 2][name], weight_map[name] = tensor, f"model-{i % 2 + 1:05d}-of-00002.safetensors"
        for i, shard in enumerate(shards, 1):
            save_file(shard, model / f"model-{i:05d}-of-00002.safetensors", metadata={"format": "pt"})
        (model / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
        (model / "model.safetensors").unlink()
        damage(model / "model-00002-of-00002.safetensors")

    return apply


def cut_file(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def same_prompts(values: Config, folder: Path) -> None:
    for one in values["experts"]:
        one["positive_prompts"] = ["the same"]


def drop(key: str) -> Callable[[Config, Path], None]:
    return lambda values, folder: values.pop(key)


def drop_source(values: Config, folder: Path) -> None:
    del values["experts"][1]["source_model"]


CASES: dict[str, tuple[Callable[[Config, Path], Any], str]] = {
    "unknown key": (top(gate_mod="hidden"), "unknown key 'gate_mod'.*did you mean 'gate_mode'"),
    "unknown key of an expert": (expert(positive_prompt=["x"]), "positive_prompt'.*did you mean 'positive_prompts'"),
    "gate typo": (top(gate_mode="hiden"), "gate_mode.*hiden.*did you mean 'hidden'"),
    "dtype typo": (top(dtype="bfloat"), "dtype.*bfloat.*did you mean 'bfloat16'"),
    "architecture typo": (top(architecture="mixtrall"), "unknown architecture 'mixtrall'.*did you mean 'mixtral'"),
    "empty architecture": (top(architecture=""), "unknown architecture ''"),
    "no base": (drop("base_model"), "base_model is missing"),
    "no experts": (top(experts=[]), "there are no experts"),
    "no model of an expert": (drop_source, "experts.1: source_model is missing"),
    "too many per token": (top(experts_per_token=4), "experts_per_token is 4"),
    "none per token": (top(experts_per_token=0), "experts_per_token is 0"),
    "no prompts": (expert(positive_prompts=[]), "experts 1 have no positive_prompts"),
    "empty prompt": (expert(positive_prompts=["good", " "]), "a prompt is empty"),
    "the same prompts": (same_prompts, "the prompts of all experts are the same"),
    "prompts that are no texts": (expert(positive_prompts=[1, 2]), "positive_prompts"),
    "a prompt longer than the model": (expert(positive_prompts=["a" * 300]), "300|301"),
    "prompts from nowhere": (expert(prompts_from="nowhere.txt"), "nowhere.txt"),
    "infinite scale": (expert(residual_scale=float("inf")), "residual_scale"),
    "negative noise": (expert(noise_scale=-1.0), "noise_scale is -1.0"),
    "deeper": (other_model(num_hidden_layers=4), "expert 1 .*layers 4 instead of 3"),
    "shallower": (other_model(num_hidden_layers=2), "layers 2 instead of 3"),
    "other vocabulary": (other_model(vocab_size=300), "vocabulary 300 instead of 258.*any_vocabulary"),
    "other hidden size": (other_model(hidden_size=64), "hidden size 64 instead of 32"),
    "other width": (other_model(intermediate_size=96), "intermediate size 96 instead of 48"),
    "other family": (other_model(family="qwen3"), "architecture qwen3 instead of llama"),
    "truncated": (damaged(cut), "expert 1: .*truncated"),
    "truncated base": (damaged(cut, base=True), "truncated"),
    "a truncated shard": (damaged(in_shards(cut_file)), "expert 1: .*model-00002-of-00002.* truncated"),
    "a shard that is not there": (damaged(in_shards(Path.unlink)), "expert 1: .*model-00002-of-00002"),
    "no weights": (damaged(lambda model: (model / "model.safetensors").unlink()), "holds no weights"),
    "no config": (damaged(lambda model: (model / "config.json").unlink()), "no config.json"),
    "no tokenizer": (damaged(lambda m: [p.unlink() for p in m.glob("tokenizer*")], base=True), "has no tokenizer"),
    "missing path": (expert(source_model="/nowhere/at/all"), "expert 1: no such model: /nowhere/at/all"),
    "missing base": (top(base_model="/nowhere/at/all"), "no such model: /nowhere/at/all"),
    "revision of a folder": (
        lambda v, f: v["experts"][1].update(source_model=v["base_model"] + "@main"),
        "no revision",
    ),
    "missing adapter": (lambda v, f: v["experts"][1].update(source_model=v["base_model"] + "+/no"), "no such adapter"),
    "DoRA": (adapter(use_dora=True), "expert 1: the adapter .* cannot be used: it uses DoRA"),
    "adapter with biases": (adapter(bias="all"), "it trained biases .bias 'all'."),
    "an adapter without weights": (adapter(), "there is no .*adapter_model.safetensors"),
    "a module that is not there": (
        adapter_weights({"mlp.fc1.lora_A.weight": (4, 32), "mlp.fc1.lora_B.weight": (48, 4)}),
        "it is for model.layers.0.mlp.fc1, which .* has not: of another base",
    ),
    "an adapter of a wider base": (adapter_weights({UP_A: (4, 64), UP_B: (48, 4)}), r"\[4, 64\] at rank 4.*\[48, 32\]"),
    "an adapter of another rank": (adapter_weights({UP_A: (4, 32), UP_B: (48, 4)}, r=8), "at rank 8"),
    "half an adapter": (adapter_weights({UP_A: (4, 32)}), "half of a LoRA"),
    "an adapter of embeddings": (adapter_weights({"mlp.lora_embedding_A": (4, 32)}), "no LoRA of a linear layer"),
    "ranks that are none": (adapter(rank_pattern={"up_proj": "many"}), "rank_pattern is .*many"),
    "no LoRA": (adapter(peft_type="IA3"), "peft_type is 'IA3'"),
    "4 bits": (top(load_in_4bit=True), "bitsandbytes, which is not installed"),
    "a class that cannot": (top(architecture="qwen3"), "qwen3-moe cannot hold this merge.*possible: mixtral"),
    "uneven parts": (top(parts=5), "not divisible by 5"),
}


@pytest.mark.parametrize("name", CASES)
def test_one_error_and_nothing_written(
    name: str,
    models: list[Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    values = config(models)
    change, message = CASES[name]
    change(values, tmp_path)
    if name == "4 bits" and importlib.util.find_spec("bitsandbytes"):
        pytest.skip("bitsandbytes is installed")
    path = tmp_path / "config.yml"
    path.write_text(json.dumps(values))
    before = sorted(tmp_path.rglob("*"))
    capsys.readouterr()
    monkeypatch.setattr("sys.argv", ["lamella", "convert", str(path), str(tmp_path / "out")])
    with pytest.raises(SystemExit) as ended:
        main()
    told = capsys.readouterr()
    assert ended.value.code == 2, told.err
    first, *more = told.err.splitlines()  # a recipe's problems stand below, a line each
    assert first.startswith("error: "), told.err
    assert all(line.startswith("  ") for line in more), told.err
    assert_matches(message, told.err)
    assert told.out == ""
    assert sorted(tmp_path.rglob("*")) == before


def test_a_disk_that_is_full_leaves_no_part_of_a_folder(models: list[Path], tmp_path: Path) -> None:
    """A limit on the size of files stands for it: the kernel refuses the bytes."""
    path = tmp_path / "config.yml"
    path.write_text(json.dumps(config(models, gate_mode="random")))
    done = subprocess.run(
        [sys.executable, "-m", "lamella.cli", "convert", str(path), str(tmp_path / "out")],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)),
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert [line[:7] for line in done.stderr.splitlines()] == ["error: "], done.stderr
    assert list(tmp_path.iterdir()) == [path]


def assert_matches(message: str, text: str) -> None:
    assert re.search(message, text.replace("\n", " ")), text


def test_several_problems_are_told_at_once(models: list[Path], tmp_path: Path) -> None:
    values = config(models)
    other_model(num_hidden_layers=2)(values, tmp_path)
    values["experts"][2]["source_model"] = "/nowhere/at/all"
    path = tmp_path / "config.yml"
    path.write_text(json.dumps(values))
    done = CliRunner().invoke(app, ["convert", str(path), str(tmp_path / "out")])
    assert_matches("layers 2 instead of 3.*/nowhere/at/all", str(done.exception))


def test_broken_yaml(tmp_path: Path) -> None:
    path = tmp_path / "config.yml"
    path.write_text("base_model: [x\nexperts: {")
    done = CliRunner().invoke(app, ["convert", str(path), str(tmp_path / "out")])
    assert_matches("not valid YAML", str(done.exception))


def test_an_experts_folder_is_not_overwritten(models: list[Path], tmp_path: Path) -> None:
    path = tmp_path / "config.yml"
    path.write_text(json.dumps(config(models)))
    done = CliRunner().invoke(app, ["convert", str(path), str(models[2]), "--overwrite"])
    assert_matches("holds the model that is to be read", str(done.exception))


def test_a_shared_expert_need_not_be_an_expert(models: list[Path], tmp_path: Path) -> None:
    """mergekit crashes there."""
    (other,) = save_models(tmp_path / "other", "llama", 1)
    values = config(models, shared_experts=[{"source_model": str(other)}], gate_mode="random")
    path = tmp_path / "config.yml"
    path.write_text(json.dumps(values))
    done = CliRunner().invoke(app, ["convert", str(path), str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
