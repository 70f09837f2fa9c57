"""Which experts a rank computes; the collectives are covered by the runs of test_train_parallel.py."""

from __future__ import annotations

import pytest
import torch

from lamella.architecture.moe import MoEConfig
from lamella.moe.expert_parallel import _own_rows, local_ids
from lamella.moe.packed import Experts
from lamella.moe.paths.choose import PATHS, apply_experts
from lamella.moe.routing import Routing


def flat_config(num_frozen: int, num_trainable: int, top_k: int) -> MoEConfig:
    return MoEConfig(num_frozen, num_trainable, 8, top_k, (0,), routing="flat")


def test_every_expert_is_one_ranks():
    config = flat_config(4, 6, 3)
    ids = torch.arange(10)[None]
    parts = torch.cat([local_ids(ids, config, rank, 2, 3) for rank in range(2)])
    assert parts.tolist() == [[0, 1, -1, -1, 2, 3, 4, -1, -1, -1], [-1, -1, 0, 1, -1, -1, -1, 2, 3, 4]]


@pytest.mark.parametrize("path", [p for p in PATHS if p not in ("fused", "quack")])  # these need a GPU
@pytest.mark.parametrize("favourite", [None, 0])
def test_the_parts_of_flat_routing_add_up(path, favourite):
    """Also where one rank gets no token at all."""
    generator = torch.Generator().manual_seed(0)
    config = flat_config(2, 4, 2)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    frozen, trainable = (Experts(draw(E, 16, 16), draw(E, 16, 8)) for E in (2, 4))
    x_GD = draw(12, 16)
    ids_GK = torch.stack([torch.randperm(6, generator=generator)[:2] for _ in range(12)])
    if favourite is not None:
        ids_GK = torch.tensor([0, 2]).expand(12, 2)  # both are the first rank's
    routing = Routing(ids_GK, torch.rand(12, 2, generator=generator))
    parts = [
        _own_rows(x_GD, routing, Experts(*(t[r : r + 1] for t in frozen)),
                  Experts(*(t[2 * r : 2 * r + 2] for t in trainable)), config, r, path)
        for r in range(2)
    ]  # fmt: skip
    whole = apply_experts(x_GD, routing, frozen, trainable, "loop")
    torch.testing.assert_close(sum(parts), whole, atol=1e-4, rtol=1e-5)  # fp32, another order of summation
