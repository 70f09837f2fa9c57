"""What a run goes on with, but somebody should know: slow ranks, experts that no token or every token chooses.

Who is slow is told by the time each rank spends on its own, compared at the logged steps.

The wall time of a step is the same for all ranks, since they wait for each other. A rank's own time is what passes
while it fetches batches and while its attention and FFN modules compute forward; no rank waits for others in there
(but under expert or context parallelism, which hides who is slow). On a GPU events in its stream time the forward.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torchtitan.tools.logging import logger

from lamella.architecture.moe import MoEConfig
from lamella.jsons import Json
from lamella.recipe.training import Recipe, TwinShare
from lamella.run.folder import RunDir
from lamella.titan.decoder import LamellaDecoder
from lamella.train import fault_hook
from lamella.train.balance import RoutingReport

# Slower than the median of the others by this factor is a straggler ...
SLOW_FACTOR = 1.5
# ... unless it is about milliseconds, which chance explains.
LEAST_EXCESS_S = 0.02


Batch = TypeVar("Batch")


class OwnTime:
    """Seconds that this rank was busy by itself since the last `take`."""

    def __init__(self, modules: list[nn.Module], device: torch.device):
        self.seconds = 0.0
        self.on_gpu = device.type != "cpu"
        self.spans: list[tuple[torch.Event, torch.Event]] = []
        """Begin and end of each forward, on a GPU."""
        for module in modules:
            # called between graphs, and no graphs themselves
            module.register_forward_pre_hook(torch.compiler.disable(self._begin))
            module.register_forward_hook(torch.compiler.disable(self._end))

    def _begin(self, *_: object) -> None:
        self.began, self.began_s = self._event(), time.perf_counter()

    def _end(self, *_: object) -> None:
        if self.began is not None and (end := self._event()) is not None:
            self.spans.append((self.began, end))
        else:
            self.seconds += time.perf_counter() - self.began_s

    def _event(self) -> torch.Event | None:
        """A mark in the GPU's stream; None on a CPU, where the clock tells the same."""
        if not self.on_gpu:
            return None
        event = torch.Event(enable_timing=True)
        event.record()
        return event

    def batches(self, batches: Iterator[Batch], step: Callable[[], int]) -> Iterator[Batch]:
        """The same batches, timed; `step()` tells the current one."""
        while True:
            began = time.perf_counter()
            fault_hook.before_batch(step())
            batch = next(batches)
            self.seconds += time.perf_counter() - began
            yield batch

    def take(self) -> float:
        """The seconds since the last call; on a GPU it synchronises, so only where the host has done so anyway."""
        for begin, end in self.spans:
            end.synchronize()
            self.seconds += begin.elapsed_time(end) / 1000
        seconds, self.seconds = self.seconds, 0.0
        self.spans.clear()
        return seconds


def stragglers(seconds_W: list[float], num_steps: int) -> list[tuple[int, float]]:
    """The slow ranks: (rank, factor over the median of the others). W ranks; the seconds are of `num_steps`."""
    slow = []
    for rank, mine in enumerate(seconds_W):
        others = [s for other, s in enumerate(seconds_W) if other != rank]
        usual = statistics.median(others) if others else mine
        if mine > SLOW_FACTOR * usual and mine - usual > LEAST_EXCESS_S * num_steps:
            slow.append((rank, mine / max(usual, 1e-9)))
    return slow


def is_collapsed(max_vio: float, moe: MoEConfig) -> bool:
    """Whether one expert gets (nearly) every token: top-k of E experts then has E/k times its share."""
    highest = moe.num_experts / moe.num_experts_per_tok - 1
    return highest > 0 and max_vio > 0.99 * highest


class Watch:
    """Compares the ranks and looks at the routing; what it finds becomes an event, once when it begins."""

    def __init__(
        self, model: LamellaDecoder, run: RunDir, recipe: Recipe, device: torch.device, mesh: DeviceMesh | None
    ):
        # behind FSDP's own hooks, so that waiting for weights does not count; inside a block they would break its graph
        self.own_time = OwnTime(list(model.layers.values()), device)
        self.run, self.device, self.mesh = run, device, mesh
        self.held = isinstance(recipe.twin_share, TwinShare)
        self.last_step: int | None = None
        self.known: set[str] = set()
        # of the whole model, as the reports are: a stage of a pipeline has a part of it
        self.layers = [layer.moe_layer.moe for layer in model.config.layers if layer.moe_layer is not None]

    def own_seconds(self) -> list[float]:
        """Each rank's own seconds since the last call, the same list on every rank."""
        rank, size = (0, 1) if self.mesh is None else (self.mesh.get_local_rank(), self.mesh.size())
        seconds_W = torch.zeros(size, dtype=torch.float64, device=self.device)
        seconds_W[rank] = self.own_time.take()
        if self.mesh is not None:
            dist.all_reduce(seconds_W, group=self.mesh.get_group())
        return seconds_W.tolist()

    def check(self, step: int, seconds_W: list[float], routing: RoutingReport) -> None:
        """Look at a logged step. Every rank calls it with the same numbers, and rank 0 writes."""
        num_steps = step - (step - 1 if self.last_step is None else self.last_step)
        first, self.last_step = self.last_step is None, step
        found: dict[str, Json] = {}
        for index, factor in [] if first else stragglers(seconds_W, num_steps):  # the first step warms up
            rank = index if self.mesh is None else dist.get_global_rank(self.mesh.get_group(), index)
            found[f"straggler {rank}"] = {"event": "straggler", "rank": rank, "factor": round(factor, 2)}
        if not self.held:
            if routing.dead_experts:
                found["dead"] = {"event": "alarm", "what": "experts without a token", "experts": routing.dead_experts}
            full = [i for i, vio in enumerate(routing.max_vio) if is_collapsed(vio, self.layers[i])]
            if full:
                found["collapsed"] = {"event": "alarm", "what": "an expert with every token", "moe_layers": full}
        for key in found.keys() - self.known:
            self._say(step, **found[key])
        self.known = set(found)

    def _say(self, step: int, event: str, **values: object) -> None:
        if dist.get_rank() == 0:
            logger.warning(f"step {step}: {event} {values}")
            self.run.event(event, step=step, **values)
