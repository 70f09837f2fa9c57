"""Which experts a token would choose if it knew their outputs: a control, the upper bound of any router.

`largest` takes the K largest |W_down,e h_e|. `best` goes on from there: experts' outputs cancel or add up, so it
exchanges a chosen expert for a dropped one as long as that lowers |sum of the dropped outputs|^2 = d' M d, with M the
Gram matrix of the token's expert outputs and d the dropped ones.

Shapes: T tokens, D width, E experts, K chosen.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lamella.calibrate.sample import LayerSample, Partition, choose, expert_norms, expert_outputs, rows

TOKENS_AT_ONCE = 1024
"""Bounds the memory of the outputs [T, E, D]."""


def largest(sample: LayerSample, partition: Partition, num_chosen: int) -> Tensor:
    """int64 [T, K]: the experts with the largest outputs."""
    return choose(expert_norms(sample, partition), num_chosen)


def best(sample: LayerSample, partition: Partition, num_chosen: int) -> Tensor:
    """int64 [T, K]: no exchange of two experts brings the token's output nearer to the dense one."""
    gram_TEE = output_grams(sample, partition)
    start_TK = choose(gram_TEE.diagonal(dim1=1, dim2=2), num_chosen)
    dropped_TE = torch.ones(gram_TEE.shape[:2]).scatter_(1, start_TK, 0.0)
    for _ in range(2 * gram_TEE.shape[1]):
        if not _exchange(gram_TEE, dropped_TE):
            break
    return choose(1 - dropped_TE, num_chosen)


def output_grams(sample: LayerSample, partition: Partition) -> Tensor:
    """[T, E, E]: inner products of each token's expert outputs."""
    grams = []
    for tokens in torch.arange(len(sample.x_TD)).split(TOKENS_AT_ONCE):
        outputs_TED = expert_outputs(rows(sample, tokens), partition)
        grams.append(outputs_TED @ outputs_TED.mT)
    return torch.cat(grams)


def _exchange(gram_TEE: Tensor, dropped_TE: Tensor) -> bool:
    """Make each token's best exchange, in place; False where there is none left.

    Keeping i and dropping j changes d' M d by (M_ii - 2 (M d)_i) + (M_jj + 2 (M d)_j) - 2 M_ij.
    """
    T, E = dropped_TE.shape
    sums_TE = (gram_TEE @ dropped_TE[..., None]).squeeze(-1)
    own_TE = gram_TEE.diagonal(dim1=1, dim2=2)
    change_TEE = (own_TE - 2 * sums_TE)[:, :, None] + (own_TE + 2 * sums_TE)[:, None, :] - 2 * gram_TEE
    allowed_TEE = (dropped_TE[:, :, None] > 0) & (dropped_TE[:, None, :] == 0)
    gain_T, pair_T = change_TEE.masked_fill(~allowed_TEE, torch.inf).view(T, -1).min(1)
    # Less than rounding is no gain, or two equal experts would be exchanged for ever.
    better = (gain_T < -1e-6 * own_TE.sum(1)).nonzero().flatten()
    dropped_TE[better, pair_T[better] // E] = 0.0
    dropped_TE[better, pair_T[better] % E] = 1.0
    return len(better) > 0
