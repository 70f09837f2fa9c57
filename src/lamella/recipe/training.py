"""A training recipe: what a YAML file and `key=value` words say, checked. Imports no torch.

Units are in the names: a step is an optimizer step, a sample is `seq_len` tokens.
"""

from __future__ import annotations

from typing import Any, Literal

import yaml
from pydantic import Field, PositiveInt, model_validator

from lamella.architecture.moe import ExpertPath
from lamella.errors import UserError, did_you_mean
from lamella.recipe.check import Harmless, Problems, Strict, checked, harmless_keys, refuse
from lamella.recipe.parallel import Parallel
from lamella.recipe.sections import (
    Distil,
    LoRA,
    OptimizerStates,
    Portion,
    RouterFit,
    RoutingLoss,
    TopKSchedule,
    TwinShare,
)


class Recipe(Strict):
    """What to train, on what, how long, and where it is written."""

    model: str = "artifacts/moe"
    """The converted model of this folder is trained (or a dense one, with trains: all)."""
    out: Harmless[str] = "artifacts/run"
    """The run directory, with checkpoints and metrics, is made here."""
    resume: Harmless[Literal["auto", "never"]] = "auto"
    """An existing run directory of the same recipe and model is continued (auto) or is an error (never)."""

    data: list[Portion] = Field(default=[Portion(source="python-docs"), Portion(source="stdlib-code")])
    """The model is trained on these texts: stdlib-code, python-docs, a file or folder, one that `lamella data prepare`
    made, or a `datasets` name. Records with `messages` in place of `text` are conversations, of which the answers are
    learned. Without weights each source has its share of the samples, and an epoch holds all of them once. With weights
    (on all entries) each has its weight over their sum of every step's samples: with replay, so much of the old text is
    mixed into the new: [{source: new, weight: 0.75}, {source: old, weight: 0.25}]. With stream: true a source is read
    while the run goes on, in its own order. Any other one is tokenised before the first step; of a `datasets` name, as
    much as the run can use."""
    heldout_data: list[Portion] | None = None
    """The held-out loss is measured on these texts; null takes the held-out part of `data`."""
    on_exhausted: Literal["repeat", "stop", "error"] = "repeat"
    """When a source has given all its samples, they come again in another order (repeat); or the run has as many steps
    as the data last for, and its schedules end there (stop); or a run that needs more does not start (error)."""
    on_bad_data: Harmless[Literal["fail", "skip"]] = "fail"
    """Corrupt or vanished data and broken records end the run (fail), or are left out (skip): a sample of them has
    nothing to predict."""
    seq_len: PositiveInt = 2048
    """A sample has this many tokens."""
    samples_per_step: PositiveInt = 8
    """An optimizer step takes this many samples, over all ranks and micro-batches."""
    samples_per_micro_batch: PositiveInt = 1
    """A rank computes this many samples at once; the rest of its share is accumulated."""
    steps: PositiveInt = 1000
    """The run has this many optimizer steps."""
    stop_at_step: Harmless[PositiveInt | None] = None
    """The run saves and stops after this step, for a later call to continue; schedules still follow `steps`."""
    seed: int = Field(default=0, ge=0)
    """The order of the samples and the start of the router are drawn from this seed."""

    objective: Literal["pretrain", "distil", "sft"] = "pretrain"
    """The model learns the next token of text (pretrain), the teacher's prediction of it too (distil), or the answers
    in conversations (sft)."""
    distil: Distil = Distil()
    """The teacher is followed like this, with objective: distil."""
    trains: Literal["experts", "experts+router", "all"] = "experts+router"
    """These weights train. The frozen experts never do; all: attention, norms, embeddings and dense layers too."""
    lora: LoRA | None = None
    """Low-rank deltas on the frozen experts train beside what `trains` names. A model that has them already trains them
    on."""
    lr: float = Field(default=3e-4, gt=0)
    """The experts have this learning rate."""
    router_lr_scale: float = Field(default=5.0, gt=0)
    """The router's learning rate is the experts' times this."""
    lora_lr_scale: float = Field(default=1.0, gt=0)
    """The low-rank deltas' learning rate is the experts' times this."""
    rest_lr_scale: float = Field(default=1.0, gt=0)
    """With trains: all, the learning rate of attention, norms, embeddings and dense layers is the experts' times
    this."""
    weight_decay: float = Field(default=0.0, ge=0)
    """The experts' matrices have this weight decay; norms and biases have none."""
    router_weight_decay: float = Field(default=0.0, ge=0)
    """The router's matrices have this weight decay."""
    rest_weight_decay: float | None = Field(default=None, ge=0)
    """With trains: all, the other matrices have this weight decay; null is that of the experts."""
    beta1: float = Field(default=0.9, ge=0, lt=1)
    """AdamW's mean of the gradients decays by this factor a step."""
    beta2: float = Field(default=0.95, ge=0, lt=1)
    """AdamW's mean of the squared gradients decays by this factor a step."""
    optimizer: OptimizerStates = OptimizerStates()
    """AdamW's own memory is held like this."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """A longer gradient is shortened to this norm."""
    warmup_steps: int = Field(default=0, ge=0)
    """The learning rate rises from 0 over this many steps."""
    router_warmup_steps: int = Field(default=0, ge=0)
    """For this many steps the router alone trains, at its own rate; only then do the others begin, with a warmup of
    their own."""
    decay: Literal["linear", "sqrt", "cosine"] = "cosine"
    """The learning rate falls along this curve."""
    decay_ratio: float | None = Field(default=None, ge=0, le=1)
    """The rate decays over this part of the steps, at the end; null decays from the end of the warmup on."""
    min_lr_ratio: float = Field(default=0.1, ge=0, le=1)
    """The decay ends at this part of the learning rate."""

    twin_share: Literal["free"] | TwinShare = "free"
    """Twin routing: the router decides alone which tokens the twins get (free), or a bias holds their share."""
    routing_loss: RoutingLoss | None = None
    """Twin routing: a loss sends the tokens of named sources to the frozen slices, or to the twins."""
    router_fit: RouterFit | None = None
    """Twin routing: the router's rows are fitted in closed form before the first step."""
    balancing: Literal["bias", "quantile", "aux", "none"] = "bias"
    """Flat routing: the experts' loads are evened out. bias: a selection bias follows the load by steps of `bias_rate`
    (arXiv 2408.15664). quantile: it is set so that each expert would have had its share of the last step's tokens. aux:
    the auxiliary loss of Switch Transformer."""
    bias_rate: float = Field(default=1e-3, ge=0)
    """With balancing: bias, the selection bias moves by this much a step."""
    aux_coefficient: float = Field(default=0.01, gt=0)
    """With balancing: aux, the loss of each layer has this factor."""
    top_k_schedule: TopKSchedule | None = None
    """Flat routing: more (or fewer) experts compute each token at first."""
    router_init_std: float = Field(default=0.02, ge=0)
    """Router rows are drawn with this standard deviation when the model's are zero, as they are after conversion."""

    heldout_every_steps: Harmless[PositiveInt] = 100
    """The held-out loss is measured every this many steps."""
    heldout_samples: int = Field(default=16, ge=0)
    """The held-out loss is of this many samples, the same each time; 0 measures none."""
    log_every_steps: Harmless[PositiveInt] = 1
    """A line of metrics is written every this many steps."""
    save_every_steps: Harmless[PositiveInt] = 500
    """A checkpoint is written every this many steps."""
    keep_checkpoints: Harmless[int] = Field(default=2, ge=0)
    """This many of the newest checkpoints are kept; 0 keeps all."""
    checkpoint_async: Harmless[bool] = False
    """Checkpoints are written while the next steps are computed; a copy of the state waits in main memory meanwhile."""
    checkpoint_folder: str | None = None
    """Checkpoints are kept in this folder or URL of the run's own (s3://bucket/run, any that fsspec has a driver for);
    null is `out`/checkpoints. A run whose `out` was lost continues from here."""
    max_skips_in_a_row: Harmless[PositiveInt] = 10
    """Steps with a non-finite gradient change nothing; after so many in a row the run stops."""
    max_restarts_without_progress: Harmless[int] = Field(default=3, ge=0)
    """After a failure that may pass, `lamella train` starts again, so often until there is a new checkpoint."""
    tensorboard: Harmless[bool] = True
    """The metrics are written for TensorBoard, too."""
    track: Harmless[list[Literal["wandb", "mlflow", "trackio"]]] = Field(default=[])
    """These trackers get the metrics, too, where they are installed (`lamella[track]`); without a network or an address
    (WANDB_API_KEY, MLFLOW_TRACKING_URI, TRACKIO_DIR) they write into the run directory."""

    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """The model is computed in this precision; weights, sums over ranks and optimizer are float32. auto: bfloat16 where
    there is a GPU."""
    dense_products: Literal["precision", "float8"] = "precision"
    """Products with the weights of attention's projections and of dense FFNs are computed in `precision`, or rounded to
    float8 with a scale for each row, which takes a GPU of compute capability 8.9 or later and torchao. Weights stay
    what they are; the head, the router and the experts are computed in `precision`."""
    attention: Literal["auto", "sdpa", "flex", "varlen"] = "auto"
    """Attention is computed by this implementation; auto: flex where there is a GPU and heads have 16 features or more,
    sdpa elsewhere."""
    expert_path: ExpertPath = "auto"
    """Experts are computed by this implementation; auto takes the fastest measured for the shapes at hand."""
    compile: Harmless[Literal["auto"] | bool] = "auto"
    """Each block of the model is compiled into one graph with torch.compile (on), or not (off), or where there is a GPU
    and nothing in the block needs the host (auto)."""
    loss_chunk_tokens: PositiveInt = 1024
    """The loss is computed this many tokens of a sample at a time, so that the logits of the others need no memory:
    those of 8,192 tokens take 12 GB at a vocabulary of 128,256. It has an effect where it divides a rank's tokens of a
    sample; pipelines, tensor parallelism and distillation compute all logits at once."""
    activation_checkpointing: Literal["none", "selective", "full", "auto"] = "none"
    """The backward pass computes activations again instead of keeping them: none; the cheap ones, but not the products
    of experts and attention (selective); or all of a layer's (full). auto: the first of these that fits the GPU's
    memory as `lamella plan` counts it."""
    gradient_sync: Harmless[Literal["auto", "micro_batch", "step"]] = "auto"
    """Gradients are summed over the ranks after each micro-batch, which keeps a part of them on each rank; or once per
    optimizer step, whole on every rank until then, 4 bytes a weight that trains. Copies of the model
    (parallel.replicate) are summed once per step either way. auto: once per step where ranks are on several nodes and
    it fits."""
    frozen_weights: Literal["auto", "sharded", "replicated"] = "auto"
    """What does not train is shared out like the rest (sharded), or every rank holds all of it and none is gathered
    during a step (replicated), which is worth its memory where ranks are joined by a slow network. auto: replicated
    without a GPU in float32, else sharded."""
    offload: Literal["none", "frozen", "cpu"] = "none"
    """Parameters, gradients and optimizer wait on the GPU (none); or the frozen experts alone, which have neither
    gradients nor optimizer, wait in main memory, and are copied to the GPU layer by layer (frozen); or all wait there,
    and the optimizer works there (cpu). GPU runs only."""
    parallel: Harmless[Parallel] = Parallel()
    """The ranks are laid out by these degrees of parallelism, besides FSDP over all of them."""
    threads_per_rank: Harmless[int] = Field(default=0, ge=0)
    """A rank computes with this many threads; 0 shares the machine's cores among the local ranks."""
    torchtitan: dict[str, Any] = Field(default={})
    """Any other option of torchtitan's Trainer.Config is set here, nested as there."""

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
        if self.frozen_weights == "replicated" and self.offload != "none":
            problems.append(f"offload: {self.offload} needs frozen_weights: sharded")
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
            raise Problems(problems)
        return self

    @property
    def loss_chunks(self) -> int:
        """The number of parts in which the loss of a rank's samples is computed; 1: all logits at once."""
        tokens = self.seq_len // self.parallel.context
        whole = self.objective == "distil" or self.parallel.pipeline > 1 or self.parallel.tensor > 1
        return 1 if whole or tokens % self.loss_chunk_tokens else tokens // self.loss_chunk_tokens

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


HARMLESS = harmless_keys(Recipe)
"""Another value of these is no other run."""


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
    """The recipe of plain values; UserError with one line for each problem."""
    if "stages" in values:
        raise UserError("the recipe has stages; here a recipe of one run is needed: select one with stage=NAME")
    recipe, lines = checked(Recipe, values, ("stages",))
    refuse(lines)
    assert recipe is not None
    return recipe
