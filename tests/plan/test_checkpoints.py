"""What checkpoints take, on disk and in memory while they are written."""

from __future__ import annotations

import pytest

from lamella.plan.command import make_layout
from lamella.plan.memory import Memory
from lamella.plan.model import read_model
from lamella.plan.report import plan_text, plan_values
from lamella.recipe.methods.slice import SliceOptions
from support.planning import recipe

SLICES = SliceOptions()


@pytest.mark.parametrize("offload", ["none", "cpu"])
def test_the_copy_of_an_asynchronous_save_is_counted_in_main_memory(offload, llama3):
    def memory(gpu, **settings):
        return Memory(make_layout(recipe(**settings), read_model(llama3, SLICES), 8, gpu))

    settings = {"checkpoint_async": True, "offload": offload}
    on_gpu, plain = memory("H100", **settings), memory("H100", offload=offload)
    state, saved = sum(on_gpu.state.values()), 3 * on_gpu.state["optimizer"] // 2  # what trains, and its two moments
    assert on_gpu.peak() == plain.peak()
    assert on_gpu.main_memory() == plain.main_memory() | {"checkpoint staging": saved}
    assert sum(plain.main_memory().values()) == (0 if offload == "none" else state + plain.main_memory()["gradients"])


def test_on_cpu_the_copy_of_an_asynchronous_save_is_in_the_peak(llama3):
    def memory(**settings):
        return Memory(make_layout(recipe(**settings), read_model(llama3, SLICES), 8, "cpu", read_model(llama3)))

    plain, saving = memory(objective="distil"), memory(objective="distil", checkpoint_async=True)
    saved = 3 * saving.state["optimizer"] // 2  # what trains, and its two moments
    assert saving.peak().parts == plain.peak().parts | {"checkpoint staging": saved}
    assert saving.peak().total_bytes == plain.peak().total_bytes + saved
    assert memory(objective="distil", checkpoint_async=True, save_every_steps=1000).peak() == plain.peak()


def test_a_checkpoint_holds_what_trains_and_its_moments(llama3):
    """Llama 3 8B in 8 slices: 5.64B trained parameters, of 12 bytes each; not the 8B that stay in the model's file."""
    planned = Memory(make_layout(recipe(), read_model(llama3, SLICES), 8, "H100")).checkpoint_bytes()
    assert planned == 12 * (32 * 3 * 4096 * 14336 + 32 * 8 * 4096)
    assert planned < 64 * 2**30


@pytest.mark.parametrize("gpu", ["cpu", "H100"])
def test_checkpoint_staging_has_a_line_of_its_own(gpu, llama3):
    def lines(**settings):
        return plan_text(
            plan_values(make_layout(recipe(**settings), read_model(llama3, SLICES), 8, gpu), gpu)
        ).splitlines()

    (line,) = [line for line in lines(checkpoint_async=True) if "checkpoint staging" in line]
    assert line.endswith(" GiB")
    assert not any("checkpoint staging" in line for line in lines())


def test_moments_in_half_precision_are_half_as_large(llama3):
    full, half = (
        Memory(make_layout(recipe(optimizer={"states": states}), read_model(llama3, SLICES), 8, "H100"))
        for states in ("float32", "bfloat16")
    )
    assert half.state["optimizer"] * 2 == full.state["optimizer"]
    assert half.checkpoint_bytes() * 3 == full.checkpoint_bytes() * 2
    assert half.checkpoint_bytes() < 43 * 2**30
    assert half.peak().total_bytes < full.peak().total_bytes
