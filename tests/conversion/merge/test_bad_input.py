"""Bad input of a merge: one clear error, exit code 2, and nothing written."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from lamella.cli import app
from lamella.errors import UserError
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
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def adapter(**changes: Any) -> Callable[[Config, Path], None]:
    """An adapter's config; it says what is wrong before the weights are looked at."""

    def change(values: Config, folder: Path) -> None:
        (folder / "lora").mkdir()
        settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 8} | changes
        (folder / "lora" / "adapter_config.json").write_text(json.dumps(settings))
        values["experts"][1]["source_model"] += f"+{folder / 'lora'}"

    return change


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
    "no LoRA": (adapter(peft_type="IA3"), "peft_type is 'IA3'"),
    "4 bits": (top(load_in_4bit=True), "bitsandbytes, which is not installed"),
    "a class that cannot": (top(architecture="qwen3"), "qwen3-moe cannot hold this merge.*possible: mixtral"),
    "uneven parts": (top(parts=5), "not divisible by 5"),
}


@pytest.mark.parametrize("name", CASES)
def test_one_error_and_nothing_written(name: str, models: list[Path], tmp_path: Path) -> None:
    values = config(models)
    change, message = CASES[name]
    change(values, tmp_path)
    if name == "4 bits" and importlib.util.find_spec("bitsandbytes"):
        pytest.skip("bitsandbytes is installed")
    path = tmp_path / "config.yml"
    path.write_text(json.dumps(values))
    before = sorted(p.name for p in tmp_path.iterdir())
    done = CliRunner().invoke(app, ["convert", str(path), str(tmp_path / "out")])
    assert isinstance(done.exception, UserError), done.output
    assert_matches(message, str(done.exception))
    assert sorted(p.name for p in tmp_path.iterdir()) == before


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
