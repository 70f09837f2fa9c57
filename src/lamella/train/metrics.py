"""What a run reports: one JSON line per logged step, TensorBoard, and a line of progress for people."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torchtitan.components.metrics import MetricsProcessor
from torchtitan.distributed.utils import dist_max, dist_sum
from torchtitan.tools.logging import logger
from torchtitan.tools.utils import device_type, get_peak_flops

from lamella.display import TrainingProgress
from lamella.jsons import Json
from lamella.run.folder import RunDir
from lamella.train.balance import RoutingReport
from lamella.train.optimizer import group_name
from lamella.train.skip import SkipNonFinite
from lamella.train.tracking import Trackers
from lamella.train.watch import Watch

A100_PEAK_FLOPS = 312e12


def known_peak_flops(device_name: str) -> float | None:
    """Return the device's peak FLOPs per second in bf16, or None where torchtitan does not know the device.

    torchtitan takes an A100's figure for every device that it does not know.
    """
    if device_type == "cpu":
        return None
    peak = get_peak_flops(device_name)
    return None if peak == A100_PEAK_FLOPS and "A100" not in device_name else peak


class LamellaMetrics(MetricsProcessor):
    """torchtitan's bookkeeping of tokens and memory; what is written is ours."""

    @dataclass(kw_only=True, slots=True)
    class Config(MetricsProcessor.Config):
        """The settings are torchtitan's; this class only leads it to `LamellaMetrics`."""

    ntokens_since_last_log: int
    time_last_log: float

    def __init__(self, config: Config, **kwargs: object):
        super().__init__(config, **kwargs)
        self.peak_flops = known_peak_flops(self.device_memory_monitor.device_name)
        self.is_rank0 = torch.distributed.get_rank() == 0
        self.line: Json = {}
        self.steps_without_labels = 0
        """Steps since this process began in which no rank had a token to predict; they give no gradient."""

    def attach(
        self,
        run: RunDir,
        progress: TrainingProgress,
        routing: Callable[[], RoutingReport],
        epochs: Callable[[int], dict[str, float]],
        watch: Watch,
        skips: SkipNonFinite,
        trackers: Trackers,
    ) -> None:
        """Take over what only the trainer knows.

        Args:
            routing: returns how the experts were used since it was called last.
            epochs: returns, for a step, how often the training has gone through each source of data.
        """
        self.run, self.progress, self.routing, self.epochs = run, progress, routing, epochs
        self.watch, self.skips, self.trackers = watch, skips, trackers

    def pause(self, seconds: float) -> None:
        """Leave seconds of evaluating or saving out of the tokens per second."""
        self.time_last_log += seconds

    def log(
        self,
        step: int,
        global_avg_loss: float,
        global_max_loss: float,
        grad_norm: float,
        extra_metrics: Json | None = None,
    ) -> None:
        """Measure a step; torchtitan's train_step calls it on every rank, and `finish_step` writes the line."""
        extra = extra_metrics or {}
        if self.parallel_dims.pp_enabled:  # the last stage alone knows the loss; torchtitan says -1 on the others
            loss = torch.tensor(global_avg_loss, device=device_type)
            global_avg_loss = dist_max(loss, self.parallel_dims.get_mesh("pp"))
        mesh = self.parallel_dims.get_optional_mesh("loss")
        batches = self.parallel_dims.get_optional_mesh("batch")  # ranks that share a sample all count it
        tokens = dist_sum(torch.tensor(float(self.ntokens_since_last_log), device=device_type), batches)
        wall_s = time.perf_counter() - self.time_last_log
        memory = self.device_memory_monitor.get_peak_stats()
        peak_gib = dist_max(torch.tensor(memory.max_active_gib, device=device_type), mesh)
        tokens_per_s = tokens / wall_s
        rates = self._rates(extra)
        num_ranks = self.parallel_dims.world_size
        mfu = (
            None if self.peak_flops is None else self.num_flops_per_token * tokens_per_s / (num_ranks * self.peak_flops)
        )
        routing = self.routing()
        self.watch.check(step, self.watch.own_seconds(), routing)
        self.line = {
            "loss": global_avg_loss,
            "grad_norm": grad_norm,
            "lr": next(rates[group] for group in ("experts", "rest", "router") if group in rates),
            "router_lr": rates.get("router"),
            "lora_lr": rates.get("lora"),
            "rest_lr": rates.get("rest"),
            "tokens": int(extra["n_tokens_seen"]),
            "data_epochs": self.epochs(step),
            "tokens_per_s": tokens_per_s,
            "mfu": mfu,
            "peak_gib": peak_gib,
            "skipped_steps": self.skips.total,
            "steps_without_labels": self.steps_without_labels,
            **asdict(routing),
        }
        logger.info(f"step {step}: loss {global_avg_loss:.5f}, grad_norm {grad_norm:.4f}, {tokens_per_s:.0f} tokens/s")
        self.ntokens_since_last_log = 0
        self.data_loading_times.clear()
        self.time_last_log = time.perf_counter()
        self.device_memory_monitor.reset_peak_stats()

    def _rates(self, extra: Json) -> dict[str, float]:
        """Return the learning rate of each group; torchtitan's entries begin with lr/, in the order of the groups."""
        names = [group_name(group["param_names"]) for optimizer in self.optimizers for group in optimizer.param_groups]
        return dict(zip(names, (v for key, v in extra.items() if key.startswith("lr/")), strict=True))

    def finish_step(self, step: int, heldout: tuple[float, dict[str, float]] | None) -> None:
        """Write the line of this step on rank 0; without `heldout` (the loss in all, and of each source), nothing is
        written where `log` had no turn."""
        if heldout is not None:
            self.line["heldout_loss"], of_sources = heldout
            self.line |= {"heldout_losses": of_sources} if len(of_sources) > 1 else {}
        if self.line and self.is_rank0:
            line = {"step": step, "time": time.time(), "heldout_loss": None} | self.line
            with self.run.metrics_file.open("a") as file:
                file.write(json.dumps(line) + "\n")
            self.logger.log(scalars(line), step)
            self.trackers.log(scalars(line), step)
            self.progress.show(line)
        self.line = {}


def scalars(line: Json) -> dict[str, float]:
    """Return a line's values as TensorBoard takes them: the mean of a list over layers, each entry of a dict; what is
    None is left out."""
    values: dict[str, float] = {}
    for name, value in line.items():
        if isinstance(value, list) and value:
            values[f"routing/{name}"] = sum(value) / len(value)
        elif isinstance(value, dict):
            values |= {f"{name}/{key}": float(entry) for key, entry in value.items()}
        elif isinstance(value, int | float) and name not in ("step", "time"):
            values[name] = float(value)
    return values
