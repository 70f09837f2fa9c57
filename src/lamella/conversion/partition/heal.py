"""Healing: converted FFNs learn together to give the dense model's next-token distribution again.

They are trained on the Kullback-Leibler divergence of the converted model's distribution from the dense one's, at
every token of a text (knowledge distillation, arXiv 1503.02531). Only the FFN's matrices and biases move: attention,
norms, embeddings and head stay the dense model's, and so does the choice of experts. What was fitted layer by layer
before (the refitted down projections) is where it starts.

While it trains, a layer computes all of its neurons and multiplies each by how often the routing asks for it: that is
what its experts give, in the dense FFN's own matrices, without gathering or scattering a token.

Shapes: N windows of L tokens, B windows of a step, t tokens, D model width, F neurons, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lamella.calibrate.sample import FFN, hidden, output
from lamella.errors import UserError
from lamella.hf.blocks import decoder_layers, ffn_modules, replace_ffn
from lamella.hf.computing import computes_bfloat16
from lamella.moe.learning import rate_at, summed_kl
from lamella.recipe.methods.partition import Heal

Counts = Callable[[Tensor], Tensor]
"""x [t, D] -> how often each neuron of the FFN is computed, [t, F], or [F] where that is the same for all tokens."""
LARGEST_GRADIENT = 1.0
"""A gradient of all parameters that is longer is cut to this norm."""


class Start(NamedTuple):
    """A converted FFN before it is healed."""

    ffn: FFN
    counts: Counts


class Step(NamedTuple):
    """A finished step of the healing."""

    number: int
    """From 1."""
    steps: int
    kl: float
    """Nats per token."""
    tokens_per_s: float
    wall_s: float


class _Healed(nn.Module):
    """Stands in a decoder layer's FFN's place: the dense FFN while the model teaches, else the one that learns."""

    def __init__(self, dense: nn.Module, start: Start, device: torch.device):
        super().__init__()
        self.dense, self.counts, self.teaches = dense, start.counts, False
        self.activation = start.ffn.activation
        for name, tensor in start.ffn._asdict().items():
            if isinstance(tensor, Tensor):
                self.register_parameter(name, nn.Parameter(tensor.detach().to(device, torch.float32, copy=True)))

    @property
    def ffn(self) -> FFN:
        tensors = dict(self.named_parameters(recurse=False))
        return FFN(**{"gate_FD": None, "activation": self.activation} | tensors)  # type: ignore[arg-type]

    def forward(self, hidden_states: Tensor) -> Tensor:
        if self.teaches:
            return self.dense(hidden_states)
        x_tD, ffn = hidden_states.flatten(0, -2), self.ffn
        with torch.no_grad():
            counts = self.counts(x_tD)
        h_tF = hidden(ffn, x_tD)
        return output(ffn, h_tF * counts.to(h_tF.dtype)).view_as(hidden_states).to(hidden_states.dtype)


def heal(
    model: Any,
    starts: Mapping[int, Start],
    windows_NL: Tensor,
    options: Heal,
    on_step: Callable[[Step], None] = lambda _: None,
) -> dict[int, FFN]:
    """Train the FFNs of some layers against the dense model, each window of the text once.

    Args:
        model: dense, of transformers; as it was when this returns.
        starts: by layer.
        windows_NL: int64 token ids; attention is causal over the window.

    Returns:
        by layer, the healed FFN: float32, where the model is.

    Raises:
        UserError: the loss stopped being a number.
    """
    layers = decoder_layers(model)
    blocks = {index: _Healed(_dense(layers[index]), start, model.device) for index, start in starts.items()}
    before = {index: dict(ffn_modules(layers[index])) for index in starts}
    for index, block in blocks.items():
        replace_ffn(layers[index], block)
    try:
        _train(model, blocks, windows_NL, options, on_step)
    finally:
        for index, modules in before.items():
            for name, module in modules.items():
                layers[index].add_module(name, module)
    return {index: block.requires_grad_(False).ffn for index, block in blocks.items()}


def _dense(layer: nn.Module) -> nn.Module:
    """The layer's FFN as one module."""
    modules = list(ffn_modules(layer).values())
    return modules[0] if len(modules) == 1 else nn.Sequential(*modules)


def _train(
    model: Any, blocks: dict[int, _Healed], windows_NL: Tensor, options: Heal, on_step: Callable[[Step], None]
) -> None:
    own = [parameter for block in blocks.values() for parameter in block.parameters(recurse=False)]
    optimizer = torch.optim.AdamW(own, lr=options.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    batches = windows_NL.split(max(1, options.tokens_per_step // windows_NL.shape[1]))
    for number, ids_BL in enumerate(batches, 1):
        begun = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = options.lr * rate_at(number - 1, len(batches))
        kl = _kl_of(model, blocks, ids_BL.to(model.device))
        if not kl.isfinite():
            raise UserError(
                f"healing failed at step {number}: the divergence is {kl.item()}; lower heal.lr ({options.lr})"
            )
        kl.backward()
        torch.nn.utils.clip_grad_norm_(own, LARGEST_GRADIENT)
        optimizer.step()
        optimizer.zero_grad()
        wall_s = time.perf_counter() - begun
        on_step(Step(number, len(batches), kl.item(), ids_BL.numel() / wall_s, wall_s))


def _kl_of(model: Any, blocks: dict[int, _Healed], ids_BL: Tensor) -> Tensor:
    """The mean over the tokens of KL(dense || converted), nats."""
    with torch.autocast(model.device.type, torch.bfloat16, enabled=computes_bfloat16(model.device)):
        teach(blocks, True)
        with torch.no_grad():
            wanted_tV = model(ids_BL, use_cache=False).logits.flatten(0, 1)
        teach(blocks, False)
        given_tV = model(ids_BL, use_cache=False).logits.flatten(0, 1)
    return summed_kl(given_tV, wanted_tV) / ids_BL.numel()


def teach(blocks: Mapping[int, _Healed], teaches: bool) -> None:
    """Make the model the dense one, or the one that learns."""
    for block in blocks.values():
        block.teaches = teaches
