"""The tokens that calibration sees: whole windows of packed documents, none of them held out for evaluation.

Windows come in an order drawn from the seed. Positions restart at every document and attention does not look across
the boundary, as in training. There is no padding.

Shapes: N windows, L tokens per window, T = N*L calibration tokens.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import xxhash
from torch import Tensor

from lamella.calibrate.layerwise import config_of
from lamella.checkpoint.source import Checkpoint
from lamella.checkpoint.write import write_json
from lamella.data.packing import PackedSamples, token_file
from lamella.data.prepared import TokenFolder
from lamella.data.sources import Split, open_source
from lamella.errors import UserError
from lamella.recipe.calibration import CalibrationOptions

# Of a large source so many times the tokens needed are tokenised, and the windows drawn from them.
DRAW_FROM = 64
# Evaluation scores the other side, "heldout".
SPLIT: Split = "train"
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "tekken.json", "vocab.json")


@dataclass(frozen=True)
class CalibrationTokens:
    """int64, all [N, L]; as in `lamella.data.packing.Sample`."""

    ids_NL: Tensor
    labels_NL: Tensor
    """The next token, or IGNORE_INDEX at a document's end."""
    positions_NL: Tensor

    @property
    def num_tokens(self) -> int:
        """T"""
        return self.ids_NL.numel()

    def hash(self) -> str:
        digest = xxhash.xxh3_128()
        for tensor in (self.ids_NL, self.labels_NL, self.positions_NL):
            digest.update(repr(tuple(tensor.shape)).encode() + tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()


def calibration_tokens(
    source: Checkpoint, options: CalibrationOptions | None = None, *, cache: Path | None = None
) -> CalibrationTokens:
    """The windows of `options.data` in the tokens of the model.

    Args:
        cache: folder of the token files in place of `lamella.architecture.embedded.cache_dir()`.

    Raises:
        UserError: no such text, too little of it, no tokenizer, or windows longer than the model's positions.
    """
    options = options or CalibrationOptions()
    longest = config_of(source).max_position_embeddings
    if options.sequence_length > longest:
        raise UserError(
            f"windows of {options.sequence_length} tokens are longer than the model's {longest} positions; "
            "lower the calibration's sequence_length"
        )
    samples = PackedSamples(_tokens(source, options, cache), options.sequence_length, options.seed)
    if len(samples) < options.num_windows:
        raise UserError(
            f"{options.data} gives {len(samples) * options.sequence_length} calibration tokens of the "
            f"{options.num_tokens} asked for; ask for fewer or give more text"
        )
    windows = [samples.sample(i) for i in range(options.num_windows)]
    return CalibrationTokens(*(torch.stack(parts) for parts in zip(*windows, strict=True)))


def _tokens(source: Checkpoint, options: CalibrationOptions, cache: Path | None) -> TokenFolder:
    opened = open_source(options.data)  # before a tokenizer is looked for
    limit = options.num_windows * options.sequence_length + 1
    with _tokenizer_folder(source) as folder:
        return token_file(
            options.data, SPLIT, folder, cache=cache, max_tokens=limit if opened.is_streamed else DRAW_FROM * limit
        )


@contextmanager
def _tokenizer_folder(source: Checkpoint) -> Iterator[Path]:
    """A folder with the tokenizer's files, those of a GGUF file too, and the config that names its class."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source.copy_sidecars(folder)
        if not any((folder / file).is_file() for file in _TOKENIZERS):
            raise UserError(f"{source.name} has no tokenizer; put its tokenizer.json beside the weights")
        write_json(folder / "config.json", source.config)
        yield folder
