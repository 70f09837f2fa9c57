"""Recipes of several stages: read strictly, and run on 2 ranks, whole and in parts."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from pydoc_data import topics

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from lamella.data.sources import open_source
from lamella.errors import UserError
from lamella.export.trained import materialise
from lamella.recipe.files import arguments
from lamella.recipe.stages import make_stages, prepare_recipe, prepare_stages
from lamella.run.folder import RunDir
from lamella.run.launch import check
from lamella.train.data import MixedSamples, check_objective
from support.models import trainable_moe

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "launch" / "recipes" / "demo-stages.yaml"
TEMPLATE = (
    "{% for m in messages %}{{ m['role'][0] + ':' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)
TWO = {
    "out": "o",
    "lr": 0.5,
    "steps": 9,
    "twin_share": {"target": 0.4, "ramp_steps": 3},
    "stages": [
        {"name": "a", "objective": "distil", "twin_share": {"target": 0.2}},
        {"name": "b", "steps": 4, "lr": 0.25},
    ],
}


def test_stages_lie_over_the_common_settings_and_follow_each_other():
    a, b = make_stages(TWO)
    assert (a.out, a.model, a.steps, a.lr, a.objective) == ("o/a", "artifacts/moe", 9, 0.5, "distil")
    assert a.twin_share.ramp_steps == 0  # a section is replaced whole
    assert (b.out, b.model, b.steps, b.lr, b.objective) == ("o/b", "o/a/hf/step-9", 4, 0.25, "pretrain")
    assert b.twin_share.ramp_steps == 3


@pytest.mark.parametrize(
    ("word", "steps", "rates"),
    [
        ("lr=0.1", [9, 4], [0.1, 0.1]),
        ("stages.b.lr=0.1", [9, 4], [0.5, 0.1]),
        ("steps=7", [7, 7], [0.5, 0.25]),
        ("stages.a.steps=2", [2, 4], [0.5, 0.25]),
        ("stage=b", [4], [0.25]),
    ],
)
def test_words_reach_all_stages_or_one(word, steps, rates):
    stages = make_stages(TWO, [word])
    assert ([s.steps for s in stages], [s.lr for s in stages]) == (steps, rates)
    if word == "stages.a.steps=2":
        assert stages[1].model == "o/a/hf/step-2"


def test_every_stage_has_its_own_place_for_checkpoints_elsewhere():
    stages = make_stages(TWO, ["checkpoint_folder=s3://bucket/run", "stages.b.checkpoint_folder=/big"])
    assert [stage.checkpoint_folder for stage in stages] == ["s3://bucket/run/a", "/big"]


def test_a_recipe_without_stages_is_its_only_one():
    (only,) = make_stages({"lr": 0.5}, ["out=x"])
    assert (only.lr, only.out) == (0.5, "x")


@pytest.mark.parametrize(
    ("values", "words", "message"),
    [
        ({"stages": []}, [], "a list of at least one"),
        ({"stages": {"a": {}}}, [], "a list of at least one"),
        ({"stages": [3]}, [], "a list of at least one"),
        ({"stages": [{"steps": 3}]}, [], "stage 1: name is None"),
        ({"stages": [{"name": "../up"}]}, [], "name is '../up'"),
        ({"stages": [{"name": "a"}, {"name": "a"}]}, [], "stage 2: there is a stage 'a' already"),
        ({"stages": [{"name": "a", "out": "x"}]}, [], "'a': out is set for the whole recipe only"),
        ({"stages": [{"name": "a", "stages": []}]}, [], "a stage has no stages"),
        ({"stages": [{"name": "a", "stepz": 3}]}, [], r"(?s)stage 'a' has errors.*'stepz' \(did you mean 'steps'"),
        ({"stepz": 3, "stages": [{"name": "a"}]}, [], "unknown key 'stepz'"),
        ({"stages": [{"name": "a", "objective": "distill"}]}, [], "objective: "),
        ({"stages": [{"name": "a", "distil": {"weight": 0}}]}, [], "distil.weight: "),
        ({"stages": [{"name": "a", "data": []}, {"name": "b", "lr": -1}]}, [], r"(?s)'a' has.*no text.*'b' has.*lr"),
        ({"on_exhausted": "stop", "stages": [{"name": "a"}, {"name": "b"}]}, [], "'a': on_exhausted: stop"),
        ({"stages": [{"name": "aim"}]}, ["stages.ami.lr=1"], r"one of aim \(did you mean 'aim'"),
        ({"stages": [{"name": "a"}]}, ["stages.a.out=x"], "whole recipe only"),
        ({"stages": [{"name": "a"}]}, ["stage=b"], "no stage 'b'"),
        ({}, ["stage=b"], "has no stages"),
        ({}, ["stages.b.lr=1"], "has no stages"),
    ],
)
def test_impossible_stages_are_refused(values, words, message):
    with pytest.raises(UserError, match=message):
        make_stages(values, words)


def test_one_run_needs_one_stage():
    with pytest.raises(UserError, match=r"the stages heal, read, chat.*stage=NAME"):
        prepare_recipe(str(RECIPE), [])
    assert prepare_recipe(str(RECIPE), ["stage=read"]).model == "artifacts/stages/heal/hf/step-8"


def test_later_stages_are_checked_before_the_first_starts(tmp_path):
    words = [str(RECIPE), f"out={tmp_path}", "stages.read.data=[nowhere.txt]", "stages.read.routing_loss=null"]
    with pytest.raises(UserError, match=r"nowhere\.txt"):
        check([*words, "stage=read"], 2, open_source)
    with pytest.raises(UserError, match="there is no teacher"):
        check([str(RECIPE), f"out={tmp_path}", "distil.teacher=nowhere", "stage=heal"], 2)


def test_sft_needs_conversations():
    class Text:
        def __len__(self):
            return 5

    check_objective("pretrain", MixedSamples([Text()]))
    with pytest.raises(UserError, match="book holds none; name a file whose records have messages"):
        check_objective("sft", MixedSamples([Text()], names=["book"]))


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stages")
    trainable_moe(folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder / "model")
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    (folder / "chat.jsonl").write_text(f"{json.dumps({'messages': turns})}\n" * 40)
    names = sorted(topics.topics)
    (folder / "new.md").write_text("\n".join(topics.topics[name] for name in names[:30]))
    (folder / "old.md").write_text("\n".join(topics.topics[name] for name in names[30:50]))
    new, old = folder / "new.md", folder / "old.md"
    words = [str(RECIPE), f"model={folder / 'model'}", f"data=[{new}, {old}]", "seq_len=32", "tensorboard=false"]
    words += [f"stages.chat.data=[{folder / 'chat.jsonl'}]", f"stages.chat.heldout_data=[{new}]"]
    words += [f"stages.read.routing_loss.to_slices=[{old}]", "lr=1e-2", "threads_per_rank=1", "keep_checkpoints=0"]
    environment = os.environ | {"LAMELLA_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    return folder, words, environment


def torchrun(setting, *more: str) -> str:
    _, words, environment = setting
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, str(ROOT / "train.py"), *words, *more],
        env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    return done.stdout


def lamella_train(setting, *more: str) -> str:
    _, words, environment = setting
    command = [sys.executable, "-m", "lamella.cli", "train", "--nproc", "2", *words, *more]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    return done.stdout


@pytest.fixture(scope="module")
def whole(setting):
    """All stages in one call of torchrun."""
    return setting[0] / "whole", torchrun(setting, f"out={setting[0] / 'whole'}")


def stages(folder: Path) -> list[RunDir]:
    return [RunDir(Path(recipe.out)) for recipe in prepare_stages(*arguments([str(RECIPE), f"out={folder}"]))]


def heldout(run: RunDir) -> list[float]:
    return [line["heldout_loss"] for line in run.metrics() if line["heldout_loss"] is not None]


@pytest.mark.slow
def test_one_call_runs_all_stages_each_from_the_last_ones_result(setting, whole):
    folder, said = whole
    runs = stages(folder)
    assert [run.status()["state"] for run in runs] == ["finished"] * len(runs)
    for run in runs:
        steps = run.recipe().steps
        assert f"finished: {run.path} at step {steps} of {steps}" in said
    for earlier, later in pairwise(runs):
        assert later.recipe().model == str(earlier.hf(8))
    assert heldout(runs[1])[0] == pytest.approx(heldout(runs[0])[-1], abs=1e-5)  # fp32, read again
    answers = [line["loss"] for line in runs[2].metrics() if line["step"] > 0]
    assert answers[-1] < answers[0]
    before = load_file(setting[0] / "model" / "model.safetensors")
    after = load_file(materialise(runs[-1].path) / "model.safetensors")
    assert all(torch.equal(before[key], after[key]) for key in before if "frozen" in key)


@pytest.mark.slow
def test_an_interrupted_call_goes_on_where_it_stood(setting, whole):
    folder = setting[0] / "parts"
    said = torchrun(setting, f"out={folder}", "stages.read.stop_at_step=3")
    heal, read, *later = stages(folder)
    assert (heal.status()["state"], read.status()["state"]) == ("finished", "stopped")
    assert not any(run.exists() for run in later)
    assert f"stopped: {read.path} at step 3 of 8" in said
    shutil.rmtree(heal.hf(8))  # to save room; it is made again
    said = lamella_train(setting, f"out={folder}")
    assert f"{heal.path} is finished" in said
    assert f"finished: {read.path} at step 8 of 8" in said
    for run, other in zip(stages(folder), stages(whole[0]), strict=True):
        assert [line.get("loss") for line in run.metrics()] == [line.get("loss") for line in other.metrics()]


@pytest.mark.slow
def test_a_changed_stage_is_refused_and_leaves_the_others_alone(setting, whole):
    folder, _ = whole
    heal, read = stages(folder)[:2]
    before = {run.path: sorted(p.name for p in run.path.rglob("*")) for run in (heal, read)}
    words = [*setting[1], f"out={folder}"]
    with pytest.raises(UserError, match=r"(?s)read holds another run.*lr: 0.01 -> 0.5"):
        check([*words, "stages.read.lr=0.5", "stage=read"], 2)
    check([*words, "stages.read.lr=0.5", "stage=heal"], 2)
    assert before == {run.path: sorted(p.name for p in run.path.rglob("*")) for run in (heal, read)}
