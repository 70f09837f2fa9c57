"""Selection-bias updates without an auxiliary loss, and the measures of balance.

Updates happen once per optimizer step, outside autograd, from statistics summed over all data-parallel ranks and
micro-batches; the bias only selects, it never weighs (arXiv 2408.15664).

Shapes: E experts, S pairs, T tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lamella.architecture.moe import DENSE_BIAS
from lamella.moe.autograd import Context


def expert_counts(expert_ids_TK: Tensor, num_experts: int) -> Tensor:
    """The tokens that chose each expert, [E] float32. The shape is static and nothing waits for the device."""
    counts_E = torch.zeros(num_experts, device=expert_ids_TK.device)
    ids = expert_ids_TK.flatten()
    return counts_E.scatter_add_(0, ids, torch.ones_like(ids, dtype=counts_E.dtype))


def sign_update(bias_E: Tensor, counts_E: Tensor, rate: float) -> Tensor:
    """bias + rate * sign(mean count - count), zero mean (flat routing). Raw counts instead of signs oscillate."""
    bias_E = bias_E + rate * torch.sign(counts_E.mean() - counts_E)
    return bias_E - bias_E.mean()


def share_bias(margins_TS: Tensor, share: float | Tensor) -> Tensor:
    """[S] bias with which the copies of each pair get `share` of these tokens (twin routing).

    A copy is chosen where margin + 2 bias > 0, so the bias is minus half the (1 - share) quantile of the margins.
    Shares 0 and 1 are exact on any text, not only on this one.

    Args:
        share: 0 to 1; as a float64 scalar on the device it may change without a compiled graph being made anew.
    """
    share = torch.as_tensor(share, dtype=torch.float64, device=margins_TS.device)
    bias_S = -0.5 * _at_share(margins_TS, share)
    bias_S = torch.where(share <= 0, DENSE_BIAS, bias_S)
    return torch.where(share >= 1, -DENSE_BIAS, bias_S)


def quantile_bias(scores_TE: Tensor, share: float | Tensor) -> Tensor:
    """[E] biases with which each expert's score + bias is positive for `share` of these tokens (flat routing).

    That is minus the (1 - share) quantile of its scores; with share = K/E, K experts are positive in the mean, so
    choosing the K largest keeps near to every expert's share. Step-free: nothing to tune, nothing to oscillate.
    """
    share = torch.as_tensor(share, dtype=torch.float64, device=scores_TE.device)
    bias_E = -_at_share(scores_TE, share)
    return bias_E - bias_E.mean()


def _at_share(values_TE: Tensor, share: Tensor) -> Tensor:
    """The values [E] that `share` of each column's T are above."""
    ordered_TE = values_TE.float().sort(dim=0).values
    position = ((1 - share) * len(ordered_TE)).long().clamp(0, len(ordered_TE) - 1)
    return ordered_TE.index_select(0, position[None])[0]


def pair_choice_loss(scores_TE: Tensor, targets_T: Tensor) -> Tensor:
    """Sum over the tokens of the mean over their pairs of -log p, p the pair's score for the expert wanted (twin
    routing): a binary cross-entropy on the router's choice.

    Args:
        targets_T: 0 wants the slices, 1 the twins; NaN wants nothing, and counts 0.
    """
    frozen_TS, trainable_TS = scores_TE.float().clamp_min(1e-37).chunk(2, dim=-1)
    target_T1, wanted_T1 = targets_T.nan_to_num()[:, None], ~targets_T.isnan()[:, None]
    # Logarithms of both: one score and 1 minus it would leave no gradient where a router is sure and wrong.
    log_TS = torch.lerp(frozen_TS.log(), trainable_TS.log(), target_T1.expand_as(frozen_TS))
    log_sum_TS = (frozen_TS + trainable_TS).log()  # 0 but for the gate softmax
    return ((log_sum_TS - log_TS) * wanted_T1).mean(dim=-1).sum()


FIRST_BALANCED = 8192
"""So many of the tokens `balanced_bias` looks at first."""


@torch.no_grad()
def balanced_bias(scores_TE: Tensor, bias_E: Tensor, top_k: int, target: float, max_rounds: int = 2000) -> Tensor:
    """[E] biases under which these tokens' MaxVio is at most `target`, found by sign updates with a falling rate.

    The rate is a share of the scores' spread: an absolute one is too slow for large scores and oscillates on small
    ones. Of many tokens a part is balanced first, which leaves a few rounds for all of them. Where the target cannot be
    reached (fewer tokens than experts), the best of all rounds; where all tokens have the same scores (a router of
    zeros), `bias_E`.
    """
    if (scores_TE == scores_TE[:1]).all():
        return bias_E
    first_round = 0
    if len(scores_TE) >= 2 * FIRST_BALANCED:
        bias_E = balanced_bias(scores_TE[:: len(scores_TE) // FIRST_BALANCED], bias_E, top_k, target, max_rounds)
        first_round = 500  # what is left to move is small
    spread = (scores_TE + bias_E).std().item() or 1.0
    best_E, best = bias_E, float("inf")
    for round_ in range(first_round, first_round + max_rounds):
        ids_TK = torch.topk(scores_TE + bias_E, top_k, dim=-1, sorted=False).indices
        counts_E = expert_counts(ids_TK, len(bias_E))
        violation = max_violation(counts_E).item()
        if violation < best:
            best_E, best = bias_E, violation
        if best <= target:
            break
        bias_E = sign_update(bias_E, counts_E, 0.03 * spread / (1 + round_ / 50))
    return best_E


def auxiliary_loss(scores_TE: Tensor, expert_ids_TK: Tensor) -> Tensor:
    """E sum over e of f_e P_e (Switch Transformer, arXiv 2101.03961): 1 when load or probability is even, E/K when K
    experts have everything. f_e: share of the routed rows that expert e got, without gradient. P_e: mean over the
    tokens of the score's share in the token's scores.

    Scores must be positive (sigmoid or softmax).
    """
    E = scores_TE.shape[-1]
    f_E = expert_counts(expert_ids_TK, E) / expert_ids_TK.numel()
    p_E = (scores_TE / scores_TE.sum(dim=-1, keepdim=True)).mean(dim=0)
    return E * (f_E * p_E).sum()


class LossContext(Context):
    """What `_AddGradientOf` keeps: the dtype of its loss."""

    dtype: torch.dtype


class _AddGradientOf(torch.autograd.Function):
    """y, with the gradient of `loss` added to the graph's: the loss need not travel to where losses are summed."""

    @staticmethod
    def forward(ctx: LossContext, y: Tensor, loss: Tensor) -> Tensor:
        ctx.dtype = loss.dtype
        return y.view_as(y)

    @staticmethod
    def backward(ctx: LossContext, dy: Tensor) -> tuple[Tensor, Tensor]:
        return dy, torch.ones((), dtype=ctx.dtype, device=dy.device)


def add_gradient_of(y: Tensor, loss: Tensor) -> Tensor:
    """y unchanged; its backward pass also runs that of the scalar `loss`."""
    return _AddGradientOf.apply(y, loss)


def max_violation(counts_E: Tensor) -> Tensor:
    """MaxVio = (max count - mean) / mean: 0 when balanced, E - 1 when one expert has everything."""
    mean = counts_E.mean()
    return (counts_E.max() - mean) / mean


def routing_entropy(counts_E: Tensor) -> Tensor:
    """Entropy of the load over the experts, over log E: 1 when balanced, 0 when one expert has everything."""
    p_E = counts_E / counts_E.sum()
    return -(p_E * p_E.clamp_min(1e-12).log()).sum() / torch.log(torch.tensor(float(len(counts_E))))
