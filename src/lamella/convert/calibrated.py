"""From options to a plan for method "partition": calibrate, decide layer by layer, and test the result if asked to."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from lamella.calibrate import calibrate, calibration_tokens
from lamella.calibrate.dense import DenseModel
from lamella.calibrate.guard import Verdict, guarded
from lamella.convert.checkpoint import Checkpoint
from lamella.convert.layout import ffn_layout
from lamella.convert.partition import plan_partition
from lamella.convert.partition_options import PartitionOptions
from lamella.convert.plan import Plan
from lamella.convert.work import Work
from lamella.partition.decide import Axes, Decision, converted_layer, decide
from lamella.partition.layer import FFN, LayerSample, weights_only


def plan_calibrated(source: Checkpoint, options: PartitionOptions, work: Work) -> Plan:
    """Decide every chosen layer and plan the model. UserError for bad options, before anything is computed."""
    layout = ffn_layout(source.config)
    layers = options.chosen_layers(layout.num_layers)
    options.check(layout.ffn_width)
    if work.folder is None:
        return plan_partition(source, sizes_only(options), _decide_all(source, sizes_only(options), layers, work))
    decisions = _decide_all(source, options, layers, work)
    if options.guard is None:
        return plan_partition(source, options, decisions, options.dtype)
    verdicts = _test(source, options, decisions, work)
    kept = {verdict.layer: decisions[verdict.layer] for verdict in verdicts if verdict.kept}
    plan = plan_partition(source, options, kept, options.dtype)
    return dataclasses.replace(plan, notes={"guard": [verdict._asdict() for verdict in verdicts]})


def sizes_only(options: PartitionOptions) -> PartitionOptions:
    """Options that give tensors of the same sizes without a look at the weights (the shared count may differ)."""
    shared = 0 if options.shared == "search" else options.shared
    return dataclasses.replace(
        options, neurons="contiguous", router="zero", shared=shared, balance=None, output="plain", guard=None
    )


def _decide_all(
    source: Checkpoint, options: PartitionOptions, layers: tuple[int, ...], work: Work
) -> dict[int, Decision]:
    axes = options.axes()

    def on_layer(layer: int, sample: LayerSample) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(options.seed * 10_000 + layer)
        return decide(sample, axes, generator).to_dict()

    if not axes.needs_sample:
        model = DenseModel(source)
        return {layer: Decision(**on_layer(layer, weights_only(model.ffn(layer)))) for layer in layers}
    assert work.folder is not None
    results = calibrate(
        source, calibration_tokens(source, options.calibration), work.folder, on_layer,
        method=options.to_dict() | {"calibration": None, "guard": None, "dtype": None},
        gradients=axes.needs_gradient, replacement=replacement(axes) if options.sequential else None,
        layers=layers, overwrite=True, on_progress=work.on_progress,
    )  # fmt: skip
    return {layer: Decision(**tensors) for layer, tensors in results.items()}


def replacement(axes: Axes) -> Callable[[FFN, dict[str, Tensor]], Callable[[Tensor], Tensor]]:
    """The converted layer as `calibrate` wants it."""
    return lambda ffn, tensors: converted_layer(ffn, Decision(**tensors), axes)


def _test(source: Checkpoint, options: PartitionOptions, decisions: dict[int, Decision], work: Work) -> list[Verdict]:
    assert options.guard is not None
    num_tokens = max(options.guard.tokens, options.calibration.sequence_length)
    tokens = calibration_tokens(source, dataclasses.replace(options.calibration, num_tokens=num_tokens))
    axes = options.axes()
    return guarded(
        DenseModel(source), tokens, options.guard, decisions,
        lambda layer, ffn: converted_layer(ffn, decisions[layer], axes), work.on_verdict,
    )  # fmt: skip
