"""What `--dry-run` lists is what a conversion writes: every tensor, its dtype and shape, for every method."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from lamella.cli import app
from lamella.conversion import convert, plan_conversion
from lamella.recipe.conversion import read_conversion
from lamella.recipe.methods import METHODS, sizes_of
from support.models import VOCAB, save_tokenizer, tiny_checkpoint

CALIBRATION = "calibration={num_tokens: 256, sequence_length: 64}"
RECIPES = {
    "slice": ["slices=4", "dtype=bfloat16"],
    "slice, flat": ["slices=3", "routing=flat", "layers=every:2", "dtype=float16"],
    "upcycle": ["method=upcycle", "experts=2", "dtype=bfloat16"],
    "upcycle, identity": ["method=upcycle", "experts=2", "granularity=2", "identity=true", "layers=1", "dtype=float16"],
    "partition": ["method=partition", "parts=4", "active=2", "dtype=bfloat16", CALIBRATION],
    "partition, analytic": ["method=partition", "parts=4", "active=2", "router=analytic", "output=align", CALIBRATION],
    "partition, plain": ["method=partition", "parts=4", "active=3", "neurons=random", "router=zero", "gate=softmax",
                         "balance=null", "output=plain", "first_dense=1", "dtype=float16"],
    "partition, all active": ["method=partition", "parts=4", "active=4", "neurons=contiguous", "router=random",
                              "shared=0", "dtype=bfloat16"],
    "merge": ["method=merge", "experts=[{}, {}]", "gate_mode=random", "architecture=lamella", "dtype=bfloat16"],
    "merge, parts": ["method=merge", "experts=[{}, {noise_scale: 0.1}]", "shared_experts=[{}]", "parts=3",
                     "gate_mode=uniform_random", "architecture=lamella"],
    "attention": ["method=attention", "top_k=1", "layers=0,2", CALIBRATION],
    "attention, softmax": ["method=attention", "gate=softmax", "router=random"],
    "adapters": ["method=adapters", "dtype=bfloat16"],
}  # fmt: skip
LISTED = re.compile(r"^  (\S+) +([A-Z]+\d+) +(\[[\d, ]+\])", re.MULTILINE)


def written(folder: Path) -> dict[str, tuple[str, list[int]]]:
    """Name -> (safetensors' dtype, shape), as the files' headers say, read by safetensors itself."""
    found = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  not a mapping
                part = tensors.get_slice(name)
                found[name] = (part.get_dtype(), part.get_shape())
    return found


def test_every_method_has_a_recipe_here() -> None:
    assert {read_conversion(words).options.method for words in RECIPES.values()} == METHODS.keys()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("name", RECIPES)
def test_a_dry_run_lists_what_is_written(
    name: str, family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    if family == "gpt2" and any(word in name for word in ("analytic", "attention", "merge", "adapters")):
        pytest.skip("a family without gate projections, whose attention stays as it is")
    monkeypatch.setenv("LAMELLA_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    dense, out = save_tokenizer(tiny_checkpoint(tmp_path / "dense", family, vocab_size=VOCAB)), tmp_path / "moe"
    words = [*RECIPES[name], f"model={dense}", f"out={out}"]
    if name == "adapters":
        adapter = LoraConfig(r=4, target_modules=["up_proj", "down_proj"])
        get_peft_model(AutoModelForCausalLM.from_pretrained(dense), adapter).save_pretrained(
            tmp_path / "dense" / "lora"
        )
        words.append(f"adapters=[{tmp_path / 'dense' / 'lora'}]")
    dry = CliRunner().invoke(app, ["convert", *words, "--dry-run"])
    assert dry.exit_code == 0, dry.exception
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense"]
    options = read_conversion(words).options
    convert(dense, out, options)
    listed = {tensor: (dtype, json.loads(shape)) for tensor, dtype, shape in LISTED.findall(dry.stdout)}
    assert listed == written(out)
    config = json.loads((out / "config.json").read_text())
    plan = plan_conversion(dense, options)
    assert config == json.loads(json.dumps(plan.listing.config))
    sizes = sizes_of(options, json.loads((dense / "config.json").read_text()))
    assert config[options.entry] == json.loads(json.dumps(sizes.to_dict()))


def test_a_dry_run_says_what_only_the_conversion_finds(tmp_path: Path) -> None:
    dense = tiny_checkpoint(tmp_path / "dense")
    words = ["method=partition", "parts=4", "active=2", "shared=search", "guard={total: 2}", f"model={dense}"]
    dry = CliRunner().invoke(app, ["convert", *words, f"out={tmp_path / 'moe'}", "--dry-run"])
    assert dry.exit_code == 0
    assert "shared: search chooses a number of shared parts" in dry.stdout
    assert "the guard may leave layers dense" in dry.stdout
