"""Stock `Glm4MoeForCausalLM`: sigmoid scores, a selection bias, renormalised weights and a scale, as they are here.

Twin routing becomes plain top-k there: a pair's frozen slice gets the gate row -w and the bias -b, its copy w and b
(lamella.moe.routing says why that picks one of each pair). Frozen experts come first. The file holds one tensor per
expert and matrix, the layout that other loaders read as well.

Shapes: E experts, f neurons per expert, D model width, S pairs.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch

from lamella.architecture.converted import attention_prefix, converted_family, dense_config, ffn_prefix
from lamella.architecture.moe import AttentionMoEConfig, MoEConfig
from lamella.checkpoint.pieces import Sink, Stretch, Stretches, Values
from lamella.checkpoint.plan import OutputTensor, WritePlan
from lamella.checkpoint.tensors import SourceTensor
from lamella.errors import UserError
from lamella.jsons import Json

ARCHITECTURE = "Glm4MoeForCausalLM"
# Of the dense config; the rest is GLM's own or follows from the experts.
_KEPT_KEYS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps", "attention_dropout",
    "bos_token_id", "eos_token_id", "pad_token_id", "dtype", "torch_dtype", "use_cache",
)  # fmt: skip


@dataclass(frozen=True)
class Mirrored:
    """[S, ...] -> [2S, ...]: the negative rows, then the rows themselves."""

    source: SourceTensor

    def write(self, sink: Sink, dtype: torch.dtype) -> None:
        rows = self.source.read(0, self.source.numel).to(dtype)
        sink.append(-rows)
        sink.append(rows)


def plan_glm4_moe(config: Json, sources: dict[str, SourceTensor]) -> WritePlan:
    """Tensors and config of the stock model; UserError where the class cannot hold this one exactly."""
    _check_attention(config, sources)
    moe = MoEConfig.from_dict(config["moe"])
    _check_fits(config, moe)
    tensors = []
    for name, source in sources.items():
        if not any(part in name for part in (".mlp.experts.", ".mlp.router.", ".mlp.shared.", ".self_attn.router.")):
            tensors.append(OutputTensor(name, source.dtype, source.shape, Stretches.copy(source)))
    for layer in moe.moe_layers:
        tensors += _layer_tensors(ffn_prefix(layer), sources, moe)
    if "lm_head.weight" not in sources:  # tied; some servers have no path for that in this class
        head = sources["model.embed_tokens.weight"]
        tensors.append(OutputTensor("lm_head.weight", head.dtype, head.shape, Stretches.copy(head)))
    return WritePlan(tensors, stock_config(config, moe))


def _layer_tensors(prefix: str, sources: dict[str, SourceTensor], moe: MoEConfig) -> list[OutputTensor]:
    tensors = []
    kinds = {"frozen": (0, moe.num_frozen_experts), "trainable": (moe.num_frozen_experts, moe.num_trainable_experts)}
    for kind, (first, count) in kinds.items():
        if not count:
            continue
        gate_up = sources[f"{prefix}experts.{kind}_gate_up_proj"]
        down = sources[f"{prefix}experts.{kind}_down_proj"]
        D, f = down.shape[1:]
        for i in range(down.shape[0]):
            expert = f"{prefix}experts.{first + i}."
            halves = (("gate_proj", 2 * i), ("up_proj", 2 * i + 1))
            one = [_part(f"{expert}{part}.weight", gate_up, half, (f, D)) for part, half in halves]
            one.append(_part(f"{expert}down_proj.weight", down, i, (D, f)))
            if kind == "frozen" and moe.lora_rank:
                places = (("gate_up", 2 * i), ("gate_up", 2 * i + 1), ("down", i))
                one = [_merged(t, prefix, sources, moe, *place) for t, place in zip(one, places, strict=True)]
            tensors += one
    weight, bias = sources[f"{prefix}router.weight"], sources[f"{prefix}router.selection_bias"]
    for name, source in (("gate.weight", weight), ("gate.e_score_correction_bias", bias)):
        piece = Mirrored(source) if moe.routing == "twin" else Stretches.copy(source)
        tensors.append(OutputTensor(prefix + name, source.dtype, (moe.num_experts, *source.shape[1:]), piece))
    if moe.shared_intermediate_size:
        return tensors + _shared_expert(prefix, sources, moe)
    return tensors + _zero_shared_expert(prefix, weight, moe)


def _part(name: str, packed: SourceTensor, index: int, shape: tuple[int, int]) -> OutputTensor:
    """The `index`-th matrix of this shape within a packed tensor, where they lie one after another."""
    count = shape[0] * shape[1]
    return OutputTensor(name, packed.dtype, shape, Stretches((Stretch(packed, index * count, count),)))


@dataclass(frozen=True)
class Merged:
    """The `index`-th matrix of a packed tensor plus its low-rank delta, for a class that has no place for one."""

    packed: SourceTensor
    a: SourceTensor
    b: SourceTensor
    index: int
    shape: tuple[int, int]
    scale: float

    def write(self, sink: Sink, dtype: torch.dtype) -> None:
        rows, columns = self.shape
        r = self.b.width
        sizes = ((self.packed, rows, columns), (self.a, r, columns), (self.b, rows, r))
        weight, a, b = (s.read(self.index * m * n, m * n).float().view(m, n) for s, m, n in sizes)
        sink.append((weight + self.scale * (b @ a)).to(dtype).flatten())


def _merged(
    tensor: OutputTensor, prefix: str, sources: dict[str, SourceTensor], moe: MoEConfig, matrix: str, index: int
) -> OutputTensor:
    """A frozen expert's matrix with its delta; `matrix` is gate_up or down."""
    packed, a, b = (
        sources[f"{prefix}experts.{name}"] for name in (f"frozen_{matrix}_proj", f"lora_{matrix}_a", f"lora_{matrix}_b")
    )
    rows, columns = tensor.shape
    return dataclasses.replace(tensor, piece=Merged(packed, a, b, index, (rows, columns), moe.lora_scale))


def _shared_expert(prefix: str, sources: dict[str, SourceTensor], moe: MoEConfig) -> list[OutputTensor]:
    gate_up, down = sources[f"{prefix}shared.gate_up_proj"], sources[f"{prefix}shared.down_proj"]
    D, n = down.shape
    name = f"{prefix}shared_experts."
    halves = [_part(f"{name}{part}.weight", gate_up, i, (n, D)) for i, part in enumerate(("gate_proj", "up_proj"))]
    return [*halves, _part(f"{name}down_proj.weight", down, 0, (D, n))]


def _zero_shared_expert(prefix: str, router: SourceTensor, moe: MoEConfig) -> list[OutputTensor]:
    """The class always adds a shared expert and some servers demand one: all zeros, it adds exactly nothing."""
    D, f = router.width, moe.moe_intermediate_size
    shapes = {"gate_proj": (f, D), "up_proj": (f, D), "down_proj": (D, f)}
    return [
        OutputTensor(f"{prefix}shared_experts.{part}.weight", router.dtype, shape, Values((0.0,) * shape[0], shape[1]))
        for part, shape in shapes.items()
    ]


def stock_config(config: Json, moe: MoEConfig) -> Json:
    """config.json of the stock class."""
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {"rope_type": "default"})
    if "rope_theta" not in rope:
        rope["rope_theta"] = config.get("rope_theta", 10000.0)
    heads = config["num_attention_heads"]
    return {
        **{key: config[key] for key in _KEPT_KEYS if key in config},
        "architectures": [ARCHITECTURE],
        "model_type": "glm4_moe",
        "num_key_value_heads": config.get("num_key_value_heads") or heads,
        "head_dim": config.get("head_dim") or config["hidden_size"] // heads,
        # GLM rotates half of each head unless told otherwise.
        "rope_parameters": rope | {"partial_rotary_factor": 1.0},
        "partial_rotary_factor": 1.0,
        "attention_bias": has_qkv_bias(config),
        "use_qk_norm": converted_family(config).qk_norm,
        "tie_word_embeddings": False,
        "n_routed_experts": moe.num_experts,
        "num_experts_per_tok": moe.num_experts_per_tok,
        "moe_intermediate_size": moe.moe_intermediate_size,
        "n_shared_experts": max(1, moe.shared_intermediate_size // moe.moe_intermediate_size),
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": moe.moe_layers[0],
        "norm_topk_prob": moe.norm_topk_prob,
        "routed_scaling_factor": moe.route_scale,
        "num_nextn_predict_layers": 0,
    }


def has_qkv_bias(config: Json) -> bool:
    family = converted_family(config)
    return family.qkv_bias or (family.optional_bias and bool(config.get("attention_bias")))


def _check_attention(config: Json, sources: dict[str, SourceTensor]) -> None:
    """UserError unless the attention is the dense one: no experts, or all of them chosen with weight exactly 1."""
    if config.get("moe") is None:
        raise UserError("glm4-moe is for experts in the FFNs, which this model has not; possible here: dense")
    if config.get("attention_moe") is None:
        return
    attention = AttentionMoEConfig.from_dict(config["attention_moe"])
    scales = [sources.get(f"{attention_prefix(layer)}router.gate_scale") for layer in attention.layers]
    weights_are_one = all(scale is not None and not scale.read(0, scale.numel).any() for scale in scales)
    if attention.num_experts_per_tok < attention.num_experts or not weights_are_one:
        raise UserError(
            "glm4-moe has no attention experts: this model's are not all chosen with weight 1; possible here: dense"
        )


def _check_fits(config: Json, moe: MoEConfig) -> None:
    if not moe.gated:
        raise UserError(
            f"glm4-moe has gated experts, those of {converted_family(config).name} have two matrices{_or_dense(moe)}"
        )
    problems = []
    if moe.gate != "sigmoid":
        problems.append(f"its gate is sigmoid, this model's is {moe.gate}; convert with gate sigmoid (normalised)")
    if moe.num_experts < 2:
        problems.append("its router chooses among two experts or more, this model has one")
    if moe.router != "linear":
        problems.append(f"its router is linear, this model's is {moe.router}; convert with another router")
    if moe.output_bias:
        problems.append("its layers have no output bias, this model's have; convert with output plain")
    if moe.per_layer:
        problems.append("its layers are all alike, this model's differ (per_layer); convert with shared as a number")
    if moe.shared_intermediate_size % moe.moe_intermediate_size:
        problems.append("its shared expert is a multiple of a routed one, this model's is not")
    if not moe.moe_layers or moe.moe_layers != tuple(range(moe.moe_layers[0], config["num_hidden_layers"])):
        problems.append("its dense layers can only come first, this model's moe_layers have gaps")
    if has_qkv_bias(config) and not converted_family(config).qkv_bias:
        problems.append("it has no bias on the attention's output projection, this model has (attention_bias)")
    window = config.get("sliding_window")
    if window and config.get("use_sliding_window", True) and window < config.get("max_position_embeddings", 0):
        problems.append(f"it has no sliding window, this model has one of {window} tokens")
    dense_config(config)
    if problems:
        raise UserError(f"glm4-moe cannot hold this model exactly: {'; '.join(problems)}{_or_dense(moe)}")


def _or_dense(moe: MoEConfig) -> str:
    return "; possible here: dense" if moe.num_frozen_experts else ""
