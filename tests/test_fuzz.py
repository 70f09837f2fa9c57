"""Damaged input is read or refused in one line, within seconds, and nothing is written; see benchmarks/fuzz.py."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from random import Random

import pytest

from lamella.errors import UserError
from support.damage import damaged
from support.models import VOCAB, save_tokenizer, tiny_checkpoint
from support.readers import READERS

ROOT = Path(__file__).parents[1]


@pytest.mark.faults
@pytest.mark.parametrize("name", READERS)
def test_damaged_files_are_read_or_refused(name: str, tmp_path: Path) -> None:
    """A few cases of each reader; the script runs 10,000, and with the limit of time."""
    reader = READERS[name]
    reader.make(tmp_path)
    before = sorted(path for path in tmp_path.rglob("*"))
    reader.read(tmp_path)
    refused = 0
    for case in range(25):
        rng = Random(f"0 {name} {case}")
        file = tmp_path / reader.files[case % len(reader.files)]
        original = file.read_bytes()
        file.write_bytes(damaged(original, file.name, rng))
        try:
            reader.read(tmp_path)
        except UserError:
            refused += 1
        file.write_bytes(original)
    assert refused > 0
    assert sorted(path for path in tmp_path.rglob("*")) == before


@pytest.mark.slow
@pytest.mark.faults
def test_the_script_finds_nothing_in_a_thousand_damaged_files() -> None:
    """By default it damages 10,000, which takes some minutes."""
    done = subprocess.run(
        [sys.executable, "benchmarks/fuzz.py", "--cases", "1000"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-3000:]


@pytest.mark.faults
@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("config", "model/config.json"),
        ("index", "model/model.safetensors.index.json"),
        ("converted", "model/config.json"),
        ("partition", "partition.yaml"),
        ("training recipe", "training.yaml"),
        ("run folder", "status.json"),
    ],
)
def test_deep_nesting_is_refused(name: str, file: str, tmp_path: Path) -> None:
    reader = READERS[{"partition": "conversion recipe"}.get(name, name)]
    reader.make(tmp_path)
    (tmp_path / file).write_text('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}")
    with pytest.raises(UserError):
        reader.read(tmp_path)


@pytest.mark.faults
def test_token_ids_beyond_the_embedding_are_refused_by_evaluate_and_verify(tmp_path: Path) -> None:
    from lamella.conversion import SliceOptions, convert
    from lamella.evaluate.logit_match import logit_match
    from lamella.evaluate.perplexity import evaluate

    small = save_tokenizer(tiny_checkpoint(tmp_path / "small", vocab_size=VOCAB - 100, max_position_embeddings=512))
    with pytest.raises(UserError, match="token id"):
        evaluate(str(small), seq_len=64, max_tokens=256)
    convert(small, tmp_path / "moe", SliceOptions(slices=4))
    with pytest.raises(UserError, match="token id"):
        logit_match(str(small), str(tmp_path / "moe"), tokens={"float32": 128})
