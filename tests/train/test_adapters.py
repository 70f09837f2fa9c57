"""Training adapters and the routers that choose among them."""

import json
import math
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from lamella import cli
from lamella.architecture.peft import WEIGHTS
from lamella.conversion import convert
from lamella.errors import UserError
from lamella.hf.adapters import adapter_layers
from lamella.hf.models import load
from lamella.recipe.adapters_training import read_adapters_training
from lamella.recipe.methods.adapters import AdaptersOptions
from lamella.run.folder import RunDir
from lamella.service.folders import Folders
from lamella.train.adapter_steps import Pace
from lamella.train.adapters import learn_adapter, train_routers
from lamella.train.adapters_recipe import train_adapters
from support.adapters import IDS, VARIANTS, logits, save_adapter
from support.models import VOCAB, save_llama, save_tokenizer, tiny_checkpoint


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return str(save_llama(tmp_path_factory.mktemp("small") / "dense"))


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    for name, line in {"digits": "1234 5678 90 ", "letters": "abc def ghij "}.items():
        lines = (json.dumps({"text": line * 30}) + "\n" for _ in range(60))
        (folder / f"{name}.jsonl").write_text("".join(lines))
    return folder


@pytest.mark.slow
def test_learn_and_route(small, texts, tmp_path):
    pace = Pace(steps=12, lr=5e-3, samples_per_step=2, seq_len=64)
    for name in ("digits", "letters"):
        losses = learn_adapter(small, [str(texts / f"{name}.jsonl")], tmp_path / name, rank=4, alpha=8.0, pace=pace)
        assert losses[-1] < losses[0] - 0.1
    # peft loads what was learned, and computes the same
    convert(small, tmp_path / "mix", AdaptersOptions(adapters=(str(tmp_path / "digits"), str(tmp_path / "letters"))))
    ids, model = IDS % VOCAB, load(tmp_path / "mix")
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(small), tmp_path / "digits").eval()
    model.computing.adapter = 0
    torch.testing.assert_close(logits(model, ids), logits(theirs, ids), atol=2e-5, rtol=1e-4)
    data = {str(texts / "digits.jsonl"): "digits", str(texts / "letters.jsonl"): "letters"}
    route = Pace(steps=40, lr=1e-1, samples_per_step=2, seq_len=64)
    train_routers(str(tmp_path / "mix"), data, tmp_path / "routed", target="router_mlp", pace=route, balance=0.01)
    routed = load(tmp_path / "routed")
    share, tokenizer = {}, AutoTokenizer.from_pretrained(small)
    for index, text in enumerate(("1234 5678 90 " * 4, "abc def ghij " * 4)):
        logits(routed, tokenizer(text, return_tensors="pt")["input_ids"])
        chosen = torch.cat([layer.last_routing.expert_ids_TK for layer in adapter_layers(routed)])
        share[index] = (chosen == index).float().mean().item()
    assert min(share.values()) > 0.8, share
    before = load_file(tmp_path / "mix/model.safetensors")
    for name, tensor in load_file(tmp_path / "routed/model.safetensors").items():
        assert torch.equal(tensor, before[name]) == (".router." not in name and ".adapters." not in name), name
    # the routers alone, from the same place
    train_routers(str(tmp_path / "mix"), data, tmp_path / "alone", pace=Pace(2, 1e-2, 2, 64))
    for name, tensor in load_file(tmp_path / "alone/model.safetensors").items():
        assert torch.equal(tensor, before[name]) == (".router." not in name), name


@pytest.mark.slow
def test_learn_and_route_attention(small, texts, tmp_path):
    pace, digits = Pace(steps=4, lr=5e-3, samples_per_step=2, seq_len=64), str(texts / "digits.jsonl")
    learn_adapter(small, [digits], tmp_path / "both", rank=4, blocks=("mlp", "attention"), pace=pace)
    learn_adapter(small, [digits], tmp_path / "heads", rank=4, blocks=("attention",), pace=pace)
    convert(small, tmp_path / "mix", AdaptersOptions(adapters=(str(tmp_path / "both"), str(tmp_path / "heads"))))
    ids, model = IDS % VOCAB, load(tmp_path / "mix")
    for index, name in enumerate(("both", "heads")):
        theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(small), tmp_path / name).eval()
        model.computing.adapter = index
        torch.testing.assert_close(logits(model, ids), logits(theirs, ids), atol=2e-5, rtol=1e-4)
    before, expected = load_file(tmp_path / "mix/model.safetensors"), {
        "router": (".router.",), "router_mlp": (".router.", ".mlp.adapters."), "attention": (".lora.adapters.",),
        "mlp": (".mlp.adapters.",),
    }  # fmt: skip
    source = tmp_path / "mix"
    for target, parts in expected.items():
        out = tmp_path / target
        train_routers(str(source), {digits: "both"}, out, target=target, pace=Pace(3, 1e-1, 2, 64), dtype="float32")
        for name, tensor in load_file(out / "model.safetensors").items():
            same = torch.equal(tensor, before[name])
            assert same or any(part in name for part in parts), name
            if any(name.endswith(f"{part.rstrip('.')}.{end}") for part in parts for end in ("weight", "up_proj_b")):
                assert not same, (target, name)
        if target == "router":  # adapters alone train behind routers that choose them
            source, before = out, load_file(out / "model.safetensors")


RECIPE = """
method: adapters
model: {model}
out: {out}
domains:
  digits: {{data: {texts}/digits.jsonl}}
  letters: {{data: {texts}/letters.jsonl, adapter: {adapter}}}
adapters: {{rank: 4, alpha: 8, blocks: [mlp, attention], steps: 3, lr: 5.0e-3}}
routers: {{target: router_mlp, top_k: 2, steps: 2}}
seq_len: 64
samples_per_step: 2
"""


@pytest.mark.slow
def test_a_recipe_learns_adapters_and_then_routers(small, texts, tmp_path, monkeypatch, capsys):
    adapter = save_adapter(small, tmp_path / "letters", **VARIANTS["plain"])
    recipe, out = tmp_path / "recipe.yaml", tmp_path / "routed"
    recipe.write_text(RECIPE.format(model=small, out=out, texts=texts, adapter=adapter))

    def train(*words):
        monkeypatch.setattr("sys.argv", ["lamella", "train", str(recipe), *words])
        try:
            cli.main()
        except SystemExit as ended:
            return ended.code or 0, capsys.readouterr().err
        return 0, capsys.readouterr().err

    for words, message in (
        (["domains.digits.data=./no.txt"], "no such data"),
        (["routers.top_k=4"], "top_k is 4; there are 2 adapters and the zero expert"),
        (["adapters.rnk=4"], "unknown key 'adapters.rnk' (did you mean 'rank'?)"),
        (["domains.letters.adapter=./no"], "it holds no adapter_config.json"),
        (["--nproc", "2"], "adapters are trained by one process"),
    ):
        code, error = train(*words)
        assert code == 2, error
        assert message in error
        assert not out.exists()
        assert not (tmp_path / "routed-parts").exists()
    assert train()[0] == 0
    routed = load(out)
    config = routed.config.adapters
    assert config["names"] == ["digits", "letters"]
    assert (config["num_experts_per_tok"], config["blocks"]) == (2, ["mlp", "attention"])
    learned = tmp_path / "routed-parts/digits"
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(small), learned).eval()
    mix = load(tmp_path / "routed-parts/mix")
    mix.computing.adapter = 0
    torch.testing.assert_close(logits(mix, IDS % VOCAB), logits(theirs, IDS % VOCAB), atol=2e-5, rtol=1e-4)
    before = (learned / WEIGHTS).stat().st_mtime_ns
    assert train(f"out={out}", "routers.steps=3")[0] == 2  # out is there
    shutil.rmtree(out)
    assert train("routers.steps=3")[0] == 0  # goes on from the parts
    assert (learned / WEIGHTS).stat().st_mtime_ns == before
    shutil.rmtree(out)
    code, error = train("adapters.rank=8")
    assert code == 2
    assert "was made by another recipe" in error


KILLED = """
method: adapters
model: {model}
out: {out}
domains:
  digits: {{data: {texts}/digits.jsonl}}
  letters: {{data: {texts}/letters.jsonl}}
adapters: {{rank: 4, alpha: 8, common_steps: 4, steps: 40, lr: 5.0e-3}}
routers: {{target: router_mlp, steps: 4}}
seq_len: 64
samples_per_step: 2
save_every_steps: 3
"""


def lamella(*words):
    return subprocess.Popen([sys.executable, "-m", "lamella.cli", *map(str, words)], stderr=subprocess.PIPE, text=True)


def ended_by(end, run, step, *words):
    """The exit code of a command that something is done to once its run has logged a step."""
    process = lamella(*words)
    while process.poll() is None and max((line["step"] for line in run.all_metrics()), default=0) < step:
        time.sleep(0.005)
    end(process)
    process.communicate()
    return process.returncode


@pytest.mark.slow
@pytest.mark.faults
def test_a_recipe_that_is_killed_goes_on_and_ends_with_the_same_bits(small, texts, tmp_path, monkeypatch, capsys):
    recipe, out = tmp_path / "recipe.yaml", tmp_path / "killed"
    recipe.write_text(KILLED.format(model=small, out=out, texts=texts))
    run = RunDir(tmp_path / "killed-parts")
    assert ended_by(lambda process: process.kill(), run, 12, "train", recipe) == -signal.SIGKILL
    assert (run.path / "digits.resume").is_file()
    folders, seen = Folders(tmp_path, home=tmp_path / "home"), []
    assert folders.show(str(run.path))["state"] == "lost"

    def pause(_):
        seen.append(folders.change(str(run.path), "pause")["state"])

    assert ended_by(pause, run, 60, "train", recipe) == 128 + signal.SIGTERM
    assert seen == ["running"]
    status = run.status()
    assert (status["state"], status["steps"]) == ("preempted", 88)
    assert 60 <= status["step"] < 88
    stopped_at = status["step"]
    train_adapters(read_adapters_training(str(recipe), []), lambda _: None)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL  # as it was
    assert run.status()["state"] == "finished"
    lines = list(run.metrics())
    assert [line["step"] for line in lines] == list(range(1, 89))
    assert {line["training"] for line in lines} == {"common", "digits", "letters", "routers"}
    assert all(math.isfinite(line["loss"]) and line["tokens_per_s"] > 0 for line in lines)
    again = [line["step"] for line in run.all_metrics()]
    assert again.count(stopped_at) == 1  # a signal that is heard loses no step
    assert len(run.events("start")) == 3
    assert not list(run.path.glob("*.resume"))
    whole = read_adapters_training(str(recipe), [f"out={tmp_path / 'whole'}"])
    train_adapters(whole, lambda _: None)
    for name in ("common/" + WEIGHTS, "digits/" + WEIGHTS, "letters/" + WEIGHTS):
        assert (run.path / name).read_bytes() == (tmp_path / "whole-parts" / name).read_bytes()
    assert (out / "model.safetensors").read_bytes() == (tmp_path / "whole/model.safetensors").read_bytes()

    def runs(*words):
        monkeypatch.setattr("sys.argv", ["lamella", "runs", *map(str, words), "--home", str(tmp_path / "home")])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return ended.value.code or 0, capsys.readouterr()

    code, said = runs("show", run.path)
    assert code == 0, said.err
    assert "succeeded" in said.out
    assert "step 88 of 88" in said.out
    assert "method: adapters" in said.out
    monkeypatch.chdir(tmp_path)
    (tmp_path / "artifacts").symlink_to(tmp_path)
    code, said = runs("ls")
    assert code == 0, said.err
    assert "killed-parts" in said.out
    code, said = runs("fork", run.path, "--out", tmp_path / "fork")
    assert code == 2
    assert "holds a training of adapters" in said.err


def test_a_recipe_without_domains_or_with_a_text_that_cannot_be_had_leaves_nothing(small, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="domains is empty; name at least one"):
        read_adapters_training(None, ["method=adapters"])
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    out = tmp_path / "routed"
    words = ["method=adapters", f"model={small}", f"out={out}", "domains={a: {data: nobody/nothing}}", "seq_len=64"]
    recipe = read_adapters_training(None, words)
    with pytest.raises(UserError, match="nobody/nothing"):
        train_adapters(recipe, lambda _: None)
    assert not out.exists()
    assert not (tmp_path / "routed-parts").exists()


def test_bad_training(small, texts, tmp_path):
    dense = tiny_checkpoint(tmp_path / "dense")
    adapter, mix = save_adapter(dense, tmp_path / "plain", **VARIANTS["plain"]), tmp_path / "mix"
    convert(dense, mix, AdaptersOptions(adapters=(str(adapter),)))
    folder, digits = str(mix), str(texts / "digits.jsonl")
    with pytest.raises(UserError, match="is for the adapter 'x', which the model lacks; it has plain"):
        train_routers(folder, {digits: "x"}, tmp_path / "out")
    with pytest.raises(UserError, match="target is 'attention', but the model's adapters are of mlp alone"):
        train_routers(folder, {digits: "plain"}, tmp_path / "out", target="attention")
    with pytest.raises(UserError, match="has no adapters as experts"):
        train_routers(small, {digits: "plain"}, tmp_path / "out")
    with pytest.raises(UserError, match="both must be positive"):
        learn_adapter(small, [digits], tmp_path / "out", rank=0)
    with pytest.raises(UserError, match="steps is 0"):
        Pace(steps=0)
    with pytest.raises(UserError, match="has rank 4, and what begins with it 2; raise rank"):
        learn_adapter(dense, [digits], tmp_path / "out", rank=2, start=adapter)
    with pytest.raises(UserError, match="changes mlp as well"):
        learn_adapter(dense, [digits], tmp_path / "out", rank=4, blocks=["attention"], start=adapter)
    with pytest.raises(UserError, match="a domain cannot be called 'common'"):
        read_adapters_training(None, ["method=adapters", "domains={common: {data: python-docs}}"])
    with pytest.raises(UserError, match="the training failed at step 2: the loss is nan; lower lr"):
        learn_adapter(small, [digits], tmp_path / "out", pace=Pace(4, 1e30, 1, 64))
    save_tokenizer(mix)
    with pytest.raises(UserError, match="send every token to the zero expert; train them first"):
        train_routers(folder, {digits: "plain"}, tmp_path / "out", target="mlp", pace=Pace(1, 1e-2, 1, 64))
    assert not (tmp_path / "out").exists()
