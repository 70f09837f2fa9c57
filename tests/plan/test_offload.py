"""What offload keeps in main memory, what it copies in a step, and where it is suggested or refused.

Llama 3 8B in 8 slices: 32 layers, of which frozen experts and their twins have 3 matrices of 4,096 x 14,336 each.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from lamella.cli import main
from lamella.plan.command import make_layout
from lamella.plan.compute import gpu
from lamella.plan.links import step_traffic
from lamella.plan.memory import Memory
from lamella.plan.model import read_model
from lamella.plan.report import plan_text, plan_values
from lamella.plan.roofline import LINK_SHARE, MAIN_MEMORY_LINK_RATE, roofline
from lamella.plan.suggest import GPU_RESERVE_BYTES, suggest
from lamella.recipe.methods.slice import SliceOptions
from support.models import PARTITIONED, tiny_moe
from support.planning import recipe

FROZEN = 32 * 3 * 4096 * 14336
TRAINED = FROZEN + 32 * 8 * 4096  # and routers
WEIGHTS = 13_668_454_400
T = 8192


@pytest.fixture
def model(llama3):
    llama3.write_text(json.dumps(json.loads(llama3.read_text()) | {"dtype": "bfloat16"}))
    return read_model(llama3, SliceOptions())


def layout(model, ranks=1, gpu_name="H100", **settings):
    return make_layout(recipe(**{"seq_len": T, "samples_per_step": 64} | settings), model, ranks, gpu_name)


@pytest.mark.parametrize("ranks", [1, 4])
def test_frozen_experts_leave_the_gpu_and_nothing_else_does(ranks, model):
    plain, frozen, every = (Memory(layout(model, ranks, offload=kind)) for kind in ("none", "frozen", "cpu"))
    assert plain.main_memory() == {}
    assert frozen.main_memory() == {"weights": 2 * FROZEN // ranks}
    assert every.main_memory() == {
        "weights": (2 * (WEIGHTS - TRAINED) + 4 * TRAINED) // ranks,
        "optimizer": 8 * TRAINED // ranks,
        "gradients": 4 * TRAINED // ranks,
    }
    before, after = plain.peak(), frozen.peak()
    assert before.parts | {"weights": before.parts["weights"] - 2 * FROZEN // ranks} == after.parts


@pytest.mark.parametrize("ranks", [1, 4])
def test_a_rank_copies_its_part_for_each_gathering(ranks, model):
    """Each of a rank's 64/ranks micro-batches gathers forwards and backwards; gradients go back, as float32."""
    plain, frozen, every = (step_traffic(layout(model, ranks, offload=kind)) for kind in ("none", "frozen", "cpu"))
    assert (plain.fetched, plain.returned) == (0, 0)
    assert (frozen.fetched, frozen.returned) == (64 * 2 * 2 * FROZEN / ranks**2, 0)
    assert every.fetched == 64 * 2 * (2 * (WEIGHTS - TRAINED) + 4 * TRAINED) / ranks**2
    assert every.returned == 64 * 4 * TRAINED / ranks**2
    assert plain.all == frozen.all == every.all


def test_copies_are_hidden_where_ranks_gather_and_waited_for_where_one_is_alone(model):
    def seconds(ranks, offload):
        return roofline(layout(model, ranks, offload=offload), "H100")

    alone = seconds(1, "frozen").waited_s - seconds(1, "none").waited_s
    assert alone == pytest.approx(64 * 2 * 2 * FROZEN / (MAIN_MEMORY_LINK_RATE["H100"] * LINK_SHARE))
    assert seconds(4, "frozen").step_s == seconds(4, "none").step_s
    for ranks in (1, 4):
        assert seconds(ranks, "frozen").step_s < seconds(ranks, "cpu").step_s


def test_the_plan_says_what_is_copied(model):
    text = plan_text(plan_values(layout(model, offload="frozen"), "H100"))
    assert "main memory to GPU 1344.00 GiB a rank and step, 0.00 GiB back\n" in text
    assert "main memory       10.50 GiB" in text
    assert "main memory" not in plan_text(plan_values(layout(model), "H100"))


def test_it_is_suggested_where_all_weights_on_the_gpu_need_recomputation(model):
    room = gpu("H100")[1] - GPU_RESERVE_BYTES
    found = suggest(layout(model, 2), "H100", 8)
    kinds = [suggestion.settings.get("offload", "none") for suggestion in found]
    assert kinds[0] == "frozen"
    assert found[0].main_memory_bytes == FROZEN
    assert {"none", "frozen"} == set(kinds)
    for suggestion, kind in zip(found, kinds, strict=True):
        degrees = {k.split(".")[1]: v for k, v in suggestion.settings.items() if k.startswith("parallel.")}
        settings = {"activation_checkpointing": suggestion.settings["activation_checkpointing"], "parallel": degrees}
        here, cpu = (layout(model, 2, offload=where, **settings) for where in ("none", "cpu"))
        assert (Memory(here).peak().total_bytes <= room) == (kind == "none")
        assert suggestion.roofline.step_s < roofline(cpu, "H100").step_s


def test_all_weights_leave_only_where_nothing_else_fits(model):
    found = suggest(layout(model, 1), "H100", 8)
    assert {suggestion.settings["offload"] for suggestion in found} == {"cpu"}
    given = suggest(layout(model, 8, offload="cpu"), "H100", 8)  # words that take the recipe's own back
    assert given[0].settings["offload"] == "none"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["offload=frozen", "model=PARTITIONED"], "and PARTITIONED has none; set offload: none, or cpu"),
        (["offload=frozen", "frozen_weights=replicated"], "offload: frozen needs frozen_weights: sharded"),
        (["offload=frozen", "--dense", "LLAMA3", "--slices", "8", "--gpu", "cpu"], "name one with --gpu"),
        (["offload=frozn"], "offload"),
    ],
)
def test_where_it_makes_no_sense_it_is_refused(words, message, llama3, tmp_path, monkeypatch, capsys):
    partitioned = str(tmp_path / "parts")
    tiny_moe("llama", Path(partitioned), moe_changes=PARTITIONED)

    def named(text: str) -> str:
        return text.replace("PARTITIONED", partitioned).replace("LLAMA3", str(llama3))

    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["lamella", "plan", "seq_len=16", "samples_per_step=8", *map(named, words)])
    with pytest.raises(SystemExit, match="2"):
        main()
    err = capsys.readouterr().err
    assert named(message) in err
    assert err.startswith("error: ")
