"""Along which dimension packed experts are cut; tests/train/test_train_parallel.py trains with every layout."""

from __future__ import annotations

import pytest
import torch

from lamella.titan.shard import expert_dimension

PACKED = [torch.Size((8, 64, 32)), torch.Size((8, 32, 24))]


@pytest.mark.parametrize(
    ("ranks", "parts", "dimension"),
    [(8, 8, 0), (16, 16, 1), (12, 12, 0), (16, 4, 1)],
    ids=["one expert a rank", "rows of experts", "rows that do not divide", "four experts' ranks, four parts of each"],
)
def test_experts_are_cut_by_expert_while_there_are_enough(ranks, parts, dimension):
    assert expert_dimension(PACKED, ranks, parts) == dimension
