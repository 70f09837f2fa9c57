"""Families that transformers has and conversion does not, by `model_type`, each with the reason."""

from __future__ import annotations

_GELU = "their gated FFN computes with gelu; only silu can be converted"
_FUSED = "gate and up projection are one matrix (gate_up_proj); only separate ones can be converted"
_EXPERTS = "they are mixtures of experts already"
_NO_GATE = "their FFN has an up and a down projection without a gate; of such models gpt2 and opt can be converted"
_LLAMA4 = "their experts, chunked attention and scaled queries are not known here"

NOT_HELD: dict[str, str] = {
    **dict.fromkeys(("gemma", "gemma2", "gemma3", "gemma3_text"), _GELU),
    **dict.fromkeys(("phi3", "glm", "glm4"), _FUSED),
    **dict.fromkeys(("llama4", "llama4_text"), _LLAMA4),
    **dict.fromkeys(
        (
            "mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "granitemoe", "deepseek_v2", "deepseek_v3", "glm4_moe",
            "phimoe", "gpt_oss", "ernie4_5_moe",
        ),
        _EXPERTS,
    ),
    **dict.fromkeys(("arcee", "apertus", "phi", "gpt_neox", "falcon", "starcoder2", "nemotron"), _NO_GATE),
}  # fmt: skip
