"""The MoE layer in torchtitan: modules that hold its weights, and what training adds to its forward pass.

The maths of the experts is in `lamella.moe.experts.moe_ffn`. Parameters start as NaN: all come from a checkpoint.

Shapes: B batch, L sequence, T = B*L tokens, D model width, S slices, E experts, R router rows, f neurons per expert.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Shard
from torchtitan.protocols.module import Module

from lamella.architecture.moe import ExpertPath, Mode, MoEConfig
from lamella.architecture.moe_tensors import PARAMETERS, Kind, expert_shapes, lora_name, packed_name
from lamella.moe.balancing import add_gradient_of, pair_choice_loss
from lamella.moe.experts import MoEWeights, Resident, SharedExpert, moe_ffn, router_scores
from lamella.moe.lora import Lora
from lamella.moe.packed import Experts
from lamella.moe.routing import with_top_k
from lamella.titan.routed import Routed, Router, unset

UNSET = dict.fromkeys((*PARAMETERS, "bias"), unset)


class PackedExperts(Module):
    """Parameters only: frozen and trainable experts apart, so that an optimizer never sees the frozen ones.

    A parameter is a matrix with the rows of all experts one below the other: FSDP cuts rows, which any number of ranks
    shares out evenly, where 3 ranks would share out 8 experts as 3, 3 and 2.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(Module.Config):
        """The model width and the layer's MoE config."""

        dim: int
        moe: MoEConfig

    def __init__(self, config: Config):
        super().__init__()
        moe = config.moe
        self.counts: dict[Kind, int] = {"frozen": moe.num_frozen_experts, "trainable": moe.num_trainable_experts}
        self.shapes = expert_shapes(config.dim, moe.moe_intermediate_size, gated=True)
        """Of one expert's matrices."""
        self.lora_shapes = moe.lora_shapes(config.dim)
        for kind, E in self.counts.items():
            for part, (rows, columns) in self.shapes.items() if E else ():
                self.register_parameter(packed_name(kind, part), nn.Parameter(torch.empty(E * rows, columns)))
        for field, (E, rows, columns) in self.lora_shapes.items():
            self.register_parameter(lora_name(field), nn.Parameter(torch.empty(E * rows, columns)))

    @property
    def frozen(self) -> Experts:
        """This rank's slices."""
        return self._packed("frozen")

    @property
    def trainable(self) -> Experts:
        """This rank's experts that train."""
        return self._packed("trainable")

    @property
    def lora(self) -> Lora | None:
        """The low-rank deltas, if there are any."""
        if not self.lora_shapes:
            return None
        return Lora(*(_here(getattr(self, lora_name(f))).view(self.lora_shapes[f]) for f in Lora._fields))

    def _packed(self, kind: Kind) -> Experts:
        if not self.counts[kind]:
            other: Kind = "frozen" if kind == "trainable" else "trainable"
            return Experts(*(tensor[:0] for tensor in self._packed(other)))
        parts = (getattr(self, packed_name(kind, part)) for part in Experts._fields)
        return Experts(*(_here(t).view(-1, *self.shapes[p]) for t, p in zip(parts, Experts._fields, strict=True)))


def _here(tensor: Tensor) -> Tensor:
    """This rank's rows, where expert parallelism shares out the experts."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _plain(tensor: Tensor) -> Tensor:
    """A weight that ranks of tensor parallelism hold whole, each for tokens of its own: gradients add up."""
    return tensor.to_local(grad_placements=[Partial()]) if isinstance(tensor, DTensor) else tensor


def _plain_or_none(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else _plain(tensor)


class Shared(Module):
    """Parameters only: the expert that is always on, of `width` neurons."""

    @dataclass(kw_only=True, slots=True)
    class Config(Module.Config):
        """The model width and the expert's neurons."""

        dim: int
        width: int

    def __init__(self, config: Config):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(2 * config.width, config.dim))
        self.down_proj = nn.Parameter(torch.empty(config.dim, config.width))


class MoELayer(Routed):
    """The FFN of a block: a mixture of experts. It maps [B, L, D] to [B, L, D]."""

    moe: MoEConfig

    @dataclass(kw_only=True, slots=True)
    class Config(Module.Config):
        """The model width, the layer's MoE config, and how its experts are computed."""

        dim: int
        moe: MoEConfig
        expert_path: ExpertPath = "auto"

    def __init__(self, config: Config):
        super().__init__(config.moe)
        self.path: ExpertPath = config.expert_path
        self.expert_group: torch.distributed.ProcessGroup | None = None
        """The ranks that share out the experts; None: this one holds all."""
        dim, moe, width = config.dim, config.moe, config.moe.shared_intermediate_size
        self.experts = PackedExperts.Config(dim=dim, moe=moe, param_init=UNSET).build()
        self.router = Router.Config(dim=dim, moe=moe, param_init=UNSET).build()
        self.shared = Shared.Config(dim=dim, width=width, param_init=UNSET).build() if width else None
        self.output_bias = nn.Parameter(torch.empty(dim)) if moe.output_bias else None

    @property
    def weights(self) -> MoEWeights:
        """What the layer computes with, as plain tensors of this rank."""
        router, experts, shared = self.router, self.experts, self.shared
        return MoEWeights(
            _plain(router.weight), router.selection_bias, Resident(experts.frozen, experts.trainable),
            _plain_or_none(router.up_weight), _plain_or_none(router.gate_scale),
            None if shared is None else SharedExpert(_plain(shared.gate_up_proj), _plain(shared.down_proj)),
            _plain_or_none(self.output_bias), experts.lora,
        )  # fmt: skip

    @property
    def config_now(self) -> MoEConfig:
        """The config with the number of experts per token that training aims at."""
        return self.moe if self.aim.top_k is None else with_top_k(self.moe, self.aim.top_k)

    def forward(self, x_BLD: Tensor, mode: Mode = "routed", choice_targets_B: Tensor | None = None) -> Tensor:
        """Compute the experts of every token.

        Args:
            x_BLD: under tensor parallelism cut along the sequence, and the output is cut alike.
            choice_targets_B: what each sample's tokens should choose in every pair; see `pair_choice_loss`.
        """
        if isinstance(x_BLD, DTensor):
            y_BLD = self.forward(x_BLD.to_local(), mode, choice_targets_B)
            return DTensor.from_local(y_BLD, x_BLD.device_mesh, [Shard(1)], run_check=False)
        x_TD, weights = x_BLD.flatten(0, 1), self.weights
        y_TD, routing, scores_TE = moe_ffn(x_TD, weights, self.config_now, mode, self.path, self.expert_group)
        self.last_routing = routing.detached()
        if self.training and scores_TE is not None:
            self.gather(routing, scores_TE)
            y_TD = self.add_auxiliary_loss(y_TD, routing, scores_TE)
            if choice_targets_B is not None:
                y_TD = self._add_choice_loss(y_TD, x_TD, weights, choice_targets_B)
        return y_TD.view_as(x_BLD)

    def _add_choice_loss(self, y_TD: Tensor, x_TD: Tensor, weights: MoEWeights, targets_B: Tensor) -> Tensor:
        """Its gradient ends at the router: the layers below are not to learn how to be told apart."""
        targets_T = targets_B.repeat_interleave(len(y_TD) // len(targets_B))
        scores_TE = router_scores(x_TD.detach(), weights, self.moe)
        return add_gradient_of(y_TD, self.aim.choice_factor * pair_choice_loss(scores_TE, targets_T))
