"""One layer's router rows from what the base model computes on the prompts, and how they route.

    hidden, hidden_last   the layer's input at the prompt's last token: mean of the positive prompts minus mean of the
    hidden_avg            negative ones, normalised; the second over all tokens of a prompt (mergekit's)
    mean                  the router's own input: an expert's mean minus the mean of all, made orthogonal to that
    ridge                 the router's own input x: ridge regression of x onto the expert that the prompt belongs to,
                          scaled so that the softmax of the logits is a probability (least cross entropy)

With parts, ridge regression is onto |W_down h| of each part of the expert, over their mean.

A router of a stock class has no bias: `mean` has none to need, `ridge` is fitted without. Every fourth prompt of each
expert is left out of a first fit, which chooses the strength and the scale and says how well tokens are routed; then
all prompts are fitted.

Shapes: T tokens, P prompts, D model width, E experts, G parts of each FFN, R rows (E*G, shared ones behind them).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from lamella.calibrate.sample import FFN, hidden
from lamella.recipe.methods.merge import MergeOptions

HELD_OUT_EVERY = 4
STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Of the ridge, in units of the mean square of an input."""
_DEFAULT_STRENGTH = 1e-1
_SCALES = torch.logspace(-1, 3, 81)


class Seen(NamedTuple):
    """Which tokens are looked at."""

    place_T: Tensor
    """Of the tokens among all, ascending."""
    prompt_T: Tensor
    """Their prompts."""
    expert_P: Tensor
    """Of the prompts; shared experts follow the others."""
    positive_P: Tensor
    """bool: whether the prompt should be routed to its expert."""


class Layer(NamedTuple):
    """What is known of a layer."""

    x_TD: Tensor
    """The router's input."""
    vectors_PD: Tensor | None
    """What the hidden modes take of each prompt."""
    ffns: list[FFN] | None = None
    """The experts', where their parts are told apart."""


def fit(layer: Layer, seen: Seen, options: MergeOptions) -> dict[str, Tensor]:
    """`rows` [R, D], and how tokens are routed by them: `accuracy`, `entropy` (0 to 1), `load` [E*G], all float32."""
    test_P = held_out(seen)
    if not test_P.any():
        rows_RD = _rows(layer, seen, ~test_P, options)(_DEFAULT_STRENGTH)
        rows_RD = rows_RD * _scale(rows_RD, layer, seen, ~test_P, options)[0]
        return {"rows": rows_RD} | routed(rows_RD, layer.x_TD, seen, ~test_P, options)
    strength, scale, first_RD = _chosen(layer, seen, test_P, options)
    found = routed(first_RD, layer.x_TD, seen, test_P, options)
    rows_RD = _rows(layer, seen, torch.ones_like(test_P), options)(strength)
    return {"rows": rows_RD * scale} | found


def num_routed(options: MergeOptions) -> int:
    """Rows of routed experts that a fit gives: one per part by ridge regression, else one per model."""
    return len(options.experts) * (options.parts if options.gate_mode == "ridge" else 1)


def held_out(seen: Seen) -> Tensor:
    """bool [P]: every fourth positive prompt of each expert; none where an expert has fewer than four."""
    test_P = torch.zeros(len(seen.expert_P), dtype=torch.bool)
    for expert in seen.expert_P.unique():
        own = (seen.positive_P & (seen.expert_P == expert)).nonzero().flatten()
        if len(own) < HELD_OUT_EVERY:
            return torch.zeros_like(test_P)
        test_P[own[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY]] = True
    return test_P


def _chosen(layer: Layer, seen: Seen, test_P: Tensor, options: MergeOptions) -> tuple[float, float, Tensor]:
    """(strength, scale, the scaled rows of the first fit) with the least cross entropy on the prompts left out."""
    strengths = STRENGTHS if options.gate_mode == "ridge" else (_DEFAULT_STRENGTH,)
    best: tuple[float, float, float, Tensor] | None = None
    rows_of = _rows(layer, seen, ~test_P, options)
    for strength in strengths:
        rows_RD = rows_of(strength)
        scale, nats = _scale(rows_RD, layer, seen, test_P, options)
        if best is None or nats < best[0]:
            best = (nats, strength, scale, rows_RD * scale)
    assert best is not None
    return best[1:]


def _rows(layer: Layer, seen: Seen, used_P: Tensor, options: MergeOptions) -> Callable[[float], Tensor]:
    """Strength of the ridge -> unscaled rows from some of the prompts."""
    if options.gate_mode == "ridge":
        return _ridge(layer, seen, used_P, options)
    if options.gate_mode == "mean":
        rows_RD = _means(layer.x_TD, seen, used_P, len(options.experts))
    else:
        assert layer.vectors_PD is not None
        rows_RD = _hidden(layer.vectors_PD, seen, used_P)
    return lambda strength: rows_RD


def _hidden(vectors_PD: Tensor, seen: Seen, used_P: Tensor) -> Tensor:
    rows = []
    for expert in range(int(seen.expert_P.max()) + 1):
        own_P = used_P & (seen.expert_P == expert)
        row_D = vectors_PD[own_P & seen.positive_P].mean(0)
        if (own_P & ~seen.positive_P).any():
            row_D = row_D - vectors_PD[own_P & ~seen.positive_P].mean(0)
        rows.append(row_D / row_D.norm().clamp(min=1e-8))
    return torch.stack(rows)


def mergekit_rows(vectors_LPD: Tensor, seen: Seen) -> Tensor:
    """[layers, E, D]: mergekit's rows of every layer, from all prompts."""
    everything = torch.ones(len(seen.expert_P), dtype=torch.bool)
    return torch.stack([_hidden(vectors_PD, seen, everything) for vectors_PD in vectors_LPD])


def _means(x_TD: Tensor, seen: Seen, used_P: Tensor, num_experts: int) -> Tensor:
    expert_T, positive_T, used_T = seen.expert_P[seen.prompt_T], seen.positive_P[seen.prompt_T], used_P[seen.prompt_T]
    means_ED = torch.stack([x_TD[used_T & positive_T & (expert_T == e)].mean(0) for e in range(num_experts)])
    centre_D = means_ED.mean(0)
    rows_ED = means_ED - centre_D
    for e in range(num_experts):
        if (negative_T := used_T & ~positive_T & (expert_T == e)).any():
            rows_ED[e] -= x_TD[negative_T].mean(0) - centre_D
    along_E1 = rows_ED @ centre_D[:, None] / centre_D.square().sum().clamp(min=1e-12)
    rows_ED = rows_ED - along_E1 * centre_D
    return rows_ED / rows_ED.norm(dim=1, keepdim=True).clamp(min=1e-8)


def _ridge(layer: Layer, seen: Seen, used_P: Tensor, options: MergeOptions) -> Callable[[float], Tensor]:
    used_T = used_P[seen.prompt_T]
    x_tD, expert_t = layer.x_TD[used_T].double(), seen.expert_P[seen.prompt_T][used_T]
    sign_t = torch.where(seen.positive_P[seen.prompt_T][used_T], 1.0, -1.0).double()
    count = len(options.experts)
    target_tE = torch.nn.functional.one_hot(expert_t, count).double() - 1 / count
    target_tR = (target_tE[:, :, None] * _part_shares(layer, used_T, expert_t, options)).flatten(1)
    weight_t = 1.0 / torch.bincount(expert_t, minlength=count).clamp(min=1)[expert_t].double()
    gram_DD = x_tD.T @ (x_tD * weight_t[:, None])
    cross_DR = x_tD.T @ (target_tR * (sign_t * weight_t)[:, None])

    def solved(strength: float) -> Tensor:
        ridged_DD = gram_DD + strength * gram_DD.diagonal().mean() * torch.eye(len(gram_DD), dtype=torch.float64)
        return torch.cholesky_solve(cross_DR, torch.linalg.cholesky(ridged_DD)).T.float()

    return solved


def _part_shares(layer: Layer, used_T: Tensor, expert_t: Tensor, options: MergeOptions) -> Tensor:
    """[t, E, G]: what a part adds to its expert's output for a token, over the mean of the parts; 1 elsewhere."""
    shares_tEG = torch.ones(len(expert_t), len(options.experts), options.parts, dtype=torch.float64)
    x_tD = layer.x_TD[used_T]
    for e, ffn in enumerate(layer.ffns or ()):
        own_t = expert_t == e
        h_tF = hidden(ffn, x_tD[own_t])
        width = h_tF.shape[1] // options.parts
        norms = [
            (h_tF[:, part : part + width] @ ffn.down_DF[:, part : part + width].T).norm(dim=1)
            for part in range(0, h_tF.shape[1], width)
        ]
        norms_tG = torch.stack(norms, dim=1).double()
        shares_tEG[own_t, e] = norms_tG / norms_tG.mean(1, keepdim=True).clamp(min=1e-12)
    return shares_tEG


def _scale(rows_RD: Tensor, layer: Layer, seen: Seen, used_P: Tensor, options: MergeOptions) -> tuple[float, float]:
    """(factor on the rows, cross entropy in nats) of the best softmax; the factor is 1 for mergekit's modes."""
    logits_tR, expert_t = _logits(rows_RD, layer.x_TD, seen, used_P, options)
    scales = _SCALES if options.gate_mode in ("ridge", "mean") else torch.ones(1)
    nats = []
    for scale in scales:
        log_p_tE = (logits_tR * scale).log_softmax(1).unflatten(1, (len(options.experts), -1)).logsumexp(2)
        nats.append(-_balanced(log_p_tE.gather(1, expert_t[:, None])[:, 0], expert_t))
    best = min(range(len(scales)), key=lambda i: nats[i])
    return scales[best].item(), nats[best]


def _logits(rows_RD: Tensor, x_TD: Tensor, seen: Seen, used_P: Tensor, options: MergeOptions) -> tuple[Tensor, Tensor]:
    """(logits [t, E*G], expert [t]) of the tokens of these positive prompts of routed experts."""
    count = len(options.experts)
    wanted_P = used_P & seen.positive_P & (seen.expert_P < count)
    wanted_T = wanted_P[seen.prompt_T]
    return x_TD[wanted_T] @ rows_RD[: num_routed(options)].T, seen.expert_P[seen.prompt_T[wanted_T]]


def _balanced(values_t: Tensor, expert_t: Tensor) -> float:
    """The mean over experts of the mean over their tokens."""
    return torch.stack([values_t[expert_t == expert].mean() for expert in expert_t.unique()]).mean().item()


def routed(rows_RD: Tensor, x_TD: Tensor, seen: Seen, used_P: Tensor, options: MergeOptions) -> dict[str, Tensor]:
    """How the tokens of some prompts are routed.

    Returns:
        accuracy: share of the tokens whose most likely expert is that of their prompt, a mean over the experts.
        entropy: of the softmax over the experts, over that of equal ones.
        load: share of the chosen places, of each row.
    """
    logits_tR, expert_t = _logits(rows_RD, x_TD, seen, used_P, options)
    p_tE = logits_tR.softmax(1).unflatten(1, (len(options.experts), -1)).sum(2)
    accuracy = _balanced((p_tE.argmax(1) == expert_t).float(), expert_t)
    entropy = -(p_tE * p_tE.clamp(min=1e-12).log()).sum(1)
    greatest = torch.tensor(float(max(2, len(options.experts)))).log()
    rows = logits_tR.shape[1]
    top = options.num_active if rows > len(options.experts) else options.experts_per_token
    chosen = logits_tR.topk(top, dim=1).indices
    load = torch.bincount(chosen.flatten(), minlength=rows).float() / chosen.numel()
    return {
        "accuracy": torch.tensor(accuracy), "entropy": torch.tensor(_balanced(entropy / greatest, expert_t)),
        "load": load,
    }  # fmt: skip
