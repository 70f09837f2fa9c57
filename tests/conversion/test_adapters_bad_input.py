"""Bad adapters and bad questions through the command line: exit code 2, one line, and nothing is written."""

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

from lamella import cli
from lamella.architecture.peft import CONFIG, WEIGHTS
from lamella.conversion import convert
from lamella.recipe.methods.adapters import AdaptersOptions
from support.adapters import VARIANTS, save_adapter
from support.models import save_tokenizer, tiny_checkpoint


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with a dense model, an adapter of it, the model that both make, and a model of another width."""
    folder = tmp_path_factory.mktemp("base")
    dense = tiny_checkpoint(folder / "dense")
    save_tokenizer(dense)
    save_adapter(dense, folder / "good", **VARIANTS["plain"])
    convert(dense, folder / "mix", AdaptersOptions(adapters=(str(folder / "good"),)))
    tiny_checkpoint(folder / "wider", intermediate_size=64)
    return folder


def refused(words, message, capsys, monkeypatch, written):
    """One line on stderr, exit code 2, and none of `written`."""
    monkeypatch.setattr("sys.argv", ["lamella", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    assert ended.value.code == 2, captured.err
    assert captured.err.strip().splitlines()[-1:] == lines, captured.err
    assert message in lines[0]
    assert "Made" not in captured.out
    assert not [path for path in written if path.exists()]


def edited(folder, out, changes=None, drop=0):
    """A copy of an adapter with another config, or without its first tensors."""
    shutil.copytree(folder, out)
    config = json.loads((out / CONFIG).read_text())
    (out / CONFIG).write_text(json.dumps(config | (changes or {})))
    tensors = load_file(out / WEIGHTS)
    save_file(dict(list(tensors.items())[drop:]), out / WEIGHTS)
    return out


ADAPTERS = {
    "dora": ({"use_dora": True}, 0, "it uses DoRA, which is not carried"),
    "bias": ({"bias": "all"}, 0, "it trained biases (bias 'all'), which are not carried"),
    "lora bias": ({"lora_bias": True}, 0, "it uses a bias on LoRA, which is not carried"),
    "other kind": ({"peft_type": "IA3"}, 0, "only LORA is carried"),
    "rank": ({"r": 5}, 0, "and rank 5 need [5, "),
    "target": ({"target_modules": ["up_proj", "w1"]}, 0, "it should change w1, of which it holds no tensor"),
    "half": ({}, 1, "is missing"),
}  # fmt: skip


@pytest.mark.parametrize("case", ADAPTERS)
def test_adapters(case, base, tmp_path, capsys, monkeypatch):
    changes, drop, message = ADAPTERS[case]
    bad, out = edited(base / "good", tmp_path / "bad", changes, drop), tmp_path / "out"
    words = ["convert", "method=adapters", f"model={base / 'dense'}", f"adapters=[{bad}]", f"out={out}"]
    refused(words, message, capsys, monkeypatch, [out])


def test_an_adapter_of_another_base(base, tmp_path, capsys, monkeypatch):
    words = ["convert", "method=adapters", f"model={base / 'wider'}", f"adapters=[{base / 'good'}]"]
    refused(
        [*words, f"out={tmp_path / 'out'}"], "dense, cannot be used: lora_", capsys, monkeypatch, [tmp_path / "out"]
    )


def test_rslora_is_carried(base, tmp_path):
    adapter = save_adapter(base / "dense", tmp_path / "rs", **VARIANTS["rslora"])
    convert(base / "dense", tmp_path / "mix", AdaptersOptions(adapters=(str(adapter),)))
    stored = load_file(tmp_path / "mix/model.safetensors")["model.layers.0.mlp.adapters.down_proj_b"][0, :, :9]
    theirs = load_file(adapter / WEIGHTS)["base_model.model.model.layers.0.mlp.down_proj.lora_B.weight"]
    assert stored.allclose(theirs * 8 / 3)  # alpha / sqrt(rank)


COMMANDS = {
    "no adapter": (("route", "{mix}", "--data", "{text}=nobody"), "is for the adapter 'nobody', which the model lacks"),
    "no mix": (("route", "{dense}", "--data", "{text}=good"), "has no adapters as experts"),
    "no pair": (("route", "{mix}", "--data", "{text}"), "write SOURCE=ADAPTER"),
    "target": (("route", "{mix}", "--data", "{text}=good", "--target", "attention"), "adapters are of mlp alone"),
    "unknown target": (("route", "{mix}", "--data", "{text}=good", "--target", "all"), "target is 'all'"),
    "asleep": (("route", "{mix}", "--data", "{text}=good", "--target", "mlp"), "send every token to the zero expert"),
    "block": (("learn", "{dense}", "--data", "{text}", "--block", "head"), "a block with adapters is 'head'"),
    "rank": (("learn", "{dense}", "--data", "{text}", "--rank", "0"), "both must be positive"),
    "lr": (("learn", "{dense}", "--data", "{text}", "--lr", "nan"), "it must be a positive number"),
    "no text": (("learn", "{dense}", "--data", "./no.txt"), "no such data"),
    "start": (("learn", "{dense}", "--data", "{text}", "--start", "{mix}"), "it holds no adapter_config.json"),
    "start's rank": (
        ("learn", "{dense}", "--data", "{text}", "--rank", "2", "--start", "{good}"),
        "has rank 4, and what begins with it 2; raise rank",
    ),
    "start's base": (("learn", "{wider}", "--data", "{text}", "--start", "{good}"), "made for "),
    "no such mix": (("export", "{dense}", "--to", "peft"), "has no adapters as experts"),
}


@pytest.mark.parametrize("case", COMMANDS)
def test_commands(case, base, tmp_path, capsys, monkeypatch):
    words, message = COMMANDS[case]
    text, out = tmp_path / "text.jsonl", tmp_path / "out"
    text.write_text("".join(json.dumps({"text": "abc " * 40}) + "\n" for _ in range(40)))
    names = {name: base / name for name in ("mix", "dense", "good", "wider")} | {"text": text}
    save_tokenizer(base / "mix")
    words = ["adapters", *(word.format(**names) for word in words), "--out", str(out)]
    refused(words, message, capsys, monkeypatch, [out])


GOOD = {"question": "The capital of France is", "choices": ["Rome", "Paris"], "answer": 1}
QUESTIONS = {
    "missing answer": ({"answer": None}, "line 1: the question has no 'answer'"),
    "one choice": ({"choices": ["Paris"], "answer": 0}, "line 1: the question has 1 choice"),
    "no choice": ({"answer": 2}, "line 1: the answer 2 is no choice"),
    "other text": ({"answer": "Berlin"}, "line 1: the answer 'Berlin' is 0 of the choices"),
}


@pytest.mark.parametrize("case", QUESTIONS)
def test_questions(case, base, tmp_path, capsys, monkeypatch):
    changes, message = QUESTIONS[case]
    task, report = tmp_path / "task.jsonl", tmp_path / "report.json"
    task.write_text(json.dumps(GOOD | changes))
    words = ["evaluate", str(base / "dense"), "--task", str(task), "--json", str(report)]
    refused(words, message, capsys, monkeypatch, [report])


FILES = {
    "no answer": (json.dumps({key: value for key, value in GOOD.items() if key != "answer"}), "has no 'answer'"),
    "no choices": (json.dumps({key: value for key, value in GOOD.items() if key != "choices"}), "has no 'choices'"),
    "broken": (json.dumps(GOOD) + "\n{", "line 2"),
    "empty": ("", "no question"),
}


@pytest.mark.parametrize("case", FILES)
def test_files_of_questions(case, base, tmp_path, capsys, monkeypatch):
    text, message = FILES[case]
    task, report = tmp_path / "task.jsonl", tmp_path / "report.json"
    task.write_text(text)
    words = ["evaluate", str(base / "dense"), "--task", str(task), "--json", str(report)]
    refused(words, message, capsys, monkeypatch, [report])


def test_a_recipe_with_an_adapter_of_another_base(base, tmp_path, capsys, monkeypatch):
    text, out = tmp_path / "text.jsonl", tmp_path / "out"
    text.write_text(json.dumps({"text": "abc " * 40}) + "\n")
    domains = f"domains={{a: {{data: {text}, adapter: {base / 'good'}}}}}"
    words = ["train", "method=adapters", f"model={base / 'wider'}", domains, f"out={out}"]
    refused(words, "cannot be used: lora_", capsys, monkeypatch, [out, tmp_path / "out-parts"])
