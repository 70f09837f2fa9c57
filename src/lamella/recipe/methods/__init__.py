"""The methods of conversion, one row each: a new one is a row here, a file of options beside this one, and a planner.

Imports no torch: planners are named, and imported when a conversion is planned.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from lamella.architecture.adapters import AdaptersConfig
from lamella.architecture.moe import AttentionMoEConfig, MoEConfig
from lamella.errors import UserError, did_you_mean
from lamella.recipe.methods.adapters import AdaptersOptions, adapters_sizes
from lamella.recipe.methods.attention import AttentionOptions, attention_sizes
from lamella.recipe.methods.common import MethodOptions
from lamella.recipe.methods.merge import MergeOptions, merge_sizes
from lamella.recipe.methods.partition import PartitionOptions, partition_sizes
from lamella.recipe.methods.slice import SliceOptions, slice_sizes
from lamella.recipe.methods.upcycle import UpcycleOptions, upcycle_sizes


class Method(NamedTuple):
    """All that the rest of lamella knows of a method."""

    options: type[MethodOptions]
    """Its fields are the recipe's keys."""
    sizes: Callable[[Any, dict[str, Any]], MoEConfig | AttentionMoEConfig | AdaptersConfig]
    """(options, config.json of the model) -> the entry of the converted model's config.json."""
    plan: str
    """MODULE:FUNCTION, (model, options) -> `lamella.conversion.plan.ConversionPlan`."""


METHODS: dict[str, Method] = {
    "slice": Method(SliceOptions, slice_sizes, "lamella.conversion.slice:plan_slices"),
    "partition": Method(PartitionOptions, partition_sizes, "lamella.conversion.partition.calibrated:plan_partition"),
    "upcycle": Method(UpcycleOptions, upcycle_sizes, "lamella.conversion.upcycle:plan_upcycle"),
    "adapters": Method(AdaptersOptions, adapters_sizes, "lamella.conversion.adapters:plan_adapters"),
    "merge": Method(MergeOptions, merge_sizes, "lamella.conversion.merge.plan:plan_merge"),
    "attention": Method(AttentionOptions, attention_sizes, "lamella.conversion.attention.plan:plan_attention"),
}


def method_named(name: str) -> Method:
    """The method's row; UserError for a name that is none."""
    if name not in METHODS:
        raise UserError(f"unknown method {name!r}{did_you_mean(name, METHODS)}; known: {', '.join(METHODS)}")
    return METHODS[name]


def sizes_of(options: MethodOptions, config: dict[str, Any]) -> MoEConfig | AttentionMoEConfig | AdaptersConfig:
    """The entry that a conversion adds to the config.json of a model. UserError where they do not fit each other."""
    return METHODS[options.method].sizes(options, config)
