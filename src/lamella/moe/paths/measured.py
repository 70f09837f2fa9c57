"""Which expert path is the fastest on this GPU: measured once per shape, on balanced synthetic rows, and kept on disk.

Published comparisons of grouped products differ by more than a factor of two between GPUs, shapes and versions, so
nothing is assumed. The rows are balanced, so that Triton's own tuning, which happens on the way, never tunes a kernel
on an expert without rows.

Shapes: T tokens, D model width, f neurons per expert, K active experts, E experts.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from lamella.architecture.embedded import cache_dir
from lamella.architecture.moe import Activation, ExpertPath
from lamella.moe.packed import Experts
from lamella.moe.routing import Routing

LEAST_TOKENS = 256
"""Below, launches and not products take the time, and one measurement says nothing about the next size."""
ROUNDS = 5
PathFunction = Callable[[Tensor, Routing, Experts, Experts], Tensor]
Clock = Callable[[PathFunction, Tensor, Routing, Experts, Experts], float]


class PathFailed(RuntimeError):
    """A path of somebody else's kernels cannot be computed here; `auto` takes another one."""


class Shape(NamedTuple):
    """What the speed of a path depends on."""

    device: str
    versions: str
    dtype: str
    tokens: int
    """T, rounded up to a power of two."""
    D: int
    f: int
    frozen: int
    trainable: int
    K: int
    trains: bool
    """With a backward pass."""
    activation: Activation = "silu"

    @property
    def key(self) -> str:
        """One string, as the file has it; silu is left out."""
        return " ".join(map(str, self if self.activation != "silu" else self[:-1]))


_known: dict[Shape, ExpertPath] = {}


def shape_of(
    x_TD: Tensor, routing: Routing, frozen: Experts, trainable: Experts, activation: Activation = "silu"
) -> Shape:
    """The shape of a call, on the device of its tensors."""
    T, D = x_TD.shape
    device = torch.cuda.get_device_name(x_TD.device) if x_TD.device.type == "cuda" else x_TD.device.type
    packed = trainable if len(trainable.down_proj) else frozen
    trains = torch.is_grad_enabled() and (x_TD.requires_grad or trainable.down_proj.requires_grad)
    return Shape(
        device, _versions(), str(x_TD.dtype).removeprefix("torch."), 1 << (T - 1).bit_length(), D,
        packed.down_proj.shape[-1], len(frozen.down_proj), len(trainable.down_proj),
        routing.expert_ids_TK.shape[1], trains, activation,
    )  # fmt: skip


def fastest(
    x_TD: Tensor, routing: Routing, frozen: Experts, trainable: Experts, paths: dict[ExpertPath, PathFunction],
    clock: Clock | None = None, file: Path | None = None, activation: Activation = "silu",
) -> ExpertPath:  # fmt: skip
    """The name of the fastest of `paths` for tensors like these.

    Args:
        paths: the candidates, the first of which is taken where nothing can be measured (few tokens, a graph that is
            being compiled or captured: what is to be compiled is measured before, and its path named).
        clock: seconds of a call; None: see `seconds`.
        file: where results are kept; None: `expert-paths.json` in the cache folder of lamella.
        activation: what the candidates compute.
    """
    first = next(iter(paths))
    if len(paths) == 1 or x_TD.shape[0] < LEAST_TOKENS:
        return first
    if _is_traced(x_TD):
        return first
    shape = shape_of(x_TD, routing, frozen, trainable, activation)
    if shape in _known:
        return _known[shape]
    file = cache_dir() / "expert-paths.json" if file is None else file
    kept = _read(file).get(shape.key)
    if kept in paths:
        _known[shape] = kept
        return kept
    _known[shape] = chosen = _measure(x_TD, shape, frozen, trainable, paths, clock or seconds)
    _write(file, shape, chosen)
    return chosen


def _measure(
    x_TD: Tensor, shape: Shape, frozen: Experts, trainable: Experts, paths: dict[ExpertPath, PathFunction], clock: Clock
) -> ExpertPath:
    """Runs every path on synthetic rows with the layer's own weights, whose gradients stay as they are."""
    E = shape.frozen + shape.trainable
    rows = torch.arange(x_TD.shape[0], device=x_TD.device)[:, None] * shape.K
    ids_TK = (rows + torch.arange(shape.K, device=x_TD.device)) % E  # K different experts, all equally often
    routing = Routing(ids_TK, torch.full(ids_TK.shape, 1.0, device=x_TD.device))
    generator = torch.Generator(device=x_TD.device).manual_seed(0)
    values_TD = torch.randn(x_TD.shape, dtype=x_TD.dtype, device=x_TD.device, generator=generator)
    with torch.set_grad_enabled(shape.trains):
        values_TD.requires_grad_(shape.trains)
        still = Experts(*(t.detach() for t in frozen))
        moving = Experts(*(t.detach().requires_grad_(shape.trains) for t in trainable))
        times = {name: clock(path, values_TD, routing, still, moving) for name, path in paths.items()}
    return min(times, key=lambda name: times[name])


def seconds(path: PathFunction, x_TD: Tensor, routing: Routing, frozen: Experts, trainable: Experts) -> float:
    """The median time of a forward and, where gradients are enabled, a backward pass; infinite where it fails."""
    try:
        return statistics.median(_once(path, x_TD, routing, frozen, trainable) for _ in range(ROUNDS + 1))
    except torch.OutOfMemoryError:
        return float("inf")
    except PathFailed as error:
        print(f"an expert path is left out: {error}", file=sys.stderr)
        return float("inf")


def _once(path: PathFunction, x_TD: Tensor, routing: Routing, frozen: Experts, trainable: Experts) -> float:
    on_gpu = x_TD.device.type == "cuda"
    if on_gpu:
        torch.cuda.synchronize(x_TD.device)
    began = time.perf_counter()
    y_TD = path(x_TD, routing, frozen, trainable)
    if y_TD.requires_grad:
        leaves = [t for t in (x_TD, *trainable) if t.requires_grad and t.numel()]
        torch.autograd.grad(y_TD, leaves, torch.ones_like(y_TD))
    if on_gpu:
        torch.cuda.synchronize(x_TD.device)
    return time.perf_counter() - began


def _is_traced(x_TD: Tensor) -> bool:
    """Whether nothing is computed now: a graph is compiled or captured, or the tensors have no values."""
    if torch.compiler.is_compiling() or hasattr(x_TD, "fake_mode"):
        return True
    return x_TD.device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _versions() -> str:
    try:
        import triton

        return f"torch-{torch.__version__},triton-{triton.__version__}"
    except ImportError:
        return f"torch-{torch.__version__}"


def _read(file: Path) -> dict[str, ExpertPath]:
    """What was measured before; nothing where the file is missing or damaged, since it can be measured again."""
    try:
        values = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def _write(file: Path, shape: Shape, path: ExpertPath) -> None:
    """Add a result; other processes may do so at the same time, and one of two results may then be measured again."""
    values = _read(file) | {shape.key: path}
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
        with os.fdopen(descriptor, "w") as out:
            json.dump(values, out, indent=1, sort_keys=True)
        os.replace(temporary, file)
    except OSError:  # a cache folder that cannot be written costs a measurement in each process
        return


def forget() -> None:
    """Drop what this process knows; the file stays."""
    _known.clear()
