"""With frozen experts in main memory a run computes, saves and continues as it does without.

There is no GPU: both places are main memory, and pages are not locked. All else is what FSDP does beside one.
"""

from __future__ import annotations

from pathlib import Path
from pydoc_data import topics

import pytest
from safetensors.torch import load_file

from lamella.export.trained import materialise
from support.models import trainable_moe
from support.train_many import OFFLOADS
from support.training import COMMON, heldout, losses, run_many

pytestmark = pytest.mark.slow
RANKS = 2
SETTINGS = COMMON | {"steps": 4, "samples_per_step": 8, "save_every_steps": 2, "heldout_samples": 4}
CASES = {
    "plain": {},
    "again": {"activation_checkpointing": "full", "gradient_sync": "step", "parallel.expert": 2},
    # in float32 a CPU has no grouped product that can be compiled
    "compiled": {
        "precision": "bfloat16", "expert_path": "grouped", "compile": "on",
        "torchtitan": "{compile: {backend: aot_eager}}",
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    trainable_moe(folder / "twin", intermediate_size=64)  # rows of an expert's neurons are multiples of 16 bytes
    (folder / "text.md").write_text("\n".join(topics.topics[name] for name in sorted(topics.topics)[:40]))

    def words(name: str, case: dict, **changes) -> list[str]:
        values = SETTINGS | case | changes | {"model": folder / "twin", "out": folder / name}
        return [f"{key}={value}" for key, value in values.items()] + [f"data=[{folder / 'text.md'}]"]

    many = []
    for name, case in CASES.items():
        many += [words(f"{name}-here", case), [*words(f"{name}-there", case, stop_at_step=2), OFFLOADS]]
        many.append([*words(f"{name}-there", case), OFFLOADS])
    run_many(folder, RANKS, many)
    return folder


@pytest.mark.parametrize("name", CASES)
def test_losses_and_weights_are_the_same_bits(runs: Path, name: str):
    here, there = f"{name}-here", f"{name}-there"
    assert losses(runs, there) == losses(runs, here)
    assert heldout(runs, there) == heldout(runs, here)
    files = [materialise(runs / run, 4) / "model.safetensors" for run in (here, there)]
    ours, theirs = map(load_file, files)
    assert ours.keys() == theirs.keys()
    assert all(ours[key].equal(theirs[key]) for key in ours)
    logs = ["wait in main memory" in (runs / run / "log" / "rank-0.log").read_text() for run in (here, there)]
    assert logs == [False, True]
