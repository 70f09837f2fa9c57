"""GPT-2 and OPT: which tensors their checkpoints hold, and which of their configs can be converted.

Their FFN has two matrices and two biases: y = down act(up x + up_bias) + down_bias. GPT-2 stores every matrix [in, out]
(transformers' Conv1D), OPT [out, in].

Shapes: D model width, F dense FFN width, V vocabulary, P positions, C embedding width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar, get_args

from lamella.architecture.moe import Activation
from lamella.architecture.types import Family, Shapes, Sizes
from lamella.errors import UserError, did_you_mean

T = TypeVar("T")

# Ends of the names of causal masks that old files of GPT-2 hold; transformers computes them.
MASKS = (".attn.bias", ".attn.masked_bias")
_OPT_OFFSET = 2  # its position table begins with rows that no token uses


def check_two_matrix(sizes: Sizes) -> None:
    """UserError for what neither conversion nor the converted model knows of."""
    values = sizes.values
    if values.get("add_cross_attention"):
        raise UserError("add_cross_attention is true; only decoders of their own can be converted")
    for key in ("enable_bias", "layer_norm_elementwise_affine"):
        if not values.get(key, True):
            raise UserError(f"{key} is false (as in Galactica); only OPT models with biases can be converted")
    check_activation(sizes)


def check_activation(sizes: Sizes) -> Activation:
    """What the FFN computes; UserError for what the experts do not."""
    name, field = sizes.activation, sizes.family.activation
    known = get_args(Activation)
    if name not in known:
        raise UserError(f"{field} is {name!r}{did_you_mean(name, known)}; it must be one of {', '.join(known)}")
    return name  # type: ignore[return-value]


def gpt2_tensors(sizes: Sizes) -> Shapes:
    """All tensors of GPT2LMHeadModel but the output head, in the order of the model."""
    D, F = sizes.D, sizes.F
    shapes: Shapes = {"transformer.wte.weight": (sizes.V, D)}
    shapes["transformer.wpe.weight"] = (sizes.max_positions, D)
    linear = {"attn.c_attn": (D, 3 * D), "attn.c_proj": (D, D), "mlp.c_fc": (D, F), "mlp.c_proj": (F, D)}
    for layer in range(sizes.num_layers):
        for name in ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj"):
            shape = linear.get(name, (D,))
            shapes |= _with_bias(f"transformer.h.{layer}.{name}", shape, shape[-1])
    return shapes | _with_bias("transformer.ln_f", (D,), D)


def opt_tensors(sizes: Sizes) -> Shapes:
    """All tensors of OPTForCausalLM but the output head, in the order of the model."""
    D, F, values = sizes.D, sizes.F, sizes.values
    C, decoder = values.get("word_embed_proj_dim") or D, "model.decoder."
    shapes: Shapes = {f"{decoder}embed_tokens.weight": (sizes.V, C)}
    shapes[f"{decoder}embed_positions.weight"] = (sizes.max_positions + _OPT_OFFSET, D)
    if C != D:
        shapes |= {f"{decoder}project_out.weight": (C, D), f"{decoder}project_in.weight": (D, C)}
    if values["do_layer_norm_before"] and not values.get("_remove_final_layer_norm"):
        shapes |= _with_bias(f"{decoder}final_layer_norm", (D,), D)
    parts: Shapes = {f"self_attn.{part}_proj": (D, D) for part in ("k", "v", "q", "out")}
    parts |= {"self_attn_layer_norm": (D,), "fc1": (F, D), "fc2": (D, F), "final_layer_norm": (D,)}
    for layer in range(sizes.num_layers):
        for name, shape in parts.items():
            shapes |= _with_bias(f"{decoder}layers.{layer}.{name}", shape, shape[0])
    return shapes


def _with_bias(name: str, shape: tuple[int, ...], n_out: int) -> Shapes:
    return {f"{name}.weight": shape, f"{name}.bias": (n_out,)}


def full_names(tensors: Mapping[str, T], expected: Shapes, family: Family) -> dict[str, T]:
    """The tensors by transformers' names, without those of old files that the model does not have."""
    renamed = {}
    for name, tensor in tensors.items():
        if family.ignored and name.endswith(family.ignored):
            continue
        full = family.prefix + name
        renamed[full if full in expected and full not in tensors else name] = tensor
    return renamed
