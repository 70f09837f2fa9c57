"""One token after another, with a fraction of the calls that transformers' layers make: the step of decoding.

For models whose layers are Llama's (Llama, Mistral, Qwen2, Qwen3), dense or converted. Keys and values lie in tensors
of a fixed size. What a layer computes is what transformers computes; norms and projections are the model's own modules.

Shapes: B sequences, D model width, N query heads, G key/value heads, H head width, C capacity in tokens, V vocabulary;
K tokens of a single sequence, which are rows as sequences are, in all but attention.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from lamella.architecture.moe import MoEConfig
from lamella.architecture.rows import CONVERTED_PREFIX, FAMILIES
from lamella.hf.blocks import MoELayer
from lamella.moe.activations import ACTIVATIONS
from lamella.moe.experts import MoEWeights, Resident, SharedExpert, moe_ffn
from lamella.moe.packed import Experts
from lamella.moe.provider import ExpertComputer
from lamella.moe.quantised import Unbound
from lamella.moe.routing_one import route_one


class Place(NamedTuple):
    """Where the new tokens stand."""

    column: int
    """Of the cache."""
    cos_B1H: Tensor
    sin_B1H: Tensor
    """The sine with its first half negated, for `_rotated`."""
    mask_B11C: Tensor | None
    """bool, false for padding; None: nothing is padded."""
    seen_KC: dict[int | None, Tensor] | None = None
    """For several tokens of a single sequence: by a layer's window, what each may see of the columns up to the last."""


class LayerCache(NamedTuple):
    """Keys and values of one layer."""

    keys_BGCH: Tensor
    values_BGCH: Tensor


def has_step(model: PreTrainedModel) -> bool:
    """Whether `DecodeStep` computes this model: a Llama-like family without attention experts or adapters."""
    family = FAMILIES.get(model.config.model_type.removeprefix(CONVERTED_PREFIX))
    others = any(getattr(model.config, entry, None) is not None for entry in ("attention_moe", "adapters"))
    return family is not None and family.llama_like and not others


class DecodeStep:
    """The next logits of a model that `has_step`."""

    def __init__(self, model: PreTrainedModel):
        self.model, self.decoder = model, model.get_decoder()
        self.layers = [_Layer(layer) for layer in self.decoder.layers]
        self.norm, self.head = _norm(self.decoder.norm), model.get_output_embeddings()
        self.caches: list[LayerCache] = []

    def start(self, prefilled: DynamicCache, capacity: int) -> None:
        """Take over what transformers has kept of the prompt, with room for `capacity` tokens in all."""
        self.caches = []
        for layer in prefilled.layers:
            assert isinstance(layer, DynamicLayer)
            assert layer.keys is not None
            assert layer.values is not None
            self.caches.append(_with_room(layer.keys, layer.values, capacity))

    def kept(self, length: int) -> DynamicCache:
        """The first `length` tokens as transformers' own cache, to go on from there."""
        cache = DynamicCache()
        for index, (keys_BGCH, values_BGCH) in enumerate(self.caches):
            cache.update(keys_BGCH[:, :, :length], values_BGCH[:, :, :length], index)
        return cache

    def __call__(self, ids_B1: Tensor, index: int, positions_B1: Tensor, mask_BC: Tensor | None = None) -> Tensor:
        """The logits [B, V] after the tokens that stand in column `index` of the cache."""
        x_B1D = self.decoder.embed_tokens(ids_B1)
        mask_B11C = None if mask_BC is None else mask_BC[:, None, None]
        return self._logits(x_B1D, Place(index, *self._rope(x_B1D, positions_B1), mask_B11C))

    def several(self, ids_K1: Tensor, index: int) -> Tensor:
        """The logits [K, V] after each of the next tokens of a single sequence; the first stands in column `index`."""
        x_K1D, end = self.decoder.embed_tokens(ids_K1), index + len(ids_K1)
        columns_C = torch.arange(end, device=ids_K1.device)
        age_KC = columns_C[index:, None] - columns_C
        windows = {layer.window for layer in self.layers}
        seen_KC = {w: (age_KC >= 0) if w is None else (age_KC >= 0) & (age_KC < w) for w in windows}
        return self._logits(x_K1D, Place(index, *self._rope(x_K1D, columns_C[index:, None]), None, seen_KC))

    def _rope(self, x_B1D: Tensor, positions_B1: Tensor) -> tuple[Tensor, Tensor]:
        cos_B1H, sin_B1H = self.decoder.rotary_emb(x_B1D, positions_B1)
        half = sin_B1H.shape[-1] // 2
        return cos_B1H, torch.cat([-sin_B1H[..., :half], sin_B1H[..., half:]], dim=-1)

    def _logits(self, x_B1D: Tensor, place: Place) -> Tensor:
        x_BD = x_B1D[:, 0]
        for layer, cache in zip(self.layers, self.caches, strict=True):
            x_BD = layer(x_BD, cache, place)
        return self.head(self.norm(x_BD))


Call = Callable[[Tensor], Tensor]


class Attention(Protocol):
    """What is read of an attention module; `q_norm`, `k_norm`, `sliding_window` are optional."""

    q_proj: Call
    k_proj: Call
    v_proj: Call
    o_proj: Call
    scaling: float
    head_dim: int
    config: PreTrainedConfig


class RMSNorm(Protocol):
    """What is read of a norm."""

    weight: Tensor
    variance_epsilon: float

    def __call__(self, x: Tensor) -> Tensor: ...


class DecoderLayer(Protocol):
    """What is read of one of transformers' layers."""

    self_attn: Attention
    mlp: nn.Module
    input_layernorm: RMSNorm
    post_attention_layernorm: RMSNorm


class _Layer:
    """One decoder layer on one token of each sequence."""

    def __init__(self, layer: DecoderLayer):
        attention = layer.self_attn
        self.q, self.k, self.v, self.o = attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj
        self.qkv = _joined(self.q, self.k, self.v)
        self.q_norm: Call | None = getattr(attention, "q_norm", None)
        self.k_norm: Call | None = getattr(attention, "k_norm", None)
        self.scale, self.head_width = attention.scaling, attention.head_dim
        # Mistral has the window in its config alone
        self.window = getattr(attention, "sliding_window", getattr(attention.config, "sliding_window", None))
        self.before, self.between = _norm(layer.input_layernorm), _norm(layer.post_attention_layernorm)
        self.ffn = _ffn(layer.mlp)

    def __call__(self, x_BD: Tensor, cache: LayerCache, place: Place) -> Tensor:
        x_BD = x_BD + self._attend(self.before(x_BD), cache, place)
        return x_BD + self.ffn(self.between(x_BD))

    def _attend(self, x_BD: Tensor, cache: LayerCache, place: Place) -> Tensor:
        B, H = len(x_BD), self.head_width
        G = cache.keys_BGCH.shape[1]
        if self.qkv is not None:
            all_heads = self.qkv(x_BD).view(B, -1, H)
            N = all_heads.shape[1] - 2 * G
            heads, v_BGH = all_heads[:, : N + G], all_heads[:, N + G :]
        else:
            q_BNH, k_BGH, v_BGH = (project(x_BD).view(B, -1, H) for project in (self.q, self.k, self.v))
            N, heads = q_BNH.shape[1], torch.cat([q_BNH, k_BGH], dim=1)
        if self.q_norm is not None and self.k_norm is not None:
            heads = torch.cat([self.q_norm(heads[:, :N]), self.k_norm(heads[:, N:])], dim=1)
        heads = _rotated(heads, place.cos_B1H, place.sin_B1H)
        if place.seen_KC is not None:
            return self._attend_several(heads, v_BGH, cache, place.column, place.seen_KC[self.window])
        end = place.column + 1
        cache.keys_BGCH[:, :, place.column] = heads[:, N:]
        cache.values_BGCH[:, :, place.column] = v_BGH
        start = 0 if self.window is None else max(0, end - self.window)
        mask = None if place.mask_B11C is None else place.mask_B11C[..., start:end]
        # The query heads of a key/value head are rows of one attention: nothing is repeated.
        out = F.scaled_dot_product_attention(
            heads[:, :N].reshape(B, G, N // G, H), cache.keys_BGCH[:, :, start:end], cache.values_BGCH[:, :, start:end],
            attn_mask=mask, scale=self.scale,
        )  # fmt: skip
        return self.o(out.reshape(B, N * H))

    def _attend_several(
        self, heads_KhH: Tensor, v_KGH: Tensor, cache: LayerCache, first: int, seen_KC: Tensor
    ) -> Tensor:
        (K, G, H), N = v_KGH.shape, heads_KhH.shape[1] - v_KGH.shape[1]
        end = first + K
        cache.keys_BGCH[0, :, first:end] = heads_KhH[:, N:].transpose(0, 1)
        cache.values_BGCH[0, :, first:end] = v_KGH.transpose(0, 1)
        q_GnKH = heads_KhH[:, :N].view(K, G, N // G, H).permute(1, 2, 0, 3)
        out = F.scaled_dot_product_attention(
            q_GnKH.reshape(1, G, N // G * K, H), cache.keys_BGCH[:, :, :end], cache.values_BGCH[:, :, :end],
            attn_mask=seen_KC.repeat(N // G, 1), scale=self.scale,
        )  # fmt: skip
        return self.o(out.view(G, N // G, K, H).permute(2, 0, 1, 3).reshape(K, N * H))


def _ffn(mlp: nn.Module) -> Call:
    """What stands in the FFN's place, without the calls of modules where experts can be looked up once."""
    if not isinstance(mlp, MoELayer):
        return mlp
    weights, config, computing = mlp.weights, mlp.config, mlp.computing
    experts = weights.experts
    if weights.lora is None and isinstance(experts, Resident) and isinstance(experts.frozen, Experts):
        assert isinstance(experts.trainable, Experts)
        weights = weights._replace(experts=Unbound(experts.frozen, experts.trainable))
    one = _OneToken(weights, config) if _fits_one_token(weights) else None

    def routed(x_BD: Tensor) -> Tensor:
        now = computing
        if one is not None and len(x_BD) == 1 and now.is_plain:
            return one(x_BD)
        return moe_ffn(x_BD, weights, now.applied(config), now.mode, now.path, twin_share=now.twin_share)[0]

    return routed


def _fits_one_token(weights: MoEWeights) -> bool:
    on_cpu = weights.router_RD.device.type == "cpu"
    is_gated = weights.shared is None or isinstance(weights.shared, SharedExpert)
    return on_cpu and is_gated and isinstance(weights.experts, ExpertComputer) and weights.router_up_RD is None


class _OneToken:
    """An MoE layer on one token on a CPU: what `moe_ffn` computes, its routing in plain numbers."""

    def __init__(self, weights: MoEWeights, config: MoEConfig):
        assert isinstance(weights.experts, ExpertComputer)
        self.experts, self.config, self.activate = weights.experts, config, ACTIVATIONS[config.activation]
        self.bias_R: list[float] = weights.selection_bias_R.tolist()
        self.gate_scale_R = None if weights.gate_scale_R is None else weights.gate_scale_R.float().tolist()
        self.bias_D = weights.output_bias_D
        self.down_Dn: Tensor | None = None
        first = [weights.router_RD]  # what is multiplied with the layer's input; the router is always float32
        if weights.shared is not None:
            assert isinstance(weights.shared, SharedExpert)
            first.append(weights.shared.gate_up_proj)
            self.down_Dn = weights.shared.down_proj
        in_float32 = all(tensor.dtype == torch.float32 for tensor in first)
        self.first = [join_rows(first)] if in_float32 else [first[0].detach().float(), *first[1:]]

    def __call__(self, x_1D: Tensor) -> Tensor:
        x_D, R = x_1D[0], len(self.bias_R)
        rows = torch.mv(self.first[0], x_D.float())
        chosen = route_one(rows[:R].tolist(), self.bias_R, self.config, self.gate_scale_R)
        if self.down_Dn is None:
            y_D = torch.zeros_like(x_D) if self.bias_D is None else self.bias_D.clone()
        else:
            gate_n, up_n = (torch.mv(self.first[1], x_D) if len(self.first) > 1 else rows[R:]).chunk(2)
            hidden_n = self.activate(gate_n).mul_(up_n)
            y_D = torch.mv(self.down_Dn, hidden_n) if self.bias_D is None else self._with_bias(hidden_n)
        self.experts.add_one(y_D, x_D, chosen, self.config.activation)
        return y_D[None]

    def _with_bias(self, hidden_n: Tensor) -> Tensor:
        assert self.bias_D is not None
        assert self.down_Dn is not None
        return torch.addmv(self.bias_D, self.down_Dn, hidden_n)


def join_rows(matrices: list[Tensor]) -> Tensor:
    """Matrices [.., D] as one, of which they become parts: no weight is there twice."""
    if len(matrices) == 1:
        return matrices[0].detach()
    joined, start = torch.cat([matrix.detach() for matrix in matrices]), 0
    for matrix in matrices:
        matrix.data = joined[start : start + len(matrix)]
        start += len(matrix)
    return joined


def _norm(norm: RMSNorm) -> Call:
    """In float32 by torch's one call, which on a CPU is nine: there one token's takes four, its root in plain numbers.

    Else by the module, whose steps of rounding are its own.
    """
    if norm.weight.dtype != torch.float32:
        return norm
    shape, weight_D, eps = norm.weight.shape, norm.weight.detach(), norm.variance_epsilon
    on_cpu, width = weight_D.device.type == "cpu", weight_D.numel()

    def normed(x_BD: Tensor) -> Tensor:
        if not on_cpu or x_BD.numel() != width:
            return F.rms_norm(x_BD, shape, weight_D, eps)
        x_D = x_BD.view(-1)
        return (x_BD * weight_D).mul_((float(torch.dot(x_D, x_D)) / width + eps) ** -0.5)

    return normed


def _joined(*projections: Call) -> Call | None:
    """Several Linear layers of one input as one, of whose weights theirs become parts; None for other modules."""
    linears = [p for p in projections if type(p) is nn.Linear]
    if len(linears) < len(projections) or len({linear.bias is None for linear in linears}) > 1:
        return None
    weight = join_rows([linear.weight for linear in linears])
    bias = None if linears[0].bias is None else torch.cat([linear.bias.detach() for linear in linears])
    return lambda x: F.linear(x, weight, bias)


def _rotated(x_BhH: Tensor, cos_B1H: Tensor, sin_B1H: Tensor) -> Tensor:
    """After rope; the sine's first half is negated."""
    return torch.addcmul(x_BhH * cos_B1H, x_BhH.roll(x_BhH.shape[-1] // 2, -1), sin_B1H)


def _with_room(keys_BGLH: Tensor, values_BGLH: Tensor, capacity: int) -> LayerCache:
    B, G, L, H = keys_BGLH.shape
    tensors = []
    for tensor in (keys_BGLH, values_BGLH):
        roomy = tensor.new_zeros(B, G, capacity, H)
        roomy[:, :, :L] = tensor
        tensors.append(roomy)
    return LayerCache(*tensors)
