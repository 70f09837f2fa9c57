"""Which experts one token goes to, in plain numbers: on a CPU some twenty calls of torch for a handful of numbers take
longer than the numbers. What is computed is `lamella.moe.routing`'s.

Shapes: E experts (frozen 0 .. S-1, then trainable), S slices, K active experts, R router rows.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from lamella.architecture.moe import MoEConfig


class Chosen(NamedTuple):
    """One token's K experts and their weights."""

    expert_ids: list[int]
    weights: list[float]

    def ascending(self) -> Chosen:
        """The same, by expert id."""
        ids, weights = zip(*sorted(zip(self.expert_ids, self.weights, strict=True)), strict=True)
        return Chosen(list(ids), list(weights))

    def within(self, first: int, end: int) -> Chosen:
        """Those whose ids are from `first` to before `end`."""
        kept = [k for k, e in enumerate(self.expert_ids) if first <= e < end]
        if len(kept) == len(self.expert_ids):
            return self
        return Chosen([self.expert_ids[k] for k in kept], [self.weights[k] for k in kept])


def route_one(
    logits_R: list[float], bias_R: list[float], config: MoEConfig, gate_scale_R: list[float] | None = None
) -> Chosen:
    """As `lamella.moe.routing.route` has it, in float64.

    Args:
        logits_R: of the router.
        bias_R: the selection bias.
        gate_scale_R: belongs to gate "unit".
    """
    if config.routing == "twin":
        return _one_of_each_pair(logits_R, bias_R, config)
    scores_E = _scores(logits_R, config)
    ids = sorted(range(len(scores_E)), key=lambda e: -scores_E[e] - bias_R[e])[: config.num_experts_per_tok]
    if config.gate == "unit":
        assert gate_scale_R is not None
        return Chosen(ids, [1 + gate_scale_R[e] * _sigmoid(scores_E[e]) for e in ids])
    return Chosen(ids, _weights([scores_E[e] for e in ids], config))


def _one_of_each_pair(logits_S: list[float], bias_S: list[float], config: MoEConfig) -> Chosen:
    S = len(logits_S)
    mirrored_E = _scores([*(-logit for logit in logits_S), *logits_S], config)
    ids = [i + S * (mirrored_E[S + i] - mirrored_E[i] + 2 * bias_S[i] > 0) for i in range(S)]
    return Chosen(ids, _weights([mirrored_E[e] for e in ids], config))


def _scores(logits_E: list[float], config: MoEConfig) -> list[float]:
    if config.gate == "unit":
        return logits_E
    if config.gate == "sigmoid":
        return [_sigmoid(logit) for logit in logits_E]
    largest = max(logits_E)
    powers_E = [math.exp(logit - largest) for logit in logits_E]
    total = sum(powers_E)
    return [power / total for power in powers_E]


def _weights(scores_K: list[float], config: MoEConfig) -> list[float]:
    scale = config.route_scale / sum(scores_K) if config.norm_topk_prob else config.route_scale
    return [score * scale for score in scores_K]


def _sigmoid(x: float) -> float:
    return 0.5 + 0.5 * math.tanh(0.5 * x)
