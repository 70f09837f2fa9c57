"""Servers that others make, started by `lamella serve-model`: what they answer is what the model computes."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lamella.errors import UserError
from lamella.evaluate.choice.evaluate import evaluate_task
from lamella.evaluate.choice.questions import Question
from lamella.export import export
from lamella.export.apart import find_apart
from lamella.export.serving import VLLM_PYTHON, command_for, open_served
from lamella.hf.models import load
from support.bpe import VOCAB, save_bpe
from support.served import free_port, served
from support.trained_model import save_trained

PROMPT = "def area(width"
TOKENS = 8
needs_llama_cpp = pytest.mark.skipif(
    find_apart("xllamacpp", "LAMELLA_XLLAMACPP", "xllamacpp") is None, reason="xllamacpp is not installed"
)
needs_serving = pytest.mark.skipif(
    find_apart("openai", "LAMELLA_TRANSFORMERS_SERVING", "transformers-serving") is None,
    reason="transformers[serving] is not installed",
)


def save_source(folder: Path, **changes: Any) -> Path:
    return save_bpe(save_trained(folder, vocab_size=VOCAB, eos_token_id=1, **changes))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_source(tmp_path_factory.mktemp("served") / "moe")


@pytest.fixture(scope="module")
def expected(source: Path) -> str:
    return greedy(source)


def greedy(source: Path) -> str:
    """The source's own greedy text."""
    tokenizer = AutoTokenizer.from_pretrained(source)
    model = load(source, torch.float32)
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    out = model.generate(ids, max_new_tokens=TOKENS, do_sample=False, eos_token_id=None)
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


def completion(url: str, model: str) -> str:
    asked = {"model": model, "prompt": PROMPT, "max_tokens": TOKENS, "temperature": 0}
    answer = httpx.post(f"{url}/completions", json=asked, timeout=120)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["text"]


@needs_llama_cpp
@pytest.mark.slow
def test_llama_cpp_answers(source: Path, expected: str, tmp_path: Path) -> None:
    out = export(source, "gguf", tmp_path / "gguf", check=False).out
    with served(out, "--context", "128") as url:
        assert expected.startswith(completion(url, "moe-F32"))


@needs_serving
@pytest.mark.slow
def test_transformers_answers(source: Path, expected: str, tmp_path: Path) -> None:
    out = export(source, "glm4-moe", tmp_path / "glm", check=False).out
    assert type(AutoModelForCausalLM.from_pretrained(out)).__module__.startswith("transformers.")
    with served(out, "--engine", "transformers", "--device", "cpu", "--dtype", "float32") as url:
        assert expected.startswith(completion(url, str(out)))
        asked = {"model": str(out), "messages": [{"role": "user", "content": PROMPT}], "max_tokens": TOKENS}
        answer = httpx.post(f"{url}/chat/completions", json=asked | {"temperature": 0}, timeout=120).json()
        assert expected.startswith(answer["choices"][0]["message"]["content"])  # the template is the message alone
        with pytest.raises(UserError, match=r"tells no log-probabilities of a prompt .* vLLM or llama\.cpp"):
            evaluate_task(f"{url}#{out}", [Question("a", ("b", "c"), 0)], tokenizer=str(out))


@pytest.mark.skipif(VLLM_PYTHON not in os.environ, reason="scripts/check_with_vllm.py runs it beside vLLM")
@pytest.mark.slow
def test_vllm_answers(tmp_path: Path) -> None:
    source = save_source(tmp_path / "moe", head_dim=64)  # vLLM computes attention of few widths on a CPU
    out = export(source, "glm4-moe", tmp_path / "glm", check=False).out
    words = ("--engine", "vllm", "--dtype", "float32", "--context", "128", "--device", "cpu")
    with served(out, *words, wait_s=900) as url:
        assert greedy(source).startswith(completion(url, "glm"))


def test_auto_takes_what_fits(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VLLM_PYTHON, sys.executable)
    glm = export(source, "glm4-moe", tmp_path / "glm", check=False).out
    command = command_for(open_served(glm, free_port(), context=64))
    assert (command.engine, command.model) == ("vllm", "glm")
    assert "--max-model-len 64" in command.describe()
    assert "127.0.0.1" in command.words
    with pytest.raises(
        UserError, match=r"vllm cannot serve .* needs the code in its folder.*lamella export .* --to auto"
    ):
        command_for(open_served(source, free_port()), "vllm")
    with pytest.raises(UserError, match=r"llama\.cpp cannot serve .* vllm, transformers can"):
        command_for(open_served(glm, free_port()), "llama.cpp")


@pytest.mark.faults
def test_what_is_missing_is_said(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lamella.export.serving.find_apart", lambda *_: None)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv(VLLM_PYTHON, raising=False)
    with pytest.raises(UserError, match=r"transformers is not installed: pip install 'transformers\[serving\]'"):
        command_for(open_served(source, free_port()))
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    with pytest.raises(UserError, match=r"llama\.cpp is not installed: pip install 'lamella\[serve\]'"):
        command_for(open_served(tmp_path / "m.gguf", free_port()))
    monkeypatch.setenv(VLLM_PYTHON, str(tmp_path / "no-python"))
    glm = export(source, "glm4-moe", tmp_path / "glm", check=False).out
    with pytest.raises(UserError, match="is no program"):
        command_for(open_served(glm, free_port()), "vllm")


@pytest.mark.faults
def test_bad_input_is_refused(source: Path, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(UserError, match="pass another --port"):
            command_for(open_served(source, taken.getsockname()[1]))
    with pytest.raises(UserError, match="holds no model"):
        open_served(tmp_path, 8000)
    with pytest.raises(UserError, match=r"engine is 'vlm'.*did you mean 'vllm'"):
        command_for(open_served(source, free_port()), "vlm")
    (tmp_path / "config.yaml").write_text("")
    with pytest.raises(UserError, match="is a run directory; export it first"):
        open_served(tmp_path, 8000)
