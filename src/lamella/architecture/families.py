"""The dense architectures that can be converted: which tensors a checkpoint of each holds, with which shapes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lamella.architecture.layout import CONVERTED_PREFIX, FFNLayout, ffn_layout
from lamella.architecture.two_matrix import Shapes, check_two_matrix, gpt2_tensors, opt_tensors
from lamella.errors import UserError, did_you_mean

__all__ = [
    "CONVERTED_PREFIX",
    "FAMILIES",
    "FFNLayout",
    "Family",
    "Shapes",
    "dense_tensors",
    "family_of",
    "ffn_layout",
    "ffn_tensors",
    "is_tied",
    "may_be_stored",
]  # fmt: skip


LLAMA_KEYS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
GPT2_KEYS = ("n_embd", "n_layer", "n_head", "n_positions", "vocab_size")
OPT_KEYS = (
    "hidden_size", "ffn_dim", "num_hidden_layers", "num_attention_heads", "max_position_embeddings", "vocab_size",
)  # fmt: skip


@dataclass(frozen=True)
class Family:
    """A decoder; what differs between them."""

    name: str
    """`model_type` of the dense config."""
    architecture: str
    """The transformers class of the dense model."""
    qkv_bias: bool = False
    """Query, key and value always have a bias, the output projection never (Qwen2)."""
    optional_bias: bool = False
    """`attention_bias` in the config gives all four projections a bias."""
    qk_norm: bool = False
    default_kv_heads: int | None = None
    """Where the config does not say; None: as many as query heads."""
    default_head_dim: int | None = None
    """Where the config does not say; None: hidden size over query heads."""
    tied_by_default: bool = False
    """Where the config does not say whether the output head is the embedding."""
    required_keys: tuple[str, ...] = LLAMA_KEYS
    """Sizes without which config.json says too little."""

    @property
    def converted_architecture(self) -> str:
        return f"Lamella{self.architecture.replace('LMHeadModel', 'ForCausalLM')}"

    @property
    def converted_config_class(self) -> str:
        return self.converted_architecture.removesuffix("ForCausalLM") + "Config"


FAMILIES = {
    family.name: family
    for family in (
        Family("llama", "LlamaForCausalLM", optional_bias=True),
        Family("mistral", "MistralForCausalLM", default_kv_heads=8),
        Family("qwen2", "Qwen2ForCausalLM", qkv_bias=True, default_kv_heads=32),
        Family(
            "qwen3", "Qwen3ForCausalLM", optional_bias=True, qk_norm=True, default_kv_heads=32, default_head_dim=128
        ),
        Family("gpt2", "GPT2LMHeadModel", tied_by_default=True, required_keys=GPT2_KEYS),
        Family("opt", "OPTForCausalLM", tied_by_default=True, required_keys=OPT_KEYS),
    )
}
# transformers' names (modeling_rope_utils); any other would be computed as something else or not at all.
ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")
_TWO_MATRIX = {"gpt2": gpt2_tensors, "opt": opt_tensors}
_OPTIONAL_SIZES = ("num_key_value_heads", "head_dim", "n_inner", "word_embed_proj_dim")
_MAX_LAYERS = 10_000  # a damaged number must not be counted up to


def family_of(config: dict[str, Any]) -> Family:
    """The family of a dense config.json, after checking that nothing in it is unknown to the conversion.

    Raises:
        UserError: unknown architecture, activation or rope; MLP biases; a quantised or already converted model.
    """
    family = _known_family(config)
    architectures = config.get("architectures") or [family.architecture]
    if architectures != [family.architecture]:
        raise UserError(
            f"the architecture is {architectures}; only {family.architecture} of {family.name} can be converted"
        )
    _check_sizes(config, family)
    if config.get("quantization_config"):
        raise UserError("the model is quantised; convert its unquantised original, or a GGUF file of it")
    if family.name in _TWO_MATRIX:
        check_two_matrix(config)
    else:
        _check_llama(config)
    return family


def _check_llama(config: dict[str, Any]) -> None:
    if config.get("mlp_bias"):
        raise UserError(
            "mlp_bias is true: a bias of the FFN cannot be cut into slices; only models without one can be converted"
        )
    if config.get("hidden_act", "silu") != "silu":
        raise UserError(f"hidden_act is {config['hidden_act']!r}; only 'silu' (a SwiGLU FFN) can be converted")
    _check_rope(config)


def _known_family(config: dict[str, Any]) -> Family:
    model_type = str(config.get("model_type"))
    if model_type in FAMILIES:
        return FAMILIES[model_type]
    if model_type.startswith(CONVERTED_PREFIX):
        raise UserError(
            "the model is converted already; give the dense model, or make it with `lamella export --to dense`"
        )
    hint = did_you_mean(model_type, FAMILIES)
    raise UserError(f"unknown architecture {model_type!r}{hint}; those that can be converted: {', '.join(FAMILIES)}")


def _check_sizes(config: dict[str, Any], family: Family) -> None:
    wrong = [key for key in family.required_keys if not _is_size(config.get(key))]
    wrong += [key for key in _OPTIONAL_SIZES if config.get(key) is not None and not _is_size(config[key])]
    if wrong:
        raise UserError(f"config.json lacks {', '.join(wrong)} (whole numbers); copy it again from the model's source")
    layers = ffn_layout(config).num_layers
    if layers > _MAX_LAYERS:
        raise UserError(f"config.json says num_hidden_layers {layers}; at most {_MAX_LAYERS}")


def _is_size(value: Any) -> bool:
    return type(value) is int and value > 0


def _check_rope(config: dict[str, Any]) -> None:
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise UserError(
            f"the rope parameters of config.json are {rope!r}, not an object; copy it again from its source"
        )
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type not in ROPE_TYPES:
        raise UserError(
            f"unknown rope type {rope_type!r}{did_you_mean(str(rope_type), ROPE_TYPES)}; known: {', '.join(ROPE_TYPES)}"
        )


def dense_tensors(config: dict[str, Any], family: Family) -> Shapes:
    """Every tensor that the dense checkpoint must hold, in the order of the model, with its shape."""
    shapes = _TWO_MATRIX[family.name](config) if family.name in _TWO_MATRIX else _llama_tensors(config, family)
    if not is_tied(config, family):
        embedding = next(iter(shapes.values()))  # OPT's head is as wide as its embedding
        shapes["lm_head.weight"] = embedding
    return shapes


def is_tied(config: dict[str, Any], family: Family) -> bool:
    """Whether the output head is the embedding."""
    return config.get("tie_word_embeddings", family.tied_by_default)


def _llama_tensors(config: dict[str, Any], family: Family) -> Shapes:
    D, V = config["hidden_size"], config["vocab_size"]
    shapes: Shapes = {"model.embed_tokens.weight": (V, D)}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        shapes[prefix + "input_layernorm.weight"] = (D,)
        shapes |= {f"{prefix}self_attn.{name}": shape for name, shape in _attention_tensors(config, family).items()}
        shapes[prefix + "post_attention_layernorm.weight"] = (D,)
        shapes |= {f"{prefix}mlp.{name}": shape for name, shape in ffn_tensors(config).items()}
    shapes["model.norm.weight"] = (D,)
    return shapes


def ffn_tensors(config: dict[str, Any]) -> Shapes:
    D, F = config["hidden_size"], config["intermediate_size"]
    return {"gate_proj.weight": (F, D), "up_proj.weight": (F, D), "down_proj.weight": (D, F)}


def _attention_tensors(config: dict[str, Any], family: Family) -> Shapes:
    D, heads = config["hidden_size"], config["num_attention_heads"]
    head_dim = config.get("head_dim") or family.default_head_dim or D // heads
    kv_heads = (config.get("num_key_value_heads", family.default_kv_heads)) or heads
    q, kv = heads * head_dim, kv_heads * head_dim
    shapes: Shapes = {
        "q_proj.weight": (q, D),
        "k_proj.weight": (kv, D),
        "v_proj.weight": (kv, D),
        "o_proj.weight": (D, q),
    }
    all_bias = family.optional_bias and config.get("attention_bias", False)
    if all_bias or family.qkv_bias:
        shapes |= {"q_proj.bias": (q,), "k_proj.bias": (kv,), "v_proj.bias": (kv,)}
    if all_bias:
        shapes["o_proj.bias"] = (D,)
    if family.qk_norm:
        shapes |= {"q_norm.weight": (head_dim,), "k_norm.weight": (head_dim,)}
    return shapes


def may_be_stored(name: str, config: dict[str, Any]) -> bool:
    """Tensors that some checkpoints hold although the model does not need them: copied along, never demanded.

    A tied output head, and the rope frequencies that Llama 2 files carry.
    """
    tied = is_tied(config, FAMILIES[config["model_type"]])
    return (name == "lm_head.weight" and tied) or name.endswith(".rotary_emb.inv_freq")
