"""Calibration text: whole windows, no held-out document, and one line where that cannot be."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from lamella.calibrate import CalibrationOptions, calibration_tokens
from lamella.checkpoint.source import Checkpoint
from lamella.data.packing import IGNORE_INDEX
from lamella.data.sources import documents
from lamella.errors import UserError
from lamella.evaluate.perplexity import text_samples
from support.models import EOS, save_llama, tiny_checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def source(folder: Path) -> Checkpoint:
    return Checkpoint.open(folder)


@pytest.fixture
def text(tmp_path: Path) -> str:
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": f"<{i}> " + "word " * (i % 9)}) + "\n" for i in range(400)))
    return str(path)


def test_no_calibration_text_is_held_out(source: Checkpoint, folder: Path, text: str, tmp_path: Path) -> None:
    """Every document is numbered: those of calibration and those that evaluation scores have no number in common."""
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def numbers(ids: torch.Tensor) -> set[str]:
        return {word for word in tokenizer.decode(ids.flatten().tolist()).split() if word.endswith(">")}

    found = calibration_tokens(source, CalibrationOptions(text, 8000, 100), cache=tmp_path)
    scored = text_samples(text, "heldout", str(folder), 64, None)
    evaluated = torch.stack([scored.sample(i).input_ids_L for i in range(len(scored))])
    calibrated, heldout = numbers(found.ids_NL), numbers(evaluated)
    assert len(calibrated) > 200
    assert len(heldout) > 20
    assert not calibrated & heldout


def test_embedded_text_is_disjoint_from_the_held_out(source: Checkpoint, tmp_path: Path) -> None:
    """The default: enough text for the default options, and the calibration windows are pieces of the train side."""
    found = calibration_tokens(source, cache=tmp_path)
    assert found.ids_NL.shape == (128, 512)
    train, heldout = (list(documents("python-docs", side)) for side in ("train", "heldout"))
    assert not set(train) & set(heldout)
    assert heldout
    stream = "\x00".join(train).encode() + b"\x00"  # a token is a byte, the end of a document one more
    letters = {i: letter for letter, i in AutoTokenizer.from_pretrained(source.name).get_vocab().items()}
    byte_of = {letter: byte for byte, letter in bytes_to_unicode().items()}
    for ids_L in found.ids_NL.tolist():
        assert bytes(0 if i == EOS else byte_of[letters[i]] for i in ids_L) in stream


def test_windows_follow_the_seed_and_hold_no_padding(source: Checkpoint, text: str, tmp_path: Path) -> None:
    def ask(seed: int):
        return calibration_tokens(source, CalibrationOptions(text, 1000, 64, seed), cache=tmp_path)

    first, again, other = ask(0), ask(0), ask(1)
    assert first.ids_NL.shape == (15, 64)  # whole windows of the 1000
    assert first.num_tokens == 960
    assert first.hash() == again.hash() != other.hash()
    assert torch.equal(first.ids_NL, again.ids_NL)
    ends = first.ids_NL == EOS
    assert ((first.labels_NL == IGNORE_INDEX) == ends).all()  # after a document's end nothing is to be learned
    assert (first.positions_NL[:, 1:][ends[:, :-1]] == 0).all()
    assert (first.positions_NL[:, 0] == 0).all()


def test_too_little_text(source: Checkpoint, text: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gives \d+ calibration tokens of the 100000 asked for"):
        calibration_tokens(source, CalibrationOptions(text, 100_000, 100), cache=tmp_path)
    (tmp_path / "short.txt").write_text("a few words")
    with pytest.raises(UserError, match=r"too few for one sample|no text"):
        calibration_tokens(source, CalibrationOptions(str(tmp_path / "short.txt"), 512, 512), cache=tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_tokens": 100}, "do not fill a window of 512"),
        ({"sequence_length": 1}, "at least 2"),
        ({"sequence_length": 513}, "longer than the model's 512 positions"),
        ({"data": "python-doc"}, "did you mean 'python-docs'"),
        ({"data": "./nowhere.txt"}, "no such data"),
    ],
)
def test_options_that_cannot_be(options: dict, message: str, source: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        calibration_tokens(source, CalibrationOptions(**options), cache=tmp_path)


def test_no_tokenizer(text: str, tmp_path: Path) -> None:
    bare = Checkpoint.open(tiny_checkpoint(tmp_path / "bare"))
    with pytest.raises(UserError, match="bare has no tokenizer"):
        calibration_tokens(bare, CalibrationOptions(text, 512, 64), cache=tmp_path)
