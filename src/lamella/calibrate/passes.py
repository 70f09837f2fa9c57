"""One layer over all calibration tokens: forward, or backward from the gradient of its output.

Shapes: N windows, L tokens per window, B windows per batch, T = N*L tokens, D model width, F FFN neurons, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from lamella.calibrate.layerwise import LayerwiseModel
from lamella.calibrate.sample import FFN, LayerSample
from lamella.data.packing import IGNORE_INDEX

BATCH_TOKENS = 2048
"""Tokens in a layer at a time, or one window where that is longer."""
_HEAD_ELEMENTS = 1 << 23
"""Logits at a time: 32 MiB, and a few times that for the softmax and its gradient."""


class _Reached(Exception):
    """A layer has come to its FFN, and nothing behind that is wanted."""


class WatchedLayer:
    """A decoder layer with its weights, and what its FFN was given and gave at the latest call."""

    def __init__(self, model: LayerwiseModel, index: int, without_ffn: bool = False):
        """`without_ffn`: the layer's output is the residual that the FFN's output is to be added to."""
        self.model, self.index = model, index
        self.module, ffn = model.layer(index), model.ffn_modules(index)
        self.ffn: FFN = ffn.weights(self.module)
        self._up = ffn.up(self.module)
        # The hooks know this dict, not the layer: in a cycle the weights would outlive their use.
        self.seen: dict[str, Tensor] = {}
        self._up.register_forward_pre_hook(_see(self.seen, "x_TD"))
        self._down = ffn.down(self.module)
        self._down.register_forward_pre_hook(_see(self.seen, "h_TF"))
        if without_ffn:
            self._down.register_forward_hook(lambda module, args, y: torch.zeros_like(y))
        else:
            self._down.register_forward_hook(_keep_output(self.seen))

    def __call__(self, hidden_BLD: Tensor, positions_BL: Tensor) -> Tensor:
        args, kwargs = self.model.call(self.index, positions_BL)
        return self.module(hidden_BLD, *args, **kwargs)

    def up_to_ffn(self, hidden_BLD: Tensor, positions_BL: Tensor) -> None:
        """As a call, but the FFN is not computed: only what it is given is seen."""
        handle = self._up.register_forward_pre_hook(_reached)
        try:
            self(hidden_BLD, positions_BL)
        except _Reached:
            pass
        finally:
            handle.remove()

    def replace_ffn(self, y_of_x: Callable[[Tensor], Tensor]) -> None:
        """Let this function, x [t, D] -> y [t, D], stand in the FFN's place from now on."""
        seen = self.seen
        self._down.register_forward_hook(lambda module, args, y: y_of_x(seen["x_TD"]).view_as(y))


def _reached(module: nn.Module, args: tuple[Tensor, ...]) -> None:
    raise _Reached


def _keep_output(seen: dict[str, Tensor]) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
    """A hook that keeps a module's output as it is, with its graph."""

    def hook(module: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> None:
        seen["y"] = y

    return hook


def _see(seen: dict[str, Tensor], name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    """A hook that keeps a module's input as [T, width]."""

    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen[name] = args[0].detach().flatten(0, -2)

    return hook


def batches(shape: tuple[int, ...]) -> Iterator[slice]:
    """Slices of the N windows, of BATCH_TOKENS tokens each, at least one window."""
    N, L = shape[:2]
    size = max(1, BATCH_TOKENS // L)
    return (slice(start, min(start + size, N)) for start in range(0, N, size))


def empty_sample(ffn: FFN, num_tokens: int) -> LayerSample:
    """A sample to be filled: x [T, D] and h [T, F]."""
    F, D = ffn.up_FD.shape
    return LayerSample(ffn, torch.empty(num_tokens, D), torch.empty(num_tokens, F))


def embed_pass(model: LayerwiseModel, ids_NL: Tensor, positions_NL: Tensor, out_NLD: Tensor) -> None:
    """The first layer's input."""
    for part in batches(ids_NL.shape):
        out_NLD[part] = model.embed(ids_NL[part], positions_NL[part])


@torch.no_grad()
def forward_pass(
    layer: WatchedLayer, hidden_NLD: Tensor, positions_NL: Tensor, out_NLD: Tensor | None, sample: LayerSample | None
) -> None:
    """Fill the layer's output and the sample's x and h, each if it is wanted."""
    for part in batches(hidden_NLD.shape):
        y_BLD = layer(hidden_NLD[part], positions_NL[part])
        if out_NLD is not None:
            out_NLD[part] = y_BLD
        _keep(layer, part, hidden_NLD.shape[1], sample)


def backward_pass(
    layer: WatchedLayer,
    hidden_NLD: Tensor,
    positions_NL: Tensor,
    gradient_NLD: Tensor,
    out_NLD: Tensor,
    sample: LayerSample | None,
    ffn_NLD: Tensor | None = None,
) -> None:
    """Run a layer as `forward_pass` does, but fill the gradient of the layer's input, given that of its output; and
    into `ffn_NLD` that of the FFN's output, where it is another than the layer's."""
    for part in batches(hidden_NLD.shape):
        leaf_BLD = hidden_NLD[part].clone().requires_grad_()
        y_BLD = layer(leaf_BLD, positions_NL[part])
        if ffn_NLD is None:
            (out_NLD[part],) = torch.autograd.grad(y_BLD, leaf_BLD, gradient_NLD[part])
        else:
            wanted = [leaf_BLD, layer.seen["y"]]
            out_NLD[part], ffn_BLD = torch.autograd.grad(y_BLD, wanted, gradient_NLD[part])
            ffn_NLD[part] = ffn_BLD.view_as(out_NLD[part])
        layer.seen.pop("y")
        _keep(layer, part, hidden_NLD.shape[1], sample)


def _keep(layer: WatchedLayer, part: slice, L: int, sample: LayerSample | None) -> None:
    if sample is not None:
        tokens = slice(part.start * L, part.stop * L)
        sample.x_TD[tokens], sample.h_TF[tokens] = layer.seen["x_TD"], layer.seen["h_TF"]


def with_gradient(sample: LayerSample, gradient_NLD: Tensor) -> LayerSample:
    """dh = dL/d(output) W_down, given the gradient of the FFN's output."""
    return sample._replace(dh_TF=gradient_NLD.flatten(0, 1) @ sample.ffn.down_DF)


def head_pass(model: LayerwiseModel, hidden_NLD: Tensor, labels_NL: Tensor, out_NLD: Tensor) -> None:
    """Gradient of the summed next-token loss with respect to the last layer's output, a few tokens at a time."""
    head_VD = model.head_VD()
    hidden_TD, out_TD, labels_T = hidden_NLD.flatten(0, 1), out_NLD.flatten(0, 1), labels_NL.flatten()
    size = max(1, _HEAD_ELEMENTS // len(head_VD))
    for start in range(0, len(labels_T), size):
        part = slice(start, start + size)
        leaf = hidden_TD[part].clone().requires_grad_()
        logits = model.logits(leaf, head_VD)
        loss = functional.cross_entropy(logits, labels_T[part], ignore_index=IGNORE_INDEX, reduction="sum")
        (out_TD[part],) = torch.autograd.grad(loss, leaf)


@torch.no_grad()
def add_replacement(out_NLD: Tensor, x_TD: Tensor, y_of_x: Callable[[Tensor], Tensor]) -> None:
    """Add a replaced FFN's output to the residual in `out_NLD`."""
    L = out_NLD.shape[1]
    for part in batches(out_NLD.shape):
        y_TD = y_of_x(x_TD[part.start * L : part.stop * L])
        out_NLD[part] += y_TD.view_as(out_NLD[part])
