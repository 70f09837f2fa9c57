"""What a converted checkpoint consists of: config, names and shapes of its tensors; from the dense ones and back."""

from __future__ import annotations

from lamella.architecture.adapters import ADAPTERS_IN_HF, adapter_shapes, adapters_config, widths_of
from lamella.architecture.families import tensors_of
from lamella.architecture.layout import layout_of
from lamella.architecture.model import known_family, sizes_of
from lamella.architecture.moe import AttentionMoEConfig, MoEConfig
from lamella.architecture.moe_tensors import ATTENTION_IN_HF, moe_tensors, router_shapes
from lamella.architecture.rows import CONVERTED_PREFIX, FAMILIES
from lamella.architecture.types import Family, Shapes, Sizes
from lamella.errors import UserError
from lamella.jsons import Json

REMOTE_CODE = "modeling_lamella"
ENTRIES = ("moe", "attention_moe", "adapters")
"""What a converted model's config.json has beside the dense one's: at least one of these."""


def converted_config(dense: Json, family: Family, dtype: str | None = None, **entries: Json | None) -> Json:
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


def dense_config(config: Json) -> Json:
    """The dense model's config from a converted one's."""
    family = converted_family(config)
    dense = {key: value for key, value in config.items() if key not in (*ENTRIES, "auto_map")}
    return dense | {"architectures": [family.architecture], "model_type": family.name}


def is_converted(config: Json) -> bool:
    """Whether the config.json names a converted model's type."""
    return str(config.get("model_type")).startswith(CONVERTED_PREFIX)


def converted_family(config: Json) -> Family:
    """The family of a converted checkpoint's config; UserError if it is another kind of model."""
    name = str(config.get("model_type")).removeprefix(CONVERTED_PREFIX)
    has_experts = any(isinstance(config.get(entry), dict) for entry in ENTRIES)
    if name not in FAMILIES or not has_experts or config["model_type"] == name:
        kinds = ", ".join(CONVERTED_PREFIX + family for family in FAMILIES)
        raise UserError(f"the model type {config.get('model_type')!r} is not converted; expected one of {kinds}")
    return known_family(name)


def ffn_config(config: Json) -> MoEConfig | None:
    """The `moe` entry; None where only attention is experts.

    Raises:
        UserError: the frozen experts are rounded in the file, which `stored_ffn_config` is for.
    """
    moe = stored_ffn_config(config)
    if moe is not None and moe.frozen_dtype != "model":
        raise UserError(
            f"the frozen experts of this model are stored in {moe.frozen_dtype}, which `lamella generate` and `lamella "
            "evaluate` read; name the folder or the run that it was exported from"
        )
    return moe


def stored_ffn_config(config: Json) -> MoEConfig | None:
    """The `moe` entry of a model whose frozen experts may be rounded in the file."""
    return None if config.get("moe") is None else MoEConfig.from_dict(config["moe"])


def attention_experts_config(config: Json) -> AttentionMoEConfig | None:
    """The `attention_moe` entry; None where attention has all heads."""
    return None if config.get("attention_moe") is None else AttentionMoEConfig.from_dict(config["attention_moe"])


def converted_tensors(config: Json) -> Shapes:
    """Every tensor that a converted checkpoint with this config must hold, with its shape."""
    converted_family(config)
    sizes = sizes_of(config)
    return model_tensors(sizes, ffn_config(config), attention_experts_config(config)) | adapter_tensors(sizes, config)


def adapter_tensors(sizes: Sizes, config: Json) -> Shapes:
    """The tensors of the entry `adapters`, by transformers' names; none where there is no such entry."""
    adapters = adapters_config(config)
    shapes: Shapes = {}
    if adapters is None:
        return shapes
    widths = widths_of(sizes)
    for block in adapters.blocks:
        own = adapter_shapes(widths[block], adapters)
        for layer in adapters.layers:
            shapes |= {ADAPTERS_IN_HF[block].format(layer) + name: shape for name, shape in own.items()}
    return shapes


def model_tensors(sizes: Sizes, moe: MoEConfig | None, attention: AttentionMoEConfig | None) -> Shapes:
    """Every tensor of a model, by transformers' names, with its shape; a dense model has neither entry."""
    shapes = tensors_of(sizes)
    if moe is not None:
        layout = layout_of(sizes)
        for layer in moe.moe_layers:
            for name in layout.names(layer).values():
                del shapes[name]
            own = moe_tensors(sizes.D, moe.for_layer(layer))
            shapes |= {layout.prefix(layer) + name: shape for name, shape in own.items()}
    if attention is not None:
        own = router_shapes(sizes.D, attention)
        shapes |= {attention_prefix(layer) + name: shape for layer in attention.layers for name, shape in own.items()}
    return shapes


def attention_prefix(layer: int) -> str:
    """Of the tensors of a layer's attention."""
    return ATTENTION_IN_HF.format(layer)


def converted_layers(entry: Json) -> list[int]:
    """The layers that an entry `moe` or `attention_moe` names."""
    return entry["moe_layers"] if "moe_layers" in entry else entry["layers"]
