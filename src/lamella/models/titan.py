"""The torchtitan home: a torchtitan Decoder whose FFNs are `SlicedMoE` layers.

Attention, norms, embeddings and rope are torchtitan's own; weights stay in the layout of transformers. The maths of the
experts is in `lamella.moe.experts.moe_ffn`. Parameters start as NaN: all weights come from a checkpoint.

Shapes: B batch, L sequence, T = B*L tokens, D model width, N heads, H head width, S slices, E experts, R router rows,
f neurons per expert.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import lamella.models.titan_device  # noqa: F401  first: torchtitan asks for the device while it is imported

# isort: split
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial
from torchtitan.models.common.attention import (
    FlexAttention,
    VarlenAttention,
    create_attention_mask,
    get_sliding_window_mask_mod,
)
from torchtitan.models.common.decoder import Decoder, TransformerBlock
from torchtitan.models.common.rope import CosSinRoPE
from torchtitan.protocols.module import Module

from lamella.config import ExpertPath, Mode, MoEConfig
from lamella.models.titan_context import ContextShare
from lamella.models.titan_tensor import set_sharding
from lamella.moe.balancing import (
    add_gradient_of,
    auxiliary_loss,
    expert_counts,
    pair_choice_loss,
    quantile_bias,
    share_bias,
)
from lamella.moe.experts import MoEWeights, SharedExpert, moe_ffn, packed, packed_lora
from lamella.moe.lora import Lora
from lamella.moe.routing import Routing, pair_margins
from lamella.moe.slicing import Experts


def unset(parameter: Tensor) -> None:
    """The only initialiser: what no checkpoint fills shows as NaN in the first loss."""
    nn.init.constant_(parameter, math.nan)


EXPERT_NAMES = ("frozen_gate_up_proj", "frozen_down_proj", "trainable_gate_up_proj", "trainable_down_proj")
LORA_NAMES = tuple(f"lora_{name}" for name in Lora._fields)
OTHER_NAMES = ("weight", "bias", "up_weight", "gate_scale", "gate_up_proj", "down_proj", "output_bias")
UNSET = dict.fromkeys((*EXPERT_NAMES, *LORA_NAMES, *OTHER_NAMES), unset)


class DocumentAttention(Module):
    """Scaled dot product attention under an explicit mask: runs, with its backward, on any device."""

    @dataclass(kw_only=True, slots=True)
    class Config(Module.Config):
        pass

    def __init__(self, config: Config):
        super().__init__()

    def forward(
        self,
        q_BLNH: Tensor,
        k_BLNH: Tensor,
        v_BLNH: Tensor,
        *,
        attention_masks: Tensor,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        q_BNLH, k_BNLH, v_BNLH = (x.transpose(1, 2) for x in (q_BLNH, k_BLNH, v_BLNH))
        y_BNLH = F.scaled_dot_product_attention(
            q_BNLH, k_BNLH, v_BNLH, attn_mask=attention_masks, scale=scale, enable_gqa=enable_gqa
        )
        return y_BNLH.transpose(1, 2)


def document_mask(positions_BL: Tensor, window: int | None = None, context: ContextShare | None = None) -> Tensor:
    """[B, 1, L, L] bool: each token sees itself and what precedes it in its document, at most `window` tokens.

    With a context share [B, 1, l, L]: this rank's tokens as rows, columns in the order of the ranks.
    """
    B, L = positions_BL.shape
    batch, every = (torch.arange(n, device=positions_BL.device) for n in (B, L))
    rows, columns = (
        (every, every) if context is None else (context.mine(L, every.device), context.order(L, every.device))
    )
    sees = document_mask_mod(positions_BL, window, rows, columns)
    return sees(batch[:, None, None, None], 0, torch.arange(len(rows), device=every.device)[:, None], every)


def document_mask_mod(positions_BL: Tensor, window: int | None, rows: Tensor, columns: Tensor) -> Any:
    """The same as FlexAttention asks for it; `rows` and `columns` name the tokens of queries and keys."""
    document_BL = (positions_BL == 0).cumsum(dim=1)

    def sees(b: Tensor, head: Any, q: Tensor, k: Tensor) -> Tensor:
        query, key = rows[q], columns[k]
        near = (query >= key) if window is None else (query >= key) & (query - key < window)
        return near & (document_BL[b, query] == document_BL[b, key])

    return sees


class ScaledRoPE(CosSinRoPE):
    """Torchtitan's rotary embedding in transformers' layout, with Llama 3.1's and linear frequency scaling too."""

    @dataclass(kw_only=True, slots=True)
    class Config(CosSinRoPE.Config):
        linear_factor: float = 1.0

    def _precompute_cache(self) -> Tensor:
        c = self.config
        frequencies = 1.0 / (c.theta ** (torch.arange(0, c.dim, 2).float() / c.dim)) / c.linear_factor
        if c.scaling == "llama":
            frequencies = llama3_frequencies(
                frequencies, c.scaling_factor, c.low_freq_factor, c.high_freq_factor, c.original_max_position_embeddings
            )
        angles = torch.outer(torch.arange(c.max_seq_len).float(), frequencies)
        angles = torch.cat([angles, angles], dim=-1)
        return torch.cat([angles.cos(), angles.sin()], dim=-1)


def llama3_frequencies(frequencies: Tensor, factor: float, low: float, high: float, original_length: int) -> Tensor:
    """Llama 3.1's scaling: long wavelengths are divided by `factor`, short ones kept, between them interpolated."""
    wavelengths = 2 * math.pi / frequencies
    kept = ((original_length / wavelengths - low) / (high - low)).clamp(0, 1)
    return (1 - kept) * frequencies / factor + kept * frequencies


class PackedExperts(Module):
    """Parameters only: frozen and trainable experts apart, so that an optimizer never sees the frozen ones."""

    @dataclass(kw_only=True, slots=True)
    class Config(Module.Config):
        dim: int
        moe: MoEConfig

    def __init__(self, config: Config):
        super().__init__()
        D, f = config.dim, config.moe.moe_intermediate_size
        counts = {"frozen": config.moe.num_frozen_experts, "trainable": config.moe.num_trainable_experts}
        for kind, E in counts.items():
            if E:
                self.register_parameter(f"{kind}_gate_up_proj", nn.Parameter(torch.empty(E, 2 * f, D)))
                self.register_parameter(f"{kind}_down_proj", nn.Parameter(torch.empty(E, D, f)))
        for name, shape in config.moe.lora_shapes(D).items():
            self.register_parameter(f"lora_{name}", nn.Parameter(torch.empty(shape)))
        # torchtitan's FSDP shards another dimension over more ranks than this
        self.num_experts = min(E for E in counts.values() if E)

    @property
    def frozen(self) -> Experts:
        return _here(packed(self, "frozen"))

    @property
    def trainable(self) -> Experts:
        return _here(packed(self, "trainable"))


def _here(experts: Experts) -> Experts:
    """This rank's experts, where expert parallelism shares them out."""
    return Experts(*(t.to_local() if isinstance(t, DTensor) else t for t in experts))


def _plain(tensor: Any) -> Any:
    """A weight that ranks of tensor parallelism hold whole, each for tokens of its own: gradients add up."""
    return tensor.to_local(grad_placements=[Partial()]) if isinstance(tensor, DTensor) else tensor


class Shared(Module):
    """Parameters only: the expert that is always on, of `width` neurons."""

    @dataclass(kw_only=True, slots=True)
    class Config(Module.Config):
        dim: int
        width: int

    def __init__(self, config: Config):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(2 * config.width, config.dim))
        self.down_proj = nn.Parameter(torch.empty(config.dim, config.width))


class Router(Module):
    """Router rows [R, D] and the float32 selection bias [R]."""

    @dataclass(kw_only=True, slots=True)
    class Config(Module.Config):
        dim: int
        moe: MoEConfig

    def __init__(self, config: Config):
        super().__init__()
        R, moe = config.moe.num_router_rows, config.moe
        self.weight = nn.Parameter(torch.empty(R, config.dim))
        self.up_weight = nn.Parameter(torch.empty(R, config.dim)) if moe.router == "analytic" else None
        self.gate_scale = nn.Parameter(torch.empty(R)) if moe.gate == "unit" else None
        self.selection_bias: Tensor
        self.register_buffer("selection_bias", torch.empty(R, dtype=torch.float32))

    def _init_self_buffers(self, *, buffer_device: torch.device | None = None) -> None:
        device = buffer_device or self.selection_bias.device
        self.selection_bias = torch.full_like(self.selection_bias, math.nan, device=device)


class SlicedMoE(Module):
    """[B, L, D] -> [B, L, D]; in training it also gathers what balancing and reports need, until `reset_statistics`."""

    @dataclass(kw_only=True, slots=True)
    class Config(Module.Config):
        dim: int
        moe: MoEConfig
        expert_path: ExpertPath = "auto"

    def __init__(self, config: Config):
        super().__init__()
        self.moe = config.moe
        self.path: ExpertPath = config.expert_path
        self.expert_group: torch.distributed.ProcessGroup | None = None
        """The ranks that share out the experts; None: this one holds all."""
        self.mode: Mode = "routed"
        dim, moe, width = config.dim, config.moe, config.moe.shared_intermediate_size
        self.experts = PackedExperts.Config(dim=dim, moe=moe, param_init=UNSET).build()
        self.router = Router.Config(dim=dim, moe=moe, param_init=UNSET).build()
        self.shared = Shared.Config(dim=dim, width=width, param_init=UNSET).build() if width else None
        self.output_bias = nn.Parameter(torch.empty(dim)) if moe.output_bias else None
        self.next_share: float | None = None
        """Share of the tokens that the twins (flat routing: each expert) should get after the next bias update; None
        gathers no bias for it."""
        self.auxiliary_factor = 0.0
        """On the auxiliary loss of one forward (flat routing); 0 computes none."""
        self.choice_targets_B: Tensor | None = None
        """What each sample's tokens should choose in every pair; see `pair_choice_loss`."""
        self.choice_factor = 0.0
        """On that loss of one token."""
        self.last_routing: Routing | None = None
        # counts [E], tokens, tokens * bias for next_share [R]: sums over forwards. Only ratios of them are used, so
        # a forward that activation checkpointing repeats changes nothing.
        self.statistics: Tensor
        width = config.moe.num_experts + 1 + config.moe.num_router_rows
        self.register_buffer("statistics", torch.empty(width, dtype=torch.float32), persistent=False)

    def _init_self_buffers(self, *, buffer_device: torch.device | None = None) -> None:
        self.statistics = torch.zeros_like(self.statistics, device=buffer_device or self.statistics.device)

    @property
    def routed_experts(self) -> Any:
        """Where torchtitan's FSDP looks for packed expert parameters."""
        return SimpleNamespace(inner_experts=self.experts)

    @property
    def weights(self) -> MoEWeights:
        router, experts, shared = self.router, self.experts, self.shared
        return MoEWeights(
            _plain(router.weight), router.selection_bias, experts.frozen, experts.trainable, _plain(router.up_weight),
            _plain(router.gate_scale),
            None if shared is None else SharedExpert(_plain(shared.gate_up_proj), _plain(shared.down_proj)),
            _plain(self.output_bias), packed_lora(experts),
        )  # fmt: skip

    def forward(self, x_BLD: Tensor) -> Tensor:
        y_TD, self.last_routing, scores_TE = moe_ffn(
            x_BLD.flatten(0, 1), self.weights, self.moe, self.mode, self.path, self.expert_group
        )
        if self.training and scores_TE is not None:
            self._gather(self.last_routing, scores_TE)
            y_TD = self._add_routing_losses(y_TD, self.last_routing, scores_TE)
        return y_TD.view_as(x_BLD)

    def _add_routing_losses(self, y_TD: Tensor, routing: Routing, scores_TE: Tensor) -> Tensor:
        if self.auxiliary_factor:
            # gate "unit" has logits in the place of scores
            positive_TE = scores_TE.sigmoid() if self.moe.gate == "unit" else scores_TE
            y_TD = add_gradient_of(y_TD, self.auxiliary_factor * auxiliary_loss(positive_TE, routing.expert_ids_TK))
        if self.choice_targets_B is not None:
            targets_T = self.choice_targets_B.repeat_interleave(len(y_TD) // len(self.choice_targets_B))
            y_TD = add_gradient_of(y_TD, self.choice_factor * pair_choice_loss(scores_TE, targets_T))
        return y_TD

    @torch.no_grad()
    def _gather(self, routing: Routing, scores_TE: Tensor) -> None:
        num_tokens, E = scores_TE.shape
        self.statistics[:E] += expert_counts(routing.expert_ids_TK, E)
        self.statistics[E] += num_tokens
        if self.next_share is not None:
            twin = self.moe.routing == "twin"
            bias_R = (
                share_bias(pair_margins(scores_TE), self.next_share)
                if twin
                else quantile_bias(scores_TE, self.next_share)
            )
            self.statistics[E + 1 :] += num_tokens * bias_R


class Block(TransformerBlock):
    """Attention, then the MoE or, in layers that stay dense, torchtitan's feed-forward."""

    @dataclass(kw_only=True, slots=True)
    class Config(TransformerBlock.Config):
        # not `moe`, which torchtitan expects to be its own MoE
        sliced_moe: SlicedMoE.Config | None = None

    def __init__(self, config: Config):
        super().__init__()
        self.attention = config.attention.build()
        self.attention_norm = config.attention_norm.build()
        self.ffn_norm = config.ffn_norm.build()
        self.moe_enabled = config.sliced_moe is not None  # torchtitan's FSDP reads it
        if config.sliced_moe is not None:
            self.moe = config.sliced_moe.build()
        else:
            assert config.feed_forward is not None
            self.feed_forward = config.feed_forward.build()

    def forward(self, x_BLD: Tensor, attention_masks: Any, positions: Tensor | None = None) -> Tensor:
        x_BLD = x_BLD + self.attention(self.attention_norm(x_BLD), attention_masks, positions)
        ffn = self.moe if self.moe_enabled else self.feed_forward
        return x_BLD + ffn(self.ffn_norm(x_BLD))


class LamellaDecoder(Decoder):
    """[B, L] token ids and positions -> [B, L, vocabulary] logits, or [B, l, ...] of this rank's l tokens."""

    @dataclass(kw_only=True, slots=True)
    class Config(Decoder.Config):
        sliding_window: int | None = None
        trains: str = "experts+router"
        frozen_weights: str = "sharded"

        def update_from_config(self, *, config: Any, **kwargs: Any) -> None:
            Decoder.Config.update_from_config(self, config=config, **kwargs)
            if config.parallelism.tensor_parallel_degree > 1:
                set_sharding(self)

        def get_nparams_and_flops(self, model: nn.Module, seq_len: int) -> tuple[int, int]:
            """(parameters, training FLOPs per token); see `lamella.train.flops`."""
            from lamella.train.flops import training_flops_per_token

            return sum(p.numel() for p in model.parameters()), training_flops_per_token(model, self, seq_len)

    def __init__(self, config: Config):
        super().__init__(config)
        self.context: ContextShare | None = None
        """Context parallelism: whole samples go in, the logits of this rank's tokens come out."""
        if config.enable_weight_tying:
            self.register_state_dict_post_hook(_drop_tied_head)

    @property
    def moe_layers(self) -> list[SlicedMoE]:
        return [m for m in self.modules() if isinstance(m, SlicedMoE)]

    @contextmanager
    def dense(self) -> Iterator[None]:
        """Inside, every MoE layer computes its frozen slices alone: the dense model that the experts came from."""
        for layer in self.moe_layers:
            layer.mode = "dense"
        try:
            yield
        finally:
            for layer in self.moe_layers:
                layer.mode = "routed"

    def forward(self, tokens: Tensor, positions: Tensor | None = None, attention_masks: Any = None) -> Tensor:
        if attention_masks is None:
            if positions is None:
                positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
            attention_masks = self.get_attention_masks(positions)
            if self.context is not None:
                positions = self.context.part(positions)
                # a later stage of a pipeline gets the activations of its part
                tokens = tokens if self.tok_embeddings is None else self.context.part(tokens)
        return super().forward(tokens, positions, attention_masks)

    def get_attention_masks(self, positions: Tensor) -> Any:
        attention = self.config.first_attention
        if attention is not None and isinstance(attention.inner_attention, DocumentAttention.Config):
            return document_mask(positions, self.config.sliding_window, self.context)
        if self.context is not None:
            return self._flex_mask_of_part(positions, attention, self.context)
        return super().get_attention_masks(positions)

    def _flex_mask_of_part(self, positions_BL: Tensor, attention: Any, context: ContextShare) -> Any:
        B, L = positions_BL.shape
        rows, columns = context.mine(L, positions_BL.device), context.order(L, positions_BL.device)
        sees = document_mask_mod(positions_BL, self.config.sliding_window, rows, columns)
        block_size = attention.inner_attention.block_size
        return create_attention_mask(sees, B, None, len(rows), L, device=positions_BL.device, BLOCK_SIZE=block_size)

    def _create_flex_attention_mask(self, positions: Tensor, attn_config: Any, mask_mods: Any) -> Any:
        window = self.config.sliding_window
        if window is not None:
            mask_mods = [*mask_mods, get_sliding_window_mask_mod(window)]
        return super()._create_flex_attention_mask(positions, attn_config, mask_mods)


def _drop_tied_head(module: nn.Module, state: dict[str, Any], prefix: str, local_metadata: Any) -> None:
    """A tied head is one tensor under two names; checkpoints hold it once, as in transformers."""
    state.pop(f"{prefix}lm_head.weight", None)


def inner_attention(kind: str, sliding_window: int | None) -> Module.Config:
    """`kind` is sdpa, flex or varlen."""
    if kind == "sdpa":
        return DocumentAttention.Config()
    if kind == "flex":
        return FlexAttention.Config()
    return VarlenAttention.Config(window_size=(-1 if sliding_window is None else sliding_window - 1, 0))
