"""Every layout of the ranks trains as one process does: the same losses, and the same bytes where nothing trains."""

from __future__ import annotations

from pathlib import Path
from pydoc_data import topics

import pytest
import torch
from safetensors.torch import load_file

from lamella.conversion import convert
from lamella.export.trained import materialise
from lamella.recipe.methods.attention import AttentionOptions
from support.models import HEADS, PARTITIONED, save_llama, trainable_moe
from support.training import COMMON, REORDERED, heldout, losses, run_many

pytestmark = pytest.mark.slow
STEPS = 6
RANKS = 4
SETTINGS = COMMON | {"steps": STEPS, "samples_per_step": 8, "heldout_samples": 6, "save_every_steps": 3}
TWIN, FLAT, PARTS = {"model": "twin"}, {"model": "flat"}, {"model": "parts"}
# What one process computes, and its layouts over four.
DISTIL = {"objective": "distil", "distil.temperature": 2.0}
UNTIED = {"model": "untied"}
ALONE = {
    "untied": UNTIED,
    "twin": {},
    "all": {"trains": "all", "lr": 1e-3},
    "flat": FLAT,
    "parts": PARTS,
    "distil": DISTIL,
    "heads": {"model": "heads"},
    "attention": {"model": "attention", "trains": "all", "balancing": "aux"},
}
LAYOUTS = {
    "once": ("twin", {"gradient_sync": "step", "samples_per_micro_batch": 1}),
    "hsdp": ("twin", {"parallel.replicate": 2, "samples_per_micro_batch": 1}),
    "ep2": ("twin", {"parallel.expert": 2}),
    "ep4": ("twin", {"parallel.expert": 4, "activation_checkpointing": "full", "frozen_weights": "replicated"}),
    "hsdp_ep": ("all", {"parallel.replicate": 2, "parallel.expert": 2}),
    "cp2": ("twin", {"parallel.context": 2, "activation_checkpointing": "full"}),
    "cp4": ("all", {"parallel.context": 4}),
    "cp_ep": ("flat", {"parallel.context": 2, "parallel.expert": 4}),
    "pp2": ("untied", {"parallel.pipeline": 2, "samples_per_micro_batch": 1}),
    "pp_ep": ("untied", {"parallel.pipeline": 2, "parallel.expert": 2, "activation_checkpointing": "full"}),
    "pp_cp": ("untied", {"parallel.pipeline": 2, "parallel.context": 2, "frozen_weights": "replicated"}),
    "tp2": ("all", {"parallel.tensor": 2, "parallel.expert": 2}),
    "tp_cp": ("twin", {"parallel.tensor": 2, "parallel.context": 2, "parallel.expert": 4}),
    "flat_ep": ("flat", {"parallel.expert": 4}),
    "distil_cp_ep": ("distil", {"parallel.context": 2, "parallel.expert": 2}),
    "parts_ep": ("parts", {"parallel.expert": 2}),
    "heads_cp_ep": ("heads", {"parallel.context": 2, "parallel.expert": 2, "activation_checkpointing": "full"}),
    "attention_hsdp": ("attention", {"parallel.replicate": 2}),
}


def words(folder: Path, name: str, settings: dict, **changes) -> list[str]:
    settings = SETTINGS | {"model": "twin"} | settings | {"out": name} | changes
    for key in ("model", "out"):
        settings[key] = folder / settings[key]
    return [f"{key}={value}" for key, value in settings.items()] + [f"data=[{folder / 'text.md'}]"]


def layout(folder: Path, name: str, **changes) -> list[str]:
    alone, settings = LAYOUTS[name]
    return words(folder, changes.pop("out", name), ALONE[alone] | settings, **changes)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    trainable_moe(folder / "twin")
    trainable_moe(folder / "untied", tie_word_embeddings=False)
    trainable_moe(folder / "flat", routing="flat")
    even = {"per_layer": {2: {"num_trainable_experts": 4, "num_experts_per_tok": 1}}}
    trainable_moe(folder / "parts", moe_changes=PARTITIONED | {"router": "linear"} | even)
    trainable_moe(folder / "heads", heads=HEADS)
    convert(save_llama(folder / "dense"), folder / "attention", AttentionOptions(top_k=1, router="random"))
    (folder / "text.md").write_text("\n".join(topics.topics[name] for name in sorted(topics.topics)[:40]))
    run_many(folder, 1, [words(folder, f"{name}-alone", settings) for name, settings in ALONE.items()])
    many = [layout(folder, name) for name in LAYOUTS]
    many += [layout(folder, "ep2", out="resumed", stop_at_step=3), layout(folder, "ep2", out="resumed")]
    many += [
        layout(folder, "ep4", out="moved", stop_at_step=3),
        words(folder, "moved", {"frozen_weights": "replicated", "activation_checkpointing": "full"}),
    ]
    run_many(folder, RANKS, many)
    return folder


@pytest.mark.parametrize("name", LAYOUTS)
def test_losses_are_those_of_one_process(runs, name):
    alone = f"{LAYOUTS[name][0]}-alone"
    assert losses(runs, name) == pytest.approx(losses(runs, alone), abs=REORDERED)
    assert heldout(runs, name) == pytest.approx(heldout(runs, alone), abs=REORDERED)


@pytest.mark.parametrize("name", LAYOUTS)
def test_what_is_frozen_keeps_its_bytes(runs, name):
    model = ALONE[LAYOUTS[name][0]].get("model", "twin")
    before, after = (load_file(f / "model.safetensors") for f in (runs / model, materialise(runs / name)))
    assert before.keys() == after.keys()
    same = {key for key in before if torch.equal(before[key], after[key])}
    assert all(key in same for key in before if "frozen" in key)
    assert not any("trainable" in key for key in same)


def test_resumed_in_the_same_layout(runs):
    assert losses(runs, "resumed") == losses(runs, "ep2")


def test_resumed_in_another_layout(runs):
    assert losses(runs, "moved") == pytest.approx(losses(runs, "twin-alone"), abs=REORDERED)
