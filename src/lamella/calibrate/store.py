"""The folder of a calibration: what it is of, and one safetensors file per finished layer."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lamella.calibrate.layerwise import model_fingerprint
from lamella.calibrate.text import CalibrationTokens
from lamella.checkpoint.check import read_json
from lamella.checkpoint.folder import write_json
from lamella.checkpoint.source import Checkpoint
from lamella.errors import UserError
from lamella.jsons import Json

FINGERPRINT = "calibration.json"
STREAMS = "streams"
LOCK = "lock"
_WHAT = {"model": "another model", "text": "other text", "method": "another method"}


def fingerprint(source: Checkpoint, tokens: CalibrationTokens, method: Json) -> Json:
    """What decides the results: weight files (names, sizes, times), config, tokens, and the method's settings."""
    found = {"model": model_fingerprint(source), "text": tokens.hash(), "method": method}
    return json.loads(json.dumps(found))  # as it will be read again


class ResultFolder:
    """Results by layer."""

    def __init__(self, folder: Path):
        self.folder = folder

    def check(self, wanted: Json, overwrite: bool) -> None:
        """UserError if the folder holds another calibration (unless `overwrite`), or something else altogether."""
        if not self.folder.exists():
            return
        found = self._found()
        if found is None and (not self.folder.is_dir() or {path.name for path in self.folder.iterdir()} - {LOCK}):
            raise UserError(f"{self.folder} is not the folder of a calibration; give another")
        differs = [] if found is None else [key for key in wanted if found.get(key) != wanted[key]]
        if differs and not overwrite:
            what = " and ".join(_WHAT[key] for key in differs)
            raise UserError(f"{self.folder} holds the calibration of {what}; overwrite it or give another folder")

    def claim(self, wanted: Json) -> None:
        """Make the existing folder this calibration's, without what another one left."""
        if not self.is_of(wanted):
            self._write_fingerprint({})  # matches nothing, if the clearing is interrupted
            for path in (*self.folder.glob("layer-*.safetensors"), *(self.folder / STREAMS).glob("*")):
                path.unlink()
            self._write_fingerprint(wanted)

    def is_of(self, wanted: Json) -> bool:
        return self._found() == wanted

    def _found(self) -> Json | None:
        path = self.folder / FINGERPRINT
        return read_json(path, "") if path.is_file() else None

    def _write_fingerprint(self, values: Json) -> None:
        temporary = self.folder / f"{FINGERPRINT}.new"
        write_json(temporary, values)
        temporary.rename(self.folder / FINGERPRINT)

    def has(self, layer: int) -> bool:
        return self.path(layer).is_file()

    def save(self, layer: int, result: dict[str, Tensor]) -> None:
        """UserError where the disk does not take it; what was saved before stays."""
        temporary = self.folder / "layer.new"
        try:
            save_file({name: tensor.detach().contiguous() for name, tensor in result.items()}, temporary)
            with temporary.open("rb") as file:
                os.fsync(file)
        except (SafetensorError, OSError) as error:  # safetensors has its own for a full disk
            raise UserError(
                f"{self.folder} cannot be written ({error}); free some space and call again: it goes on from there"
            ) from error
        temporary.rename(self.path(layer))

    def load(self, layer: int) -> dict[str, Tensor]:
        return load_file(self.path(layer))

    def path(self, layer: int) -> Path:
        return self.folder / f"layer-{layer:04d}.safetensors"


class LayerResults(Mapping[int, dict[str, Tensor]]):
    """layer -> result, ascending; read from the folder each time, so that they need not fit in memory together."""

    def __init__(self, results: ResultFolder, layers: tuple[int, ...]):
        self._results, self._layers = results, layers

    def __getitem__(self, layer: int) -> dict[str, Tensor]:
        if layer not in self._layers:
            raise KeyError(layer)
        return self._results.load(layer)

    def __iter__(self) -> Iterator[int]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)

    def path(self, layer: int) -> Path:
        """The safetensors file of a layer."""
        return self._results.path(layer)
