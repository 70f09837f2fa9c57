"""The base model on the prompts, a layer at a time: what each layer is given, and what its router will be given.

A layer is in memory at a time, and there are no logits. Prompts are packed into windows without padding between them,
each seeing itself alone; the residual stream is on disk in float32, and a pass that was interrupted goes on. Matrices
that are stored in bfloat16 are multiplied in it where the processor does so faster, others in float32.

Shapes: P prompts, N windows of L tokens, B windows of a batch, T tokens that are looked at, D model width, E experts
(shared ones with prompts behind the others).
"""

from __future__ import annotations

import time
from contextlib import nullcontext
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lamella.calibrate import CalibrationStep, locked
from lamella.calibrate.anatomy import LayerFFN
from lamella.calibrate.layerwise import LayerwiseModel
from lamella.calibrate.passes import WatchedLayer, batches, embed_pass
from lamella.calibrate.sample import FFN
from lamella.calibrate.store import STREAMS, ResultFolder, fingerprint
from lamella.calibrate.stream import StreamFolder
from lamella.calibrate.text import CalibrationTokens
from lamella.conversion.merge.fit import Layer, Seen, fit
from lamella.conversion.merge.parts import Merge
from lamella.conversion.merge.prompts import Tokens
from lamella.conversion.merge.report import notes_of
from lamella.conversion.plan import Workspace
from lamella.hf.computing import computes_bfloat16
from lamella.jsons import Json

MAX_ROWS = 32768
"""Router inputs of a layer that are kept in memory; of more, every n-th."""
WINDOW_TOKENS = 256
"""A window has at least so many tokens, and as many as the longest prompt."""
NO_PROMPT = -1


class Packed(NamedTuple):
    """Prompts in windows; int64, all [N, L]."""

    ids_NL: Tensor
    positions_NL: Tensor
    prompt_NL: Tensor
    """Index of the prompt; NO_PROMPT at a window's end."""


def packed(prompts: list[Tokens], max_positions: int) -> Packed:
    """The longest prompts first, each into the first window that has room."""
    length = max(len(prompt.ids) for prompt in prompts)
    length = max(length, min(WINDOW_TOKENS, max_positions))
    windows: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(prompts)), key=lambda i: -len(prompts[i].ids)):
        need = len(prompts[index].ids)
        place = next((i for i, free in enumerate(room) if free >= need), len(room))
        if place == len(room):
            windows.append([])
            room.append(length)
        windows[place].append(index)
        room[place] -= need
    length -= min(room)
    ids_NL, positions_NL = torch.zeros(2, len(windows), length, dtype=torch.int64).unbind()
    prompt_NL = torch.full((len(windows), length), NO_PROMPT)
    for row, window in enumerate(windows):
        at = 0
        for index in window:
            end = at + len(prompts[index].ids)
            ids_NL[row, at:end] = torch.tensor(prompts[index].ids)
            positions_NL[row, at:end] = torch.arange(end - at)
            prompt_NL[row, at:end] = index
            at = end
        positions_NL[row, at:] = torch.arange(length - at)
    return Packed(ids_NL, positions_NL, prompt_NL)


def run_base(merge: Merge, prompts: list[Tokens], work: Workspace) -> tuple[np.ndarray, Json]:
    """([layers, rows, D], notes): the rows of every layer's router, and how they route the prompts.

    Raises:
        UserError: the disk is full, or another process works in the folder.
    """
    if merge.options.load_in_4bit or merge.options.load_in_8bit:
        from lamella.conversion.merge.quantised import hidden_rows

        return hidden_rows(merge, prompts), {}
    windows = packed(prompts, merge.sizes.max_positions)
    with locked(work.folder):
        return _Pass(merge, prompts, windows, work).all()


class _Pass:
    def __init__(self, merge: Merge, prompts: list[Tokens], windows: Packed, work: Workspace):
        self.merge, self.prompts, self.windows, self.work = merge, prompts, windows, work
        matrices = [tensor for tensor in merge.base.tensors.values() if len(tensor.shape) > 1]
        is_stored = all(tensor.dtype == "BF16" for tensor in matrices)  # autocast takes all or none
        self.in_bfloat16 = is_stored and computes_bfloat16(torch.device("cpu"))
        self.model, self.results = LayerwiseModel(merge.base, self.in_bfloat16), ResultFolder(work.folder)
        self.seen = _kept(windows.prompt_NL, prompts)
        self.stream = StreamFolder(work.folder / STREAMS, (*windows.ids_NL.shape, self.model.width))

    def all(self) -> tuple[np.ndarray, Json]:
        """Every layer that is not done yet."""
        wanted = self._fingerprint()
        self.results.check(wanted, overwrite=True)
        self.stream.check_space(2)
        self.results.claim(wanted)
        count = self.model.num_layers
        if not all(self.results.has(layer) for layer in range(count)):
            self._embed()
            for index in range(self.stream.indices("hidden")[-1], count):
                self._layer(index)
        self.stream.remove()
        found = [self.results.load(layer) for layer in range(count)]
        rows_LED = torch.stack([layer["rows"] for layer in found]).numpy()
        return rows_LED, notes_of(found, self.seen, self.merge)

    def _fingerprint(self) -> Json:
        options = self.merge.options
        experts = [said.to_dict() for said in (*options.experts, *options.shared_experts)]
        method = {"gates": options.gate_mode, "experts": experts, "parts": options.parts, "top": options.num_active}
        windows = CalibrationTokens(self.windows.ids_NL, self.windows.prompt_NL, self.windows.positions_NL)
        return fingerprint(self.merge.base, windows, method)

    def _embed(self) -> None:
        if not self.stream.indices("hidden"):
            with self.stream.writing("hidden", 0) as out_NLD:
                embed_pass(self.model, self.windows.ids_NL, self.windows.positions_NL, out_NLD)

    def _layer(self, index: int) -> None:
        begun, is_last = time.perf_counter(), index + 1 == self.model.num_layers
        hidden_NLD = self.stream.open("hidden", index)
        # The next stream's file gets its name after the layer is saved: where both are there, nothing is lacking.
        with nullcontext() if is_last else self.stream.writing("hidden", index + 1) as out_NLD:
            x_TD = self._router_inputs(index, hidden_NLD, out_NLD)
            vectors_PD = _per_prompt(hidden_NLD, self.windows.prompt_NL, self.prompts, self.merge.options.gate_mode)
            self.results.save(index, fit(Layer(x_TD, vectors_PD, self._ffns(index)), self.seen, self.merge.options))
        self.stream.drop("hidden", index)
        wall_s = time.perf_counter() - begun
        speed = self.windows.ids_NL.numel() / wall_s
        self.work.on_progress(CalibrationStep("forward", index, self.model.num_layers, speed, wall_s))

    @torch.no_grad()
    def _router_inputs(self, index: int, hidden_NLD: Tensor, out_NLD: Tensor | None) -> Tensor:
        """[T, D] of the tokens that are looked at; fills the layer's output if it is wanted."""
        layer, seen, positions_NL = WatchedLayer(self.model, index), self.seen, self.windows.positions_NL
        x_TD = torch.empty(len(seen.prompt_T), self.model.width)
        for part in batches(hidden_NLD.shape):
            with torch.autocast("cpu", torch.bfloat16, enabled=self.in_bfloat16):
                if out_NLD is None:
                    layer.up_to_ffn(hidden_NLD[part], positions_NL[part])
                else:
                    out_NLD[part] = layer(hidden_NLD[part], positions_NL[part])
            begin = part.start * hidden_NLD.shape[1]
            first, last = torch.searchsorted(seen.place_T, torch.tensor([begin, begin + len(layer.seen["x_TD"])]))
            x_TD[first:last] = layer.seen["x_TD"][seen.place_T[first:last] - begin]
        return x_TD

    def _ffns(self, index: int) -> list[FFN] | None:
        """The experts' FFNs, where their parts are told apart."""
        if self.merge.options.parts == 1 or self.merge.options.gate_mode != "ridge":
            return None
        ffns = []
        for expert in self.merge.experts:
            prefix = self.merge.layout.prefix(index)
            ffns.append(LayerFFN(expert.source.config, index, prefix).read(expert.source.tensors))
        return ffns


def _kept(prompt_NL: Tensor, prompts: list[Tokens]) -> Seen:
    """The tokens whose router inputs are kept: of prompts, without BOS, at most MAX_ROWS."""
    flat_T = prompt_NL.flatten()
    bos_P = torch.tensor([prompt.num_bos for prompt in prompts])
    first_T = torch.cat([torch.tensor([True]), flat_T[1:] != flat_T[:-1]])
    keep_T = (flat_T != NO_PROMPT) & ~(first_T & (bos_P[flat_T.clamp(min=0)] > 0))
    place_T = keep_T.nonzero().flatten()
    place_T = place_T[:: -(-len(place_T) // MAX_ROWS)]
    expert_P = torch.tensor([prompt.expert for prompt in prompts])
    positive_P = torch.tensor([prompt.positive for prompt in prompts])
    return Seen(place_T, flat_T[place_T], expert_P, positive_P)


def _per_prompt(hidden_NLD: Tensor, prompt_NL: Tensor, prompts: list[Tokens], mode: str) -> Tensor | None:
    """[P, D]: the layer's input at each prompt's last token, or its mean over the prompt; None where nobody asks."""
    if not mode.startswith("hidden"):
        return None
    vectors_PD = torch.zeros(len(prompts), hidden_NLD.shape[-1])
    for row, prompt_L in enumerate(prompt_NL):
        for index in prompt_L.unique().tolist():
            if index != NO_PROMPT:
                hidden = hidden_NLD[row, (prompt_L == index).nonzero().flatten()]
                vectors_PD[index] = hidden.mean(0) if mode == "hidden_avg" else hidden[-1]
    return vectors_PD
