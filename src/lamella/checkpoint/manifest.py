"""The hashes that a conversion leaves beside its weights, and whether the weights still have them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from lamella.checkpoint.check import read_json
from lamella.checkpoint.source import read_folder

MANIFEST = "lamella.json"


def changed_tensors(folder: Path, place: int = 0, places: int = 1) -> Iterator[str]:
    """The names of tensors whose bytes are not those that the conversion wrote; none where there is no manifest.

    Args:
        folder: of a converted model.
        place, places: which share of the tensors is looked at, of how many.
    """
    if not (folder / MANIFEST).is_file():
        return
    tensors = read_folder(folder)
    known = read_json(folder / MANIFEST, "").get("tensors", {})
    for name in sorted(known)[place::places]:
        if name not in tensors or tensors[name].xxh3_128() != known[name]["xxh3_128"]:
            yield name
