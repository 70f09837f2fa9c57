"""Neurons of a dense FFN into shared and routed experts, and routers for them: tensor functions of one layer at a time.

partition = PARTITIONS["coadapted"](sample, Parts(16, 3, 8), generator)
router = ROUTERS["ridge"](sample, partition, 5, generator)
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from lamella.recipe.methods import partition as axes

if TYPE_CHECKING:
    from lamella.conversion.partition.search import PartitionMethod, RouterMethod


def _function(choice: axes.Choice) -> PartitionMethod | RouterMethod:
    module, _, name = choice.function.partition(":")
    return getattr(import_module(module), name)


PARTITIONS: dict[str, PartitionMethod] = {name: _function(choice) for name, choice in axes.PARTITIONS.items()}  # type: ignore[misc]
ROUTERS: dict[str, RouterMethod] = {name: _function(choice) for name, choice in axes.ROUTERS.items()}  # type: ignore[misc]
