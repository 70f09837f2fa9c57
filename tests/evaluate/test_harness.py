"""Beside lm-evaluation-harness: the same figures on the same task, by its own command's defaults."""

import json

import pytest
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from lamella.checkpoint.embedded import embedded_model
from lamella.errors import UserError
from lamella.evaluate.choice.evaluate import evaluate_task
from lamella.evaluate.choice.harness import evaluate_harness_task
from support.models import SIZES, save_llama, save_tokenizer

pytestmark = pytest.mark.slow

YAML = """
task: local_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list:
  - metric: acc
  - metric: acc_norm
  - metric: acc_bytes
"""
TEXT = "the river town old bridge naïve café 12 345 stone said über water under night day"
WORDS = TEXT.split()
MEASURES = ("acc", "acc_norm", "acc_bytes")


def records(count: int) -> list[dict]:
    """Contexts that end with spaces and lines, choices that share beginnings, of one letter, with umlauts."""
    found = []
    for i in range(count):
        words = [WORDS[(i * j + i + j) % len(WORDS)] for j in range(2 + i % 9)]
        end = ("", " ", "\n", "  ", "?")[i % 5]
        choices = [" ".join(words[:2]), words[0], f"{i}", "A", f"über {words[1]}"][: 2 + i % 4]
        # numbered: where a context is another one with its choice, the harness (0.4.13) reads logits a place too early
        found.append({"question": f"{i}: " + " ".join(words) + end, "choices": choices, "answer": i % len(choices)})
    return found


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    folder = tmp_path_factory.mktemp("task")
    file = folder / "task.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records(120)))
    (folder / "local_choice.yaml").write_text(YAML.format(file=file))
    return file


def save_with_smollm2s_tokenizer(folder):
    config = LlamaConfig(**SIZES | {"vocab_size": 49152, "initializer_range": 0.3, "tie_word_embeddings": True})
    LlamaForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(embedded_model()).save_pretrained(folder)
    return folder


def save_with_bos(folder):
    return save_tokenizer(save_llama(folder), add_bos=True)


@pytest.mark.parametrize("save", [save_with_smollm2s_tokenizer, save_with_bos])
def test_equal_to_the_harness_to_the_last_digit(save, task, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    folder = str(save(tmp_path / "model"))
    yaml = str(task.with_name("local_choice.yaml"))
    theirs = simple_evaluate(
        "hf", {"pretrained": folder, "dtype": "float32", "device": "cpu"}, [yaml], task_manager=TaskManager()
    )
    figures = theirs["results"]["local_choice"]
    ours = evaluate_task(folder, str(task), dtype="float32")[folder]
    through_its_api = evaluate_harness_task(folder, yaml, dtype="float32")[folder].tasks["local_choice"]
    for measure in MEASURES:
        value, error = figures[f"{measure},none"], figures[f"{measure}_stderr,none"]
        assert (getattr(ours.overall, measure), getattr(ours.overall, f"{measure}_stderr")) == (value, error)
        assert through_its_api[measure] == (value, error)
    assert 0.1 < figures["acc,none"] < 0.9
    for sample, answer in zip(theirs["samples"]["local_choice"], ours.answers, strict=True):
        wanted = [float(response[0][0]) for response in sample["resps"]]
        assert list(answer.log_likelihoods) == pytest.approx(wanted, rel=1e-5)  # fp32, sums of other shapes


def test_what_the_harness_does_not_know(tmp_path):
    folder = str(save_llama(tmp_path / "model"))
    with pytest.raises(UserError, match=r"nor a task of lm-evaluation-harness \(did you mean 'hellaswag'\?\)"):
        evaluate_harness_task(folder, "helaswag")
    with pytest.raises(UserError, match=r"cannot read the task file .*no\.yaml"):
        evaluate_harness_task(folder, str(tmp_path / "no.yaml"))
    (tmp_path / "broken.yaml").write_text("task: [")
    with pytest.raises(UserError, match="lm-evaluation-harness cannot run"):
        evaluate_harness_task(folder, str(tmp_path / "broken.yaml"))
