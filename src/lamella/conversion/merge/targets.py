"""The architectures that a merge is written in: what each can hold, its names, its config.json.

Tensors are one per expert, not packed, and config.json is spelt twice: so transformers 4 and 5, vLLM and llama.cpp's
converter read them.

Shapes: E routed experts (parts counted one by one), D model width, f neurons per expert.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from lamella.architecture.rows import names_of
from lamella.checkpoint.source import Checkpoint
from lamella.checkpoint.spelling import completed, spelt_rope
from lamella.conversion.merge.lora import MergedTensor
from lamella.conversion.merge.parts import Merge
from lamella.errors import UserError
from lamella.jsons import Json
from lamella.recipe.methods.merge import RANDOM_MODES, TargetName, target_named

# Of the base config as transformers reads it: a key that config.json leaves out has another default in each class.
_BACKBONE = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "hidden_act",
    "max_position_embeddings", "initializer_range", "rms_norm_eps", "attention_dropout", "use_cache",
    "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id",
)  # fmt: skip
EMPTY_SHARED_WIDTH = 64
"""Neurons, all 0, of the shared expert that a Qwen2-MoE must have where none is wanted."""
_QWEN_NAMES = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}


@dataclass(frozen=True)
class Stock:
    """A class that is not ours."""

    name: TargetName
    architecture: str
    model_type: str
    block: str
    """The place of a layer's experts and router; {} is the layer."""
    problems: Callable[[Merge], list[str]]
    """What a merge has that the class cannot hold."""
    config: Callable[[Merge], Json]
    """The keys of config.json about experts and attention."""
    names: dict[str, str]
    """Part of an expert -> its tensor's name."""
    shared: str | None = None
    """The place of the shared expert within the block."""


def _no_shared(merge: Merge) -> list[str]:
    return ["it has no shared experts"] if merge.shared else []


def _mixtral_problems(merge: Merge) -> list[str]:
    found = _no_shared(merge)
    if merge.sizes.qkv_bias:
        found.append("its attention has no biases, the base model's has")
    if len(set(merge.sizes.windows)) > 1:
        found.append("all its layers have the same attention window, the base model's differ")
    return found


def _qwen2_problems(merge: Merge) -> list[str]:
    sizes, found = merge.sizes, []
    if sizes.output_bias:
        found.append("its attention's output projection has no bias, the base model's has (attention_bias)")
    if sizes.H * sizes.N != sizes.D:
        found.append(f"its heads are hidden_size / heads wide, the base model's are {sizes.H} of {sizes.D} / {sizes.N}")
    if len(merge.shared) > 1 and has_shared_gate(merge):
        found.append("it has one gate for the shared expert; give several shared experts without prompts")
    return found


def _qwen3_problems(merge: Merge) -> list[str]:
    found = _no_shared(merge)
    if len(set(merge.sizes.windows)) > 1:
        found.append("all its layers have the same attention window, the base model's differ")
    return found


def _deepseek_problems(merge: Merge) -> list[str]:
    found = ["its attention has no biases, the base model's has"] if merge.sizes.qkv_bias else []
    if has_shared_gate(merge) and merge.options.gate_mode not in RANDOM_MODES:
        found.append("its shared experts have no gate; leave their prompts out")
    return found


def has_shared_gate(merge: Merge) -> bool:
    """Whether prompts say how much of the shared expert a token gets, as mergekit's Qwen does it."""
    return any(expert.said.has_prompts for expert in merge.shared)


def _window(merge: Merge) -> int | None:
    windows = set(merge.sizes.windows)
    return windows.pop() if len(windows) == 1 else None


def _mixtral(merge: Merge) -> Json:
    moe = merge.moe
    return {
        "intermediate_size": moe.moe_intermediate_size, "num_local_experts": moe.num_experts,
        "num_experts": moe.num_experts, "head_dim": merge.sizes.H, "sliding_window": _window(merge),
        "router_jitter_noise": 0.0,
    }  # fmt: skip


def _qwen2(merge: Merge) -> Json:
    moe = merge.moe
    return _qwen(merge) | {
        "shared_expert_intermediate_size": moe.shared_intermediate_size or EMPTY_SHARED_WIDTH, "qkv_bias": True,
        "sliding_window": None, "use_sliding_window": False,
    }  # fmt: skip


def _qwen3(merge: Merge) -> Json:
    window = _window(merge)
    return _qwen(merge) | {
        "head_dim": merge.sizes.H, "attention_bias": merge.sizes.output_bias, "sliding_window": window,
        "use_sliding_window": window is not None,
    }  # fmt: skip


def _qwen(merge: Merge) -> Json:
    moe = merge.moe
    return {
        "intermediate_size": merge.sizes.F, "moe_intermediate_size": moe.moe_intermediate_size,
        "num_experts": moe.num_experts, "num_local_experts": moe.num_experts, "decoder_sparse_step": 1,
        "mlp_only_layers": [], "norm_topk_prob": True,
    }  # fmt: skip


_REMOTE = "deepseek-ai/deepseek-moe-16b-base--"


def _deepseek(merge: Merge) -> Json:
    moe = merge.moe
    return {
        "intermediate_size": merge.sizes.F, "moe_intermediate_size": moe.moe_intermediate_size,
        "n_routed_experts": moe.num_experts, "n_shared_experts": len(merge.shared) * merge.options.parts or None,
        "first_k_dense_replace": 0, "moe_layer_freq": 1, "scoring_func": "softmax", "norm_topk_prob": True,
        "auto_map": {
            "AutoConfig": f"{_REMOTE}configuration_deepseek.DeepseekConfig",
            "AutoModel": f"{_REMOTE}modeling_deepseek.DeepseekModel",
            "AutoModelForCausalLM": f"{_REMOTE}modeling_deepseek.DeepseekForCausalLM",
        },
    }  # fmt: skip


# In the order in which they are tried; the last is remote code, and written on request alone.
STOCK = (
    Stock(
        "mixtral", "MixtralForCausalLM", "mixtral", "model.layers.{}.block_sparse_moe.",
        _mixtral_problems, _mixtral, {"gate": "w1", "up": "w3", "down": "w2"},
    ),
    Stock(
        "qwen2-moe", "Qwen2MoeForCausalLM", "qwen2_moe", "model.layers.{}.mlp.",
        _qwen2_problems, _qwen2, _QWEN_NAMES, "shared_expert",
    ),
    Stock(
        "qwen3-moe", "Qwen3MoeForCausalLM", "qwen3_moe", "model.layers.{}.mlp.",
        _qwen3_problems, _qwen3, _QWEN_NAMES,
    ),
    Stock(
        "deepseek", "DeepseekForCausalLM", "deepseek", "model.layers.{}.mlp.",
        _deepseek_problems, _deepseek, _QWEN_NAMES, "shared_experts",
    ),
)  # fmt: skip


def chosen(merge: Merge) -> Stock | None:
    """The class to write, or None for our own form.

    Raises:
        UserError: the class that was asked for cannot hold the merge, or our own form cannot.
    """
    asked = target_named(merge.options.architecture)
    found = {stock.name: _cannot(stock, merge) for stock in STOCK}
    if asked not in (None, "lamella"):
        if found[asked]:
            possible = [name for name, problems in found.items() if not problems]
            hint = f"; possible: {', '.join([*possible, 'lamella'])}"
            raise UserError(f"{asked} cannot hold this merge: {'; '.join(found[asked])}{hint}")
        return next(stock for stock in STOCK if stock.name == asked)
    if asked is None:
        for stock in STOCK:
            if not found[stock.name] and stock.name != "deepseek":
                return stock
    if has_shared_gate(merge):
        raise UserError("our own form has no gate on shared experts; leave their prompts out")
    return None


def _cannot(stock: Stock, merge: Merge) -> list[str]:
    family = merge.sizes.family
    if stock.name not in family.merged_in:
        held = names_of(lambda other: stock.name in other.merged_in)
        return [f"it is for {', '.join(held)} models, the base model is {family.name}"]
    silu = [] if merge.moe.activation == "silu" else [f"it computes silu, the base model's FFNs {merge.moe.activation}"]
    return silu + stock.problems(merge)


def stock_config(stock: Stock, merge: Merge) -> Json:
    """config.json, for old readers and new ones."""
    values, sizes = merge.sizes.values, merge.sizes
    assert sizes.rope is not None, "families of stock classes rotate"
    config = {key: values[key] for key in _BACKBONE if values.get(key) is not None}
    config |= {"architectures": [stock.architecture], "model_type": stock.model_type, "output_router_logits": False}
    config |= {"num_experts_per_tok": merge.moe.num_experts_per_tok} | stock.config(merge)
    if dtype := merge.dtype:
        config |= {"dtype": dtype, "torch_dtype": dtype}
    return config | spelt_rope(completed(sizes.rope, sizes.max_positions))


def remarks(stock: Stock | None, merge: Merge) -> list[str]:
    """What a reader of the model should know, a sentence each."""
    found = []
    if stock is None and merge.options.architecture is None:
        reasons = {s.name: "; ".join(_cannot(s, merge)) for s in STOCK if s.name in merge.sizes.family.merged_in}
        why = "".join(f" ({name}: {problems})" for name, problems in reasons.items() if problems)
        found.append(f"no stock class holds this merge exactly{why}, so it is written in lamella's own form")
    if stock is not None and stock.name in ("qwen2-moe", "deepseek") and any(merge.sizes.windows):
        found.append("the base model's sliding window is left out: attention sees all tokens, as mergekit has it")
    if stock is not None and stock.name == "qwen2-moe":
        if not merge.shared:
            found.append(f"the shared expert that Qwen2-MoE must have is {EMPTY_SHARED_WIDTH} neurons of 0: it adds 0")
        elif not has_shared_gate(merge):
            found.append("the shared expert's gate is always 1/2, and its down projections are doubled: it counts once")
    if stock is not None and stock.name == "deepseek":
        found.append("DeepSeek's class is remote code, which transformers 5 does not run; qwen2-moe holds the same")
    if stock is not None and merge.options.parts > 1:
        found.append(f"the down projections are multiplied by {merge.options.parts}, the parts of an FFN")
    unused = sorted({e.label for e in merge.all_experts if _has_other_changes(e.source, merge)})
    if unused:
        found.append(f"the adapters of {', '.join(unused)} change more than the FFNs, which are all that is used")
    return found


def _has_other_changes(source: Checkpoint, merge: Merge) -> bool:
    if source is merge.base:
        return False
    ffn = {name for layer in range(merge.layout.num_layers) for name in merge.layout.names(layer).values()}
    return any(isinstance(tensor, MergedTensor) and name not in ffn for name, tensor in source.tensors.items())
