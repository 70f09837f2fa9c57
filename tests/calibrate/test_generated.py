"""Calibration on what the dense model writes, alone and mixed with text."""

from __future__ import annotations

import contextlib
import itertools
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from lamella import cli
from lamella.calibrate import CalibrationOptions, calibration_tokens
from lamella.calibrate.generated import LENGTH
from lamella.checkpoint.source import Checkpoint
from lamella.data.sources import documents
from lamella.errors import UserError
from lamella.hf.models import load
from lamella.recipe.calibration import CalibrationText
from support.models import save_llama


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model so sure of its next token that sampling nearly always takes the most likely one."""
    folder = save_llama(tmp_path_factory.mktemp("model"))
    file = next(folder.glob("*.safetensors"))
    tensors = load_file(file)
    name = "lm_head.weight" if "lm_head.weight" in tensors else "model.embed_tokens.weight"
    tensors[name] = tensors[name] * 1000
    save_file(tensors, file, {"format": "pt"})
    return folder


@pytest.fixture
def text(tmp_path: Path) -> str:
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": f"<{i}> " + "word " * (i % 9)}) + "\n" for i in range(400)))
    return str(path)


def test_documents_are_what_the_model_says(folder: Path, tmp_path: Path) -> None:
    found = calibration_tokens(Checkpoint.open(folder), CalibrationOptions("generated", 1024, 128), cache=tmp_path)
    assert found.ids_NL.shape == (8, 128)
    model = load(folder, torch.float32)
    likely = told = 0
    for ids_L, positions_L in zip(found.ids_NL, found.positions_NL, strict=True):
        begins = [*torch.nonzero(positions_L == 0).flatten().tolist(), len(ids_L)]
        assert max(positions_L) < LENGTH
        if begins[0] != 0:
            continue
        for begin, end in itertools.pairwise(begins):
            predicted = model(ids_L[None, begin:end]).logits[0, :-1].argmax(-1)
            likely += int((predicted == ids_L[begin + 1 : end]).sum())
            told += end - begin - 1
    assert told > 500
    assert likely / told > 0.95


def test_documents_are_kept_and_follow_the_seed(folder: Path, tmp_path: Path) -> None:
    def made(seed: int) -> torch.Tensor:
        options = CalibrationOptions("generated", 512, 64, seed)
        return calibration_tokens(Checkpoint.open(folder), options, cache=tmp_path).ids_NL

    first = made(0)
    files = sorted((tmp_path / "generated").iterdir())
    assert torch.equal(first, made(0))
    assert sorted((tmp_path / "generated").iterdir()) == files
    assert not torch.equal(first, made(1))


def test_texts_are_mixed_by_weight(folder: Path, text: str, tmp_path: Path) -> None:
    mixture = (CalibrationText("generated", 3.0), CalibrationText(text, 1.0))
    source = Checkpoint.open(folder)
    alone = calibration_tokens(source, CalibrationOptions(text, 2 * 64, 64), cache=tmp_path)
    found = calibration_tokens(source, CalibrationOptions(mixture, 8 * 64, 64), cache=tmp_path)
    read = {tuple(row) for row in alone.ids_NL.tolist()}
    assert [tuple(row) in read for row in found.ids_NL.tolist()].count(True) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data": ()}, "names no text"),
        ({"data": (CalibrationText("a"), CalibrationText("b")), "num_tokens": 512}, "fewer than the 2 texts"),
    ],
)
def test_impossible_mixtures_are_refused(options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        CalibrationOptions(**options)
    with pytest.raises(UserError, match="the weight of a is 0"):
        CalibrationText("a", 0.0)


def test_the_text_is_a_source_like_any_other(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LAMELLA_CACHE", str(tmp_path / "cache"))
    out = tmp_path / "made" / "own.jsonl"

    def generate(*words: str) -> str:
        monkeypatch.setattr("sys.argv", ["lamella", "data", "generate", str(folder), "--tokens", "600", *words])
        with contextlib.suppress(SystemExit):
            cli.main()
        said = capsys.readouterr()
        return said.err + said.out

    assert "ends with .jsonl" in generate("--out", str(tmp_path / "own.txt"))
    assert not out.parent.exists()
    assert "documents" in generate("--out", str(out))
    texts = list(documents(str(out)))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert sum(len(tokenizer(text).input_ids) for text in texts) > 300
    assert "is there" in generate("--out", str(out))
    generate("--out", str(out), "--overwrite", "--seed", "1")
    assert list(documents(str(out))) != texts
