"""One row per family of dense models: all that conversion, training, plans and exports know of it by name.

A further family is a row here; where its tensors are laid out otherwise, a table like that of `gated` beside it.
transformers' config classes say the defaults and which fields a family has (`reading`).
"""

from __future__ import annotations

from collections.abc import Callable

from lamella.architecture.gated import LAYER, gated_tensors
from lamella.architecture.gated_kin import NORMS_BEHIND, WIDE_NORMS, cohere_tensors, stablelm_tensors
from lamella.architecture.two_matrix import MASKS, gpt2_tensors, opt_tensors
from lamella.architecture.types import Family, FFNNames, GGUFNames, Modules, Part, Shapes, Sizes

CONVERTED_PREFIX = "lamella_"
"""Of the model type of converted models."""

_GGUF_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_GGUF_LAYER = {
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm", "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip
GATED_GGUF = GGUFNames(_GGUF_TOP, _GGUF_LAYER)
"""Of Llama-like families."""

_MLP = "model.layers.{}.mlp."
_GATED = FFNNames(_MLP, f"{_MLP}up_proj.weight", f"{_MLP}down_proj.weight", gate=f"{_MLP}gate_proj.weight")
_GATED_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")


def _gated(
    name: str, architecture: str, *, gguf: GGUFNames = GATED_GGUF, qkv_bias: bool = False, qk_norm: bool = False
) -> Family:
    """A Llama-like family."""
    return Family(
        name, architecture, gated_tensors, _GATED, _GATED_SIZES, LAYER, qkv_bias=qkv_bias, qk_norm=qk_norm, gguf=gguf,
        trains=True, attention_experts=True, llama_like=True,
    )  # fmt: skip


def _kin(
    name: str, architecture: str, layer: tuple[Part, ...] = LAYER, *,
    tensors: Callable[[Sizes], Shapes] = gated_tensors, qk_norm: bool = False, plain_residual: bool = True,
    any_head_width: bool = True, required: tuple[str, ...] = (),
) -> Family:  # fmt: skip
    """A family with Llama's FFN in a decoder of its own."""
    return Family(
        name, architecture, tensors, _GATED, (*_GATED_SIZES, *required), layer, qk_norm=qk_norm,
        any_head_width=any_head_width, plain_residual=plain_residual,
    )  # fmt: skip


_GPT2 = "transformer.h.{}.mlp."
_OPT = "model.decoder.layers.{}."
_ROWS = (
    _gated("llama", "LlamaForCausalLM", gguf=GGUFNames(_GGUF_TOP, _GGUF_LAYER, interleaved=True)),
    _gated("mistral", "MistralForCausalLM"),
    _gated("qwen2", "Qwen2ForCausalLM", qkv_bias=True),
    _gated("qwen3", "Qwen3ForCausalLM", qk_norm=True),
    _kin("olmo2", "Olmo2ForCausalLM", WIDE_NORMS, plain_residual=False),
    _kin("granite", "GraniteForCausalLM", plain_residual=False),
    _kin("smollm3", "SmolLM3ForCausalLM"),
    # its class computes no width from a null head_dim
    _kin("ministral", "MinistralForCausalLM", required=("head_dim",)),
    _kin("exaone4", "Exaone4ForCausalLM", NORMS_BEHIND, qk_norm=True, plain_residual=False),
    _kin("stablelm", "StableLmForCausalLM", tensors=stablelm_tensors, any_head_width=False),
    _kin("cohere", "CohereForCausalLM", tensors=cohere_tensors, plain_residual=False),
    Family(
        "gpt2", "GPT2LMHeadModel", gpt2_tensors,
        FFNNames(
            _GPT2, f"{_GPT2}c_fc.weight", f"{_GPT2}c_proj.weight", None, f"{_GPT2}c_fc.bias", f"{_GPT2}c_proj.bias",
            transposed=True,
        ),
        ("n_embd", "n_layer", "n_head", "n_positions", "vocab_size"),
        width="n_inner", activation="activation_function",
        modules=Modules("h", "ln_f"), prefix="transformer.", ignored=MASKS,
    ),
    # transformers' OPT layer calls fc1, the activation and fc2 itself: the MoE layer stands in fc1's place
    Family(
        "opt", "OPTForCausalLM", opt_tensors,
        FFNNames(
            f"{_OPT}fc1.", f"{_OPT}fc1.weight", f"{_OPT}fc2.weight", None, f"{_OPT}fc1.bias", f"{_OPT}fc2.bias",
            modules=("fc1", "activation_fn", "fc2"),
        ),
        (
            "hidden_size", "ffn_dim", "num_hidden_layers", "num_attention_heads", "max_position_embeddings",
            "vocab_size",
        ),
        width="ffn_dim", activation="activation_function",
        modules=Modules("layers", "final_layer_norm", masks_documents=False), prefix="model.",
    ),
)  # fmt: skip
FAMILIES = {family.name: family for family in _ROWS}


def names_of(ability: Callable[[Family], object]) -> list[str]:
    """The names of the families that have an ability."""
    return [family.name for family in FAMILIES.values() if ability(family)]
