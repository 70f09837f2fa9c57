"""`lamella.convert`: from a dense model to one that generates, in one call."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import lamella
from lamella.conversion import command
from lamella.errors import UserError
from lamella.recipe.conversion import make_conversion
from support.models import VOCAB, save_tokenizer, tiny_checkpoint

RECIPES: dict[str, dict[str, Any]] = {
    "slice": {"slices": 4},
    "partition": {"parts": 4, "active": 2, "calibration": {"num_tokens": 256, "sequence_length": 64}},
    "upcycle": {"experts": 2, "top_k": 1},
    "attention": {"top_k": 1, "router": "random"},
}


@pytest.mark.parametrize("method", RECIPES)
@pytest.mark.parametrize("keep", [True, False])
def test_a_model_and_its_tokenizer_that_generate_at_once(tmp_path: Path, method: str, keep: bool) -> None:
    tiny_checkpoint(tmp_path / "dense", vocab_size=VOCAB)
    save_tokenizer(tmp_path / "dense")
    out = tmp_path / "moe" if keep else None
    model, tokenizer = lamella.convert(tmp_path / "dense", out, method=method, **RECIPES[method])
    assert sorted(p.name for p in tmp_path.iterdir()) == (["dense", "moe"] if keep else ["dense"])
    prompt = tokenizer("import", return_tensors="pt")
    text = model.generate(**prompt, max_new_tokens=5, do_sample=False)
    assert text.shape == (1, len("import") + 5)
    if out is not None:
        again, _ = lamella.load(out)
        with torch.no_grad():
            assert torch.equal(again(text).logits, model(text).logits)


@pytest.mark.slow
def test_again_with_progress_and_a_report(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path / "dense", vocab_size=VOCAB)
    save_tokenizer(tmp_path / "dense")
    with pytest.raises(UserError, match="exists"):
        lamella.convert(tmp_path / "dense", tmp_path / "dense")
    steps: list[Any] = []
    recipe = RECIPES["partition"] | {"layers": (1,), "guard": {"metric": "kl", "per_layer": 9.0}}
    for _ in range(2):
        steps.clear()
        model, _ = lamella.convert(
            tmp_path / "dense", tmp_path / "moe", overwrite=True, method="partition", on_progress=steps.append, **recipe
        )
        assert {step.phase for step in steps} >= {"embed", "method"}
        assert [verdict["layer"] for verdict in model.lamella_report.notes["guard"]] == [1]


@pytest.mark.slow
def test_a_calibration_says_how_far_it_is_where_there_is_no_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_checkpoint(tmp_path / "dense", vocab_size=VOCAB)
    save_tokenizer(tmp_path / "dense")
    options = make_conversion({"method": "partition"} | RECIPES["partition"]).options
    monkeypatch.setattr(command, "SECONDS_PER_LINE", 0)
    command.run(str(tmp_path / "dense"), tmp_path / "moe", options, overwrite=False, dry_run=False)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("calibrating: ")]
    assert any(re.fullmatch(r"calibrating: method, layer 1 of \d+, [\d,]+ tokens/s", line) for line in lines)


def test_bad_recipes_are_user_errors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="did you mean 'neurons'"):
        lamella.convert(tmp_path, method="partition", neuron="random")
    with pytest.raises(UserError, match="unknown method 'slic'"):
        lamella.convert(tmp_path, method="slic")


def test_importing_lamella_imports_no_torch() -> None:
    code = "import sys, lamella; sys.exit('torch' in sys.modules or 'pydantic' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
