"""What a merge is made of: base, experts and shared experts, opened and checked against each other by their headers."""

from __future__ import annotations

from dataclasses import dataclass

from lamella.architecture.families import sizes_of
from lamella.architecture.layout import FFNLayout, ffn_layout
from lamella.architecture.model import Sizes
from lamella.architecture.moe import MoEConfig
from lamella.architecture.reading import read_together
from lamella.checkpoint.source import Checkpoint
from lamella.checkpoint.tensors import SourceTensor
from lamella.conversion.merge.references import local_config, open_reference
from lamella.conversion.replace import ffn_parts
from lamella.errors import UserError
from lamella.recipe.check import Problems
from lamella.recipe.methods.common import DTYPE_NAMES
from lamella.recipe.methods.merge import MergeOptions, Prompted, merge_sizes


@dataclass(frozen=True)
class Expert:
    """A model whose FFNs are used."""

    label: str
    """Tells its noise from that of the others."""
    said: Prompted
    source: Checkpoint

    def ffn(self, layout: FFNLayout, layer: int) -> dict[str, SourceTensor]:
        """A layer's FFN: "gate", "up" and "down"."""
        return ffn_parts(self.source, layout, layer)


@dataclass(frozen=True)
class Merge:
    """Everything that a plan is made of."""

    options: MergeOptions
    base: Checkpoint
    sizes: Sizes
    """Of the base."""
    layout: FFNLayout
    experts: tuple[Expert, ...]
    shared: tuple[Expert, ...]
    moe: MoEConfig

    @property
    def dtype(self) -> str | None:
        """ "float32", "bfloat16" or "float16"; None keeps each tensor's own."""
        said = self.base.config.get("dtype") or self.base.config.get("torch_dtype")
        return self.options.dtype or (said if said in DTYPE_NAMES else None)

    @property
    def all_experts(self) -> tuple[Expert, ...]:
        return (*self.experts, *self.shared)


def open_merge(model: str | None, options: MergeOptions) -> Merge:
    """Open base and experts and compare them; reads headers only.

    Raises:
        UserError: all that is wrong with any of the models, or between them.
    """
    if not options.experts:
        raise UserError("there are no experts; list models under `experts`, each with source_model and prompts")
    named = [(f"expert {i}", said) for i, said in enumerate(options.experts)]
    named += [(f"shared expert {i}", said) for i, said in enumerate(options.shared_experts)]
    configs = [local_config(name) for name in {model, *(said.source_model for _, said in named)}]
    read_together([config for config in configs if config is not None])
    base = open_reference(model)
    sizes, layout = sizes_of(base.config), ffn_layout(base.config)
    if not layout.gated:
        raise UserError(f"the FFN of {sizes.family.name} has two matrices; only models with gated FFNs can be merged")
    opened: dict[str | None, Checkpoint] = {None: base, model: base}
    problems: list[str] = []
    experts = []
    for label, said in named:
        try:
            if said.source_model not in opened:
                opened[said.source_model] = open_reference(said.source_model)
            experts.append(Expert(label, said, opened[said.source_model]))
            problems += _differences(experts[-1], sizes, options)
        except UserError as error:
            problems.append(f"{label}: {error}")
    if problems:
        raise Problems(problems)
    count = len(options.experts)
    moe = merge_sizes(options, base.config)
    return Merge(options, base, sizes, layout, tuple(experts[:count]), tuple(experts[count:]), moe)


def _differences(expert: Expert, base: Sizes, options: MergeOptions) -> list[str]:
    """In what a model differs from the base that must be the same, one line for it."""
    own = sizes_of(expert.source.config)
    compared = {
        "architecture": (own.family.name, base.family.name),
        "layers": (own.num_layers, base.num_layers),
        "hidden size": (own.D, base.D),
        "intermediate size": (own.F, base.F),
        "activation": (own.activation, base.activation),
    }
    if not options.any_vocabulary:
        compared["vocabulary"] = (own.V, base.V)
    found = [f"{what} {own} instead of {wanted}" for what, (own, wanted) in compared.items() if own != wanted]
    if not found:
        return []
    hint = "; any_vocabulary: true allows another number of tokens" if found[0].startswith("vocabulary") else ""
    return [f"{expert.label} ({expert.source.name}) is of another shape than the base model: {', '.join(found)}{hint}"]
