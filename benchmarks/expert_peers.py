"""What experts.py measures: one MoE layer's weights, and the implementations of others that are given them.

Each builder raises ImportError, or whatever the peer raises, where the peer cannot run; experts.py says so in one line.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lamella.architecture.moe import MoEConfig
from lamella.moe.packed import Experts

SLICES = 8


@dataclasses.dataclass
class Layer:
    """The weights and the input that every implementation gets."""

    x_TD: Tensor
    dy_TD: Tensor
    router_SD: Tensor
    bias_S: Tensor
    frozen: Experts
    trainable: Experts
    config: MoEConfig


def make_layer(T: int, D: int, F_: int, device: torch.device, dtype: torch.dtype) -> Layer:
    torch.manual_seed(0)
    f = F_ // SLICES
    config = MoEConfig(SLICES, SLICES, f, SLICES, (0,), route_scale=float(SLICES))

    def random(*shape: int, std: float, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, device=device, dtype=dtype) * std

    def experts() -> Experts:
        return Experts(random(SLICES, 2 * f, D, std=D**-0.5), random(SLICES, D, f, std=F_**-0.5))

    return Layer(
        random(T, D, std=1), random(T, D, std=1), random(SLICES, D, std=D**-0.5),
        torch.zeros(SLICES, device=device), experts(), experts(), config,
    )  # fmt: skip


Implementation = tuple[Callable[[Tensor], Tensor], list[Tensor]]
"""(forward, the leaves that train)"""


def leaf(t: Tensor) -> Tensor:
    return t.detach().clone().requires_grad_()


def dense(layer: Layer) -> Implementation:
    """The FFN of the same active width, training all its weights."""
    f, D = layer.config.moe_intermediate_size, layer.x_TD.shape[1]
    gate_up = layer.trainable.gate_up_proj.view(SLICES, 2, f, D)
    gate, up = leaf(gate_up[:, 0].reshape(-1, D)), leaf(gate_up[:, 1].reshape(-1, D))
    down = leaf(layer.trainable.down_proj.transpose(0, 1).reshape(D, -1))
    return lambda x: F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down), [gate, up, down]


def all_experts(layer: Layer) -> Implementation:
    """Every expert for every token, unchosen ones weighted 0."""
    gate_up = leaf(torch.cat([layer.frozen.gate_up_proj, layer.trainable.gate_up_proj]))
    down = leaf(torch.cat([layer.frozen.down_proj, layer.trainable.down_proj]))
    router = leaf(_mirrored(layer.router_SD))

    def forward(x: Tensor) -> Tensor:
        scores = F.linear(x.float(), router.float()).sigmoid()
        chosen = scores.topk(SLICES, dim=-1).indices
        weights = torch.zeros_like(scores).scatter(1, chosen, scores.gather(1, chosen))
        weights = (weights / weights.sum(-1, keepdim=True) * SLICES).to(x.dtype)
        gate, up = torch.einsum("td,efd->tef", x, gate_up).chunk(2, dim=-1)
        return torch.einsum("tef,edf->td", F.silu(gate) * up * weights[..., None], down)

    return forward, [gate_up, down, router]


def _mirrored(router_SD: Tensor) -> Tensor:
    return torch.cat([-router_SD, router_SD])


def transformers_block(layer: Layer, family: str, implementation: str) -> Implementation:
    from transformers import AutoConfig
    from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeMoE
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    D, f = layer.x_TD.shape[1], layer.config.moe_intermediate_size
    common = {"hidden_size": D, "num_experts_per_tok": SLICES}
    if family == "glm4_moe":
        config = AutoConfig.for_model(
            family, **common, moe_intermediate_size=f, n_routed_experts=2 * SLICES, n_shared_experts=1, n_group=1,
            topk_group=1, routed_scaling_factor=float(SLICES), norm_topk_prob=True,
        )  # fmt: skip
    else:
        config = AutoConfig.for_model(family, **common, intermediate_size=f, num_local_experts=2 * SLICES)
    config._experts_implementation = implementation
    with torch.device(layer.x_TD.device):
        block = (Glm4MoeMoE if family == "glm4_moe" else MixtralSparseMoeBlock)(config)
    block.experts.gate_up_proj = nn.Parameter(torch.cat([layer.frozen.gate_up_proj, layer.trainable.gate_up_proj]))
    block.experts.down_proj = nn.Parameter(torch.cat([layer.frozen.down_proj, layer.trainable.down_proj]))
    block.gate.weight = nn.Parameter(_mirrored(layer.router_SD))
    if family == "glm4_moe":
        block.gate.e_score_correction_bias.zero_()
        block.shared_experts = nn.Module()
        block.shared_experts.forward = lambda x: 0.0  # no shared expert: only the routed ones are compared

    def forward(x: Tensor) -> Tensor:
        y = block(x[None])
        return (y[0] if isinstance(y, tuple) else y)[0]

    return forward, [block.experts.gate_up_proj, block.experts.down_proj, block.gate.weight]


def torchtitan_block(layer: Layer) -> Implementation:
    """torchtitan's MoE, which computes its experts in bf16 whatever the parameters' dtype."""
    from torchtitan.models.common.config_utils import make_moe_config, make_routed_experts_config, make_router_config

    import lamella.titan  # noqa: F401  lets torchtitan run without an accelerator

    D, f = layer.x_TD.shape[1], layer.config.moe_intermediate_size
    init = {"weight": nn.init.zeros_}
    E = 2 * SLICES
    with torch.device(layer.x_TD.device):
        block = make_moe_config(
            num_experts=E,
            load_balance_coeff=1e-3,
            router=make_router_config(
                dim=D, num_experts=E, gate_param_init=init, top_k=SLICES, score_func="sigmoid", route_norm=True,
                route_scale=float(SLICES),
            ),
            routed_experts=make_routed_experts_config(
                dim=D, hidden_dim=f, num_experts=E, top_k=SLICES, comm_backend="standard",
                param_init=dict.fromkeys(("w1_EFD", "w2_EDF", "w3_EFD"), nn.init.zeros_),
            ),
        ).build()  # fmt: skip
    experts = block.routed_experts.inner_experts
    gate_up = torch.cat([layer.frozen.gate_up_proj, layer.trainable.gate_up_proj])
    experts.w1_EFD = nn.Parameter(gate_up[:, :f].clone())
    experts.w3_EFD = nn.Parameter(gate_up[:, f:].clone())
    experts.w2_EDF = nn.Parameter(torch.cat([layer.frozen.down_proj, layer.trainable.down_proj]))
    block.router.gate.weight = nn.Parameter(_mirrored(layer.router_SD))
    block.expert_bias_E.zero_()
    return lambda x: block(x[None])[0], [experts.w1_EFD, experts.w2_EDF, experts.w3_EFD, block.router.gate.weight]


def sonic_block(layer: Layer) -> Implementation:
    """SonicMoE (arXiv 2512.14080) by its own package: rows are sorted by token, gate and up rows alternate."""
    if not torch.cuda.is_available():
        raise ImportError("its kernels need a Hopper or Blackwell GPU")
    from sonicmoe.enums import ActivationType
    from sonicmoe.functional import moe_general_routing_inputs

    f, D = layer.config.moe_intermediate_size, layer.x_TD.shape[1]
    gate_up = torch.cat([layer.frozen.gate_up_proj, layer.trainable.gate_up_proj])
    E = len(gate_up)
    gate_up_E2fD = leaf(gate_up.view(E, 2, f, D).transpose(1, 2).reshape(E, 2 * f, D))
    down_EDf = leaf(torch.cat([layer.frozen.down_proj, layer.trainable.down_proj]))
    router = leaf(_mirrored(layer.router_SD))

    def forward(x: Tensor) -> Tensor:
        scores = F.linear(x.float(), router.float()).sigmoid()
        weights_TK, ids_TK = scores.topk(SLICES, dim=-1)
        weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True) * SLICES
        token_N = torch.arange(len(x), device=x.device, dtype=torch.int32).repeat_interleave(SLICES)
        arguments: dict[str, Any] = {
            "E": E, "stream_id": torch.cuda.current_stream().cuda_stream, "activation_type": ActivationType.SWIGLU,
            "is_inference_mode_enabled": not torch.is_grad_enabled(),
        }  # fmt: skip
        return moe_general_routing_inputs(
            x, weights_TK.flatten(), token_N, ids_TK.flatten().int(), gate_up_E2fD.permute(1, 2, 0), None,
            down_EDf.permute(1, 2, 0), None, **arguments,
        )[0]  # fmt: skip

    return forward, [gate_up_E2fD, down_EDf, router]


PEERS: dict[str, Callable[[Layer], Implementation]] = {
    **{
        f"transformers {family} {kind}": lambda layer, family=family, kind=kind: transformers_block(layer, family, kind)
        for family in ("glm4_moe", "mixtral")
        for kind in ("eager", "grouped_mm")
    },
    "transformers glm4_moe sonicmoe": lambda layer: transformers_block(layer, "glm4_moe", "sonicmoe"),
    "torchtitan MoE": torchtitan_block,
    "SonicMoE": sonic_block,
    "every expert, einsum": all_experts,
}
