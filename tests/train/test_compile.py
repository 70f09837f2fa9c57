"""Blocks compiled into one graph each train as eager ones do: the same losses and the same statistics of the routing.

On CPU with the backend `aot_eager`: the graphs of forward and backward are the compiler's, the operations torch's own.
"""

from __future__ import annotations

from pathlib import Path
from pydoc_data import topics

import pytest

from support.models import trainable_moe
from support.training import COMMON, heldout, lines, losses, run_many

pytestmark = pytest.mark.slow
RANKS = 2
# in float32 a CPU has no grouped product that can be compiled
COMPUTED = {"precision": "bfloat16", "expert_path": "grouped", "torchtitan": "{compile: {backend: aot_eager}}"}
SETTINGS = COMMON | COMPUTED | {"steps": 4, "samples_per_step": 8, "heldout_every_steps": 4, "heldout_samples": 0}
CASES = {
    "twin": {"twin_share": "{target: 0.5, ramp_steps: 4}", "activation_checkpointing": "full", "heldout_samples": 4},
    "flat": {"model": "flat", "balancing": "aux", "activation_checkpointing": "selective"},
}


def words(folder: Path, name: str, settings: dict, compiled: str) -> list[str]:
    settings = SETTINGS | {"model": "twin"} | settings | {"out": f"{name}-{compiled}", "compile": compiled}
    for key in ("model", "out"):
        settings[key] = folder / settings[key]
    return [f"{key}={value}" for key, value in settings.items()] + [f"data=[{folder / 'text.md'}]"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    wide = {"intermediate_size": 64}  # rows of an expert's neurons are multiples of 16 bytes
    trainable_moe(folder / "twin", **wide)
    trainable_moe(folder / "flat", routing="flat", **wide)
    (folder / "text.md").write_text("\n".join(topics.topics[name] for name in sorted(topics.topics)[:40]))
    many = [words(folder, name, case, compiled) for name, case in CASES.items() for compiled in ("off", "on")]
    run_many(folder, RANKS, many)
    return folder


@pytest.mark.parametrize("name", CASES)
def test_losses_and_routing_are_those_of_eager_blocks(runs, name):
    # bf16: a graph's products are the same, and sums of a few terms may be rounded once less
    assert losses(runs, f"{name}-on") == pytest.approx(losses(runs, f"{name}-off"), abs=2e-3)
    assert heldout(runs, f"{name}-on") == pytest.approx(heldout(runs, f"{name}-off"), abs=2e-3)
    first, eager = (lines(runs, f"{name}-{word}")[1] for word in ("on", "off"))
    assert first["grad_norm"] == pytest.approx(eager["grad_norm"], rel=1e-2)
    assert first["twin_share"] == pytest.approx(eager["twin_share"], abs=0.01)
    assert "Compiling each TransformerBlock" in (runs / f"{name}-on" / "log" / "rank-0.log").read_text()
