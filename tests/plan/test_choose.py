"""What a recipe leaves to the plan: the fastest that fits the memory of a GPU."""

from __future__ import annotations

import pytest

from lamella.plan.command import make_layout
from lamella.plan.model import read_model
from lamella.plan.report import plan_values
from lamella.recipe.methods.slice import SliceOptions
from support.planning import recipe

SLICES = SliceOptions()


@pytest.mark.parametrize(
    ("ranks", "settings", "kept", "sync"),
    [
        (8, {}, "none", "micro_batch"),
        (3, {}, "full", "micro_batch"),
        (3, {"expert_path": "fused"}, "none", "micro_batch"),  # which keeps less
        (32, {}, "none", "step"),  # several nodes
        (32, {"samples_per_micro_batch": 2}, "full", "step"),
        (8, {"activation_checkpointing": "full"}, "full", "micro_batch"),
        (8, {"gradient_sync": "step"}, "full", "step"),
    ],
)
def test_the_cheapest_that_fits_is_chosen(ranks, settings, kept, sync, llama3):
    """Llama 3 8B on H100s of 80 GB, in samples of 8,192 tokens."""
    wanted = {"seq_len": 8192, "samples_per_step": 8 * ranks, "activation_checkpointing": "auto"} | settings
    layout = make_layout(recipe(**wanted), read_model(llama3, SLICES), ranks, "H100")
    batch = plan_values(layout, "H100")["batch"]
    assert (batch["activation_checkpointing"], batch["gradient_sync"]) == (kept, sync)
    on_cpu = make_layout(recipe(**wanted), read_model(llama3, SLICES), ranks, "cpu").recipe
    assert on_cpu.activation_checkpointing == settings.get("activation_checkpointing", "none")
