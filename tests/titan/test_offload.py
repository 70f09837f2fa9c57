"""Frozen experts alone wait in main memory, however the ranks are laid out, in units that stay those of the blocks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.testing._internal.distributed.fake_pg import FakeStore
from torchtitan.config import CompileConfig, ParallelismConfig, TrainingConfig
from torchtitan.distributed import ParallelDims

from lamella.titan.config import decoder_config
from lamella.titan.decoder import LamellaDecoder
from lamella.titan.parallelise import parallelize
from support.models import tiny_moe


@contextmanager
def ranks(number: int) -> Iterator[None]:
    """This process is the first of so many, whose collectives move nothing."""
    torch.distributed.init_process_group("fake", rank=0, world_size=number, store=FakeStore())
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def laid_out(folder, number: int, offloads: bool, **degrees: int) -> LamellaDecoder:
    parallelism = ParallelismConfig(spmd_backend="partial_dtensor", **degrees)
    config = decoder_config(folder, "sdpa")
    config.offloads_frozen = offloads
    with torch.device("meta"):
        model = config.build()
    parallelize(
        model, parallel_dims=ParallelDims.from_config(parallelism, number), training=TrainingConfig(),
        parallelism=parallelism, compile_config=CompileConfig(), ac_config=None, dump_folder="",
    )  # fmt: skip
    model.to_empty(device="cpu")
    return model


def fsdp_parts(model: nn.Module) -> dict[str, tuple[bool, int]]:
    """Parameter -> (whether FSDP keeps its part in main memory, the number of its unit)."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    units = [module for module in model.modules() if isinstance(module, FSDPModule)]
    return {
        names[part.sharded_param]: (part.offload_to_cpu, number)
        for number, unit in enumerate(units)
        for group in unit._get_fsdp_state()._fsdp_param_groups
        for part in group.fsdp_params
    }


@pytest.mark.parametrize(
    ("number", "degrees"),
    [
        (1, {}),
        (4, {}),
        (4, {"expert_parallel_degree": 2}),
        (4, {"data_parallel_replicate_degree": 2, "data_parallel_shard_degree": 2}),
    ],
    ids=["alone", "fsdp", "experts", "hsdp"],
)
def test_frozen_experts_wait_and_nothing_else(number, degrees, tmp_path):
    tiny_moe("llama", tmp_path)
    with ranks(number):
        plain, offloaded = (fsdp_parts(laid_out(tmp_path, number, offloads, **degrees)) for offloads in (False, True))
    assert not any(waits for waits, _ in plain.values())
    assert {name for name, (waits, _) in offloaded.items() if waits} == {n for n in plain if ".experts.frozen_" in n}
    assert any(waits for waits, _ in offloaded.values())
    assert {name: unit for name, (_, unit) in offloaded.items()} == {name: unit for name, (_, unit) in plain.items()}
