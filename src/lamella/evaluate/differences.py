"""How far two models' logits lie apart, and how far a model lies from itself when its sums take another order.

Shapes: L tokens of a window, V vocabulary, D model width, F dense FFN width.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN

from lamella.architecture.layout import ffn_layout
from lamella.calibrate.anatomy import ffn_of
from lamella.calibrate.sample import FFN
from lamella.hf.blocks import decoder_layers, ffn_modules, replace_ffn


@dataclass
class Difference:
    """Between reference logits and others, over all tokens seen."""

    max_abs: float = 0.0
    sum_abs: float = 0.0
    sum_kl: float = 0.0
    same_top1: int = 0
    tokens: int = 0
    vocabulary: int = 0
    max_logit: float = 0.0
    """Largest |logit| of the reference: the scale that a rounding error is relative to."""

    def add(self, reference_LV: Tensor, other_LV: Tensor) -> None:
        reference_LV, other_LV = reference_LV.float(), other_LV.float()
        apart_LV = (reference_LV - other_LV).abs()
        self.max_abs = max(self.max_abs, apart_LV.max().item())
        self.sum_abs += apart_LV.sum(dtype=torch.float64).item()
        self.sum_kl += kl_divergence(reference_LV, other_LV)
        self.same_top1 += int((reference_LV.argmax(-1) == other_LV.argmax(-1)).sum())
        self.tokens += len(reference_LV)
        self.vocabulary = reference_LV.shape[-1]
        self.max_logit = max(self.max_logit, reference_LV.abs().max().item())

    @property
    def mean_abs(self) -> float:
        return self.sum_abs / (self.tokens * self.vocabulary)

    @property
    def kl(self) -> float:
        """Mean KL(reference || other) per token, nats."""
        return self.sum_kl / self.tokens

    @property
    def top1_agreement(self) -> float:
        """Share of tokens with the same most likely next token."""
        return self.same_top1 / self.tokens


def kl_divergence(reference_LV: Tensor, other_LV: Tensor) -> float:
    """Sum over tokens of KL(reference || other), nats; float64, for in float32 rounding hides values below 1e-7."""
    p_LV, q_LV = (F.log_softmax(x.double(), dim=-1) for x in (reference_LV, other_LV))
    return F.kl_div(q_LV, p_LV, reduction="sum", log_target=True).item()


@torch.inference_mode()
def logits_of(model: PreTrainedModel, windows: Iterable[Tensor]) -> list[Tensor]:
    """Logits [L, V] of each window [L] of token ids, in the model's dtype, in main memory."""
    return [_logits(model, ids_L).cpu() for ids_L in windows]


def _logits(model: PreTrainedModel, ids_L: Tensor) -> Tensor:
    """[L, V], on the model's device."""
    return model(ids_L[None].to(model.device), use_cache=False).logits[0]


@torch.inference_mode()
def compare(references: list[Tensor], model: PreTrainedModel, windows: Iterable[Tensor]) -> Difference:
    """The model's logits on each window against reference logits [L, V]."""
    difference = Difference()
    for reference_LV, ids_L in zip(references, windows, strict=True):
        difference.add(reference_LV.to(model.device), _logits(model, ids_L))
    return difference


@torch.inference_mode()
def greedy(model: PreTrainedModel, prompt_L: Tensor, count: int) -> tuple[list[int], Tensor]:
    """`count` most likely tokens one after another, end-of-text included, and the logits [count, V] of each choice, in
    main memory."""
    ids_1L, cache, tokens, logits = prompt_L[None].to(model.device), None, [], []
    for _ in range(count):
        output = model(ids_1L, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = output.past_key_values
        logits.append(output.logits[0, -1].float())
        ids_1L = logits[-1].argmax().view(1, 1)
        tokens.append(int(ids_1L))
    return tokens, torch.stack(logits).cpu()


class ReorderedFFN(nn.Module):
    """An FFN summed over `slices` groups of its neurons, drawn at random: the same function."""

    def __init__(self, dense: FFN, slices: int, generator: torch.Generator):
        super().__init__()
        self.dense = dense
        order_F = torch.randperm(len(dense.up_FD), generator=generator)
        self.groups = order_F.to(dense.up_FD.device).chunk(slices)

    def forward(self, x: Tensor) -> Tensor:
        total = sum((_group(self.dense, g, x) for g in self.groups), torch.zeros_like(x))
        return total if self.dense.down_bias_D is None else total + self.dense.down_bias_D


def _group(ffn: FFN, neurons: Tensor, x: Tensor) -> Tensor:
    up_fD, down_Df = ffn.up_FD[neurons], ffn.down_DF[:, neurons]
    up = F.linear(x, up_fD, None if ffn.up_bias_F is None else ffn.up_bias_F[neurons])
    act = ACT2FN[ffn.activation]  # the dense model's own: others round otherwise in bf16
    hidden = act(up) if ffn.gate_FD is None else act(F.linear(x, ffn.gate_FD[neurons])) * up
    return F.linear(hidden, down_Df)


@contextmanager
def reordered_ffns(model: PreTrainedModel, slices: int, layers: Iterable[int], seed: int) -> Iterator[None]:
    """Inside, the FFNs of these layers of a dense model are summed in another order; weights are shared, not copied."""
    generator = torch.Generator().manual_seed(seed)
    kept = {i: ffn_modules(decoder_layers(model)[i]) for i in layers}
    try:
        for i in kept:
            replace_ffn(decoder_layers(model)[i], ReorderedFFN(_dense_ffn(model, i), slices, generator))
        yield
    finally:
        for i, modules in kept.items():
            for name, module in modules.items():
                decoder_layers(model)[i].add_module(name, module)


def _dense_ffn(model: PreTrainedModel, layer: int) -> FFN:
    layout = ffn_layout(model.config.to_dict())
    parts = {part: model.get_parameter(name).detach() for part, name in layout.names(layer).items()}
    return ffn_of(layout, parts)


def compare_reordered(
    references: list[Tensor], model: PreTrainedModel, slices: int, layers: list[int], windows: list[Tensor], seed: int
) -> Difference:
    """A dense model against its own logits, its FFNs summed in another order: the floor of any such comparison."""
    with reordered_ffns(model, slices, layers, seed):
        return compare(references, model, windows)
