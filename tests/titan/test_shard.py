"""Along which dimension packed experts are cut; tests/train/test_train_parallel.py trains with every layout."""

from __future__ import annotations

import pytest
import torch
from torch.distributed.fsdp._fully_shard import _fsdp_common

from lamella.titan.shard import expert_dimension

PACKED = [torch.Size((8, 64, 32)), torch.Size((8, 32, 24))]


@pytest.mark.parametrize(
    ("ranks", "parts", "dimension"),
    [(8, 8, 0), (16, 16, 1), (12, 12, 0), (16, 4, 1)],
    ids=["one expert a rank", "rows of experts", "rows that do not divide", "four experts' ranks, four parts of each"],
)
def test_experts_are_cut_by_expert_while_there_are_enough(ranks, parts, dimension):
    assert expert_dimension(PACKED, ranks, parts) == dimension


def test_torch_still_has_what_places_experts_on_other_ranks():
    """Private names: a parameter's own mesh has no public spelling yet."""
    assert set(_fsdp_common.ShardPlacementResult.__annotations__) == {"placement", "mesh_info"}
    assert {"mesh", "shard_mesh_dim", "replicate_mesh_dim"} <= set(
        _fsdp_common.HSDPMeshInfo.__dataclass_fields__
    ) & set(_fsdp_common.FSDPMeshInfo.__dataclass_fields__)
