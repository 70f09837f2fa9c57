"""The tokens that calibration sees: whole windows of packed documents, none of them held out for evaluation.

Windows come in an order drawn from the seed, those of several texts mixed. Positions restart at every document and
attention does not look across the boundary, as in training. There is no padding.

Shapes: N windows, L tokens per window, T = N*L calibration tokens.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import xxhash
from torch import Tensor

from lamella.calibrate.layerwise import config_of
from lamella.checkpoint.folder import write_json
from lamella.checkpoint.source import Checkpoint
from lamella.data.packing import PackedSamples, Sample, make_sample, token_file
from lamella.data.prepared import TokenFolder
from lamella.data.sources import Split, open_source
from lamella.errors import UserError
from lamella.recipe.calibration import GENERATED, CalibrationOptions

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

    def first(self, num_tokens: int) -> CalibrationTokens:
        """The first windows, of about as many tokens, at least one."""
        count = max(1, num_tokens // self.ids_NL.shape[1])
        return CalibrationTokens(self.ids_NL[:count], self.labels_NL[:count], self.positions_NL[:count])

    def hash(self) -> str:
        digest = xxhash.xxh3_128()
        for tensor in (self.ids_NL, self.labels_NL, self.positions_NL):
            digest.update(repr(tuple(tensor.shape)).encode() + tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()


def calibration_tokens(
    source: Checkpoint, options: CalibrationOptions | None = None, *, cache: Path | None = None
) -> CalibrationTokens:
    """The windows of the options' texts in the tokens of the model, each text's share of them.

    Args:
        cache: folder of the token files in place of `lamella.architecture.embedded.cache_dir()`.

    Raises:
        UserError: no such text, too little of it, no tokenizer, or windows longer than the model's positions.
    """
    options = options or CalibrationOptions()
    _check_length(source, options)
    windows: list[Sample] = []
    for text, count in zip(options.texts, options.windows_of_texts(), strict=True):
        if count:
            windows += _windows(source, text.source, options, count, cache)
    return _mixed(windows, options)


def training_tokens(
    source: Checkpoint, options: CalibrationOptions, num_tokens: int, *, cache: Path | None = None
) -> CalibrationTokens:
    """Another number of windows of the same texts in the same shares, to train on: a text that has fewer is read again
    from its start, and the model writes no more of its own than for the calibration.

    Raises:
        UserError: as `calibration_tokens`.
    """
    _check_length(source, options)
    more = dataclasses.replace(options, num_tokens=max(num_tokens, options.sequence_length * len(options.texts)))
    windows: list[Sample] = []
    shares = zip(options.texts, more.windows_of_texts(), options.windows_of_texts(), strict=True)
    for text, count, calibrated in shares:
        if count:
            there = calibrated or 1 if text.source == GENERATED else count
            found = _windows(source, text.source, options, there, cache, may_lack=True)
            windows += [found[i % len(found)] for i in range(count)]
    return _mixed(windows, options)


def _check_length(source: Checkpoint, options: CalibrationOptions) -> None:
    longest = config_of(source).max_position_embeddings
    if options.sequence_length > longest:
        raise UserError(
            f"windows of {options.sequence_length} tokens are longer than the model's {longest} positions; "
            "lower the calibration's sequence_length"
        )


def _mixed(windows: list[Sample], options: CalibrationOptions) -> CalibrationTokens:
    if len(options.texts) > 1:  # what is held out of the tokens for a fit is then of every text
        order = np.random.default_rng(options.seed).permutation(len(windows))
        windows = [windows[i] for i in order]
    return CalibrationTokens(*(torch.stack(parts) for parts in zip(*windows, strict=True)))


def _windows(
    source: Checkpoint, text: str, options: CalibrationOptions, count: int, cache: Path | None, may_lack: bool = False
) -> list[Sample]:
    """`count` windows of a text; with `may_lack` as many as it has of them, at least one."""
    if text == GENERATED:
        return _written_windows(source, options, count, cache)
    return _read_windows(source, text, options, count, cache, may_lack)


def _read_windows(
    source: Checkpoint, text: str, options: CalibrationOptions, count: int, cache: Path | None, may_lack: bool
) -> list[Sample]:
    """Windows of a text, in an order drawn from the seed."""
    samples = PackedSamples(_tokens(source, text, options, count, cache), options.sequence_length, options.seed)
    if len(samples) < (1 if may_lack else count):
        raise UserError(
            f"{text} gives {len(samples) * options.sequence_length} calibration tokens of the "
            f"{count * options.sequence_length} asked for; lower calibration.num_tokens or give more text"
        )
    return [samples.sample(i) for i in range(min(count, len(samples)))]


def _written_windows(source: Checkpoint, options: CalibrationOptions, count: int, cache: Path | None) -> list[Sample]:
    """`count` windows of what the model writes."""
    from lamella.calibrate.generated import generated_text

    L = options.sequence_length
    with _tokenizer_folder(source) as folder:
        written = generated_text(source, folder, count * L + 1, options.seed, cache)
    windows = []
    for begin in range(0, count * L, L):
        inside = written.starts[(written.starts >= begin) & (written.starts <= begin + L)] - begin
        windows.append(make_sample(written.ids[begin : begin + L + 1], inside))
    return windows


def written_documents(source: Checkpoint, num_tokens: int, seed: int = 0) -> list[str]:
    """What the model itself writes, as `lamella.calibrate.generated` says, without special tokens.

    Args:
        num_tokens: at least so many in all.

    Raises:
        UserError: as `generated_text`; no tokenizer.
    """
    from transformers import AutoTokenizer

    from lamella.calibrate.generated import generated_text

    with _tokenizer_folder(source) as folder:
        written = generated_text(source, folder, num_tokens, seed)
        tokenizer = AutoTokenizer.from_pretrained(folder)
    documents = [ids.tolist() for ids in np.split(written.ids, written.starts[1:])]
    return tokenizer.batch_decode(documents, skip_special_tokens=True)


def _tokens(source: Checkpoint, text: str, options: CalibrationOptions, count: int, cache: Path | None) -> TokenFolder:
    opened = open_source(text)  # before a tokenizer is looked for
    limit = count * options.sequence_length + 1
    with _tokenizer_folder(source) as folder:
        return token_file(
            text, SPLIT, folder, cache=cache, max_tokens=limit if opened.is_streamed else DRAW_FROM * limit
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
