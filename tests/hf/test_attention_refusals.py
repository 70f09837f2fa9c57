"""Attention experts that cannot be: refused in one line, before anything is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lamella.architecture.moe import AttentionMoEConfig
from lamella.calibrate import CalibrationOptions
from lamella.checkpoint.source import Checkpoint
from lamella.conversion import convert
from lamella.errors import UserError
from lamella.hf.models import load
from lamella.recipe.methods.attention import AttentionOptions
from lamella.titan.config import read_hf_config
from support.models import tiny_checkpoint

CALIBRATION = CalibrationOptions(num_tokens=600, sequence_length=60)


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return tiny_checkpoint(tmp_path / "dense")


def converted(source: Path, name: str = "experts", **options: Any) -> Path:
    out = source.parent / name
    convert(source, out, AttentionOptions(**{"layers": "0,2"} | options))
    return out


WRONG_OPTIONS = [
    ({"experts": 3}, "do not fit 4 query heads with 2 key/value heads; possible: 2, 4"),
    ({"top_k": 3}, "top-k is 3 of 2 experts"),
    ({"layers": "7"}, "the model has the layers 0-2"),
    ({"gate": "softmx"}, "did you mean 'softmax'"),
    ({"router": "rige"}, "did you mean 'ridge'"),
    ({"router": "ridge", "gate": "softmax"}, "use gate 'unit'"),
    ({"route_scale": 2.0}, "gate 'unit' has no route_scale"),
    ({"router": "ridge", "calibration": CALIBRATION}, "has no tokenizer"),
    ({"router": "ridge"}, "longer than the model's 256 positions; lower the calibration's sequence_length"),
    ({"router": "zero", "balance": 0.1}, "balance needs calibration text, which only router 'ridge' reads"),
    ({"router": "ridge", "balance": 0.0}, "balance is 0.0; it must be a MaxVio above 0"),
]


@pytest.mark.parametrize(("options", "message"), WRONG_OPTIONS)
def test_wrong_options_are_refused_before_anything_is_written(llama: Path, options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        converted(llama, **options)
    assert [path.name for path in llama.parent.iterdir()] == ["dense"]


def test_wrong_sources_and_folders(llama: Path) -> None:
    folder = converted(llama)
    with pytest.raises(UserError, match="attention experts already"):
        converted(folder, "twice")
    with pytest.raises(UserError, match="pass --overwrite"):
        converted(llama)
    assert read_hf_config(folder).attention_moe == AttentionMoEConfig((0, 2), 2, 2)
    with pytest.raises(UserError, match="converted already"):
        Checkpoint.open(folder)


CONFIG = {"layers": [0], "num_experts": 2, "num_experts_per_tok": 1}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_expert": 2}, "unknown key 'num_expert' in the attention_moe config .did you mean 'num_experts'"),
        ({"num_experts_per_tok": 0}, "between 1 and the number"),
        ({"gate": "unite"}, "did you mean 'unit'"),
        ({"num_experts": 3}, "do not fit"),
        ({"layers": [3]}, "the model has the layers 0-2"),
    ],
)
def test_strict_config(llama: Path, change: dict, message: str) -> None:
    folder = converted(llama)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"attention_moe": CONFIG | change}))
    with pytest.raises(UserError, match=message):
        load(folder)
