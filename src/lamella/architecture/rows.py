"""One row per family of dense models: all that conversion, training, plans and exports know of it by name.

A further family is a row here; where its tensors are laid out otherwise, a table like that of `gated` beside it.
transformers' config classes say the defaults and which fields a family has (`reading`).
"""

from __future__ import annotations

from collections.abc import Callable

from lamella.architecture.gated import LAYER, gated_tensors
from lamella.architecture.gated_kin import (
    DIFFERENTIAL,
    FUSED_FFN,
    FUSED_FFN_NORMS,
    FUSED_QKV,
    NAMED_QK_NORMS,
    NORMS_AROUND,
    NORMS_BEFORE,
    NORMS_BEHIND,
    SINKS,
    WIDE_NORMS,
    cohere_tensors,
    hyperclovax_tensors,
    olmo_tensors,
    stablelm_tensors,
)
from lamella.architecture.two_matrix import MASKS, gpt2_tensors, opt_tensors
from lamella.architecture.types import Family, FFNNames, GGUFNames, LayerKind, Modules, Part, Shapes, Sizes

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
_FUSED = FFNNames(_MLP, None, f"{_MLP}down_proj.weight", gate_up=f"{_MLP}gate_up_proj.weight")
_PLAIN = LayerKind()
_GATED_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")


_MERGED_LLAMAS = ("mixtral", "qwen2-moe", "deepseek")


def _gated(
    name: str, architecture: str, *, gguf: GGUFNames | None = GATED_GGUF, qkv_bias: bool = False,
    qk_norm: bool = False, also_called: str = "", merged_in: tuple[str, ...] = (),
) -> Family:  # fmt: skip
    """A Llama-like family."""
    return Family(
        name, architecture, gated_tensors, _GATED, _GATED_SIZES, LAYER, qkv_bias=qkv_bias, qk_norm=qk_norm, gguf=gguf,
        trains=True, attention_experts=True, llama_like=True, also_called=also_called,
        merged_in=merged_in,
    )  # fmt: skip


def _kin(
    name: str, architecture: str, layer: tuple[Part, ...] = LAYER, *, not_trained: str = "", kind: LayerKind = _PLAIN,
    tensors: Callable[[Sizes], Shapes] = gated_tensors, ffn: FFNNames = _GATED, activation: str = "hidden_act",
    output_bias: str | None = "attention_bias", qk_norm: bool = False, plain_residual: bool = True,
    any_head_width: bool = True, required: tuple[str, ...] = (), scales_part: bool = False,
    ropes_by_kind: bool = False, kv_multiple: int = 1,
) -> Family:  # fmt: skip
    """A family with Llama's FFN in a decoder of its own; it trains unless `not_trained` says what is missing."""
    return Family(
        name, architecture, tensors, ffn, (*_GATED_SIZES, *required), layer, activation=activation,
        output_bias=output_bias, qk_norm=qk_norm, any_head_width=any_head_width, plain_residual=plain_residual,
        scales_part=scales_part, ropes_by_kind=ropes_by_kind, trains=not not_trained, not_trained=not_trained,
        kind=kind, kv_multiple=kv_multiple,
    )  # fmt: skip


_PAIRS = "its rope turns neighbouring features, the training home's those half a head apart"
_NORMS_AROUND = "it has norms before and behind attention and FFN"
_LAYER_NORMS = "its norms subtract the mean"
_TWO_MATRICES = "its experts have two matrices, and gated ones alone can be trained"
_GPT2 = "transformer.h.{}.mlp."
_OPT = "model.decoder.layers.{}."
_ROWS = (
    _gated(
        "llama", "LlamaForCausalLM", gguf=GGUFNames(_GGUF_TOP, _GGUF_LAYER, interleaved=True), merged_in=_MERGED_LLAMAS
    ),
    _gated("mistral", "MistralForCausalLM", merged_in=_MERGED_LLAMAS),
    _gated("qwen2", "Qwen2ForCausalLM", qkv_bias=True, merged_in=("qwen2-moe",)),
    _gated("qwen3", "Qwen3ForCausalLM", qk_norm=True, merged_in=("qwen3-moe",)),
    # transformers computes both by its Llama class
    _gated("internlm3", "LlamaForCausalLM", also_called="InternLM3ForCausalLM", gguf=None),
    _gated("iquestcoder", "LlamaForCausalLM", also_called="IQuestCoderForCausalLM", gguf=None),
    _kin(
        "olmo2", "Olmo2ForCausalLM", WIDE_NORMS, plain_residual=False,
        kind=LayerKind(norms_behind=True, wide_qk_norm=True),
    ),
    _kin("granite", "GraniteForCausalLM", plain_residual=False),
    _kin("smollm3", "SmolLM3ForCausalLM"),
    # its class computes no width from a null head_dim
    _kin("ministral", "MinistralForCausalLM", required=("head_dim",)),
    _kin("cwm", "CwmForCausalLM"),
    _kin("seed_oss", "SeedOssForCausalLM", output_bias="attention_out_bias"),
    _kin("gemma", "GemmaForCausalLM", kind=LayerKind(norm_offset=1.0, embedding_by_width=True)),
    _kin(
        "phi3", "Phi3ForCausalLM", FUSED_QKV, ffn=_FUSED, scales_part=True,
        kind=LayerKind(fused=True, rotates_part=True),
    ),
    _kin(
        "exaone4", "Exaone4ForCausalLM", NORMS_BEHIND, qk_norm=True, plain_residual=False,
        not_trained="its layers without a window are not rotated where others have one",
    ),
    _kin(
        "stablelm", "StableLmForCausalLM", tensors=stablelm_tensors, any_head_width=False, not_trained=_LAYER_NORMS
    ),
    _kin("cohere", "CohereForCausalLM", tensors=cohere_tensors, not_trained=_LAYER_NORMS),
    _kin("cohere2", "Cohere2ForCausalLM", tensors=cohere_tensors, not_trained=_LAYER_NORMS),
    _kin("olmo", "OlmoForCausalLM", tensors=olmo_tensors, any_head_width=False, not_trained=_LAYER_NORMS),
    _kin(
        "olmo3", "Olmo3ForCausalLM", WIDE_NORMS, plain_residual=False, ropes_by_kind=True,
        not_trained="its layers with a window have a rope of their own",
    ),
    _kin(
        "ministral3", "Ministral3ForCausalLM", not_trained="its queries are scaled by their positions",
    ),
    _kin("ernie4_5", "Ernie4_5ForCausalLM", output_bias="use_bias", not_trained=_PAIRS),
    _kin("helium", "HeliumForCausalLM", output_bias=None, any_head_width=False, not_trained=_PAIRS),
    _kin(
        "hunyuan_v1_dense", "HunYuanDenseV1ForCausalLM", NAMED_QK_NORMS, required=("head_dim",),
        not_trained="its queries and keys are normed behind the rotation",
    ),
    _kin(
        "hyperclovax", "HyperCLOVAXForCausalLM", tensors=hyperclovax_tensors, plain_residual=False,
        not_trained=_NORMS_AROUND,
    ),
    _kin(
        "granite_swa", "GraniteSWAForCausalLM", SINKS, plain_residual=False,
        not_trained="its attention has learned sinks",
    ),
    _kin(
        "diffllama", "DiffLlamaForCausalLM", DIFFERENTIAL, not_trained="its attention is the difference of two",
        kv_multiple=2,
    ),
    _kin(
        "gemma2", "Gemma2ForCausalLM", NORMS_AROUND, activation="hidden_activation", plain_residual=False,
        not_trained=_NORMS_AROUND,
    ),
    _kin(
        "gemma3_text", "Gemma3ForCausalLM", NORMS_AROUND, activation="hidden_activation", qk_norm=True,
        plain_residual=False, ropes_by_kind=True, not_trained=_NORMS_AROUND,
    ),
    _kin(
        "vaultgemma", "VaultGemmaForCausalLM", NORMS_BEFORE, activation="hidden_activation",
        not_trained="its attention caps its scores",
    ),
    _kin(
        "glm", "GlmForCausalLM", FUSED_FFN, ffn=_FUSED, output_bias=None, required=("head_dim",), not_trained=_PAIRS,
    ),
    _kin(
        "glm4", "Glm4ForCausalLM", FUSED_FFN_NORMS, ffn=_FUSED, output_bias=None, plain_residual=False,
        not_trained=f"{_PAIRS}, and {_NORMS_AROUND}",
    ),
    Family(
        "gpt2", "GPT2LMHeadModel", gpt2_tensors,
        FFNNames(
            _GPT2, f"{_GPT2}c_fc.weight", f"{_GPT2}c_proj.weight", None, f"{_GPT2}c_fc.bias", f"{_GPT2}c_proj.bias",
            transposed=True,
        ),
        ("n_embd", "n_layer", "n_head", "n_positions", "vocab_size"),
        width="n_inner", activation="activation_function",
        modules=Modules("h", "ln_f"), prefix="transformer.", ignored=MASKS, not_trained=_TWO_MATRICES,
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
        not_trained=_TWO_MATRICES,
    ),
)  # fmt: skip
FAMILIES = {family.name: family for family in _ROWS}


def names_of(ability: Callable[[Family], object]) -> list[str]:
    """The names of the families that have an ability."""
    return [family.name for family in FAMILIES.values() if ability(family)]
