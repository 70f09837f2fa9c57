"""What a converted checkpoint consists of: config, names and shapes of its tensors; from the dense ones and back."""

from __future__ import annotations

from typing import Any

from lamella.architecture.families import CONVERTED_PREFIX, FAMILIES, Family, Shapes, dense_tensors, family_of
from lamella.architecture.layout import ffn_layout
from lamella.architecture.moe import AttentionMoEConfig, MoEConfig
from lamella.architecture.sizes import expert_shapes
from lamella.errors import UserError

REMOTE_CODE = "modeling_lamella"
FLOAT32 = ("router.selection_bias",)  # whatever the dtype of the weights


def converted_config(
    dense: dict[str, Any], family: Family, dtype: str | None = None, **entries: dict[str, Any] | None
) -> dict[str, Any]:
    """The dense config with its type changed and `entries` (moe, attention_moe) added; every other field stays."""
    config = dense | {
        "architectures": [family.converted_architecture],
        "model_type": CONVERTED_PREFIX + family.name,
        "auto_map": {
            "AutoConfig": f"{REMOTE_CODE}.{family.converted_config_class}",
            "AutoModelForCausalLM": f"{REMOTE_CODE}.{family.converted_architecture}",
        },
        **entries,
    }
    if dtype is not None:
        config["torch_dtype" if "torch_dtype" in dense else "dtype"] = dtype
    return config


def dense_config(config: dict[str, Any]) -> dict[str, Any]:
    """The dense model's config from a converted one's."""
    family = converted_family(config)
    dense = {key: value for key, value in config.items() if key not in ("moe", "attention_moe", "auto_map")}
    return dense | {"architectures": [family.architecture], "model_type": family.name}


def converted_family(config: dict[str, Any]) -> Family:
    """The family of a converted checkpoint's config; UserError if it is another kind of model."""
    name = str(config.get("model_type")).removeprefix(CONVERTED_PREFIX)
    is_converted = any(isinstance(config.get(entry), dict) for entry in ("moe", "attention_moe"))
    if name not in FAMILIES or not is_converted or config["model_type"] == name:
        kinds = ", ".join(CONVERTED_PREFIX + family for family in FAMILIES)
        raise UserError(f"the model type {config.get('model_type')!r} is not converted; expected one of {kinds}")
    return FAMILIES[name]


def ffn_config(config: dict[str, Any]) -> MoEConfig | None:
    """The `moe` entry; None where only attention is experts."""
    return None if config.get("moe") is None else MoEConfig.from_dict(config["moe"])


def converted_tensors(config: dict[str, Any]) -> Shapes:
    """Every tensor that a converted checkpoint with this config must hold, with its shape."""
    dense, moe = dense_config(config), ffn_config(config)
    shapes, layout = dense_tensors(dense, family_of(dense)), ffn_layout(dense)
    for layer, layer_moe in {i: moe.for_layer(i) for i in moe.moe_layers}.items() if moe else ():
        for name in layout.names(layer).values():
            del shapes[name]
        own = moe_tensors(layout.hidden_size, layer_moe)
        shapes |= {layout.prefix(layer) + name: shape for name, shape in own.items()}
    if attention := config.get("attention_moe"):
        shapes |= router_tensors(dense["hidden_size"], AttentionMoEConfig.from_dict(attention))
    return shapes


def moe_tensors(D: int, moe: MoEConfig) -> Shapes:
    """Names and shapes within one converted layer, in the place of its FFN; `moe` is that layer's config."""
    n, R = moe.shared_intermediate_size, moe.num_router_rows
    shapes: Shapes = {}
    for kind, E in (("frozen", moe.num_frozen_experts), ("trainable", moe.num_trainable_experts)):
        if E:
            packed = expert_shapes(D, moe.moe_intermediate_size, moe.gated)
            shapes |= {f"experts.{kind}_{name}": (E, *shape) for name, shape in packed.items()}
    shapes |= {f"experts.lora_{name}": shape for name, shape in moe.lora_shapes(D).items()}
    if n:
        shapes |= {f"shared.{name}": shape for name, shape in expert_shapes(D, n, moe.gated).items()}
    shapes |= {"router.weight": (R, D), "router.selection_bias": (R,)}
    if moe.router == "analytic":
        shapes["router.up_weight"] = (R, D)
    if moe.gate == "unit":
        shapes["router.gate_scale"] = (R,)
    if moe.output_bias:
        shapes["output_bias"] = (D,)
    return shapes


def attention_prefix(layer: int) -> str:
    return f"model.layers.{layer}.self_attn."


def router_tensors(hidden_size: int, config: AttentionMoEConfig) -> Shapes:
    """Names and shapes that attention experts add to the dense tensors of the checkpoint."""
    E = config.num_experts
    own: Shapes = {"weight": (E, hidden_size), "selection_bias": (E,)}
    if config.gate == "unit":
        own["gate_scale"] = (E,)
    prefixes = [f"{attention_prefix(layer)}router." for layer in config.layers]
    return {prefix + name: shape for prefix in prefixes for name, shape in own.items()}


def converted_layers(entry: dict[str, Any]) -> list[int]:
    """The layers that an entry `moe` or `attention_moe` names."""
    return entry["moe_layers"] if "moe_layers" in entry else entry["layers"]


def ffn_prefix(layer: int) -> str:
    """Of a Llama-like layer's FFN; `lamella.architecture.layout` knows every family's."""
    return f"model.layers.{layer}.mlp."
