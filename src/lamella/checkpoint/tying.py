"""Whether a model's output head is its embedding: the weights decide, not config.json, as in transformers.

A config that ties them beside a file that holds another head is wrong about the model: transformers then loads both and
says so. Training, exports and calibration would lose the head if they went by the config.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping

from lamella.architecture.families import HEAD, sizes_of, tensors_of
from lamella.checkpoint.remote import AnyPath
from lamella.checkpoint.tensors import SourceTensor
from lamella.jsons import Json

_logger = logging.getLogger(__name__)


def as_stored(config: Json, tensors: Mapping[str, SourceTensor], where: str) -> Json:
    """The config.json, with `tie_word_embeddings` false where the tensors hold a head that is not the embedding."""
    sizes = sizes_of(config)
    if not sizes.tied or HEAD not in tensors:
        return config
    embedding = tensors.get(next(iter(tensors_of(sizes))))
    if embedding is None or _equal(embedding, tensors[HEAD]):
        return config
    say_once(
        f"{where}: config.json ties the output head to the embedding, but the file holds another {HEAD}; it is kept, "
        "as in transformers, and written with tie_word_embeddings false"
    )
    return config | {"tie_word_embeddings": False}


def _equal(a: SourceTensor, b: SourceTensor) -> bool:
    if a.shape != b.shape:
        return False
    return all(bool((a.read(*chunk).float() == b.read(*chunk).float()).all()) for chunk in a.chunks())


@functools.cache
def say_once(message: str) -> None:
    """A warning on standard error, or in the log of a run, once per process."""
    _logger.warning(message)


def stray_files(folder: AnyPath, tensors: Mapping[str, SourceTensor]) -> list[str]:
    """Names of safetensors files of the folder that are not among those which the tensors are read from."""
    used = {tensor.path.name for tensor in tensors.values()}
    return sorted(path.name for path in folder.glob("*.safetensors") if path.name not in used)
