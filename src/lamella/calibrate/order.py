"""The order of a calibration: which layer is computed when, what is kept, and where it resumes.

Without gradients the layers are visited first to last, behind replaced FFNs where there are any (sequential
calibration). With gradients, a forward pass keeps every layer's input, and the layers are visited last to first.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Literal, NamedTuple

from torch import Tensor

from lamella.calibrate.layerwise import LayerwiseModel
from lamella.calibrate.passes import (
    WatchedLayer,
    add_replacement,
    backward_pass,
    embed_pass,
    empty_sample,
    forward_pass,
    head_pass,
    with_gradient,
)
from lamella.calibrate.sample import FFN, LayerSample
from lamella.calibrate.store import ResultFolder
from lamella.calibrate.stream import StreamFolder
from lamella.calibrate.text import CalibrationTokens

Phase = Literal["embed", "forward", "head", "backward", "replaced", "method", "heal"]
OnLayer = Callable[[int, LayerSample], dict[str, Tensor]]
Replacement = Callable[[FFN, dict[str, Tensor]], Callable[[Tensor], Tensor]]


class CalibrationStep(NamedTuple):
    """A finished step. "method" is the time in `on_layer`; "replaced" the forward pass behind replaced FFNs; in "heal",
    a step of training, its number and the count of steps stand in the place of the layers'."""

    phase: Phase
    layer: int
    num_layers: int
    tokens_per_s: float
    wall_s: float


@dataclass
class Calibration:
    """One calibration; see `lamella.calibrate.calibrate` for the fields."""

    model: LayerwiseModel
    tokens: CalibrationTokens
    stream: StreamFolder
    results: ResultFolder
    layers: tuple[int, ...]
    on_layer: OnLayer
    gradients: bool
    replacement: Replacement | None
    on_progress: Callable[[CalibrationStep], None]

    @property
    def num_streams(self) -> int:
        """Stream files that are there at once, at most."""
        return self.model.num_layers + 3 + (not self._is_plain) if self.gradients else 2

    @property
    def _is_plain(self) -> bool:
        return self.model.anatomy.plain_residual

    def all(self) -> None:
        """Everything that is not done yet."""
        if not self.gradients:
            self._forward_visits()
            return
        if not self.stream.indices("gradient"):
            self._forward()
        self._backward()

    def _forward(self) -> None:
        """Every layer's input, and the gradient at the end."""
        self._embed()
        for index in range(self.stream.indices("hidden")[-1], self.model.num_layers):
            with self._timed("forward", index), self.stream.writing("hidden", index + 1) as out_NLD:
                layer, hidden_NLD = WatchedLayer(self.model, index), self.stream.open("hidden", index)
                forward_pass(layer, hidden_NLD, self.tokens.positions_NL, out_NLD, None)
        last = self.model.num_layers
        with self._timed("head", last - 1), self.stream.writing("gradient", last) as out_NLD:
            head_pass(self.model, self.stream.open("hidden", last), self.tokens.labels_NL, out_NLD)
        self.stream.drop("hidden", last)

    def _backward(self) -> None:
        """Go from the last layer to the first that is wanted, and visit them."""
        for index in reversed(range(self.layers[0], self.stream.indices("gradient")[0])):
            own = nullcontext() if self._is_plain else self.stream.writing("ffn", index)
            with self.stream.writing("gradient", index) as out_NLD, own as ffn_NLD:
                self._visit_backward(index, out_NLD, ffn_NLD)
            self.stream.drop("hidden", index)
            self.stream.drop("gradient", index + 1)
            self.stream.drop("ffn", index)

    def _visit_backward(self, index: int, out_NLD: Tensor, ffn_NLD: Tensor | None) -> None:
        with self._timed("backward", index):
            layer, hidden_NLD = WatchedLayer(self.model, index), self.stream.open("hidden", index)
            gradient_NLD = self.stream.open("gradient", index + 1)
            sample = empty_sample(layer.ffn, self.tokens.num_tokens) if self._is_open(index) else None
            backward_pass(layer, hidden_NLD, self.tokens.positions_NL, gradient_NLD, out_NLD, sample, ffn_NLD)
            if sample is not None:
                sample = with_gradient(sample, gradient_NLD if ffn_NLD is None else ffn_NLD)
        if sample is not None:
            self._visit(index, sample)

    def _forward_visits(self) -> None:
        """Go from the first layer to the last that is wanted, and visit them."""
        self._embed()
        for index in range(self.stream.indices("hidden")[-1], self.layers[-1] + 1):
            with self.stream.writing("hidden", index + 1) as out_NLD:
                self._visit_forward(index, out_NLD)
            self.stream.drop("hidden", index)

    def _visit_forward(self, index: int, out_NLD: Tensor) -> None:
        replaces = self.replacement is not None and index in self.layers
        with self._timed("replaced" if self.replacement is not None else "forward", index):
            without_ffn = replaces and self._is_plain
            layer, hidden_NLD = WatchedLayer(self.model, index, without_ffn), self.stream.open("hidden", index)
            wanted = replaces or self._is_open(index)
            sample = empty_sample(layer.ffn, self.tokens.num_tokens) if wanted else None
            forward_pass(layer, hidden_NLD, self.tokens.positions_NL, out_NLD, sample)
        if sample is not None and self._is_open(index):
            self._visit(index, sample)
        if sample is not None and self.replacement is not None:
            y_of_x = self.replacement(sample.ffn, self.results.load(index))
            if self._is_plain:
                add_replacement(out_NLD, sample.x_TD, y_of_x)
            else:
                layer.replace_ffn(y_of_x)
                forward_pass(layer, hidden_NLD, self.tokens.positions_NL, out_NLD, None)

    def _visit(self, index: int, sample: LayerSample) -> None:
        with self._timed("method", index):
            result = self.on_layer(index, sample)
        self.results.save(index, result)

    def _embed(self) -> None:
        if not self.stream.indices("hidden"):
            with self._timed("embed", 0), self.stream.writing("hidden", 0) as out_NLD:
                embed_pass(self.model, self.tokens.ids_NL, self.tokens.positions_NL, out_NLD)

    def _is_open(self, index: int) -> bool:
        return index in self.layers and not self.results.has(index)

    @contextmanager
    def _timed(self, phase: Phase, index: int) -> Iterator[None]:
        begun = time.perf_counter()
        yield
        wall_s = time.perf_counter() - begun
        speed = self.tokens.num_tokens / max(wall_s, 1e-9)
        self.on_progress(CalibrationStep(phase, index, self.model.num_layers, speed, wall_s))
