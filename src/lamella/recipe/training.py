"""A training recipe: what a YAML file and `key=value` words say, checked. Imports no torch.

Units are in the names: a step is an optimizer step, a sample is `seq_len` tokens.
"""

from __future__ import annotations

from typing import Any, Literal

import yaml
from pydantic import Field, PositiveInt, ValidationError, model_validator

from lamella.architecture.moe import ExpertPath
from lamella.errors import UserError, did_you_mean
from lamella.recipe.parallel import Parallel
from lamella.recipe.sections import (
    Distil,
    LoRA,
    Portion,
    RouterFit,
    RoutingLoss,
    Strict,
    TopKSchedule,
    TwinShare,
)


class Recipe(Strict):
    """What to train, on what, how long, and where it is written."""

    model: str = "artifacts/moe"
    """Folder of a converted model (or of a dense one, with trains: all)."""
    out: str = "artifacts/run"
    """The run directory."""
    resume: Literal["auto", "never"] = "auto"
    """auto: an existing run directory of the same recipe and model is continued. never: it is an error."""

    data: list[Portion] = Field(default=[Portion(source="python-docs"), Portion(source="stdlib-code")])
    """Text to train on: stdlib-code, python-docs, a file or folder, one that `lamella data prepare` made, or a
    `datasets` name. Records with `messages` in place of `text` are conversations, of which the answers are learned.
    Without weights each source has its share of the samples, and an epoch holds all of them once.
    With weights (on all entries) each has its weight over their sum of every step's samples: with replay, so much of
    the old text is mixed into the new: [{source: new, weight: 0.75}, {source: old, weight: 0.25}].
    With stream: true a source is read while the run goes on, in its own order. Any other one is tokenised before the
    first step; of a `datasets` name, as much as the run can use."""
    heldout_data: list[Portion] | None = None
    """Text of the held-out loss; None is the held-out part of `data`."""
    on_exhausted: Literal["repeat", "stop", "error"] = "repeat"
    """When a source has given all its samples. repeat: again, in another order. stop: the run has as many steps as the
    data last for, and its schedules end there. error: a run that needs more than there is does not start."""
    on_bad_data: Literal["fail", "skip"] = "fail"
    """Corrupt or vanished data, broken records. skip: a sample of them has nothing to predict, a record is left out."""
    seq_len: PositiveInt = 2048
    """Tokens per sample."""
    samples_per_step: PositiveInt = 8
    """Samples of one optimizer step, over all ranks and micro-batches."""
    samples_per_micro_batch: PositiveInt = 1
    """Samples that one rank computes at once; the rest of its share is accumulated."""
    steps: PositiveInt = 1000
    stop_at_step: PositiveInt | None = None
    """Save and stop there, for a later call to continue; schedules still follow `steps`."""
    seed: int = Field(default=0, ge=0)

    objective: Literal["pretrain", "distil", "sft"] = "pretrain"
    """pretrain: the next token of text. distil: the teacher's prediction of it too. sft: answers in conversations."""
    distil: Distil = Distil()
    """objective: distil; {weight, temperature, teacher}."""
    trains: Literal["experts", "experts+router", "all"] = "experts+router"
    """The frozen experts never train. all: attention, norms, embeddings and dense layers too."""
    lora: LoRA | None = None
    """Low-rank deltas on the frozen experts, {rank, alpha}; they train beside what `trains` names. A model that has
    them already trains them on."""
    lr: float = Field(default=3e-4, gt=0)
    """Of the experts."""
    router_lr_scale: float = Field(default=5.0, gt=0)
    """Learning rate of the router over that of the experts."""
    lora_lr_scale: float = Field(default=1.0, gt=0)
    """Likewise of the low-rank deltas."""
    rest_lr_scale: float = Field(default=1.0, gt=0)
    """With trains: all, likewise of attention, norms, embeddings and dense layers."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Of the experts' matrices; norms and biases have none."""
    router_weight_decay: float = Field(default=0.0, ge=0)
    rest_weight_decay: float | None = Field(default=None, ge=0)
    """With trains: all, of the other matrices; None is that of the experts."""
    beta1: float = Field(default=0.9, ge=0, lt=1)
    beta2: float = Field(default=0.95, ge=0, lt=1)
    max_grad_norm: float = Field(default=1.0, gt=0)
    warmup_steps: int = Field(default=0, ge=0)
    router_warmup_steps: int = Field(default=0, ge=0)
    """So long the router alone trains, at its own rate; only then do the others begin, with a warmup of their own."""
    decay: Literal["linear", "sqrt", "cosine"] = "cosine"
    decay_ratio: float | None = Field(default=None, ge=0, le=1)
    """Part of the steps, at the end, over which the rate decays; None decays from the end of the warmup on."""
    min_lr_ratio: float = Field(default=0.1, ge=0, le=1)

    twin_share: Literal["free"] | TwinShare = "free"
    """Twin routing. free: the router decides alone. Else a section {start, hold_steps, ramp_steps, target}."""
    routing_loss: RoutingLoss | None = None
    """Twin routing: sends the tokens of named sources to the frozen slices, or to the twins."""
    router_fit: RouterFit | None = None
    """Twin routing: router rows in closed form before the first step, {to_slices, to_twins, samples}."""
    balancing: Literal["bias", "quantile", "aux", "none"] = "bias"
    """Flat routing. bias: a selection bias follows the load by steps of `bias_rate` (arXiv 2408.15664). quantile: it
    is set so that each expert would have had its share of the last step's tokens. aux: the auxiliary loss of Switch
    Transformer."""
    bias_rate: float = Field(default=1e-3, ge=0)
    """balancing: bias."""
    aux_coefficient: float = Field(default=0.01, gt=0)
    """balancing: aux; factor on the loss of each layer."""
    top_k_schedule: TopKSchedule | None = None
    """Flat routing: more (or fewer) experts per token at first, {start, hold_steps, ramp_steps}."""
    router_init_std: float = Field(default=0.02, ge=0)
    """Router rows are drawn with it when the model's are zero, as they are after conversion."""

    heldout_every_steps: PositiveInt = 100
    heldout_samples: int = Field(default=16, ge=0)
    """Samples of the held-out loss, the same each time; 0 measures none."""
    log_every_steps: PositiveInt = 1
    save_every_steps: PositiveInt = 500
    keep_checkpoints: int = Field(default=2, ge=0)
    """The newest ones; 0 keeps all."""
    checkpoint_async: bool = False
    """Write checkpoints while the next steps are computed; a copy of the state waits in main memory meanwhile."""
    checkpoint_folder: str | None = None
    """Folder or URL (s3://bucket/run, any that fsspec has a driver for) of this run's own; None is `out`/checkpoints.
    A run whose `out` was lost continues from here."""
    max_skips_in_a_row: PositiveInt = 10
    """Steps with a non-finite gradient change nothing; after so many in a row the run stops."""
    max_restarts_without_progress: int = Field(default=3, ge=0)
    """`lamella train` starts again after a failure that may pass, so often until there is a new checkpoint."""
    tensorboard: bool = True

    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the computation; weights, sums over ranks and optimizer are float32. auto: bfloat16 where there is a GPU."""
    attention: Literal["auto", "sdpa", "flex", "varlen"] = "auto"
    """auto: flex where there is a GPU, sdpa elsewhere."""
    expert_path: ExpertPath = "auto"
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    frozen_weights: Literal["auto", "sharded", "replicated"] = "auto"
    """replicated: every rank holds all that does not train, and none of it is gathered during a step. Worth its memory
    where ranks are joined by a slow network. auto: replicated without a GPU in float32, else sharded."""
    offload: Literal["none", "cpu"] = "none"
    """cpu: parameters, gradients and optimizer wait in main memory (GPU runs only)."""
    parallel: Parallel = Parallel()
    """Parallelism besides FSDP over all ranks; see `lamella.recipe.parallel`."""
    threads_per_rank: int = Field(default=0, ge=0)
    """Threads of one rank's computation; 0 shares the machine's cores among the local ranks."""
    torchtitan: dict[str, Any] = Field(default={})
    """Any other option of torchtitan's Trainer.Config, nested."""

    @model_validator(mode="after")
    def _possible(self) -> Recipe:
        problems = []
        if self.samples_per_step % self.samples_per_micro_batch:
            problems.append("samples_per_step must be a multiple of samples_per_micro_batch")
        if self.warmup_steps > self.steps:
            problems.append("warmup_steps is larger than steps")
        if self.keep_checkpoints == 1:
            problems.append("keep_checkpoints must be 0 (all) or at least 2: the newest may be half-written")
        problems += self.parallel.problems(self.seq_len)
        if self.frozen_weights == "replicated" and self.offload == "cpu":
            problems.append("offload: cpu needs frozen_weights: sharded")
        problems += _mixture_problems("data", self.data)
        problems += _mixture_problems("heldout_data", self.heldout_data)
        streams = [portion.source for portion in self.data if portion.stream]
        if streams and self.on_exhausted != "repeat":
            problems.append(f"on_exhausted: {self.on_exhausted} needs the length of the data; streams only repeat")
        if self.router_warmup_steps and (self.trains == "experts" or self.router_warmup_steps >= self.steps):
            problems.append("router_warmup_steps must be below steps, and needs trains: experts+router or all")
        if self.routing_loss is not None and self.trains == "experts":
            problems.append("routing_loss trains the router; set trains: experts+router or all")
        known = [portion.source for portion in self.data]
        for key, sides in (("routing_loss", self.routing_loss), ("router_fit", self.router_fit)):
            for name in [] if sides is None else [*sides.to_slices, *sides.to_twins]:
                if name not in known:
                    problems.append(f"{key} names {name!r}, which data does not{did_you_mean(name, known)}")
                elif key == "router_fit" and name in streams:
                    problems.append(f"router_fit needs samples from all over {name!r}; leave out its stream: true")
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def check_world_size(self, num_ranks: int) -> None:
        """UserError where the ranks cannot be laid out, or the samples of a step not be shared out as they need."""
        num_groups = self.parallel.batch_ranks(num_ranks)
        unit = self.samples_per_micro_batch * num_groups
        if self.samples_per_step % unit:
            below, above = self.samples_per_step // unit * unit, (self.samples_per_step // unit + 1) * unit
            shares = f"{num_ranks} ranks" if num_groups == num_ranks else f"{num_groups} groups of ranks"
            choices = " or ".join(str(n) for n in (below, above) if n)
            raise UserError(
                f"samples_per_step {self.samples_per_step} cannot be shared among {shares} in micro-batches "
                f"of {self.samples_per_micro_batch}; set samples_per_step={choices}, or another number of ranks"
            )
        stages = self.parallel.pipeline
        if self.samples_per_step < stages * unit:
            raise UserError(
                f"a step has {self.samples_per_step // unit} micro-batches for a pipeline of {stages} stages; "
                f"set samples_per_step={stages * unit} or more, or a smaller samples_per_micro_batch"
            )

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(), sort_keys=False)


def _mixture_problems(key: str, portions: list[Portion] | None) -> list[str]:
    """What is wrong with the weights as a whole; at most one problem."""
    if portions is None:
        return []
    weights = [p.weight for p in portions if p.weight is not None]
    if not portions:
        return [f"{key} names no text"]
    if weights and len(weights) < len(portions):
        return [f"{key} has weights on some sources; give one to each, or to none"]
    if key == "data" and not weights and len(portions) > 1 and any(p.stream for p in portions):
        return ["data has a stream, whose length is not known; give each source a weight"]
    if weights and sum(weights) == 0:
        return [f"the weights of {key} sum to 0; raise one of them"]
    return []


# Another value of these is no other run: they change what is kept and shown, and where it is computed, not what.
HARMLESS = frozenset(
    {"out", "resume", "stop_at_step", "heldout_every_steps", "log_every_steps", "save_every_steps", "keep_checkpoints",
     "checkpoint_async", "max_skips_in_a_row", "max_restarts_without_progress", "tensorboard", "threads_per_rank",
     "parallel", "on_bad_data"}
)  # fmt: skip


def differences(old: Recipe, new: Recipe) -> list[str]:
    """'key: old -> new' for every setting that makes it another run."""
    a, b = old.model_dump(), new.model_dump()
    return [f"{key}: {a[key]!r} -> {b[key]!r}" for key in a if key not in HARMLESS and a[key] != b[key]]


def harmless_changes(old: Recipe, new: Recipe) -> list[str]:
    """'key: old -> new' for every other setting, but for where the run is and how it stops."""
    a, b = old.model_dump(), new.model_dump()
    keys = sorted(HARMLESS - {"out", "resume", "stop_at_step"})
    return [f"{key}: {a[key]!r} -> {b[key]!r}" for key in keys if a[key] != b[key]]


def make_recipe(values: dict[str, Any]) -> Recipe:
    """Check plain values; UserError with one line for each problem."""
    if "stages" in values:
        raise UserError("the recipe has stages; here a recipe of one run is needed: select one with stage=NAME")
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise UserError("the recipe has errors:\n" + "\n".join(_lines(error))) from None


SECTIONS: dict[str, type[Strict]] = {
    "data": Portion,
    "heldout_data": Portion,
    "distil": Distil,
    "lora": LoRA,
    "twin_share": TwinShare,
    "routing_loss": RoutingLoss,
    "router_fit": RouterFit,
    "top_k_schedule": TopKSchedule,
    "parallel": Parallel,
}


def _lines(error: ValidationError) -> list[str]:
    lines = []
    tags = ("literal[", *(section.__name__ for section in SECTIONS.values()))
    for problem in error.errors():
        # The tag of a union's branch stands in the location of its errors; it is no key.
        where = [str(part) for part in problem["loc"] if not str(part).startswith(tags)]
        key = ".".join(where)
        if problem["type"] == "extra_forbidden":
            known = (SECTIONS[where[0]] if len(where) > 1 else Recipe).model_fields
            lines.append(f"  unknown key {key!r}{did_you_mean(where[-1], known)}")
        elif problem["type"] == "value_error" and not problem["loc"][1:]:
            lines.append(f"  {problem['msg'].removeprefix('Value error, ')}")
        else:
            lines.append(f"  {key}: {problem['msg'].removeprefix('Value error, ')}, not {problem['input']!r}")
    return lines
