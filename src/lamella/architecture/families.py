"""The dense architectures that can be converted: which tensors a checkpoint of each holds, with which shapes."""

from __future__ import annotations

from lamella.architecture.layout import FFNLayout, ffn_layout
from lamella.architecture.model import sizes_of
from lamella.architecture.rows import CONVERTED_PREFIX, FAMILIES
from lamella.architecture.two_matrix import check_activation, check_two_matrix
from lamella.architecture.types import Family, Shapes, Sizes
from lamella.errors import UserError
from lamella.jsons import Json

__all__ = [
    "CONVERTED_PREFIX", "FAMILIES", "HEAD", "FFNLayout", "Family", "Shapes", "Sizes", "dense_tensors", "family_of",
    "ffn_layout", "may_be_stored", "sizes_of", "tensors_of",
]  # fmt: skip

HEAD = "lm_head.weight"


def family_of(config: Json) -> Family:
    """The family of a dense config.json, after checking that nothing in it is unknown to the conversion.

    Raises:
        UserError: unknown architecture, activation or rope; MLP biases; a quantised or already converted model.
    """
    if str(config.get("model_type")).startswith(CONVERTED_PREFIX):
        raise UserError(
            "the model is converted already; give the dense model, or make it with `lamella export --to dense`"
        )
    sizes = sizes_of(config)
    family = sizes.family
    architectures = config.get("architectures") or [family.architecture]
    if architectures not in [[name] for name in family.architectures]:
        known = " or ".join(family.architectures)
        raise UserError(f"the architecture is {architectures}; only {known} of {family.name} can be converted")
    if config.get("quantization_config"):
        raise UserError("the model is quantised; convert its unquantised original, or a GGUF file of it")
    if not family.ffn.gated:
        check_two_matrix(sizes)
    elif sizes.mlp_bias:
        raise UserError(
            "mlp_bias (or use_bias) is true: a bias of the FFN cannot be cut into slices; only models without one can "
            "be converted"
        )
    check_activation(sizes)
    return family


def dense_tensors(config: Json, family: Family | None = None) -> Shapes:
    """Every tensor that the dense checkpoint must hold, in the order of the model, with its shape."""
    return tensors_of(sizes_of(config))


def tensors_of(sizes: Sizes) -> Shapes:
    """The same, of a config that has been read."""
    shapes = sizes.family.tensors(sizes)
    if not sizes.tied:
        embedding = next(iter(shapes.values()))  # OPT's head is as wide as its embedding
        shapes[HEAD] = embedding
    return shapes


def may_be_stored(name: str, config: Json) -> bool:
    """Tensors that some checkpoints hold although the model does not need them: copied along, never demanded.

    A tied output head, and the rope frequencies that Llama 2 files carry.
    """
    return (name == HEAD and sizes_of(config).tied) or name.endswith(".rotary_emb.inv_freq")
