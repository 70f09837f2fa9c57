"""The modules of an MoE layer in the transformers home, and where they stand in a decoder layer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lamella.architecture.moe import DENSE_BIAS, MoEConfig
from lamella.architecture.moe_tensors import GATE_UP, KINDS, SELECTION_BIAS, expert_shapes, lora_name, packed_name
from lamella.errors import UserError
from lamella.hf.computing import Computing
from lamella.moe.experts import AnyExperts, MoEWeights, Resident, SharedExpert, moe_ffn, packed, packed_lora
from lamella.moe.provider import ExpertComputer, ExpertProvider
from lamella.moe.routing import Routing
from lamella.moe.two_matrix import TwoMatrixShared


class PackedExperts(nn.Module):
    """Parameters only: frozen and trainable experts, apart, so that an optimizer never sees the frozen ones."""

    def __init__(self, hidden_size: int, config: MoEConfig):
        super().__init__()
        shapes = expert_shapes(hidden_size, config.moe_intermediate_size, config.gated)
        for kind, E in zip(KINDS, (config.num_frozen_experts, config.num_trainable_experts), strict=True):
            for part, shape in shapes.items() if E else ():
                parameter = nn.Parameter(torch.empty(E, *shape), requires_grad=kind == "trainable")
                self.register_parameter(packed_name(kind, part), parameter)
        for name, lora_shape in config.lora_shapes(hidden_size).items():
            self.register_parameter(lora_name(name), nn.Parameter(torch.zeros(lora_shape)))

    @property
    def frozen(self) -> AnyExperts:
        """The slices, which take no gradient."""
        return packed(self, "frozen")

    @property
    def trainable(self) -> AnyExperts:
        """The experts that train."""
        return packed(self, "trainable")

    @property
    def provider(self) -> ExpertProvider | ExpertComputer:
        """All of them, as the layer computes with them."""
        return Resident(self.frozen, self.trainable)

    def frozen_parameters(self) -> Iterator[nn.Parameter]:
        """The parameters of the slices."""
        return (parameter for name, parameter in self.named_parameters() if name.startswith("frozen_"))


class ExpertsElsewhere(PackedExperts):
    """In the place of `PackedExperts` where another form of the experts, or who keeps them, has been `given`."""

    def __init__(self, given: ExpertProvider | ExpertComputer | None = None) -> None:
        nn.Module.__init__(self)  # no parameters
        self.given = given

    @property
    def provider(self) -> ExpertProvider | ExpertComputer:
        """Who has them."""
        if self.given is None:  # of `experts_elsewhere` is told who has them
            raise UserError("the frozen experts of this model are rounded in its file; open it with lamella.load")
        return self.given


_elsewhere: ContextVar[bool] = ContextVar("_elsewhere", default=False)


@contextmanager
def experts_elsewhere() -> Iterator[None]:
    """Inside, models are made without experts: each MoE layer has `ExpertsElsewhere`."""
    token = _elsewhere.set(True)
    try:
        yield
    finally:
        _elsewhere.reset(token)


def are_experts_elsewhere() -> bool:
    """Whether this is within `experts_elsewhere`."""
    return _elsewhere.get()


class Shared(nn.Module):
    """Parameters only: the expert that is always on."""

    def __init__(self, hidden_size: int, width: int, gated: bool = True):
        super().__init__()
        for name, shape in expert_shapes(hidden_size, width, gated).items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape)))

    @property
    def weights(self) -> SharedExpert | TwoMatrixShared:
        """The expert's tensors, as the maths wants them."""
        cls = SharedExpert if hasattr(self, GATE_UP) else TwoMatrixShared
        return cls._make(getattr(self, name) for name in cls._fields)


class Router(nn.Module):
    """Router rows [R, D] and the float32 selection bias [R].

    With the gate "sigmoid" zero rows weigh every chosen expert exactly 1, with "unit" zeros in `gate_scale` do.
    """

    def __init__(self, hidden_size: int, config: MoEConfig):
        super().__init__()
        R = config.num_router_rows
        self.weight = nn.Parameter(torch.zeros(R, hidden_size))
        self.up_weight = nn.Parameter(torch.zeros(R, hidden_size)) if config.router == "analytic" else None
        self.gate_scale = nn.Parameter(torch.zeros(R)) if config.gate == "unit" else None
        self.selection_bias: Tensor
        self.register_buffer(SELECTION_BIAS, torch.full((R,), DENSE_BIAS, dtype=torch.float32))


class MoELayer(nn.Module):
    """Takes the place of a decoder layer's FFN. It maps [..., D] to [..., D]."""

    def __init__(self, hidden_size: int, config: MoEConfig, computing: Computing | None = None):
        super().__init__()
        self.config = config
        self.computing = computing or Computing()
        elsewhere = are_experts_elsewhere() or config.frozen_dtype != "model"
        self.experts: PackedExperts = ExpertsElsewhere() if elsewhere else PackedExperts(hidden_size, config)
        self.router = Router(hidden_size, config)
        width = config.shared_intermediate_size
        self.shared = Shared(hidden_size, width, config.gated) if width else None
        self.output_bias = nn.Parameter(torch.zeros(hidden_size)) if config.output_bias else None
        self.last_routing: Routing | None = None
        """The routing of the latest forward, without its graph, for reports."""

    @property
    def weights(self) -> MoEWeights:
        """What the layer computes with, as it is told to."""
        router, experts = self.router, self.experts
        shared = None if self.shared is None else self.shared.weights
        if self.computing.exact_copies and isinstance(experts, ExpertsElsewhere):
            raise UserError("exact copies need experts in the model's dtype; name the model before it was rounded")
        frozen = experts.frozen if self.computing.exact_copies else None
        provider = experts.provider if frozen is None else Resident(frozen, frozen)
        return MoEWeights(
            router.weight, router.selection_bias, provider, router.up_weight, router.gate_scale, shared,
            self.output_bias, packed_lora(experts),
        )  # fmt: skip

    def forward(self, hidden_states: Tensor) -> Tensor:
        """The layer's output [..., D], computed as the model's `computing` says."""
        x_TD, now = hidden_states.reshape(-1, hidden_states.shape[-1]), self.computing
        config = now.applied(self.config)
        y_TD, routing, _ = moe_ffn(x_TD, self.weights, config, now.mode, now.path, twin_share=now.twin_share)
        self.last_routing = routing.detached()
        return y_TD.view_as(hidden_states)


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The layers of a causal model of any family that can be converted."""
    decoder = model.get_decoder()
    layers = decoder.h if hasattr(decoder, "h") else decoder.layers
    assert isinstance(layers, nn.ModuleList)
    return layers


def ffn_modules(layer: nn.Module) -> dict[str, nn.Module]:
    """The modules, by name, that are the layer's FFN. OPT's layer calls its three itself."""
    names = ("fc1", "activation_fn", "fc2") if hasattr(layer, "fc1") else ("mlp",)
    return {name: getattr(layer, name) for name in names}


def replace_ffn(layer: nn.Module, block: nn.Module) -> None:
    """Let `block`, [..., D] -> [..., D], stand where the FFN is called first; what was called after it does nothing."""
    first, *rest = ffn_modules(layer)
    layer.add_module(first, block)
    for name in rest:
        layer.add_module(name, nn.Identity())
