"""Every tensor of a merged model, and where its elements come from.

Shapes: L layers, E experts (whole models), G parts of each FFN, D model width, F dense FFN width, f = F/G.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from lamella.architecture.converted import converted_config
from lamella.architecture.families import HEAD
from lamella.architecture.moe_tensors import (
    DOWN,
    GATE_UP,
    SELECTION_BIAS,
    WEIGHT,
    expert_name,
    is_float32,
    moe_tensors,
    router_name,
    shared_name,
)
from lamella.checkpoint.pieces import (
    Array,
    BesideEachOther,
    Columns,
    EndToEnd,
    Piece,
    Stretch,
    Stretches,
    Values,
)
from lamella.checkpoint.plan import OutputTensor, WritePlan
from lamella.checkpoint.tensors import SourceTensor
from lamella.conversion.merge.change import Scaled, change_of
from lamella.conversion.merge.parts import Expert, Merge
from lamella.conversion.merge.targets import (
    EMPTY_SHARED_WIDTH,
    Stock,
    has_shared_gate,
    remarks,
    stock_config,
)
from lamella.conversion.plan import Undecided
from lamella.conversion.replace import stored_dtype, with_ffns_replaced
from lamella.jsons import Json


class GateRows(NamedTuple):
    """The router's rows; float32."""

    experts: np.ndarray
    """[L, E*G, D]"""
    shared: np.ndarray | None = None
    """[L, 1, D]: how much of the shared expert a token gets, by a sigmoid."""


def write_plan(merge: Merge, stock: Stock | None, rows: GateRows | None, notes: Json) -> WritePlan:
    """The plan of the merged model; `rows` None leaves the router undecided."""
    notes = {"remarks": remarks(stock, merge)} | notes
    if stock is None:
        config = converted_config(merge.base.config, merge.base.family, merge.dtype, moe=merge.moe.to_dict())
        return WritePlan(_own_tensors(merge, rows), config, notes=notes)
    return WritePlan(_stock_tensors(merge, stock, rows), stock_config(stock, merge), notes=notes)


def _stock_tensors(merge: Merge, stock: Stock, rows: GateRows | None) -> list[OutputTensor]:
    layers = range(merge.layout.num_layers)

    def experts(layer: int, parts: dict[str, SourceTensor]) -> list[OutputTensor]:
        return _StockLayer(merge, stock, rows, layer, parts["down"]).tensors()

    tensors = with_ffns_replaced(merge.base, merge.layout, layers, experts, merge.dtype)
    if stock.name == "qwen2-moe" and not merge.sizes.qkv_bias:
        tensors += _zero_biases(merge)
    return [tensor for tensor in tensors if not _is_computed(tensor.name, merge)]


def _is_computed(name: str, merge: Merge) -> bool:
    """What some checkpoints hold although the class computes it or shares it with another tensor."""
    return name.endswith(".rotary_emb.inv_freq") or (name == HEAD and merge.sizes.tied and _is_tied(merge))


def _is_tied(merge: Merge) -> bool:
    return bool(merge.base.config.get("tie_word_embeddings", merge.sizes.tied))


def _zero_biases(merge: Merge) -> list[OutputTensor]:
    sizes, found = merge.sizes, []
    for layer in range(sizes.num_layers):
        for name, heads in (("q", sizes.N), ("k", sizes.G), ("v", sizes.G)):
            weight = merge.base.tensors[f"model.layers.{layer}.self_attn.{name}_proj.weight"]
            count = heads * sizes.H
            bias = weight.name.removesuffix("weight") + "bias"
            found.append(OutputTensor(bias, stored_dtype(weight.dtype, merge.dtype), (count,), Values((0.0,), count)))
    return found


class _StockLayer:
    """The tensors of one layer's experts."""

    def __init__(self, merge: Merge, stock: Stock, rows: GateRows | None, layer: int, base_down: SourceTensor):
        self.merge, self.stock, self.rows, self.layer = merge, stock, rows, layer
        self.block, self.D = stock.block.format(layer), merge.layout.hidden_size
        self.dtype = stored_dtype(base_down.dtype, merge.dtype)

    def tensors(self) -> list[OutputTensor]:
        found: list[OutputTensor] = []
        parts = self.merge.options.parts
        for e, expert in enumerate(self.merge.experts):
            for g in range(parts):
                found += self._expert(f"{self.block}experts.{e * parts + g}.", expert, g)
        found += self._shared()
        count = self.merge.moe.num_experts
        rows = None if self.rows is None else self.rows.experts[self.layer]
        return [*found, self._tensor(f"{self.block}gate.weight", (count, self.D), _array(rows))]

    def _expert(self, prefix: str, expert: Expert, part: int) -> list[OutputTensor]:
        ffn, f = expert.ffn(self.merge.layout, self.layer), self.merge.moe.moe_intermediate_size
        pieces: dict[str, Piece] = {
            name: Stretches((Stretch(ffn[name], part * f * self.D, f * self.D),), changed(expert, self.merge))
            for name in ("gate", "up")
        }
        down = changed(expert, self.merge, is_down=True, factor=float(self.merge.options.parts))
        whole = f == ffn["down"].width
        pieces["down"] = Stretches(Stretches.copy(ffn["down"]).stretches, down) if whole else (
            Columns(ffn["down"], part * f, f, down)
        )  # fmt: skip
        shapes = {"gate": (f, self.D), "up": (f, self.D), "down": (self.D, f)}
        return [self._named(prefix, part, shapes[part], pieces[part]) for part in ("gate", "up", "down")]

    def _shared(self) -> list[OutputTensor]:
        if self.stock.shared is None or (self.stock.name == "deepseek" and not self.merge.shared):
            return []
        prefix = f"{self.block}{self.stock.shared}."
        n = self.merge.moe.shared_intermediate_size or EMPTY_SHARED_WIDTH
        shapes = {"gate": (n, self.D), "up": (n, self.D), "down": (self.D, n)}
        pieces: dict[str, Piece] = {name: Values((0.0,), n * self.D) for name in shapes}
        is_qwen = self.stock.name == "qwen2-moe"
        if self.merge.shared:
            # sigmoid(0) = 1/2: twice as much makes the shared expert count once
            factor = 2.0 if is_qwen and not has_shared_gate(self.merge) else 1.0
            pieces = _shared_pieces(self.merge, self.layer, factor)
        found = [self._named(prefix, part, shapes[part], pieces[part]) for part in shapes]
        if is_qwen:
            gate = self._shared_gate()
            found.append(self._tensor(f"{self.block}shared_expert_gate.weight", (1, self.D), gate))
        return found

    def _shared_gate(self) -> Piece:
        if not has_shared_gate(self.merge):
            return Values((0.0,), self.D)
        return _array(None if self.rows is None or self.rows.shared is None else self.rows.shared[self.layer])

    def _named(self, prefix: str, part: str, shape: tuple[int, ...], piece: Piece) -> OutputTensor:
        return self._tensor(f"{prefix}{self.stock.names[part]}.weight", shape, piece)

    def _tensor(self, name: str, shape: tuple[int, ...], piece: Piece) -> OutputTensor:
        return OutputTensor(name, self.dtype, shape, piece)


def _array(rows: np.ndarray | None) -> Piece:
    return Undecided() if rows is None else Array(rows)


def changed(expert: Expert, merge: Merge, *, is_down: bool = False, factor: float = 1.0) -> Scaled | None:
    """What happens to a matrix of an expert on its way; `factor` is a scale of the architecture's."""
    said = expert.said
    factors = (said.residual_scale, factor) if is_down else ()
    return change_of(expert.label, said.noise_scale, factors, merge.options.seed)


def _shared_pieces(merge: Merge, layer: int, factor: float) -> dict[str, Piece]:
    """All shared experts side by side: one FFN whose neurons are those of all of them."""
    ffns = [(expert, expert.ffn(merge.layout, layer)) for expert in merge.shared]

    def rows(part: str) -> Piece:
        copies = ((Stretches.copy(ffn[part]).stretches, changed(expert, merge)) for expert, ffn in ffns)
        return EndToEnd(tuple(Stretches(stretches, change) for stretches, change in copies))

    downs = [(ffn["down"], changed(expert, merge, is_down=True, factor=factor)) for expert, ffn in ffns]
    down: Piece = BesideEachOther(tuple(downs))
    if len(downs) == 1:
        down = Stretches(Stretches.copy(downs[0][0]).stretches, downs[0][1])
    return {"gate": rows("gate"), "up": rows("up"), "down": down}


def _own_tensors(merge: Merge, rows: GateRows | None) -> list[OutputTensor]:
    def experts(layer: int, parts: dict[str, SourceTensor]) -> list[OutputTensor]:
        return _own_layer(merge, rows, layer, parts["down"])

    return with_ffns_replaced(merge.base, merge.layout, range(merge.layout.num_layers), experts, merge.dtype)


def _own_layer(merge: Merge, rows: GateRows | None, layer: int, base_down: SourceTensor) -> list[OutputTensor]:
    f, D, parts = merge.moe.moe_intermediate_size, merge.layout.hidden_size, merge.options.parts
    gate_up: list[Piece] = []
    down: list[Piece] = []
    for expert in merge.experts:
        ffn = expert.ffn(merge.layout, layer)
        for g in range(parts):
            stretches = tuple(Stretch(ffn[name], g * f * D, f * D) for name in ("gate", "up"))
            gate_up += [Stretches((stretch,), changed(expert, merge)) for stretch in stretches]
            change = changed(expert, merge, is_down=True)
            whole = Stretches(Stretches.copy(ffn["down"]).stretches, change)
            down.append(whole if parts == 1 else Columns(ffn["down"], g * f, f, change))
    pieces: dict[str, Callable[[], Piece]] = {
        expert_name("trainable", GATE_UP): lambda: EndToEnd(tuple(gate_up)),
        expert_name("trainable", DOWN): lambda: EndToEnd(tuple(down)),
        router_name(WEIGHT): lambda: _array(None if rows is None else rows.experts[layer]),
        router_name(SELECTION_BIAS): lambda: Values((0.0,), merge.moe.num_experts),
        shared_name(GATE_UP): lambda: EndToEnd(
            tuple(_shared_pieces(merge, layer, 1.0)[part] for part in ("gate", "up"))
        ),
        shared_name(DOWN): lambda: _shared_pieces(merge, layer, 1.0)["down"],
    }
    dtype = stored_dtype(base_down.dtype, merge.dtype)
    prefix = merge.layout.prefix(layer)
    return [
        OutputTensor(prefix + name, "F32" if is_float32(name) else dtype, shape, pieces[name]())
        for name, shape in moe_tensors(D, merge.moe).items()
    ]
