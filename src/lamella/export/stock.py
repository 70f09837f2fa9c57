"""What the stock mixture-of-experts classes of transformers have in common: the backbone, and what it must be."""

from __future__ import annotations

import math

import torch

from lamella.architecture.families import HEAD
from lamella.architecture.moe_tensors import of_layer
from lamella.checkpoint.dtypes import DTYPES
from lamella.checkpoint.pieces import Stretches
from lamella.checkpoint.plan import OutputTensor
from lamella.export.experts import Expert, Part, named
from lamella.export.model import ConvertedModel
from lamella.jsons import Json

# Of the dense config as transformers reads it: a key that config.json leaves out has another default in each class.
_BACKBONE_KEYS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps", "attention_dropout", "use_cache",
)  # fmt: skip
# Written where they are None, too: some classes have numbers of their own, and would end a text at them.
_SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
PARTS_OF_GATED: dict[Part, str] = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}


def experts_needed(model: ConvertedModel) -> list[str]:
    """What no format with routed experts of a Llama-like decoder holds. Alone where it makes other questions moot."""
    if model.ffn is None:
        return ["it is for experts in the FFNs, which this model has not"]
    if not model.moe.gated:
        return [f"it has gated experts, those of {model.family.name} have two matrices"]
    if not model.family.llama_like:
        name = model.family.name
        return [f"its decoder is Llama's with biases or norms in the attention, this model's is that of {name}"]
    moe, problems = model.moe, []
    if moe.activation != "silu":  # transformers would compute another, but other readers of these formats silu
        problems.append(f"its experts compute silu, this model's {moe.activation}")
    if not model.attention_is_dense():
        problems.append("it has no attention experts, this model's are not all chosen with weight 1")
    if moe.num_experts < 2:
        problems.append("its router chooses among two experts or more, this model has one")
    if moe.router != "linear":
        problems.append(f"its router is linear, this model's is {moe.router}; convert with another router")
    if moe.output_bias:
        problems.append("its layers have no output bias, this model's have; convert with output plain")
    if moe.per_layer:
        problems.append(
            "its layers are all alike, this model's differ (per_layer); "
            "convert with allocation even, and shared as a number"
        )
    if not moe.moe_layers:
        problems.append("it has experts in at least one layer, this model has none")
    return problems


def gate_needed(model: ConvertedModel, gate: str, normalised: bool = False) -> list[str]:
    """Problems with how the router scores; `normalised`: the format always divides by the sum of the chosen scores."""
    problems = []
    if model.moe.gate != gate:
        fix = "; convert with gate sigmoid (normalised)" if gate == "sigmoid" else ""
        problems.append(f"its gate is {gate}, this model's is {model.moe.gate}{fix}")
    if normalised and not model.moe.norm_topk_prob:
        problems.append("it always divides gate weights by their sum, this model does not (norm_topk_prob)")
    return problems


def no_selection_bias(model: ConvertedModel) -> list[str]:
    if not model.has_selection_bias():
        return []
    return ["its router has no selection bias, this model's has one that changes which experts are chosen"]


def pairs_hold(model: ConvertedModel) -> list[str]:
    """Twin routing takes one of each pair; by softmax scores with a bias plain top-k may take both of one pair.

    Sigmoid scores of a pair add up to 1, so that all pairs meet at the same threshold; softmax scores do not.
    """
    if model.moe.routing != "twin" or model.moe.gate != "softmax" or not model.has_selection_bias():
        return []
    return ["twin routing by softmax with a selection bias is no top-k of all experts; convert with gate sigmoid"]


def scale_folds(model: ConvertedModel, factor: float = 1.0) -> list[str]:
    """A routing scale goes into the experts' down projections, which rounds unless it is a power of two."""
    scale = model.moe.route_scale * factor
    dtype = DTYPES.get(model.written_as or "", model.dtype)
    if dtype == torch.float32 or math.frexp(scale)[0] == 0.5:
        return []
    name = str(dtype).removeprefix("torch.")
    return [
        f"it has no routing scale, and times this model's ({scale:g}) {name} experts would be rounded; "
        "--dtype f32 holds them"
    ]


def folded(model: ConvertedModel) -> list[str]:
    """What to say of a routing scale that was multiplied into the experts."""
    scale = model.moe.route_scale
    return [] if scale == 1.0 else [f"the routing scale {scale:g} is multiplied into the experts' down projections"]


def one_window(model: ConvertedModel) -> list[str]:
    if len(set(model.windows)) <= 1:
        return []
    return ["all its layers have the same attention window, this model's differ"]


def no_window(model: ConvertedModel) -> list[str]:
    windows = sorted({window for window in model.windows if window})
    return [f"it has no sliding window, this model has one of {windows[0]} tokens"] if windows else []


def no_shared_expert(model: ConvertedModel) -> list[str]:
    return ["it has no shared expert, this model has one"] if model.moe.shared_intermediate_size else []


def shared_is_multiple(model: ConvertedModel) -> list[str]:
    if not model.moe.shared_intermediate_size % model.moe.moe_intermediate_size:
        return []
    return ["its shared expert is a multiple of a routed one, this model's is not"]


def dense_layers_first(model: ConvertedModel) -> list[str]:
    layers, count = model.moe.moe_layers, model.dense_hf.num_hidden_layers
    if not layers or layers == tuple(range(layers[0], count)):
        return []
    return ["its dense layers can only come first, this model's moe_layers have gaps"]


def all_layers(model: ConvertedModel) -> list[str]:
    if len(model.moe.moe_layers) == model.dense_hf.num_hidden_layers:
        return []
    return ["all its layers have experts, some of this model's are dense"]


def no_qk_norm(model: ConvertedModel) -> list[str]:
    return [f"it has no norm of queries and keys, {model.family.name} has"] if model.attention.qk_norm else []


def no_output_bias(model: ConvertedModel) -> list[str]:
    if not model.attention.output_bias:
        return []
    return ["it has no bias on the attention's output projection, this model has (attention_bias)"]


def no_attention_bias(model: ConvertedModel) -> list[str]:
    has_bias = model.attention.qkv_bias or model.attention.output_bias
    return [f"its attention has no biases, that of {model.family.name} has"] if has_bias else []


def backbone_config(model: ConvertedModel, architecture: str, model_type: str) -> Json:
    """What config.json says of everything but the experts. The head is written out: tied ones some servers lack."""
    hf = model.dense_hf
    config = {key: getattr(hf, key) for key in _BACKBONE_KEYS if getattr(hf, key, None) is not None}
    config |= {key: getattr(hf, key, None) for key in _SPECIAL_TOKENS}
    dtype = model.config.get("dtype") or model.config.get("torch_dtype") or str(model.dtype).removeprefix("torch.")
    return config | {
        "architectures": [architecture],
        "model_type": model_type,
        "head_dim": model.head_dim,
        "rope_parameters": dict(hf.rope_parameters),
        "dtype": dtype,
        "tie_word_embeddings": False,
        "num_experts_per_tok": model.moe.num_experts_per_tok,
    }


def backbone_tensors(model: ConvertedModel) -> list[OutputTensor]:
    """Embedding, attention, norms, dense FFNs and head, copied by their own names."""
    tensors = [
        OutputTensor(name, source.dtype, source.shape, Stretches.copy(source))
        for name, source in model.tensors.items()
        if not of_layer(name) and not name.endswith(".rotary_emb.inv_freq")
    ]
    if HEAD not in model.tensors:
        tensors.append(OutputTensor(HEAD, model.head.dtype, model.head.shape, Stretches.copy(model.head)))
    return tensors


def expert_tensors(expert: Expert, prefix: str, names: dict[Part, str] | None = None) -> list[OutputTensor]:
    """The matrices of one expert as `prefix` + name + ".weight"."""
    names = names or PARTS_OF_GATED
    return [named(expert[part], f"{prefix}{name}.weight") for part, name in names.items()]
