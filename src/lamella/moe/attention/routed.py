"""Attention experts computed from routed rows alone (`lamella.moe.attention.heads` has the definition).

Per expert its tokens' queries, per key/value head the keys of the tokens that an expert of it was given, then one
attention over lanes (an expert in a sequence) padded to the longest, and per expert its columns of o.

Shapes: B sequences, L tokens of each in this call, T = B*L, D model width, E experts, G key/value heads, m = E/G,
h query heads per expert, H head width, R (token, expert) rows sorted by expert, then token, N stored keys, A lanes,
Q and P places of queries and keys in a lane.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from lamella.moe.attention.heads import AttentionWeights, Context, Projection, expert_weights, in_order, rotated
from lamella.moe.attention.ragged import Keys, Padded, pad, pad_keys
from lamella.moe.routing import Routing


def attend_routed(
    x_BLD: Tensor,
    w: AttentionWeights,
    routing: Routing,
    context: Context,
    remember: Callable[[Keys], Keys] | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """The attention's output [B, L, D], computed from routed rows alone; as `attend_masked` up to the order of sums.

    Args:
        remember: takes this call's keys and gives back those to attend over, earlier ones first; None: these alone.
        dropout: the probability with which an attention weight is dropped.
    """
    B, L, D = x_BLD.shape
    chosen_TE, weights_TE = expert_weights(routing, w.num_experts)
    chosen_TE = chosen_TE & context.real_BL().reshape(-1, 1)
    y_TD = torch.zeros(B * L, D, dtype=torch.float32, device=x_BLD.device)
    expert_R, token_R = chosen_TE.t().nonzero(as_tuple=True)
    keys = _keys(x_BLD, w, chosen_TE, context)
    keys = keys if remember is None else remember(keys)
    if len(token_R):
        q_RhH = _queries(x_BLD, w, expert_R, token_R, context)
        out_RA = _attend(q_RhH, expert_R, token_R, keys, context, dropout)
        weights_R = weights_TE[token_R, expert_R]
        y_TD = _add_outputs(y_TD, out_RA, w, expert_R, token_R, weights_R)
    y_TD = y_TD if w.o.bias is None else y_TD + w.o.bias
    return y_TD.to(x_BLD.dtype).view_as(x_BLD)


def _project(x_TD: Tensor, projection: Projection, part_R: Tensor, token_R: Tensor, parts: int) -> Tensor:
    """[R, width / parts]: each row through its own part of the outputs. Rows come sorted by part."""
    counts = torch.bincount(part_R, minlength=parts).tolist()
    groups = enumerate(token_R.split(counts))
    return torch.cat([F.linear(x_TD[ids], *projection.rows(i, parts)) for i, ids in groups if len(ids)])


def _queries(x_BLD: Tensor, w: AttentionWeights, expert_R: Tensor, token_R: Tensor, context: Context) -> Tensor:
    """The queries [R, h, H] of the routed rows, after norm and rope."""
    q = _project(x_BLD.flatten(0, 1), w.q, expert_R, token_R, w.num_experts).unflatten(1, (-1, w.head_width))
    q = q if w.q_norm is None else w.q_norm(q)
    cos, sin = (table.flatten(0, 1)[token_R][:, None] for table in (context.cos_BLH, context.sin_BLH))
    return rotated(q, cos, sin)


def _keys(x_BLD: Tensor, w: AttentionWeights, chosen_TE: Tensor, context: Context) -> Keys:
    """The keys and values of the tokens that an expert of their head was given."""
    x_TD, L = x_BLD.flatten(0, 1), x_BLD.shape[1]
    chosen_TGm = chosen_TE.unflatten(1, (w.num_kv_heads, -1))
    head_N, token_N = chosen_TGm.any(2).t().nonzero(as_tuple=True)
    if not len(token_N):
        key_NH = value_NH = x_TD.new_zeros(0, w.head_width)
    else:
        key_NH, value_NH = (_project(x_TD, p, head_N, token_N, w.num_kv_heads) for p in (w.k, w.v))
    key_NH = key_NH if w.k_norm is None else w.k_norm(key_NH)
    key_NH = rotated(key_NH, *(table.flatten(0, 1)[token_N] for table in (context.cos_BLH, context.sin_BLH)))
    sequence_N, time_N = token_N // L, token_N % L + context.seen
    return Keys(key_NH, value_NH, sequence_N.int(), head_N.int(), time_N.int(), chosen_TGm[token_N, head_N])


def _attend(q_RhH: Tensor, expert_R: Tensor, token_R: Tensor, keys: Keys, context: Context, dropout: float) -> Tensor:
    """What every routed row's heads attend to, [R, h*H]."""
    B, L = context.cos_BLH.shape[:2]
    lanes_A, lane_R = torch.unique(expert_R * B + token_R // L, return_inverse=True)
    queries, stored = pad(lane_R, len(lanes_A)), pad_keys(keys, lanes_A, B)
    q_AhQH = q_RhH[queries.index_AP].transpose(1, 2)
    k, v = (x[stored.index_AP][:, None].expand(-1, q_AhQH.shape[1], -1, -1) for x in (keys.key_NH, keys.value_NH))
    # Without a mask and earlier keys, a lane's queries and keys are the same tokens: causal as it stands, and what
    # fills a lane up comes after all that counts.
    causal = context.seen == 0 and context.mask_BLS is None and (context.window is None or context.window >= L)
    mask = None if causal else _visible(token_R, lanes_A % B, queries, stored, keys, context, L)[:, None]
    out_AhQH = F.scaled_dot_product_attention(q_AhQH, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal)
    out_FA = out_AhQH.transpose(1, 2)[queries.filled_AP].flatten(1)
    back_R = torch.empty_like(token_R)
    back_R[queries.index_AP[queries.filled_AP]] = torch.arange(len(token_R), device=token_R.device)
    return out_FA[back_R]


def _visible(
    token_R: Tensor, sequence_A: Tensor, queries: Padded, stored: Padded, keys: Keys, context: Context, L: int
) -> Tensor:
    """bool [A, Q, P]: which of its lane's keys each query sees. Empty places of queries see all: no row is empty."""
    query_AQ1 = (token_R[queries.index_AP] % L)[:, :, None]
    time_A1P = keys.time_N[stored.index_AP].long()[:, None]
    visible = in_order(query_AQ1 + context.seen, time_A1P, context.window)
    if context.mask_BLS is not None:
        first_column = context.seen + L - context.mask_BLS.shape[2]
        visible = visible & context.mask_BLS[sequence_A[:, None, None], query_AQ1, (time_A1P - first_column).clamp(0)]
    return (visible & stored.filled_AP[:, None]) | ~queries.filled_AP[:, :, None]


def _add_outputs(
    y_TD: Tensor, out_RA: Tensor, w: AttentionWeights, expert_R: Tensor, token_R: Tensor, weights_R: Tensor
) -> Tensor:
    """Each expert's columns of o, weighed, added up per token in float32."""
    counts = torch.bincount(expert_R, minlength=w.num_experts).tolist()
    columns = w.o.weight.chunk(w.num_experts, dim=1)
    parts = (tensor.split(counts) for tensor in (out_RA, token_R, weights_R))
    for column_DA, out_rA, token_r, weights_r in zip(columns, *parts, strict=True):
        if len(token_r):
            y_TD = y_TD.index_add(0, token_r, F.linear(out_rA, column_DA).float() * weights_r[:, None])
    return y_TD
