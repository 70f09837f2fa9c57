"""Layers that cost more to thin out keep more parts, at the same mean."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import pytest
import torch

from lamella.conversion.partition import allocate as allocation
from lamella.conversion.partition.allocate import allocate, costs, counts
from lamella.errors import UserError
from lamella.hf.models import load
from lamella.recipe.conversion import load_conversion
from support.partition_samples import sample_of
from support.partitioning import dense_model, partition


def test_the_cheapest_counts_are_found() -> None:
    generator = torch.Generator().manual_seed(0)
    cost_of_layers = {layer: torch.rand(3, generator=generator).tolist() for layer in (1, 4, 5, 7)}
    found = allocate(cost_of_layers, range(3, 6), 4)
    assert list(found) == [1, 4, 5, 7]

    def total(chosen: tuple[int, ...]) -> float:
        return sum(cost[count - 3] for cost, count in zip(cost_of_layers.values(), chosen, strict=True))

    every = [chosen for chosen in itertools.product(range(3, 6), repeat=4) if sum(chosen) == 16]
    assert tuple(found.values()) == min(every, key=total)


def test_a_layer_that_costs_nothing_gives_its_parts_to_the_others() -> None:
    assert allocate({0: [9.0, 4.0, 1.0], 1: [0.0, 0.0, 0.0]}, range(1, 4), 2) == {0: 3, 1: 1}


@pytest.mark.parametrize(("parts", "active"), [(16, 8), (16, 15), (16, 1), (4, 2), (16, 4)])
def test_the_counts_leave_something_out_and_hold_the_mean(parts: int, active: int) -> None:
    found = counts(parts, active)
    assert active in found
    assert 1 <= found[0] <= found[-1] < parts


def test_a_layer_keeps_one_part_to_choose(tmp_path: Path) -> None:
    """However few are active there, beside the shared ones that the recipe names."""
    assert counts(16, 8, 7) == range(8, 13)
    dense = dense_model(tmp_path / "dense", num_hidden_layers=4)
    out = partition(dense, tmp_path / "moe", "parts=8", "active=5", "shared=4")
    moe = json.loads((out / "config.json").read_text())["moe"]
    chosen = [(moe | moe["per_layer"].get(str(layer), {}))["num_experts_per_tok"] for layer in range(4)]
    assert sum(chosen) == 4 * 5 - 4 * 4
    assert min(chosen) >= 1


def test_the_cost_is_the_squared_first_order_change_of_the_loss() -> None:
    """Without a regression to help, where the neurons' activations are independent: that of the dropped ones."""
    sample = sample_of()
    found = costs(sample, 8, [2, 4, 7])
    assert (found.diff() < 0).all()
    assert sample.dh_TF is not None
    T, F = sample.h_TF.shape
    h_TF = torch.randn(4096, F, generator=torch.Generator().manual_seed(1))
    dh_TF = sample.dh_TF.repeat(4096 // T + 1, 1)[:4096]
    unrelated = sample._replace(h_TF=h_TF, dh_TF=dh_TF, x_TD=torch.zeros(4096, sample.x_TD.shape[1]))
    dropped = (h_TF * dh_TF).abs().mean(0).argsort(descending=True)[4 * F // 8 :]
    expected = math.pi / 2 * (h_TF[:, dropped] * dh_TF[:, dropped]).sum(1).abs().mean().item() ** 2
    assert costs(unrelated, 8, [4]).item() == pytest.approx(expected, rel=0.05)


def test_counts_between_the_probes_lie_on_lines_of_the_logarithm(monkeypatch: pytest.MonkeyPatch) -> None:
    sample = sample_of()
    exact = costs(sample, 8, range(2, 7))
    monkeypatch.setattr(allocation, "PROBES", 3)
    found = costs(sample, 8, range(2, 7))
    assert torch.allclose(found[::2], exact[::2])
    assert torch.allclose(found[1::2], (exact[:-1:2] * exact[2::2]).sqrt())


def test_a_model_with_layers_that_differ(tmp_path: Path) -> None:
    """The mean over the layers is what was asked for; it loads, computes and says so in its config."""
    dense = dense_model(tmp_path / "dense", num_hidden_layers=4)
    out = partition(dense, tmp_path / "moe", "parts=8", "active=4")
    moe = json.loads((out / "config.json").read_text())["moe"]
    own = [moe["per_layer"].get(str(layer), {}) for layer in range(4)]
    width = moe["moe_intermediate_size"]
    active = [
        (moe | fields)["num_experts_per_tok"] + (moe | fields)["shared_intermediate_size"] // width for fields in own
    ]
    assert sum(active) == 16
    assert len(set(active)) > 1
    assert set(active) <= set(counts(8, 4))
    logits = load(out)(torch.arange(12)[None]).logits
    assert logits.isfinite().all()
    even = partition(dense, tmp_path / "even", "parts=8", "active=4", "allocation=even")
    assert json.loads((even / "config.json").read_text())["moe"]["per_layer"] == {}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["neurons=kmeans"], "choose 'even', or neurons 'coadapted'"),
        (["shared=search"], "choose allocation 'even', or a number of parts"),
    ],
)
def test_what_cannot_be_allocated_is_refused(words: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        load_conversion(None, ["method=partition", "allocation=sensitivity", *words])
