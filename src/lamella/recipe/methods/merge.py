"""Method "merge": what a recipe may say about it, and the sizes that come of it. Imports no torch.

A config of mergekit-moe is such a recipe, too: `lamella.recipe.mergekit` reads it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, get_args

from lamella.architecture.layout import ffn_layout
from lamella.architecture.moe import MoEConfig
from lamella.architecture.sizes import check_slices
from lamella.recipe.check import Options
from lamella.recipe.methods.common import DtypeName, MethodOptions

GateMode = Literal[
    "ridge", "mean", "hidden", "hidden_last", "hidden_avg", "cheap_embed", "random", "uniform_random"
]  # fmt: skip
TargetName = Literal["mixtral", "qwen2-moe", "qwen3-moe", "deepseek", "lamella"]
RANDOM_MODES = ("random", "uniform_random")
OWN_MODES = ("ridge", "mean")


@dataclass(frozen=True)
class Prompted(Options):
    """A model whose FFNs become experts, and the text by which tokens find their way to it."""

    source_model: str | None = None
    """The FFNs are taken from this model: a folder or a hub name, with @REVISION and +ADAPTER (a LoRA that is merged
    into them) behind it if wanted; null takes the base model."""
    positive_prompts: list[str] | None = None
    """Texts of the kind that should be routed here."""
    negative_prompts: list[str] | None = None
    """Texts of the kind that should not be routed here."""
    prompts_from: str | None = None
    """More positive prompts come from here: a .txt file with one per line, a .jsonl file with `prompt` or `text` in
    each line, or the training part of a text as in `data` of a training recipe."""
    noise_scale: float | None = None
    """The FFNs get normal noise of this standard deviation, in the weights' own units."""
    residual_scale: float | None = None
    """The FFNs' down projections are multiplied by this number."""

    def problems(self) -> list[str]:
        found = []
        for name in ("noise_scale", "residual_scale"):
            value = getattr(self, name)
            if value is not None and not math.isfinite(value):
                found.append(f"{name} is {value}; it must be a finite number")
        if self.noise_scale is not None and self.noise_scale < 0:
            found.append(f"noise_scale is {self.noise_scale}; it must be 0 or a positive number")
        return found

    @property
    def has_empty_prompt(self) -> bool:
        return any(not prompt.strip() for prompt in [*(self.positive_prompts or []), *(self.negative_prompts or [])])

    @property
    def has_prompts(self) -> bool:
        return bool(self.positive_prompts or self.prompts_from)


@dataclass(frozen=True)
class MergeOptions(MethodOptions):
    """Make the FFNs of several models of one shape the experts of one model, with a router made from prompts."""

    method: ClassVar[str] = "merge"
    entry: ClassVar[str] = "moe"

    experts: list[Prompted] = field(default_factory=list)
    """The models whose FFNs become experts, in the order of the experts; all other weights come from the base model,
    the recipe's `model`."""
    shared_experts: list[Prompted] = field(default_factory=list)
    """The FFNs of these models are computed for every token."""
    experts_per_token: int = 2
    """Each token is computed by this many of the experts."""
    gate_mode: GateMode = "ridge"
    """The router's rows are a classifier of what the router sees of the prompts (ridge, mean), mergekit's vectors
    (hidden, hidden_last, hidden_avg, cheap_embed), or drawn at random (random, uniform_random)."""
    architecture: str | None = None
    """The model is written as mixtral, qwen2-moe, qwen3-moe, deepseek (names of an architecture that is remote code),
    or lamella (our own form); null takes the first of the stock classes that holds it exactly, or else lamella."""
    parts: int = 1
    """Each FFN is cut into this many experts, which must divide its width; then a token is computed by
    parts * experts_per_token of them, or by parts_per_token."""
    parts_per_token: int | None = None
    """With parts, each token is computed by this many of them, of one model or of several."""
    any_vocabulary: bool = False
    """An expert may have another number of tokens than the base model, as after a fine-tune that added some: its
    FFNs are used, its embeddings are not."""
    prompts_per_expert: int = 64
    """So many prompts are taken from each prompts_from."""
    prompt_tokens: int = 256
    """Each prompt from prompts_from is cut after this many tokens."""
    load_in_4bit: bool = False
    """The gates are computed by the base model in 4 bits, through bitsandbytes."""
    load_in_8bit: bool = False
    """The gates are computed by the base model in 8 bits, through bitsandbytes."""
    seed: int = 0
    """Random gates and noise are drawn from this seed."""
    dtype: DtypeName | None = None
    """The weights are stored as float32, bfloat16 or float16; null takes what the base model's config.json says."""

    def problems(self) -> list[str]:
        found: list[str] = []
        if self.experts and not 1 <= self.experts_per_token <= len(self.experts):
            found.append(
                f"experts_per_token is {self.experts_per_token}; it must be 1 to the {len(self.experts)} experts"
            )
        if self.parts < 1:
            found.append(f"parts is {self.parts}; it must be at least 1")
        elif not 1 <= self.num_active <= len(self.experts) * self.parts and self.parts_per_token is not None:
            found.append(
                f"parts_per_token is {self.parts_per_token}; it must be 1 to the {len(self.experts) * self.parts} parts"
            )
        for name in ("prompts_per_expert", "prompt_tokens"):
            if getattr(self, name) < 1:
                found.append(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.load_in_4bit and self.load_in_8bit:
            found.append("load_in_4bit and load_in_8bit exclude each other; take one")
        if (self.load_in_4bit or self.load_in_8bit) and not self.gate_mode.startswith("hidden"):
            found.append("load_in_4bit and load_in_8bit are for the gate modes hidden, hidden_last and hidden_avg")
        return [*found, *self._target_problems(), *self._prompt_problems()]

    def _target_problems(self) -> list[str]:
        try:
            target_named(self.architecture)
        except ValueError as error:
            return [str(error)]
        return []

    def _prompt_problems(self) -> list[str]:
        """What the gate mode needs and the prompts do not give."""
        if self.gate_mode not in get_args(GateMode) or self.gate_mode in RANDOM_MODES:
            return []
        if any(expert.has_empty_prompt for expert in [*self.experts, *self.shared_experts]):
            return ["a prompt is empty; write a text of the kind that should be routed there, or leave it out"]
        lacking = [str(i) for i, expert in enumerate(self.experts) if not expert.has_prompts]
        if lacking and not self.is_upcycle:
            numbers = ", ".join(lacking)
            return [f"experts {numbers} have no positive_prompts; gate_mode {self.gate_mode} needs some for each"]
        given = [(e.positive_prompts, e.negative_prompts, e.prompts_from) for e in self.experts]
        if len(given) > 1 and not lacking and all(prompts == given[0] for prompts in given):
            return ["the prompts of all experts are the same, so nothing tells the experts apart; give each its own"]
        if lacking:
            return [f"gate_mode {self.gate_mode} needs prompts; copies of one model can take gate_mode random"]
        with_prompts = [e.has_prompts for e in self.shared_experts]
        if any(with_prompts) and not all(with_prompts):
            return ["some shared experts have prompts and some have none; give all of them some, or none"]
        if any(with_prompts) and self.gate_mode in OWN_MODES:
            return [f"shared experts are always on with gate_mode {self.gate_mode}; leave their prompts out"]
        return []

    @property
    def is_upcycle(self) -> bool:
        """Whether all experts are of one model."""
        return len({expert.source_model for expert in self.experts}) == 1

    @property
    def num_active(self) -> int:
        """K: routed experts per token, parts counted one by one."""
        return self.parts_per_token or self.experts_per_token * self.parts

    def describe(self, entry: dict[str, Any]) -> str:
        lines = [f"- Recipe: method `merge`, gates `{self.gate_mode}`, seed {self.seed}, {self.parts} parts per FFN."]
        for i, expert in enumerate(self.experts):
            lines.append(f"- Expert {i}: {expert.source_model or 'the base model'}{_changes(expert)}")
        for expert in self.shared_experts:
            lines.append(f"- Shared expert: {expert.source_model or 'the base model'}{_changes(expert)}")
        return "\n".join(lines)


def _changes(expert: Prompted) -> str:
    said = [f"{name} {value}" for name in ("noise_scale", "residual_scale") if (value := getattr(expert, name))]
    return f" ({', '.join(said)})" if said else ""


# As mergekit writes them; any case, any beginning.
_MERGEKIT_NAMES = {
    "mixtral": "mixtral", "deepseek moe": "deepseek", "qwen moe": "qwen2-moe", "qwen3 moe": "qwen3-moe",
}  # fmt: skip


def target_named(name: str | None) -> TargetName | None:
    """The architecture by its own name or by a beginning of mergekit's name of it; UserError for one there is not."""
    from lamella.errors import UserError, did_you_mean

    if name is None:
        return None
    for target in get_args(TargetName):
        if name.lower() == target:
            return target
    for written, target in _MERGEKIT_NAMES.items():
        if name and written.startswith(name.lower()):
            return target  # type: ignore[return-value]
    known = [*get_args(TargetName), "Mixtral", "DeepSeek MoE", "Qwen MoE", "Qwen3 MoE"]
    raise UserError(f"unknown architecture {name!r}{did_you_mean(name, known)}; known: {', '.join(known)}")


def merge_sizes(options: MergeOptions, config: dict[str, Any]) -> MoEConfig:
    """The `moe` entry of a merge into the base model of this config.json. UserError where they do not fit."""
    layout = ffn_layout(config)
    return MoEConfig(
        num_frozen_experts=0,
        num_trainable_experts=len(options.experts) * options.parts,
        moe_intermediate_size=check_slices(layout.ffn_width, options.parts),
        num_experts_per_tok=options.num_active,
        moe_layers=tuple(range(layout.num_layers)),
        routing="flat",
        gate="softmax",
        route_scale=float(options.parts),
        shared_intermediate_size=layout.ffn_width * len(options.shared_experts),
        output_bias=layout.output_bias,
        gated=layout.gated,
        activation=layout.activation,
    )
