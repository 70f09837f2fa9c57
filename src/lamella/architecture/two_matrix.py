"""GPT-2 and OPT: which tensors their checkpoints hold, and which of their configs can be converted.

Their FFN has two matrices and two biases: y = down act(up x + up_bias) + down_bias. GPT-2 stores every matrix [in, out]
(transformers' Conv1D), OPT [out, in].

Shapes: D model width, F dense FFN width, V vocabulary, P positions, C embedding width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar, get_args

from lamella.architecture.moe import Activation
from lamella.errors import UserError, did_you_mean

Shapes = dict[str, tuple[int, ...]]
T = TypeVar("T")

# Names of the tensors begin so in transformers; files saved from the bare decoder lack it.
PREFIXES = {"gpt2": "transformer.", "opt": "model."}
# Causal masks that old files of GPT-2 hold; transformers computes them.
MASKS = (".attn.bias", ".attn.masked_bias")
_OPT_OFFSET = 2  # its position table begins with rows that no token uses


def check_two_matrix(config: dict[str, Any]) -> None:
    """UserError for what neither conversion nor the converted model knows of."""
    if config.get("add_cross_attention"):
        raise UserError("add_cross_attention is true; only decoders of their own can be converted")
    for key in ("enable_bias", "layer_norm_elementwise_affine"):
        if not config.get(key, True):
            raise UserError(f"{key} is false (as in Galactica); only OPT models with biases can be converted")
    activation_of(config)


def activation_of(config: dict[str, Any]) -> Activation:
    """What the FFN computes; UserError for what the experts do not."""
    name, known = config.get("activation_function", "gelu_new" if "n_embd" in config else "relu"), get_args(Activation)
    if name not in known:
        raise UserError(
            f"activation_function is {name!r}{did_you_mean(str(name), known)}; it must be one of {', '.join(known)}"
        )
    return name


def gpt2_ffn_width(config: dict[str, Any]) -> int:
    return config.get("n_inner") or 4 * config["n_embd"]


def gpt2_tensors(config: dict[str, Any]) -> Shapes:
    """All tensors of GPT2LMHeadModel but the output head, in the order of the model."""
    D, F = config["n_embd"], gpt2_ffn_width(config)
    shapes: Shapes = {"transformer.wte.weight": (config["vocab_size"], D)}
    shapes["transformer.wpe.weight"] = (config["n_positions"], D)
    linear = {"attn.c_attn": (D, 3 * D), "attn.c_proj": (D, D), "mlp.c_fc": (D, F), "mlp.c_proj": (F, D)}
    for layer in range(config["n_layer"]):
        for name in ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj"):
            shape = linear.get(name, (D,))
            shapes |= _with_bias(f"transformer.h.{layer}.{name}", shape, shape[-1])
    return shapes | _with_bias("transformer.ln_f", (D,), D)


def opt_tensors(config: dict[str, Any]) -> Shapes:
    """All tensors of OPTForCausalLM but the output head, in the order of the model."""
    D, F, V = config["hidden_size"], config["ffn_dim"], config["vocab_size"]
    C, decoder = config.get("word_embed_proj_dim") or D, "model.decoder."
    shapes: Shapes = {f"{decoder}embed_tokens.weight": (V, C)}
    shapes[f"{decoder}embed_positions.weight"] = (config["max_position_embeddings"] + _OPT_OFFSET, D)
    if C != D:
        shapes |= {f"{decoder}project_out.weight": (C, D), f"{decoder}project_in.weight": (D, C)}
    if config.get("do_layer_norm_before", True) and not config.get("_remove_final_layer_norm"):
        shapes |= _with_bias(f"{decoder}final_layer_norm", (D,), D)
    parts: Shapes = {f"self_attn.{part}_proj": (D, D) for part in ("k", "v", "q", "out")}
    parts |= {"self_attn_layer_norm": (D,), "fc1": (F, D), "fc2": (D, F), "final_layer_norm": (D,)}
    for layer in range(config["num_hidden_layers"]):
        for name, shape in parts.items():
            shapes |= _with_bias(f"{decoder}layers.{layer}.{name}", shape, shape[0])
    return shapes


def _with_bias(name: str, shape: tuple[int, ...], n_out: int) -> Shapes:
    return {f"{name}.weight": shape, f"{name}.bias": (n_out,)}


def full_names(tensors: Mapping[str, T], expected: Shapes, family: str) -> dict[str, T]:
    """The tensors by transformers' names, without the masks of old files."""
    prefix = PREFIXES.get(family, "")
    renamed = {}
    for name, tensor in tensors.items():
        if family == "gpt2" and name.endswith(MASKS):
            continue
        full = prefix + name
        renamed[full if full in expected and full not in tensors else name] = tensor
    return renamed
