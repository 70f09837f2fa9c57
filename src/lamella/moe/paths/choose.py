"""The paths by which the chosen experts of every token are computed: one result.

    y_t = sum over k of weight_tk * down_e (act(gate_e x_t) * (up_e x_t)),  e = expert_ids_tk

`loop` is the oracle. `batched` pads every expert to the fullest one and uses batched matmul; `grouped` sorts the
rows by expert and uses grouped matmul; `quack` does the same by the products of quack-kernels, where that package is,
and `fused` by Triton kernels that gather, weigh and activate on the way, silu alone; `tiled` is the loop with a
backward pass of its own, the fastest on a CPU. grouped, quack and fused wait for no host.
Frozen and trainable experts stay separate tensors: joining them would copy all weights every step.

Shapes: T tokens, D model width, f neurons per expert, K active experts, N = T*K routed rows, C rows per expert.
"""

from __future__ import annotations

from functools import partial
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from lamella.architecture.moe import Activation, ExpertPath
from lamella.moe.activations import ACTIVATIONS
from lamella.moe.packed import Experts
from lamella.moe.paths.decode import decode_path
from lamella.moe.paths.fused import fused_fits, fused_path
from lamella.moe.paths.grouped import grouped_fits, grouped_path
from lamella.moe.paths.measured import PathFunction, fastest
from lamella.moe.paths.quack_path import quack_fits, quack_path
from lamella.moe.paths.tiled import tiled_path
from lamella.moe.routing import Routing


def apply_experts(
    x_TD: Tensor,
    routing: Routing,
    frozen: Experts,
    trainable: Experts,
    path: ExpertPath = "auto",
    activation: Activation = "silu",
) -> Tensor:
    """The weighted sum [T, D] of the outputs of each token's experts, computed by the named path.

    Args:
        path: a key of PATHS, or "auto" for the fastest that fits, see `fitting_paths`.

    Raises:
        UserError: the path does not fit the device, the dtype or the activation.
    """
    if path == "auto":
        fitting = fitting_paths(x_TD, trainable if len(trainable.down_proj) else frozen, activation)
        paths = {name: _computing(name, activation) for name in fitting}
        path = fastest(x_TD, routing, frozen, trainable, paths, activation=activation)
        if path == "tiled" and x_TD.shape[0] == 1 and not torch.is_grad_enabled():
            return decode_path(x_TD, routing, frozen, trainable, activation)
    return PATHS[path](x_TD, routing, frozen, trainable, activation)


def _computing(path: ExpertPath, activation: Activation) -> PathFunction:
    """The path with its activation."""
    return PATHS[path] if activation == "silu" else partial(PATHS[path], activation=activation)


def fitting_paths(x_TD: Tensor, experts: Experts, activation: Activation = "silu") -> list[ExpertPath]:
    """The paths worth trying on this device with this dtype, widths and activation; the first is the best guess.

    On a CPU `tiled` is the fastest at every size that was measured. On a GPU `lamella.moe.paths.measured` chooses.
    """
    if x_TD.device.type == "cpu":
        return ["tiled"]
    names: list[ExpertPath] = ["fused"] if fused_fits(x_TD, experts, activation) else []
    names += ["grouped"] if grouped_fits(x_TD, experts) else []
    names += ["quack"] if quack_fits(x_TD, experts) else []
    return names or ["batched"]


def gated_ffn(x_ND: Tensor, gate_up_2fD: Tensor, down_Df: Tensor, activation: Activation = "silu") -> Tensor:
    """One expert on its rows [N, D]: down (act(gate x) * (up x)), [N, D]."""
    gate_Nf, up_Nf = F.linear(x_ND, gate_up_2fD).chunk(2, dim=-1)
    return F.linear(ACTIVATIONS[activation](gate_Nf) * up_Nf, down_Df)


def loop_path(
    x_TD: Tensor, routing: Routing, frozen: Experts, trainable: Experts, activation: Activation = "silu"
) -> Tensor:
    """One expert after another, on exactly the tokens that chose it."""
    y_TD = torch.zeros_like(x_TD)
    weights_TK = routing.weights_TK.to(x_TD.dtype)
    S = len(frozen.down_proj)
    for e in range(S + len(trainable.down_proj)):
        experts, i = (frozen, e) if e < S else (trainable, e - S)
        token, k = torch.where(routing.expert_ids_TK == e)
        y_ND = gated_ffn(x_TD[token], experts.gate_up_proj[i], experts.down_proj[i], activation)
        y_TD = y_TD.index_add(0, token, y_ND * weights_TK[token, k, None])
    return y_TD


def batched_path(
    x_TD: Tensor, routing: Routing, frozen: Experts, trainable: Experts, activation: Activation = "silu"
) -> Tensor:
    """Batched matmul on the packed tensors; each expert's rows are padded with zeros to those of the fullest one."""
    E, D = len(frozen.down_proj) + len(trainable.down_proj), x_TD.shape[1]
    order_N, counts_E = _sort_by_expert(routing.expert_ids_TK, E)
    starts_E = counts_E.cumsum(0) - counts_E
    C = int(counts_E.max())
    expert_N = routing.expert_ids_TK.flatten()[order_N]
    slot_N = expert_N * C + torch.arange(len(order_N), device=x_TD.device) - starts_E[expert_N]
    token_N = order_N // routing.expert_ids_TK.shape[1]
    x_ECD = x_TD.new_zeros(E * C, D).index_copy(0, slot_N, x_TD[token_N]).view(E, C, D)
    S = len(frozen.down_proj)
    halves = ((x_ECD[:S], frozen), (x_ECD[S:], trainable))
    y_ECD = torch.cat([_batched_ffn(x_eCD, experts, activation) for x_eCD, experts in halves])
    return _combine(y_ECD.view(E * C, D)[slot_N], order_N, routing)


def _batched_ffn(x_ECD: Tensor, experts: Experts, activation: Activation) -> Tensor:
    gate_ECf, up_ECf = torch.bmm(x_ECD, experts.gate_up_proj.mT).chunk(2, dim=-1)
    return torch.bmm(ACTIVATIONS[activation](gate_ECf) * up_ECf, experts.down_proj.mT)


def _sort_by_expert(expert_ids_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """(order [N]: positions in the flattened ids, sorted by expert and then by token; counts [E])."""
    ids_N = expert_ids_TK.flatten()
    return ids_N.argsort(stable=True), torch.bincount(ids_N, minlength=num_experts)


def _combine(y_ND: Tensor, order_N: Tensor, routing: Routing) -> Tensor:
    """Undo the sort and add up each token's weighted rows."""
    T, K = routing.expert_ids_TK.shape
    y_TKD = torch.empty_like(y_ND).index_copy(0, order_N, y_ND).view(T, K, -1)
    return torch.bmm(routing.weights_TK.to(y_ND.dtype).unsqueeze(1), y_TKD).squeeze(1)


class AnyActivation(Protocol):
    """A path, told what its experts compute."""

    def __call__(
        self, x_TD: Tensor, routing: Routing, frozen: Experts, trainable: Experts, activation: Activation = "silu"
    ) -> Tensor: ...


PATHS: dict[ExpertPath, AnyActivation] = {
    "loop": loop_path,
    "batched": batched_path,
    "grouped": grouped_path,
    "fused": fused_path,
    "quack": quack_path,
    "tiled": tiled_path,
}
