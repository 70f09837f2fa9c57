"""Convert a layer, measure the whole model, and put the layer back where it cost too much.

What Dynamic MoE does after each layer, with a numeric test: perplexity or KL divergence on calibration text, a budget
per layer and one in total. A layer at a time is in memory, as in calibration; every test runs the layers behind the
one in question.

Shapes: N windows, L tokens per window, D model width, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as functional
from torch import Tensor

from lamella.calibrate.layerwise import LayerwiseModel
from lamella.calibrate.passes import (
    WatchedLayer,
    embed_pass,
    forward_pass,
)
from lamella.calibrate.sample import FFN
from lamella.calibrate.text import CalibrationTokens
from lamella.data.packing import IGNORE_INDEX
from lamella.recipe.calibration import Guard

_HEAD_ELEMENTS = 1 << 23
"""Logits at a time."""


class Verdict(NamedTuple):
    """On one layer."""

    layer: int
    before: float
    after: float
    """The metric with this layer converted."""
    kept: bool
    reason: str
    """Why it stays dense; "" where it is converted."""


ReplacedFFN = Callable[[int, FFN], Callable[[Tensor], Tensor]]
"""(layer, its dense FFN) -> the FFN that takes its place, x [t, D] -> y [t, D]"""


@torch.no_grad()
def guarded(
    model: LayerwiseModel,
    tokens: CalibrationTokens,
    guard: Guard,
    layers: Iterable[int],
    replaced: ReplacedFFN,
    on_verdict: Callable[[Verdict], None] = lambda _: None,
) -> list[Verdict]:
    """Try the layers in ascending order, each on top of those that were kept."""
    test = _Test(model, tokens, guard)
    hidden_NLD, value, verdicts = test.embedded, test.start, []
    wanted = set(layers)
    for index in range(model.num_layers):
        layer = WatchedLayer(model, index)
        dense_NLD = _through(layer, hidden_NLD, tokens)
        if index not in wanted:
            hidden_NLD = dense_NLD
            continue
        candidate_NLD = _through_replaced(model, index, hidden_NLD, tokens, replaced(index, layer.ffn))
        after = test.value(candidate_NLD, index + 1)
        reason = _over_budget(guard, value, after)
        verdicts.append(Verdict(index, value, after, not reason, reason))
        on_verdict(verdicts[-1])
        hidden_NLD, value = (dense_NLD, value) if reason else (candidate_NLD, after)
    return verdicts


def _over_budget(guard: Guard, before: float, after: float) -> str:
    step = after / before if guard.metric == "perplexity" else after - before
    if not step <= guard.per_layer:  # NaN is over budget, too
        return f"{guard.metric} {step:.4g} over the budget per layer of {guard.per_layer:g}"
    if not after <= guard.total:
        return f"{guard.metric} {after:.4g} over the total budget of {guard.total:g}"
    return ""


def _through(layer: WatchedLayer, hidden_NLD: Tensor, tokens: CalibrationTokens) -> Tensor:
    out_NLD = torch.empty_like(hidden_NLD)
    forward_pass(layer, hidden_NLD, tokens.positions_NL, out_NLD, None)
    return out_NLD


def _through_replaced(
    model: LayerwiseModel, index: int, hidden_NLD: Tensor, tokens: CalibrationTokens, ffn: Callable[[Tensor], Tensor]
) -> Tensor:
    layer = WatchedLayer(model, index)
    layer.replace_ffn(ffn)
    return _through(layer, hidden_NLD, tokens)


class _Test:
    """The metric of a model that is dense from some layer on."""

    def __init__(self, model: LayerwiseModel, tokens: CalibrationTokens, guard: Guard):
        self.model, self.tokens, self.metric = model, tokens, guard.metric
        N, L = tokens.ids_NL.shape
        self.embedded = torch.empty(N, L, model.width)
        embed_pass(model, tokens.ids_NL, tokens.positions_NL, self.embedded)
        self.dense_NLD = self._finish(self.embedded, 0)
        self.dense_nats = self._nats(self.dense_NLD) if guard.metric == "perplexity" else 0.0
        self.start = 1.0 if guard.metric == "perplexity" else 0.0

    def value(self, hidden_NLD: Tensor, next_layer: int) -> float:
        final_NLD = self._finish(hidden_NLD, next_layer)
        if self.metric == "kl":
            return self._kl(final_NLD)
        return math.exp(min(self._nats(final_NLD) - self.dense_nats, 700.0))

    def _finish(self, hidden_NLD: Tensor, next_layer: int) -> Tensor:
        for index in range(next_layer, self.model.num_layers):
            hidden_NLD = _through(WatchedLayer(self.model, index), hidden_NLD, self.tokens)
        return hidden_NLD

    def _nats(self, final_NLD: Tensor) -> float:
        labels_T = self.tokens.labels_NL.flatten()
        total = 0.0
        for part, (logits_tV,) in self._logits(final_NLD):
            total += functional.cross_entropy(
                logits_tV, labels_T[part], ignore_index=IGNORE_INDEX, reduction="sum"
            ).item()
        return total / int((labels_T != IGNORE_INDEX).sum())

    def _kl(self, final_NLD: Tensor) -> float:
        total = 0.0
        for _, (dense_tV, logits_tV) in self._logits(self.dense_NLD, final_NLD):
            log_p, log_q = dense_tV.log_softmax(-1), logits_tV.log_softmax(-1)
            total += (log_p.exp() * (log_p - log_q)).sum().item()
        return total / self.tokens.num_tokens

    def _logits(self, *final_NLD: Tensor) -> Iterator[tuple[slice, list[Tensor]]]:
        head_VD = self.model.head_VD()
        flat = [hidden.flatten(0, 1) for hidden in final_NLD]
        size = max(1, _HEAD_ELEMENTS // len(head_VD))
        for start in range(0, len(flat[0]), size):
            part = slice(start, start + size)
            yield part, [self.model.logits(h[part], head_VD) for h in flat]
