"""The demo's ranks on machines with and without GPUs; `lamella demo` itself is run by test_docs.py."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lamella import demo
from lamella.demo_adapters import run_adapters_demo
from lamella.errors import UserError
from lamella.recipe.stages import prepare_recipe
from lamella.run import launch


@pytest.fixture
def gpus(monkeypatch):
    """Say how many GPUs this machine has."""

    def have(count: int) -> None:
        for module in (demo, launch):
            monkeypatch.setattr(module, "visible_gpus", lambda: count)

    return have


@pytest.mark.parametrize(("count", "ranks"), [(0, 3), (1, 1), (2, 2), (3, 3), (8, 3)])
def test_a_rank_for_each_gpu_up_to_three(count, ranks, gpus, tmp_path, monkeypatch):
    """And the recipe that the demo trains can be laid over them."""
    gpus(count)

    def begins(begun: demo.Demo) -> None:
        raise InterruptedError(begun.ranks)

    monkeypatch.setattr(demo, "convert", begins)
    with pytest.raises(InterruptedError) as stopped:
        demo.run_demo(tmp_path / "demo")
    assert stopped.value.args == (ranks,)
    prepare_recipe(None, [f"samples_per_step={ranks}"]).check_world_size(ranks)


def test_more_ranks_than_gpus_are_refused_before_anything_is_written(gpus, tmp_path):
    gpus(2)
    with pytest.raises(UserError, match="3 processes need a GPU each, and 2 can be used here; start 2"):
        demo.run_demo(tmp_path / "demo", ranks=3)
    assert not Path(tmp_path / "demo").exists()
    launch.check_gpus(2)
    gpus(0)
    launch.check_gpus(64)


@pytest.mark.slow
def test_the_demo_of_adapters(tmp_path: Path) -> None:
    """Too short to learn much: what it reports is there, and the zero expert is the dense model."""
    report = run_adapters_demo(tmp_path / "demo", steps=2, tokens=128, questions=1)
    assert report["zero_expert_is_dense"]
    assert set(report["nats"]) == {"headers", "docs", "dense", "mix", "all"}
    assert all(set(nats) == {"headers", "docs"} for nats in report["nats"].values())
    assert set(report["acc"]["mix"]) == {"headers", "docs"}
    assert json.loads((tmp_path / "demo/report.json").read_text())["steps"] == 2
    assert (tmp_path / "demo/experts.png").stat().st_size > 10_000
