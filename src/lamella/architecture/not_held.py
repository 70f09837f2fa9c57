"""Families that transformers has and conversion does not, by `model_type`, each with the reason."""

from __future__ import annotations

_EXPERTS = "they are mixtures of experts already"
_NO_GATE = "their FFN has an up and a down projection without a gate; of such models gpt2 and opt can be converted"
_RECURRENT = "some or all of their layers are recurrent or convolutions, which the converted model does not know"
_LATENT = "their attention keeps latent keys and values, which the converted model does not know"
_ENCODER = "they are encoders, or have one beside the decoder; decoders alone can be converted"
_WITH_IMAGES = "they read images or sound as well; take the text model out of it, if its own family can be converted"
_LLAMA4 = "their experts, chunked attention and scaled queries are not known here"
_LAYERS_DIFFER = "their layers share tensors or differ in width, which the converted model does not know"
_FOREIGN = "transformers has no class for them, and code that comes with a checkpoint is never run"

_GROUPS: tuple[tuple[str, str], ...] = (
    (
        _EXPERTS,
        "mixtral qwen2_moe qwen3_moe olmoe granitemoe granitemoeshared granitemoe_swa deepseek_v2 deepseek_v3 "
        "deepseek_v32 deepseek_v4 glm4_moe glm4_moe_lite glm_moe_dsa phimoe gpt_oss ernie4_5_moe afmoe aria_text axk1 "
        "axk2 beam cohere2_moe dbrx dots1 dots3_note dots3_note_text exaone_moe flex_olmo flint gemma4 gemma4_text "
        "hunyuan_v1_moe hy_v3 hy_v4 jetmoe kolibri1 laguna longcat_flash mellum mimo_v2_flash minimax_m2 "
        "minimax_m3_vl_text solar_open zaya",
    ),
    (_LLAMA4, "llama4 llama4_text"),
    (
        _NO_GATE,
        "arcee apertus phi gpt_neox gpt_neox_japanese falcon starcoder2 nemotron bloom codegen gpt_bigcode gpt_neo "
        "gptj gpt-sw3 mpt persimmon xglm biogpt ctrl openai-gpt jais2 nanochat xlnet xlm reformer",
    ),
    (
        _RECURRENT,
        "bamba bailing_hybrid falcon_h1 falcon_mamba granitemoehybrid inkling_text inkling2_text jamba kimi_linear "
        "lfm2 lfm2_moe lfm3 mamba mamba2 minimax nemotron_h olmo_hybrid qwen3_5 qwen3_5_text qwen3_5_moe "
        "qwen3_5_moe_text qwen3_next qwen4_exp qwen4_exp_text recurrent_gemma rwkv xlstm zamba zamba2",
    ),
    (_LATENT, "minicpm3 youtu"),
    (
        _ENCODER,
        "bart bert bert-generation big_bird bigbird_pegasus blenderbot blenderbot-small camembert data2vec-text "
        "electra ernie marian mbart megatron-bert mvp pegasus plbart prophetnet rembert roberta roberta-prelayernorm "
        "roc_bert roformer trocr xlm-roberta xlm-roberta-xl xmod",
    ),
    (
        _WITH_IMAGES,
        "gemma3 gemma3n gemma4_unified git fuyu got_ocr2 mllama emu3 moshi moss_transcribe_diarize musicgen "
        "musicgen_melody phi4_multimodal whisper",
    ),
    (_LAYERS_DIFFER, "gemma3n_text gemma4_assistant gemma4_unified_text gemma4_unified_assistant"),
    ("their FFN has a norm before the last matrix (attn_sub_norm, ffn_sub_norm), which mixes all neurons", "bitnet"),
    ("their layers are two stacks that run in cycles", "hrm_text"),
    ("their gated FFN has scales, and their attention buckets of positions, under names of their own", "cpmant"),
    ("their masks of keys are learned, and their layers scale the residual", "doge"),
    ("their output head is a network of its own, not one matrix", "modernbert-decoder"),
    ("it is the text part of a model of images, and was not tried", "cohere_compass_text"),
    ("they read bytes through an encoder of patches", "blt"),
    (_FOREIGN, "internlm internlm2 baichuan chatglm qwen deepseek minicpm xverse yi"),
)  # fmt: skip
NOT_HELD: dict[str, str] = {name: reason for reason, names in _GROUPS for name in names.split()}
HAS_NO_CLASS = frozenset(next(names for reason, names in _GROUPS if reason == _FOREIGN).split())
"""Those that transformers itself does not know."""
