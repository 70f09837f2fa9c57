"""The tensors of a model whose FFNs become something else, planned in the order of the dense model."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator

from lamella.architecture.families import dense_tensors
from lamella.architecture.layout import FFNLayout
from lamella.checkpoint.pieces import Stretches
from lamella.checkpoint.plan import OutputTensor
from lamella.checkpoint.source import Checkpoint
from lamella.checkpoint.tensors import SourceTensor
from lamella.recipe.methods.common import DTYPE_NAMES


def with_ffns_replaced(
    source: Checkpoint,
    layout: FFNLayout,
    layers: Container[int],
    experts: Callable[[int, dict[str, SourceTensor]], list[OutputTensor]],
    dtype: str | None,
) -> list[OutputTensor]:
    """The source's tensors, those of each layer's FFN replaced by `experts(layer, the FFN's parts)`.

    Args:
        dtype: "float32", "bfloat16", "float16", or None for that of the source.
    """
    replaced = {name: i for i in range(layout.num_layers) if i in layers for name in layout.names(i).values()}
    tensors: list[OutputTensor] = []
    for name in _in_model_order(source):
        layer = replaced.get(name)
        if layer is None:
            tensor = source.tensors[name]
            tensors.append(OutputTensor(name, stored_dtype(tensor.dtype, dtype), tensor.shape, Stretches.copy(tensor)))
        elif name == next(iter(layout.names(layer).values())):
            tensors += experts(layer, ffn_parts(source, layout, layer))
    return tensors


def stored_dtype(source: str, wanted: str | None) -> str:
    """safetensors' code of a tensor's dtype in the new checkpoint."""
    return source if wanted is None else DTYPE_NAMES[wanted]


def _in_model_order(source: Checkpoint) -> Iterator[str]:
    """Names of the dense tensors as the model has them, then those that are merely stored along."""
    expected = dense_tensors(source.config, source.family)
    yield from expected
    yield from (name for name in source.tensors if name not in expected)


def ffn_parts(source: Checkpoint, layout: FFNLayout, layer: int) -> dict[str, SourceTensor]:
    """A layer's dense FFN by the parts of `FFNLayout.names`, gate and up apart and matrices as [out, in] however they
    are stored."""
    parts = {part: source.tensors[name] for part, name in layout.names(layer).items()}
    if fused := parts.pop("gate_up", None):
        from lamella.checkpoint.transposed import halves

        parts["gate"], parts["up"] = halves(fused, ("gate", "up"))
    if layout.transposed:
        from lamella.checkpoint.transposed import transposed

        parts |= {part: transposed(parts[part]) for part in ("up", "down")}
    return parts
