"""From options to a plan for method "partition": calibrate, decide layer by layer, and test the result if asked to."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from lamella.architecture.layout import ffn_layout
from lamella.calibrate import calibrate, calibration_tokens
from lamella.calibrate.guard import Verdict, guarded
from lamella.calibrate.layerwise import LayerwiseModel
from lamella.calibrate.sample import FFN, LayerSample, weights_only
from lamella.checkpoint.plan import WritePlan
from lamella.checkpoint.source import Checkpoint
from lamella.checkpoint.tensors import SourceTensor, read_header
from lamella.conversion.partition.decide import Decision, converted_layer, decide
from lamella.conversion.partition.plan import plan_partition
from lamella.conversion.work import Work
from lamella.errors import UserError
from lamella.recipe.methods.partition import Axes, PartitionOptions


def plan_calibrated(source: Checkpoint, options: PartitionOptions, work: Work) -> WritePlan:
    """Decide every chosen layer and plan the model. UserError for bad options, before anything is computed."""
    layout = ffn_layout(source.config)
    layers = options.chosen_layers(layout.num_layers)
    options.check(layout.ffn_width)
    if options.router == "analytic" and layout.gate is None:
        raise UserError("router 'analytic' is made of gate projections, which this family has none of; use 'ridge'")
    if work.folder is None:
        axes = sizes_only(options)
        return plan_partition(source, axes, _decide_all(source, axes, layers, work).decisions)
    decided = _decide_all(source, options, layers, work)
    decisions, notes = decided.decisions, {}
    if options.guard is not None:
        verdicts = _test(source, options, decided, work)
        decisions = {verdict.layer: decisions[verdict.layer] for verdict in verdicts if verdict.kept}
        notes = {"guard": [verdict._asdict() for verdict in verdicts]}
    plan = plan_partition(source, options, decisions, options.dtype, decided.refitted)
    return dataclasses.replace(plan, notes=notes, scratch=work.folder if options.needs_sample else None)


class Decided(NamedTuple):
    """What every layer becomes. Refitted matrices stay in their files: together they are a third of the FFNs."""

    decisions: dict[int, Decision]
    refitted: dict[int, SourceTensor]

    def whole(self, layer: int) -> Decision:
        decision, down = self.decisions[layer], self.refitted.get(layer)
        return decision if down is None else decision._replace(down_DF=down.read(0, down.numel).view(down.shape))


def sizes_only(options: PartitionOptions) -> PartitionOptions:
    """Options that give tensors of the same sizes without a look at the weights (the shared count may differ)."""
    return dataclasses.replace(
        options,
        neurons="contiguous",
        router="zero",
        shared=options.fixed_shared or 0,
        balance=None,
        output="plain",
        guard=None,
    )


def _decide_all(source: Checkpoint, options: PartitionOptions, layers: tuple[int, ...], work: Work) -> Decided:
    axes = options.axes()

    def on_layer(layer: int, sample: LayerSample) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(options.seed * 10_000 + layer)
        return decide(sample, axes, generator).to_dict()

    if not axes.needs_sample:
        model = LayerwiseModel(source)
        return Decided({layer: Decision(**on_layer(layer, weights_only(model.ffn(layer)))) for layer in layers}, {})
    assert work.folder is not None
    sequential, layout = options.sequential and not axes.all_active, ffn_layout(source.config)
    refitted = 0 if axes.all_active or axes.output != "refit" else layout.hidden_size * layout.ffn_width
    results = calibrate(
        source, calibration_tokens(source, options.calibration), work.folder, on_layer,
        method=options.to_dict() | {"calibration": None, "guard": None, "dtype": None},
        gradients=axes.needs_gradient, replacement=replacement(axes) if sequential else None,
        layers=layers, overwrite=True, result_bytes=4 * refitted, on_progress=work.on_progress,
    )  # fmt: skip
    headers = {layer: read_header(results.path(layer)) for layer in layers}
    return Decided(
        {layer: Decision(**results[layer])._replace(down_DF=None) for layer in layers},
        {layer: header["down_DF"] for layer, header in headers.items() if "down_DF" in header},
    )


def replacement(axes: Axes) -> Callable[[FFN, dict[str, Tensor]], Callable[[Tensor], Tensor]]:
    """The converted layer as `calibrate` wants it."""
    return lambda ffn, tensors: converted_layer(ffn, Decision(**tensors), axes)


def _test(source: Checkpoint, options: PartitionOptions, decided: Decided, work: Work) -> list[Verdict]:
    assert options.guard is not None
    num_tokens = max(options.guard.tokens, options.calibration.sequence_length)
    tokens = calibration_tokens(source, dataclasses.replace(options.calibration, num_tokens=num_tokens))
    axes = options.axes()
    return guarded(
        LayerwiseModel(source), tokens, options.guard, decided.decisions,
        lambda layer, ffn: converted_layer(ffn, decided.whole(layer), axes), work.on_verdict,
    )  # fmt: skip
