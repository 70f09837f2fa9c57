"""What is served is measured: a GGUF file by llama.cpp, and endpoints; figures are those of the folder itself."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from lamella.errors import UserError
from lamella.evaluate.choice.evaluate import TaskResult, evaluate_task
from lamella.evaluate.choice.questions import Question
from lamella.evaluate.perplexity import evaluate
from lamella.evaluate.served.names import address_of
from lamella.export import export
from lamella.export.gguf.llama_cpp import find, running
from lamella.export.serving import VLLM_PYTHON
from support.bpe import VOCAB, save_bpe
from support.served import served
from support.trained_model import LLAMA3_ROPE, save_trained

needs_llama_cpp = pytest.mark.skipif(find() is None, reason="xllamacpp is not installed")
QUESTIONS = [
    Question("def area(width, height", (") return", " 12 x 345", "): # äöü", "import"), 0, "code"),
    Question("import os", (" and os", " width width"), 1, "code"),
    Question("A letter of two bytes: ", ("ä", "é", "naïve café"), 2, "prose"),
    Question("Answer:", ("A", "B"), 0, "prose"),
]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_bpe(save_trained(tmp_path_factory.mktemp("served") / "moe", vocab_size=VOCAB, eos_token_id=1)))


@pytest.fixture(scope="module")
def gguf(source: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    out = export(Path(source), "gguf", tmp_path_factory.mktemp("file") / "out", check=False).out
    return str(next(out.glob("*.gguf")))


@pytest.fixture(scope="module")
def endpoint(gguf: str) -> Iterator[str]:
    """A server of llama.cpp, as another program would have started it."""
    with running(Path(gguf), 256, slots=2) as address:
        yield f"{address}/v1"


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Documents with letters of two bytes: tokens that are parts of a character, and ends of documents."""
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    path.write_text("".join(json.dumps({"text": f"naïve café {i} def area(width)"}) + "\n" for i in range(60)))
    return str(path)


def measured(name: str, text: str, **options: str) -> tuple[float, float, int, int]:
    result = evaluate(name, text, split=None, max_tokens=192, seq_len=48, **options)["model"]
    return result.nats_per_token, result.perplexity, result.tokens, result.bytes


def same_answers(found: TaskResult, wanted: TaskResult) -> None:
    for ours, theirs in zip(found.answers, wanted.answers, strict=True):
        assert ours.chosen == theirs.chosen
        assert ours.log_likelihoods == pytest.approx(theirs.log_likelihoods, rel=1e-5, abs=1e-5)  # fp32, other kernels
    assert found.overall == wanted.overall
    assert found.domains == wanted.domains


@needs_llama_cpp
@pytest.mark.slow
def test_a_gguf_file_has_the_figures_of_its_folder(source: str, gguf: str, text: str) -> None:
    wanted = measured(source, text)
    assert measured(gguf, text, tokenizer=source) == pytest.approx(wanted, rel=1e-5)  # fp32, other kernels
    results = evaluate_task(gguf, QUESTIONS, beside=[source], tokenizer=source)
    same_answers(results[gguf], results[source])
    assert results[gguf].expert_use == {}


@needs_llama_cpp
@pytest.mark.slow
def test_llama3_rope_too(text: str, tmp_path: Path) -> None:
    """In step35, whose last layer has a sliding window: keys and values of it are kept whole."""
    model = save_bpe(save_trained(tmp_path / "moe", vocab_size=VOCAB, rope_parameters=LLAMA3_ROPE))
    file = next(export(model, "gguf", tmp_path / "out", check=False).out.glob("*.gguf"))
    wanted = measured(str(model), text)
    assert measured(str(file), text, tokenizer=str(model)) == pytest.approx(wanted, rel=1e-5)


@needs_llama_cpp
@pytest.mark.slow
def test_an_endpoint_has_the_figures_of_its_folder(source: str, endpoint: str, text: str) -> None:
    assert measured(endpoint, text, tokenizer=source) == pytest.approx(measured(source, text), rel=1e-5)
    results = evaluate_task(source, QUESTIONS, beside=[endpoint], tokenizer=source)
    same_answers(results[endpoint], results[source])


@pytest.mark.skipif(VLLM_PYTHON not in os.environ, reason="scripts/check_with_vllm.py runs it beside vLLM")
@pytest.mark.slow
def test_vllm_has_the_figures_of_the_folder(text: str, tmp_path: Path) -> None:
    shape = {"vocab_size": VOCAB, "eos_token_id": 1, "head_dim": 64}  # vLLM computes attention of few widths on a CPU
    source = str(save_bpe(save_trained(tmp_path / "moe", **shape)))
    out = export(Path(source), "glm4-moe", tmp_path / "glm", check=False).out
    words = ("--engine", "vllm", "--dtype", "float32", "--context", "128", "--device", "cpu")
    with served(out, *words, wait_s=900) as url:
        assert measured(url, text, tokenizer=source) == pytest.approx(measured(source, text), rel=1e-4)
        results = evaluate_task(source, QUESTIONS, beside=[url], tokenizer=source)
        same_answers(results[url], results[source])


def run_cli(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "lamella.cli", "evaluate", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=600)


@needs_llama_cpp
@pytest.mark.slow
def test_the_command(source: str, gguf: str, text: str, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    words = ("--data", text, "--split", "all", "--tokens", "64", "--seq-len", "32", "--json", str(report))
    done = run_cli(str(Path(gguf).parent), "--tokenizer", source, "--dense", source, *words)
    assert done.returncode == 0, done.stderr
    values = json.loads(report.read_text())
    assert values["model"]["perplexity"] == pytest.approx(values["dense"]["perplexity"], rel=1e-4)


@pytest.mark.slow
@pytest.mark.faults
def test_an_unreachable_endpoint_is_one_line(source: str, text: str) -> None:
    with socket.socket() as bound:  # nobody listens there
        bound.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{bound.getsockname()[1]}/v1"
        done = run_cli(url, "--tokenizer", source, "--data", text)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
        assert done.stderr.startswith(f"error: nothing answers at {url} ")
        with pytest.raises(UserError, match=f"nothing answers at {url}"):
            evaluate_task(source, QUESTIONS, beside=[url], tokenizer=source)


@needs_llama_cpp
@pytest.mark.faults
def test_bad_input_is_refused(source: str, gguf: str, endpoint: str, text: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no such model: /missing\.gguf"):
        measured("/missing.gguf", text)
    (tmp_path / "other.gguf").write_bytes(b"PK")
    with pytest.raises(UserError, match="is not a GGUF file"):
        measured(str(tmp_path / "other.gguf"), text)
    (tmp_path / "broken.gguf").write_bytes(b"GGUF no")
    with pytest.raises(UserError, match=r"llama\.cpp does not take .*broken\.gguf"):
        measured(str(tmp_path / "broken.gguf"), text, tokenizer=source)
    with pytest.raises(UserError, match=r"needs --tokenizer DIR"):
        measured(gguf, text)
    with pytest.raises(UserError, match=r"needs --tokenizer DIR"):
        measured(endpoint, text)
    with pytest.raises(UserError, match=r"--tokenizer is for GGUF files and endpoints"):
        measured(source, text, tokenizer=source)
    with pytest.raises(UserError, match=r"--mode has no effect on .*gguf, which is computed by its server"):
        measured(gguf, text, tokenizer=source, mode="dense")
    with pytest.raises(UserError, match=r"serves no model 'other'; it has moe-F32"):
        measured(f"{endpoint}#other", text, tokenizer=source)
    with pytest.raises(UserError, match=r"windows of 400 tokens are longer than the 256"):
        evaluate(endpoint, text, split=None, max_tokens=400, seq_len=400, tokenizer=source)
    with pytest.raises(UserError, match=r"a choice has \d+ tokens, and .* takes 256; shorten it"):
        evaluate_task(endpoint, [Question("a", ("b", "width 12 " * 200), 0)], tokenizer=source)


@needs_llama_cpp
@pytest.mark.faults
def test_another_tokenizer_is_noticed(source: str, endpoint: str, text: str, tmp_path: Path) -> None:
    """The same ids stand for other texts."""
    tokenizer = AutoTokenizer.from_pretrained(source)
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = state["model"]["vocab"]
    vocabulary["T"], vocabulary["Q"] = vocabulary["Q"], vocabulary["T"]
    save_bpe(tmp_path / "other")
    (tmp_path / "other" / "config.json").write_text("{}")
    file = tmp_path / "other" / "tokenizer.json"
    file.write_text(json.dumps(state))
    with pytest.raises(UserError, match="has other tokens than --tokenizer"):
        measured(endpoint, text, tokenizer=str(tmp_path / "other"))


def test_addresses() -> None:
    assert address_of("http://host:8000/v1") == address_of("http://host:8000/") == ("http://host:8000", None)
    assert address_of("http://host:8000/v1#me/model") == ("http://host:8000", "me/model")
