"""Bytes that a forward pass keeps for the backward pass, layer by layer, and what the loss needs.

Counted from what the operations of `lamella.titan.decoder` save. With frozen weights a matrix product keeps nothing of
its input (only the weight's gradient would need it), so continued training of experts keeps less than full training.

Shapes: T tokens of a micro-batch, D model width, F FFN width, N heads, G key/value heads, H head width, L tokens of a
sample, K active experts, E experts, S slices, f neurons per expert, V vocabulary.
"""

from __future__ import annotations

from lamella.architecture.moe import MoEConfig
from lamella.plan.layout import Layout

ROUTED_ROW_BYTES = 44
"""A routed row keeps these bytes once: expert id, order and token (int64), its gate weight thrice (float32), and their
gradient."""
ROUTER_SCORES = 6
"""float32 numbers per token and expert: logits, their mirror image, scores, and what chooses and normalises them."""
HIDING_FEATURES = 8
"""The number is that of `lamella.titan.attention.MORE_FEATURES`."""
KL_CHUNK = 128
"""Tokens, as in `lamella.moe.learning`."""
KL_NUMBERS = 3
"""float32 numbers per token and id: both log-probabilities and the teacher's probabilities; the rest is in place."""


def kept_bytes(layout: Layout, layer: int) -> int:
    """The bytes that one layer keeps without activation checkpointing."""
    return _attention_bytes(layout, layer) + _ffn_bytes(layout, layer)


def block_bytes(layout: Layout, layer: int) -> int:
    """The bytes that one layer keeps under the recipe's activation checkpointing.

    full: its input. selective: that, the outputs of attention, every second matrix product, and the products of experts
    before their activation (`lamella.titan.checkpointing`).
    """
    match layout.recipe.activation_checkpointing:
        case "full":
            return layout.residual_bytes + _routing_bytes(layout, layer)
        case "selective":
            return min(kept_bytes(layout, layer), _selected_bytes(layout, layer))
        case _:
            return kept_bytes(layout, layer)


def _selected_bytes(layout: Layout, layer: int) -> int:
    model, T, b = layout.model, layout.tokens, layout.compute_bytes
    q, kv = model.N * model.H, 2 * model.G * model.H
    attention = T * (2 * q + kv // 2) * b + T * model.N * 4  # queries, values; attended heads
    moe = model.moe_of(layer)
    if moe is None:
        return layout.residual_bytes + attention + T * b * (model.F + model.D)
    rows = T * moe.num_experts_per_tok * moe.moe_intermediate_size * b
    shared = T * 2 * moe.shared_intermediate_size * b
    products = rows * (2 * _buffers(layout, moe) + 1)  # gate and up; `fused` gives weighted activations with them
    return layout.residual_bytes + attention + shared + products + _routing_bytes(layout, layer)


def recomputed_bytes(layout: Layout, layer: int) -> int:
    """What the backward pass of a layer brings back for a while."""
    return max(0, kept_bytes(layout, layer) - block_bytes(layout, layer))


def needs_gradient(layout: Layout, layer: int) -> bool:
    """Whether anything below this layer trains, so that gradients must pass through its attention."""
    return layer > 0 or layout.recipe.trains == "all"


def _attention_bytes(layout: Layout, layer: int) -> int:
    if not needs_gradient(layout, layer):
        return 0
    model, T, b = layout.model, layout.tokens, layout.compute_bytes
    all_train = layout.recipe.trains == "all"
    inputs = T * model.D * b * (3 if all_train else 1)  # the norm's input; normalised, and scaled
    gathered = layout.recipe.parallel.context
    heads = model.heads_of(layer)
    if heads is None:
        q, kv = model.N * model.H, 2 * model.G * model.H * gathered
        out = T * q * b + T * model.N * 4
    elif layout.attention == "flex" and gathered == 1:  # told in the score function; beside them the weighed heads
        q, kv = model.N * model.H, 2 * model.G * model.H
        out = T * model.N * (2 * model.H * b + 4) + T * heads.num_experts
    else:  # wider by the features that hide, beside the projections; keys and values of every expert; weighed heads
        wider = model.H + HIDING_FEATURES
        q, kv = model.N * (model.H + wider), 2 * (model.G * model.H + heads.num_experts * wider * gathered)
        out = T * model.N * (2 * wider * b + 4)
    rope = T * 2 * model.H * 4
    mask = T * layout.recipe.parallel.tensor * layout.recipe.seq_len * b if layout.attention == "sdpa" else 0
    return inputs + T * (q + kv) * b + out + rope + mask


def _ffn_bytes(layout: Layout, layer: int) -> int:
    model, T, b = layout.model, layout.tokens, layout.compute_bytes
    all_train = layout.recipe.trains == "all"
    norm = T * model.D * b * (2 if all_train else 1)
    moe = model.moe_of(layer)
    if moe is None:
        return norm + T * b * (model.F * (4 if all_train else 3) + (model.D if all_train else 0))
    # the experts' input is the router's, too, which reads float32
    inputs = T * model.D * (b * layout.recipe.parallel.expert + (4 if b < 4 else 0))
    shared = 4 * T * moe.shared_intermediate_size * b
    return norm + inputs + shared + _expert_bytes(layout, moe) + _routing_bytes(layout, layer)


def _expert_bytes(layout: Layout, moe: MoEConfig) -> int:
    rows, f, b = layout.tokens * moe.num_experts_per_tok, moe.moe_intermediate_size, layout.compute_bytes
    path = layout.recipe.expert_path
    # under autograd: gate, up, silu(gate), product; inputs and outputs of every row
    if path in ("loop", "batched") or moe.lora_rank:
        return rows * b * (4 * f + 2 * layout.model.D)
    return rows * b * 2 * f * _buffers(layout, moe)


def _buffers(layout: Layout, moe: MoEConfig) -> int:
    """`grouped` and `quack`, which `auto` may take on a GPU, have a buffer for frozen rows and one for trainable rows,
    each with room for all."""
    path = layout.recipe.expert_path
    has_both = moe.num_frozen_experts > 0 and moe.num_trainable_experts > 0
    return 2 if has_both and (path in ("grouped", "quack") or (path == "auto" and layout.device == "gpu")) else 1


def _routing_bytes(layout: Layout, layer: int) -> int:
    moe = layout.model.moe_of(layer)
    if moe is None:
        return 0
    return layout.tokens * (moe.num_experts_per_tok * ROUTED_ROW_BYTES + moe.num_experts * 4 * ROUTER_SCORES)


def logits_bytes(layout: Layout) -> int:
    """At the start of the backward pass: log-softmax, its gradient and that of the logits, all float32, of the tokens
    whose logits are computed at once; and in chunks the float32 gradient of the last hidden states."""
    chunks = layout.recipe.loss_chunks
    hidden_gradient = 4 * layout.tokens * layout.model.D if chunks > 1 else 0
    return 3 * layout.tokens // chunks * layout.model.V * 4 + hidden_gradient


def teacher_logits_bytes(layout: Layout) -> int:
    return layout.tokens * layout.model.V * layout.compute_bytes


def kl_bytes(layout: Layout) -> int:
    """Besides, where a teacher is learned from: its logits, the gradient for ours, and the probabilities of a chunk."""
    return 2 * teacher_logits_bytes(layout) + KL_NUMBERS * min(layout.tokens, KL_CHUNK) * layout.model.V * 4


def working_bytes(layout: Layout, layer: int) -> int:
    """What the backward pass of a layer holds besides: gradients of the residual stream and of one branch's rows."""
    return 4 * layout.residual_bytes
