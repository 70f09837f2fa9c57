"""The router's rows of every layer, by what the gate mode says.

    random          N(0, 1)                            uniform_random  U(+-1/sqrt D)
    cheap_embed     sum of the prompts' token embeddings, normalised; the same in every layer
    hidden, ...     what each layer is given, and `mean` and `ridge`, what each router is given: lamella.conversion.
                    merge.router_inputs, which runs the base model on the prompts

The first two lines import no torch.

Shapes: L layers, E experts, G parts of each FFN, D model width.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from lamella.architecture.families import dense_tensors
from lamella.checkpoint.copying import decoded
from lamella.checkpoint.tensors import ITEM_BYTES, SourceTensor, read_bytes
from lamella.conversion.merge.parts import Merge
from lamella.conversion.merge.prompts import Tokens, check_tokenizer, read_prompts, tokenised
from lamella.conversion.merge.targets import has_shared_gate
from lamella.conversion.merge.tensors import GateRows
from lamella.conversion.plan import Workspace
from lamella.jsons import Json
from lamella.recipe.methods.merge import RANDOM_MODES


class Gates(NamedTuple):
    """What was found."""

    rows: GateRows
    notes: Json
    """For the manifest: `gates`, with accuracy, load and entropy of each layer where the base model was run."""


def check_gates(merge: Merge) -> None:
    """UserError where the gates cannot be made: no tokenizer, no prompts at the named place, a library missing."""
    if merge.options.gate_mode in RANDOM_MODES:
        return
    check_tokenizer(merge.base)
    read_prompts(merge)
    if merge.options.load_in_4bit or merge.options.load_in_8bit:
        from lamella.conversion.merge.quantised import check_bitsandbytes

        check_bitsandbytes()


def gates(merge: Merge, work: Workspace) -> Gates:
    """The rows of the experts' routers, and of the shared expert's where it has prompts."""
    mode = merge.options.gate_mode
    if mode in RANDOM_MODES:
        return Gates(_split(merge, _random(merge)), {"gates": {"mode": mode}})
    prompts = tokenised(merge.base, read_prompts(merge), merge.sizes.max_positions)
    if mode == "cheap_embed":
        rows_ED = _cheap_embed(merge, prompts)
        rows_LED = np.repeat(rows_ED[None], merge.layout.num_layers, axis=0)
        return Gates(_split(merge, rows_LED), {"gates": {"mode": mode, "prompts": len(prompts)}})
    from lamella.conversion.merge.router_inputs import run_base

    rows_LED, notes = run_base(merge, prompts, work)
    return Gates(_split(merge, rows_LED), {"gates": {"mode": mode, "prompts": len(prompts)} | notes})


def _split(merge: Merge, rows_LED: np.ndarray) -> GateRows:
    """Rows of the experts and of the shared expert behind them. Parts have equal ones, unless each was fitted."""
    experts, parts = len(merge.experts), merge.options.parts
    if merge.options.gate_mode == "ridge":
        own, rest = rows_LED[:, : experts * parts], rows_LED[:, experts * parts :]
    else:
        own, rest = np.repeat(rows_LED[:, :experts], parts, axis=1), rows_LED[:, experts:]
    return GateRows(own, rest[:, :1] if has_shared_gate(merge) else None)


def _random(merge: Merge) -> np.ndarray:
    random = np.random.default_rng(merge.options.seed)
    shape = (merge.layout.num_layers, len(merge.experts) + int(has_shared_gate(merge)), merge.layout.hidden_size)
    if merge.options.gate_mode == "random":
        return random.standard_normal(shape, np.float32)
    bound = merge.layout.hidden_size**-0.5
    return random.uniform(-bound, bound, shape).astype(np.float32)


def _cheap_embed(merge: Merge, prompts: list[Tokens]) -> np.ndarray:
    """[E, D], the shared experts' behind the others; as mergekit's, of unit length."""
    table = merge.base.tensors[next(iter(dense_tensors(merge.base.config, merge.base.family)))]
    count = len(merge.all_experts)
    sums = np.zeros((2, count, merge.layout.hidden_size), np.float32)
    for prompt in prompts:
        for token in prompt.ids:
            sums[int(prompt.positive), prompt.expert] += _row(table, token)
    negative, positive = sums
    rows = unit(positive)
    has_negative = {prompt.expert for prompt in prompts if not prompt.positive}
    for expert in has_negative:
        rows[expert] -= unit(negative)[expert]
    return unit(rows)


def unit(rows: np.ndarray) -> np.ndarray:
    """Rows of length 1; those of length 0 stay."""
    return rows / np.maximum(np.linalg.norm(rows, axis=-1, keepdims=True), 1e-8)


def _row(table: SourceTensor, token: int) -> np.ndarray:
    width = table.shape[1]
    if type(table) is not SourceTensor:
        return table.read(token * width, width).float().numpy()
    size = ITEM_BYTES[table.dtype]
    return decoded(read_bytes(table.path, table.begin + token * width * size, width * size), table.dtype)
