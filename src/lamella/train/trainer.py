"""torchtitan's Trainer with our start of a run, balancing, held-out loss, status and a clean stop."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TextIO, TypeAlias, cast

import torch
from torch import Tensor
from torchtitan.components.dataloader import BaseDataLoader
from torchtitan.components.tokenizer import BaseTokenizer
from torchtitan.distributed.utils import set_pg_timeouts
from torchtitan.observability import structured_logger
from torchtitan.tools.logging import logger
from torchtitan.tools.profiler import Profiler
from torchtitan.trainer import Trainer

from lamella.display import TrainingProgress
from lamella.jsons import Json
from lamella.recipe.sections import RouterFit
from lamella.recipe.training import Recipe, harmless_changes
from lamella.run.folder import RunDir, State
from lamella.run.heartbeat import Heartbeat, Where
from lamella.run.processes import StopRequest
from lamella.titan.decoder import LamellaDecoder
from lamella.titan.flops import forward_flops_per_token
from lamella.titan.shard import sum_gradients
from lamella.train import fault_hook, lora
from lamella.train.balance import Balance, assert_loaded, start_routing
from lamella.train.checkpoint import CommittedCheckpoints
from lamella.train.data import MixedSamples, SampleLoader, has_label, spread
from lamella.train.distil import DistilLoss, Lesson, load_teacher, teacher_logits
from lamella.train.fit_router import fit_router
from lamella.train.heldout import HeldOut
from lamella.train.metrics import LamellaMetrics
from lamella.train.skip import SkipNonFinite
from lamella.train.tracking import Trackers
from lamella.train.watch import Watch

Batch: TypeAlias = tuple[dict[str, Tensor], Tensor]
"""({"input", "positions", "source"}, labels) of one micro-batch."""


class TokenisedAlready(BaseTokenizer):
    """torchtitan wants a tokenizer; the samples are token ids already."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseTokenizer.Config):
        """Nothing to say."""

        pass

    def __init__(self, config: Config, **_: object):
        super().__init__()

    def encode(self, *args: object, **kwargs: object) -> list[int]:
        raise NotImplementedError

    def decode(self, *args: object, **kwargs: object) -> str:
        raise NotImplementedError

    def get_vocab_size(self) -> int:
        raise NotImplementedError


class LamellaTrainer(Trainer):
    """One training run in one run directory; `train` continues it where its newest checkpoint stands."""

    @dataclass(kw_only=True, slots=True)
    class Config(Trainer.Config):
        """torchtitan's config, and what it does not know of."""

        recipe: Recipe
        notes: list[str] = dataclasses.field(default_factory=list)
        """What people are told at the start."""
        heldout: MixedSamples | None = None
        teacher: LamellaDecoder.Config | None = None
        """A model beside the student."""
        stream: TextIO | None = None
        """Where people look, on rank 0."""
        stop: StopRequest | None = None
        """Signals that ask the run to end."""
        heart: Heartbeat | None = None
        """Told where this rank stands."""

        def to_dict(self) -> Json:
            """torchtitan's own record of the config, without what is no JSON."""
            own = {f.name: getattr(self, f.name) for f in dataclasses.fields(Trainer.Config)}
            return Trainer.Config(**own | {"dataloader": BaseDataLoader.Config()}).to_dict()

    config: Config

    def __init__(self, config: Config):
        super().__init__(config)
        self.recipe = config.recipe
        self.run = RunDir(Path(config.dump_folder))
        self.is_rank0 = torch.distributed.get_rank() == 0
        self.last_step = min(self.recipe.steps, self.recipe.stop_at_step or self.recipe.steps)
        self.mesh = self.parallel_dims.get_optional_mesh("loss")
        self.stages = self.parallel_dims.get_optional_mesh("pp")
        tensor = self.parallel_dims.get_optional_mesh("tp")
        self.balance = Balance(self.model, self.recipe, self.mesh, tensor, self.stages)
        self.skips = SkipNonFinite(self.recipe.max_skips_in_a_row, self.device)
        self.optimizers.register_step_pre_hook(lambda *_: self._before_update())
        self.lr_schedulers.follow(self.skips)
        self.watch = Watch(self.model, self.run, self.recipe, self.device, self.mesh)
        self.notes = list(config.notes)
        self.heldout = self._open_heldout(config.heldout)
        self.teacher = self._open_teacher(config) if self.recipe.objective == "distil" else None
        self._show_where_it_stands(config.heart)
        self.stop = config.stop or StopRequest()
        self.stop.listen()

    @property
    def model(self) -> LamellaDecoder:
        """The model, or this rank's stage of it."""
        return cast(LamellaDecoder, self.model_parts[0])

    @property
    def metrics(self) -> LamellaMetrics:
        """What the run reports."""
        return cast(LamellaMetrics, self.metrics_processor)

    @property
    def checkpoints(self) -> CommittedCheckpoints:
        """The checkpoints of the run."""
        return cast(CommittedCheckpoints, self.checkpointer)

    @property
    def batch_place(self) -> tuple[int, int]:
        """This rank's (place, number) among those that compute samples of their own."""
        batches = self.parallel_dims.get_optional_mesh("batch")
        return (0, 1) if batches is None else (batches.get_local_rank(), batches.size())

    def fit_router(self, fit: RouterFit) -> None:
        """Set the router rows in closed form, from samples of the recipe's data."""
        meshes = [mesh for mesh in (self.mesh, self.parallel_dims.get_optional_mesh("tp")) if mesh is not None]
        per_batch = self.recipe.samples_per_micro_batch
        fit_router(self.model, fit, self.samples, *self.batch_place, per_batch, meshes)
        logger.info(f"Router rows were fitted to {fit.samples} samples of each side")

    def _open_heldout(self, samples: MixedSamples | None) -> HeldOut | None:
        if samples is None or self.recipe.heldout_samples == 0:
            return None
        rank, size = self.batch_place
        chosen = spread(samples, self.recipe.heldout_samples)
        if not any(has_label(sample) for of_source in chosen.values() for sample in of_source):
            self.notes.append("the held-out samples have nothing to predict, so no held-out loss is measured")
            return None
        return HeldOut(chosen, rank, size, self.recipe.samples_per_micro_batch, self.mesh, self.stages)

    def _open_teacher(self, config: Config) -> LamellaDecoder | None:
        """The model beside the student, or None where the student's own frozen slices teach it."""
        teacher = None
        if config.teacher is not None:
            teacher = load_teacher(
                Path(self.recipe.distil.teacher or ""), config.teacher, self.parallel_dims, config.training,
                config.parallelism,
            )  # fmt: skip
            assert_loaded(teacher)
        model = self.model if teacher is None else teacher
        config = model.config
        self.metrics.num_flops_per_token += forward_flops_per_token(
            model, config.layers, self.recipe.seq_len, tied=config.enable_weight_tying
        )
        return teacher

    def _show_where_it_stands(self, heart: Heartbeat | None) -> None:
        self.heart = heart
        if heart is not None and self.device.type != "cpu":
            heart.mark = _marker
        if self.stages is None:  # of a pipeline, forward and backward passes of micro-batches are mixed
            self.model.register_forward_hook(lambda *_: self.enter("backward") if torch.is_grad_enabled() else None)

    def enter(self, where: Where) -> None:
        """Say where this rank stands; it costs no synchronisation with the device."""
        if self.heart is not None:
            self.heart.enter(where, self.step)

    def _before_update(self) -> None:
        """After the backward passes of a step, before the optimizer."""
        self.enter("optimizer")
        skipped = self.skips.look(p for part in self.model_parts for p in part.parameters())
        self.balance.update(move=not skipped)
        if not bool(self.labels_of_step):
            self.metrics.steps_without_labels += 1
            logger.warning(f"step {self.step} has nothing to predict: its gradient is 0")
            if self.is_rank0:
                self.run.event("no_labels", step=self.step)

    def train(self) -> State:
        """Train to the last step, or until a signal asks to stop; returns the state of the run."""
        self.restore()
        first_step = self.step
        progress = TrainingProgress(self.config.stream if self.is_rank0 else None, first_step, self.recipe.steps)
        names = self.recipe.track if self.is_rank0 else ()
        trackers = Trackers(names, self.run, self.recipe.model_dump(mode="json"))
        self.metrics.attach(self.run, progress, self.balance.report, self.data_epochs, self.watch, self.skips, trackers)
        self.write_status("running")
        self.say_start(progress)
        for note in self.notes:
            logger.warning(note)
            progress.say(f"WARNING: {note}")
        logger.info(f"Data: {self.samples.describe(self.recipe.steps * self.recipe.samples_per_step)}")
        if first_step == 0:
            self.metrics.finish_step(0, self.heldout_loss())
        with self.config.profiler.build(global_step=self.step, base_folder=self.config.dump_folder) as profiler:
            state = self.train_steps(first_step, profiler)
        self.write_status(state)  # also where no step was left to train
        progress.close()
        trackers.finish()
        return state

    def train_steps(self, first_step: int, profiler: Profiler) -> State:
        """Take steps until the run ends or is asked to; returns its state then."""
        data = self.watch.own_time.batches(self.batch_generator(self.dataloader), lambda: self.step)
        state: State = self.end_state()
        self.metrics.time_last_log = time.perf_counter()
        while state == "running":
            self.step += 1
            self.enter("data")
            structured_logger.set_step(self.step, relative_step=self.step - first_step)
            self.gc_handler.run(self.step)
            fault_hook.before_step(self.step, self.model, self.checkpoints.store)
            self.train_step(data)
            state = self.state_after_step()
            self.metrics.finish_step(self.step, self.heldout_loss() if self.measures_heldout() else None)
            self.save(state)
            profiler.step()
            if self.step - first_step == 1:
                self.shorten_timeouts()
        cast(SampleLoader, self.dataloader).close()
        return state

    def train_step(self, data_iterator: Iterator[Batch]) -> None:
        """One optimizer step, on every rank; it is skipped where the gradient is not finite."""
        self.balance.aim(self.step)
        self.micro_batch = 0
        try:
            super().train_step(data_iterator)
        except RuntimeError as error:
            # torchtitan ends the run at a logged step whose loss is not finite; that step was skipped
            if not (self.skips.skipped and "Loss is not finite" in str(error)):
                raise
        if self.skips.skipped:
            logger.warning(f"step {self.step} was skipped: its gradient is not finite")
            if self.is_rank0:
                self.run.event("skip", step=self.step, in_a_row=self.skips.in_a_row)
            self.skips.stop_if_hopeless(self.step)

    def forward_backward_step(
        self,
        *,
        input_dict: dict[str, Tensor] | list[dict[str, Tensor]],
        labels: Tensor | list[Tensor],
        global_valid_tokens: Tensor,
    ) -> Tensor:
        """Of a step without a label the loss and the gradient are 0; torchtitan would divide by 0."""
        self.labels_of_step = global_valid_tokens
        self.micro_batch += 1
        if self.stages is None:
            is_last = self.micro_batch == self.gradient_accumulation_steps
            sum_gradients(self.model, self.recipe.gradient_sync == "step", is_last)
        return super().forward_backward_step(
            input_dict=input_dict, labels=labels, global_valid_tokens=global_valid_tokens.clamp(min=1)
        )

    def post_dataloading_process(
        self, input_dict: dict[str, Tensor], labels: Tensor
    ) -> tuple[Tensor, Tensor | Lesson, dict[str, Tensor]]:
        """Prepare one micro-batch on its way to the model.

        Returns:
            (token ids [B, L], what the loss is given, what the model is told besides).
        """
        self.enter("forward")
        source_B = input_dict.pop("source")
        inputs, labels, keywords = self._share_of(input_dict, labels)
        lesson: Tensor | Lesson = labels
        if isinstance(self.loss_fn, DistilLoss):
            lesson = Lesson(labels, self.teacher_logits(inputs, keywords))
        if (targets_B := self.balance.choice_targets(source_B)) is not None:
            keywords["choice_targets_B"] = targets_B
        return inputs, lesson, keywords

    def _share_of(self, input_dict: dict[str, Tensor], labels: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Under context parallelism, the model takes whole samples and computes its part of them."""
        if self.model.context is None:
            return super().post_dataloading_process(input_dict, labels)
        labels = self.model.context.part(labels)
        self.ntokens_seen += labels.numel()
        return input_dict["input"], labels, {"positions": input_dict["positions"]}

    @torch.no_grad()
    def teacher_logits(self, inputs: Tensor, keywords: dict[str, Tensor]) -> Tensor:
        """The logits [B, L, V] of the model beside the student, or of the dense model inside it."""
        with self.train_context():
            if self.teacher is not None:
                return teacher_logits(self.teacher, inputs, keywords)
            return self.model(inputs, **keywords, mode="dense")

    def restore(self) -> None:
        """Load the newest checkpoint or, in a fresh run, the model."""
        self.enter("load")
        self.checkpoints.discard_unfinished()
        self.checkpoints.load(step=self.config.checkpoint.load_step)
        if self.step == 0 and lora.is_new(self.recipe):
            lora.start_lora(self.model, self.recipe.seed)
        assert_loaded(self.model)
        if self.step == 0 and self.recipe.router_fit is not None:
            self.fit_router(self.recipe.router_fit)
        elif self.step == 0 and start_routing(self.model, self.recipe):
            logger.info("Router rows were drawn: the model comes from conversion")
        self.balance.aim(self.step + 1)

    @property
    def samples(self) -> MixedSamples:
        """The samples that are trained on."""
        return cast(SampleLoader.Config, self.config.dataloader).samples

    def data_epochs(self, step: int) -> dict[str, float]:
        """How often each source has been gone through after so many steps."""
        return self.samples.epochs(step * self.recipe.samples_per_step)

    def measures_heldout(self) -> bool:
        """Whether the held-out loss is measured after this step."""
        return self.step % self.recipe.heldout_every_steps == 0 or self.step == self.recipe.steps

    def heldout_loss(self) -> tuple[float, dict[str, float]] | None:
        """The held-out loss in nats per token, in all and of each source, or None without held-out samples; its time
        counts in no rate."""
        if self.heldout is None:
            return None
        self.enter("held-out loss")
        start = time.perf_counter()
        loss = self.heldout.loss(self.model, self.loss_fn)
        self.metrics.pause(time.perf_counter() - start)
        return loss

    def state_after_step(self) -> State:
        """The run's state after this step, the same on every rank: a signal to one of them stops all."""
        self.enter("end of step")
        asked = torch.tensor(float(self.stop.asked), device=self.device)
        torch.distributed.all_reduce(asked, torch.distributed.ReduceOp.MAX)
        if asked.item() > 0 and self.step < self.last_step:
            return "preempted"
        return self.end_state()

    def end_state(self) -> State:
        """The run's state after this step, if nobody asks it to stop."""
        if self.step < self.last_step:
            return "running"
        return "finished" if self.step >= self.recipe.steps else "stopped"

    def save(self, state: State) -> None:
        """Save where a checkpoint is due, and at the end; its time counts in no rate."""
        self.enter("save")
        start = time.perf_counter()
        self.checkpointer.save(self.step, last_step=state != "running")
        self.write_status(state)
        self.metrics.pause(time.perf_counter() - start)

    def write_status(self, state: State) -> None:
        """Tell people and programs the state of the run (rank 0)."""
        if self.is_rank0:
            failure = "preempted" if state == "preempted" else None
            self.run.write_status(state, self.step, self.recipe.steps, failure=failure, retryable=failure is not None)

    def say_start(self, progress: TrainingProgress) -> None:
        """Tell what this start has to do with the ones before it."""
        if not self.is_rank0:
            return
        changed = harmless_changes(self.run.recipe(), self.recipe)
        self.run.event("running", step=self.step, world_size=torch.distributed.get_world_size(), changed=changed)
        if fallback := self.checkpoints.fallback:
            progress.say(f"WARNING: {fallback}")

    def shorten_timeouts(self) -> None:
        """Let collectives fail sooner: the first step, which waits for slow starters, is over."""
        set_pg_timeouts(timedelta(seconds=self.config.comm.train_timeout_seconds), self.parallel_dims)


def _marker() -> torch.Event:
    """An event in the current stream of this rank's device."""
    event = torch.Event()
    event.record()
    return event
