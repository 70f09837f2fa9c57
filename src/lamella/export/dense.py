"""The inverse of slicing: the frozen slices laid side by side are the dense FFN again, bit for bit.

The trainable experts, the routers and their biases are left out; whatever else was trained is kept as it is. Of
attention experts only the routers are left out: their heads are the dense tensors.
"""

from __future__ import annotations

import dataclasses

from lamella.architecture.families import dense_tensors, family_of, may_be_stored
from lamella.architecture.layout import FFNLayout, ffn_layout
from lamella.architecture.moe_tensors import (
    DOWN,
    GATE_UP,
    KINDS,
    OUTPUT_BIAS,
    SELECTION_BIAS,
    UP,
    UP_BIAS,
    WEIGHT,
    expert_name,
    router_name,
)
from lamella.checkpoint.pieces import JoinColumns, Piece, Stretch, Stretches
from lamella.checkpoint.plan import OutputTensor, WritePlan
from lamella.checkpoint.tensors import SourceTensor
from lamella.checkpoint.transposed import matrices, transposed
from lamella.export.model import ConvertedModel


def needs(model: ConvertedModel) -> list[str]:
    """Why no dense model lies in this one."""
    if model.ffn and not model.ffn.num_frozen_experts:
        return ["this model has no frozen slices, so no dense FFN lies in it; give the model it was made of"]
    return []


def loses(model: ConvertedModel) -> list[str]:
    """What the routed model computes beside the dense one, which it is as long as its routers are as converted.

    It still is where the trainable copies are the slices themselves, bit for bit, and nothing was added to the slices.
    """
    if not model.ffn or _chooses_the_slices(model) or _copies_are_the_slices(model):
        return []
    return [
        "its router chooses trained copies of the slices, which the dense model leaves out; --mode dense takes it "
        "without them, --to auto keeps them"
    ]


def _chooses_the_slices(model: ConvertedModel) -> bool:
    """Whether every router is as converted: rows zero, and biases that choose all slices, whatever the token is."""
    moe = model.moe
    if moe.num_experts_per_tok != moe.num_frozen_experts or moe.lora_rank:
        return False
    for layer in moe.moe_layers:
        weight, bias = (model.tensors[model.ffn_prefix(layer) + router_name(name)] for name in (WEIGHT, SELECTION_BIAS))
        values = bias.read(0, bias.numel)
        if moe.routing == "twin":
            chosen = bool((values < 0).all())
        else:
            slices, copies = values.tensor_split([moe.num_frozen_experts])
            chosen = not copies.numel() or bool(slices.min() > copies.max())
        if not chosen or weight.read(0, weight.numel).any():
            return False
    return True


def _copies_are_the_slices(model: ConvertedModel) -> bool:
    """Of twin routing, which takes one of each pair whatever the router says."""
    moe = model.moe
    if moe.routing != "twin" or moe.lora_rank or moe.num_trainable_experts != moe.num_frozen_experts:
        return False
    parts = (GATE_UP, DOWN) if moe.gated else (UP, UP_BIAS, DOWN)
    return all(
        _same(*(model.tensors[model.ffn_prefix(layer) + expert_name(kind, part)] for kind in KINDS))
        for layer in moe.moe_layers
        for part in parts
    )


def plan(model: ConvertedModel) -> WritePlan:
    """Tensors and config of the dense model within a converted one."""
    dense, moe, sources = model.dense, model.ffn, model.tensors
    layout = ffn_layout(dense)
    layers = moe.moe_layers if moe else ()
    joined = {name: how for layer in layers for name, how in joined_ffn(layout, layer, sources).items()}
    shapes = dense_tensors(dense, family_of(dense))
    tensors = []
    for name, shape in shapes.items():
        source, piece = joined[name] if name in joined else (sources[name], Stretches.copy(sources[name]))
        tensors.append(OutputTensor(name, source.dtype, shape, piece))
    stored = [name for name in sources if name not in shapes and may_be_stored(name, dense)]
    tensors += [OutputTensor(n, sources[n].dtype, sources[n].shape, Stretches.copy(sources[n])) for n in stored]
    if "lm_head.weight" in stored and not _same(sources["lm_head.weight"], sources[next(iter(shapes))]):
        # transformers 5 takes the head that is in the file, transformers 4 ties it as the config says
        dense = dense | {"tie_word_embeddings": False}
    return WritePlan(tensors, dense)


def _same(one: SourceTensor, other: SourceTensor) -> bool:
    """Bit for bit."""
    return (one.dtype, one.shape) == (other.dtype, other.shape) and one.xxh3_128() == other.xxh3_128()


def joined_ffn(
    layout: FFNLayout, layer: int, sources: dict[str, SourceTensor]
) -> dict[str, tuple[SourceTensor, Piece]]:
    """dense name -> (the packed tensor it comes from, how) for one layer's FFN."""
    prefix, names = layout.prefix(layer), layout.names(layer)
    down = sources[prefix + expert_name("frozen", DOWN)]
    if layout.gated:
        gate_up = sources[prefix + expert_name("frozen", GATE_UP)]
        if "gate_up" in names:
            both = (*_half_stretches(gate_up, 0), *_half_stretches(gate_up, 1))
            return {names["gate_up"]: (gate_up, Stretches(both)), names["down"]: (down, JoinColumns(down))}
        return {
            names["gate"]: (gate_up, Stretches(_half_stretches(gate_up, 0))),
            names["up"]: (gate_up, Stretches(_half_stretches(gate_up, 1))),
            names["down"]: (down, JoinColumns(down)),
        }
    up, up_bias = (sources[prefix + expert_name("frozen", part)] for part in (UP, UP_BIAS))
    down_bias = sources[prefix + OUTPUT_BIAS]
    return {
        names["up"]: (up, _stored_up(up) if layout.transposed else Stretches.copy(up)),
        names["up_bias"]: (up_bias, Stretches.copy(up_bias)),
        names["down"]: (down, _stored_down(down) if layout.transposed else JoinColumns(down)),
        names["down_bias"]: (down_bias, Stretches.copy(down_bias)),
    }


def _stored_up(up: SourceTensor) -> Stretches:
    """[S, f, D] -> [D, F], as Conv1D stores it."""
    S, f, D = up.shape
    return Stretches.copy(transposed(dataclasses.replace(up, shape=(S * f, D))))


def _stored_down(down: SourceTensor) -> Stretches:
    """[S, D, f] -> [F, D]: each slice's [f, D], one after another."""
    parts = (transposed(part) for part in matrices(down))
    return Stretches(tuple(Stretch(part, 0, part.numel) for part in parts))


def _half_stretches(gate_up: SourceTensor, half: int) -> tuple[Stretch, ...]:
    """The gate rows (half 0) or up rows (half 1) of every slice."""
    S, f2, D = gate_up.shape
    count = f2 // 2 * D
    return tuple(Stretch(gate_up, (2 * i + half) * count, count) for i in range(S))
