"""From options to a plan for method "partition": calibrate, decide layer by layer, and test the result if asked to."""

from __future__ import annotations

import dataclasses
import functools
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from lamella.architecture.layout import ffn_layout
from lamella.architecture.moe import MoEConfig
from lamella.calibrate import CalibrationStep, calibrate, calibration_tokens, training_tokens
from lamella.calibrate.guard import Verdict, guarded
from lamella.calibrate.layerwise import LayerwiseModel
from lamella.calibrate.sample import FFN, weights_only
from lamella.calibrate.store import ResultFolder
from lamella.checkpoint.plan import WritePlan
from lamella.checkpoint.source import Checkpoint
from lamella.checkpoint.tensors import SourceTensor, read_header
from lamella.conversion.partition.allocate import allocate, costs, counts
from lamella.conversion.partition.decide import (
    Decision,
    Split,
    converted_ffn,
    converted_layer,
    decide,
    finish,
    neuron_counts,
    split,
)
from lamella.conversion.partition.plan import decided_plan, list_tensors
from lamella.conversion.plan import ConversionPlan, Workspace
from lamella.jsons import Json
from lamella.recipe.methods.partition import Axes, Heal, PartitionOptions, partition_sizes

ALLOCATION_TOKENS = 8192
"""Of the calibration's, at most: by these the layers are compared."""


def plan_partition(model: str | Path | None, options: PartitionOptions) -> ConversionPlan:
    """The plan of a partition: every chosen layer is decided when the plan is, and tested if a guard is asked for.

    Raises:
        UserError: options that do not fit the model, before anything is computed.
    """
    source = Checkpoint.open(model)
    sizes = partition_sizes(options, source.config)

    def decide_layers(work: Workspace) -> WritePlan:
        return _decide(source, options, sizes, work)

    return ConversionPlan(source, list_tensors(source, options, sizes), decide_layers, _remark(options))


def _remark(options: PartitionOptions) -> str:
    """What is not known before the layers are decided."""
    remarks = []
    if options.allocates:
        remarks.append(f"the layers' active parts differ, {options.active} in the mean, listed as alike")
    if options.fixed_shared is None:
        remarks.append("shared: search chooses a number of shared parts for each layer, listed as none")
    if options.guard is not None:
        remarks.append("the guard may leave layers dense, listed as converted")
    return "; ".join(remarks)


def _decide(source: Checkpoint, options: PartitionOptions, sizes: MoEConfig, work: Workspace) -> WritePlan:
    decided = decide_all(source, options, sizes.moe_layers, work)
    decisions = decided.decisions
    notes: Json = {}
    if options.guard is not None:
        verdicts = _test(source, options, decided, work)
        decisions = {verdict.layer: decisions[verdict.layer] for verdict in verdicts if verdict.kept}
        notes = {"guard": [verdict._asdict() for verdict in verdicts]}
    matrices = {layer: {"down": down} for layer, down in decided.refitted.items()}
    if options.heal is not None and decisions:
        decisions, matrices, notes["heal"] = _healed(source, options, options.heal, decided, decisions, work)
    plan = decided_plan(source, options, sizes, decisions, matrices)
    return dataclasses.replace(
        plan, notes=notes, scratch=work.folder if options.needs_sample or options.heal is not None else None
    )


class Decided(NamedTuple):
    """What every layer becomes. Refitted matrices stay in their files: together they are a third of the FFNs."""

    decisions: dict[int, Decision]
    refitted: dict[int, SourceTensor]

    def whole(self, layer: int) -> Decision:
        decision, down = self.decisions[layer], self.refitted.get(layer)
        return decision if down is None else decision._replace(down_DF=down.read(0, down.numel).view(down.shape))


def decide_all(source: Checkpoint, options: PartitionOptions, layers: tuple[int, ...], work: Workspace) -> Decided:
    """Every layer's decision.

    Sequential calibration divides the neurons by what the dense model does with the text, and fits the rest to what a
    layer gets behind the converted ones: divided by the latter, each layer would follow the errors of those below.
    """
    axes = options.axes()

    def drawn(layer: int) -> torch.Generator:
        return torch.Generator().manual_seed(options.seed * 10_000 + layer)

    if not axes.needs_sample:
        model = LayerwiseModel(source)
        samples = {layer: weights_only(model.ffn(layer)) for layer in layers}
        return Decided({layer: decide(sample, axes, drawn(layer)) for layer, sample in samples.items()}, {})
    layout, sequential = ffn_layout(source.config), options.sequential and not axes.all_active
    refitted = 0 if axes.all_active or axes.output != "refit" else layout.hidden_size * layout.ffn_width
    run = functools.partial(
        calibrate, source, layers=layers, overwrite=True, on_progress=work.on_progress,
        method=options.to_dict() | {"calibration": None, "guard": None, "dtype": None, "heal": None},
    )  # fmt: skip
    tokens = calibration_tokens(source, options.calibration)
    folders = iter((work.folder, work.folder / "second", work.folder / "third"))
    own = dict.fromkeys(layers, axes)
    if axes.allocates:
        candidates = counts(axes.parts, axes.active, axes.shared if isinstance(axes.shared, int) else 0)
        found = run(
            tokens.first(ALLOCATION_TOKENS), next(folders),
            lambda layer, sample: {"costs": costs(sample, axes.parts, candidates)}, gradients=True,
        )  # fmt: skip
        by_layer = {layer: result["costs"].tolist() for layer, result in found.items()}
        chosen = allocate(by_layer, candidates, axes.active)
        own = {layer: dataclasses.replace(axes, active=active) for layer, active in chosen.items()}
    if sequential:
        splits = run(
            tokens, next(folders), lambda layer, sample: split(sample, own[layer], drawn(layer)).to_dict(),
            gradients=axes.needs_gradient,
        )  # fmt: skip
        results = run(
            tokens, next(folders), lambda layer, sample: finish(sample, own[layer], Split.of(splits[layer])).to_dict(),
            replacement=replacement(axes), result_bytes=4 * refitted,
        )  # fmt: skip
    else:
        results = run(
            tokens, next(folders), lambda layer, sample: decide(sample, own[layer], drawn(layer)).to_dict(),
            gradients=axes.needs_gradient, result_bytes=4 * refitted,
        )  # fmt: skip
    headers = {layer: read_header(results.path(layer)) for layer in layers}
    return Decided(
        {layer: Decision(**results[layer])._replace(down_DF=None) for layer in layers},
        {layer: header["down_DF"] for layer, header in headers.items() if "down_DF" in header},
    )


Matrices = dict[int, dict[str, SourceTensor]]
"""By layer and part (gate, up, down, up_bias): what takes the dense tensor's place."""


def _healed(
    source: Checkpoint, options: PartitionOptions, heal: Heal, decided: Decided, decisions: dict[int, Decision],
    work: Workspace,
) -> tuple[dict[int, Decision], Matrices, Json]:  # fmt: skip
    """These layers' decisions and matrices after healing, the latter in files; and what is to be said of it."""
    from lamella.calibrate.whole import whole_model
    from lamella.conversion.partition.heal import Start, Step
    from lamella.conversion.partition.heal import heal as train

    axes, layers, steps = options.axes(), LayerwiseModel(source), []
    starts = {}
    for layer in decisions:
        ffn, decision = layers.ffn(layer), decided.whole(layer)
        starts[layer] = Start(converted_ffn(ffn, decision), neuron_counts(ffn, decision, axes))
    tokens = training_tokens(source, options.calibration, heal.tokens)

    def on_step(step: Step) -> None:
        steps.append(step)
        work.on_progress(CalibrationStep("heal", step.number - 1, step.steps, step.tokens_per_s, step.wall_s))

    healed = train(whole_model(source), starts, tokens.ids_NL, heal, on_step)
    matrices: Matrices = {}
    results = ResultFolder(work.folder / "healed")
    results.folder.mkdir(parents=True, exist_ok=True)
    for layer, ffn in healed.items():
        parts = {"gate": ffn.gate_FD, "up": ffn.up_FD, "down": ffn.down_DF, "up_bias": ffn.up_bias_F}
        results.save(layer, {name: tensor.cpu() for name, tensor in parts.items() if tensor is not None})
        matrices[layer] = read_header(results.path(layer))
        bias_D = None if ffn.down_bias_D is None else ffn.down_bias_D.cpu()
        decisions = decisions | {layer: decisions[layer]._replace(output_bias_D=bias_D, row_scale_D=None)}
    first, last = (statistics.mean(step.kl for step in part) for part in (steps[:5], steps[-5:]))
    return decisions, matrices, {"tokens": tokens.num_tokens, "kl_first_steps": first, "kl_last_steps": last}


def replacement(axes: Axes) -> Callable[[FFN, dict[str, Tensor]], Callable[[Tensor], Tensor]]:
    """The converted layer as `calibrate` wants it."""
    return lambda ffn, tensors: converted_layer(ffn, Decision(**tensors), axes)


def _test(source: Checkpoint, options: PartitionOptions, decided: Decided, work: Workspace) -> list[Verdict]:
    assert options.guard is not None
    num_tokens = max(options.guard.tokens, options.calibration.sequence_length * len(options.calibration.texts))
    tokens = calibration_tokens(source, dataclasses.replace(options.calibration, num_tokens=num_tokens))
    axes = options.axes()
    return guarded(
        LayerwiseModel(source), tokens, options.guard, decided.decisions,
        lambda layer, ffn: converted_layer(ffn, decided.whole(layer), axes), work.on_verdict,
    )  # fmt: skip
