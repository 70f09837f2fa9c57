"""Steps and held-out text with nothing to predict: counted and said, and no end of the run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from lamella.conversion import convert
from lamella.errors import UserError
from lamella.evaluate.perplexity import evaluate
from lamella.recipe.sections import Portion
from lamella.train.data import check_learnable, has_label, open_samples
from support.models import save_llama

TEMPLATE = "{% for m in messages %}{{ '[' + m['role'] + ']' + m['content'] + '[end]' }}{% endfor %}"
TEMPLATE += "{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


def write_chats(file: Path, weights: list[int], question: str = "why?") -> str:
    rows = [
        [{"role": "user", "content": f"{question} {i}"}, {"role": "assistant", "content": f"because {i}", "weight": w}]
        for i, w in enumerate(weights)
    ]
    file.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    return str(file)


@pytest.fixture
def model(tmp_path):
    save_llama(tmp_path / "dense")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "dense")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


def train(ranks: int, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "lamella.cli", "train", f"--nproc={ranks}", *words]
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=500)


@pytest.mark.slow
@pytest.mark.faults
def test_a_step_without_labels_is_one_of_no_gradient(tmp_path, model):
    convert(str(model), tmp_path / "moe")
    chats = write_chats(tmp_path / "chats.jsonl", [int(i % 4 == 0) for i in range(120)])
    unlearned = write_chats(tmp_path / "unlearned.jsonl", [0] * 100)
    recipe = tmp_path / "recipe.yaml"
    settings = {
        "model": str(tmp_path / "moe"), "out": str(tmp_path / "run"), "data": [chats], "heldout_data": [unlearned],
        "seq_len": 48, "steps": 8, "samples_per_step": 2, "threads_per_rank": 1, "heldout_samples": 3, "lr": 1e-2,
        "tensorboard": False, "objective": "sft", "max_restarts_without_progress": 0,
    }  # fmt: skip
    recipe.write_text(json.dumps(settings))
    done = train(2, str(recipe))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert f"data {chats}: 1 file (1 .jsonl)" in done.stdout
    assert "WARNING: the held-out samples have nothing to predict" in done.stdout
    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    without = [event["step"] for event in events if event["event"] == "no_labels"]
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    by_step = {line["step"]: line for line in lines if "loss" in line}
    samples = open_samples([Portion(source=chats)], "train", model, 48, 0, 16, 258)
    expected = [s for s in range(1, 9) if not any(has_label(samples.sample(2 * s - 2 + i)) for i in range(2))]
    assert without == expected
    assert 0 < len(without) < 8
    for step, line in by_step.items():
        assert (line["loss"] == line["grad_norm"] == 0) == (step in without)
        assert line["heldout_loss"] is None
    assert by_step[8]["steps_without_labels"] == len(without)
    assert by_step[8]["skipped_steps"] == 0
    for changes in (f"data=[{unlearned}]", "seq_len=8"):
        refused = train(2, str(recipe), f"out={tmp_path / 'other'}", changes)
        assert refused.returncode == 2
        assert "error: nothing can be learned from " in refused.stderr
        assert not (tmp_path / "other").exists()


@pytest.mark.faults
def test_data_in_which_nothing_can_be_learned_are_refused(tmp_path, model, monkeypatch):
    monkeypatch.setenv("LAMELLA_CACHE", str(tmp_path / "cache"))

    def check(weights: list[int], question: str) -> str:
        source = write_chats(tmp_path / "chats.jsonl", weights, question)
        check_learnable(open_samples([Portion(source=source)], "train", model, 48, 0, 16, 258))
        return source

    check([0, 0, 0, 1] * 20, "why?")
    for weights, question in (([0] * 50, "why?"), ([1] * 50, "why " * 40)):
        with pytest.raises(UserError, match=r"nothing can be learned from .*chats\.jsonl: no sample has a token"):
            check(weights, question)
    source = write_chats(tmp_path / "chats.jsonl", [0] * 50)
    with pytest.raises(UserError, match="hold nothing to predict"):
        evaluate(str(model), source, split=None, max_tokens=64, seq_len=16)
