"""Recipes, the run directory and the launcher: strict, and without torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from lamella.data.sources import open_source
from lamella.errors import UserError
from lamella.recipe.files import arguments
from lamella.recipe.stages import make_stages, prepare_recipe, prepare_stages
from lamella.recipe.training import HARMLESS, Recipe, differences, make_recipe
from lamella.run.folder import RunDir, model_fingerprint
from lamella.run.launch import check, check_run_dir

RECIPES = sorted(Path(__file__).parents[2].glob("launch/recipes/*.yaml"))


def test_recipe_and_launcher_import_no_torch():
    code = "import sys, lamella.recipe.stages, lamella.run.folder, lamella.run.launch; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_all_errors_come_at_once():
    values = {"stepz": 3, "lr": "fast", "twin_share": {"targt": 0.5}, "samples_per_step": 0}
    with pytest.raises(UserError) as raised:
        make_recipe(values)
    text = str(raised.value)
    assert "unknown key 'stepz' (did you mean 'steps'?)" in text
    assert "unknown key 'twin_share.targt' (did you mean 'target'?)" in text
    assert "lr: " in text
    assert "samples_per_step: " in text


@pytest.mark.faults
@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"samples_per_step": 3, "samples_per_micro_batch": 2}, "multiple of samples_per_micro_batch"),
        ({"steps": 5, "warmup_steps": 6}, "warmup_steps is larger than steps"),
        ({"keep_checkpoints": 1}, "at least 2"),
        ({"data": []}, "names no text"),
        ({"data": [3]}, r"data.0: write a source's name, or \{source: NAME, weight: NUMBER, stream: true\}, not 3"),
        ({"data": ["a", {"source": "b", "weight": 1}]}, "data has weights on some sources"),
        ({"data": [{"source": "a", "weight": -1}]}, r"data.0.weight: .* greater than or equal to 0, not -1"),
        ({"data": [{"source": "a", "weight": float("nan")}]}, "data.0.weight: .* finite"),
        ({"heldout_data": [{"source": s, "weight": 0} for s in "ab"]}, "the weights of heldout_data sum to 0"),
        ({"data": [{"source": "a", "wieght": 1}]}, r"unknown key 'data.0.wieght' \(did you mean 'weight'\?\)"),
        ({"data": [{"source": "a", "streem": True}]}, r"unknown key 'data.0.streem' \(did you mean 'stream'\?\)"),
        ({"str": 3}, "unknown key 'str'"),  # what pydantic calls a branch of a union, too
        ({"trains": "everything"}, "trains: "),
        ({"twin_share": 0.5}, "twin_share: "),
        ({"parallel": {"experts": 2}}, r"unknown key 'parallel.experts' \(did you mean 'expert'\?\)"),
        ({"parallel": {"context": 0}}, "parallel.context: "),
        ({"parallel": {"tensor": 3}}, "parallel.tensor must divide the tokens of a rank"),
        ({"parallel": {"tensor": 2, "pipeline": 2}}, "do not go together"),
        ({"parallel": {"context": 3}}, "2 . parallel.context must divide seq_len"),
    ],
)
def test_impossible_recipes_are_refused(values, message):
    with pytest.raises(UserError, match=message):
        make_recipe(values)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a: &x [1]\nb: *x\n", "^[^:]* uses YAML aliases"),
        (b"x: !!python/object:os.system {}\n", "not valid YAML"),
        (b"- 1\n- 2\n", "must be a mapping"),
        (b"\xff\xfe\x00", "not UTF-8"),
        (b"#" * 1_000_001, "larger than"),
        (b"{", "not valid YAML"),
    ],
)
def test_files_that_are_no_recipes_are_refused(content, message, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        prepare_recipe(str(path), [])


def test_words_lie_over_the_file(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("steps: 5\nlr: 1e-4\ntorchtitan: {training: {gc_freq: 7}}\n")
    recipe = prepare_recipe(
        str(path), ["steps=9", "twin_share.target=0.7", "torchtitan.training.gc_debug=true", "data=[a, b]"]
    )
    assert (recipe.steps, recipe.lr, [p.source for p in recipe.data]) == (9, 1e-4, ["a", "b"])
    assert recipe.twin_share.target == 0.7
    assert recipe.torchtitan == {"training": {"gc_freq": 7, "gc_debug": True}}


def test_a_mixture_is_written_as_it_was_said(tmp_path):
    recipe = make_recipe({"data": [{"source": "a", "weight": 3}, {"source": "b", "weight": 0.25}]})
    assert [(p.source, p.weight) for p in recipe.data] == [("a", 3), ("b", 0.25)]
    assert make_recipe(yaml.safe_load(recipe.to_yaml())) == recipe
    assert yaml.safe_load(make_recipe({"data": ["a", "b"]}).to_yaml())["data"] == ["a", "b"]


def test_arguments():
    assert arguments(["r.yaml", "a=1"]) == ("r.yaml", ["a=1"])
    with pytest.raises(UserError, match="one recipe"):
        arguments(["a.yaml", "b.yaml"])
    with pytest.raises(UserError, match="there is no recipe"):
        prepare_recipe("nowhere.yaml", [])


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.name)
def test_shipped_recipes_are_valid_and_yaml_survives(path):
    for recipe in prepare_stages(str(path), []):
        assert make_recipe(yaml.safe_load(recipe.to_yaml())) == recipe


def test_the_demo_recipe_is_for_three_ranks_and_the_same_in_both_places():
    demo = prepare_recipe(None, [])
    demo.check_world_size(3)
    assert demo == prepare_recipe(str(next(p for p in RECIPES if p.name == "demo.yaml")), [])


@pytest.mark.faults
def test_world_sizes_that_do_not_divide_are_refused():
    Recipe(samples_per_step=12, samples_per_micro_batch=2).check_world_size(3)
    with pytest.raises(UserError, match="samples_per_step=10 or 20"):
        Recipe(samples_per_step=12, samples_per_micro_batch=2).check_world_size(5)


def fake_model(folder: Path) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "tokenizer.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"1234")
    return folder


def test_run_directory_keeps_what_it_is_given(tmp_path):
    model, run = fake_model(tmp_path / "model"), RunDir(tmp_path / "run")
    assert not run.exists()
    assert run.status()["state"] == "none"
    run.create(Recipe(steps=9), model)
    assert run.recipe() == Recipe(steps=9)
    assert sorted(p.name for p in run.model.iterdir()) == ["config.json", "fingerprint.json", "tokenizer.json"]
    run.write_status("running", 3, 9)
    assert run.status()["step"] == 3
    run.metrics_file.write_text(
        "".join(json.dumps({"step": s, "loss": x}) + "\n" for s, x in [(1, 1.0), (2, 2.0), (2, 3.0)])
    )
    assert [line["loss"] for line in run.metrics()] == [1.0, 3.0]  # a resumed run logged step 2 again
    for step in (2, 10):
        run.checkpoint(step).mkdir()
    (run.checkpoint(10) / "manifest.json").touch()
    assert run.steps() == [10]  # step 2 was never finished


@pytest.mark.faults
def test_another_recipe_or_model_is_refused(tmp_path):
    model, run = fake_model(tmp_path / "model"), RunDir(tmp_path / "run")
    run.create(Recipe(), model)
    run.check_same_run(Recipe(log_every_steps=7, stop_at_step=3), model)
    with pytest.raises(UserError, match=r"(?s)seed: 0 -> 4.*lr: 0.0003 -> 0.1"):
        run.check_same_run(Recipe(lr=0.1, seed=4), model)
    fingerprint = model_fingerprint(model)
    (model / "model.safetensors").write_bytes(b"12345")
    assert model_fingerprint(model) != fingerprint
    with pytest.raises(UserError, match="the weights of"):
        run.check_same_run(Recipe(), model)


def test_harmless_settings_exist():
    assert set(Recipe.model_fields) >= HARMLESS
    assert differences(Recipe(), Recipe(out="elsewhere")) == []


def bad_runs(tmp_path: Path) -> dict[str, list[str]]:
    model = fake_model(tmp_path / "model")
    RunDir(tmp_path / "run").create(Recipe(model=str(model), data=["python-docs"]), model)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "precious.txt").touch()
    base = [f"model={model}", "data=[python-docs]"]
    return {
        "there is no model": [f"model={tmp_path / 'nothing'}"],
        "holds another run": [*base, f"out={tmp_path / 'run'}", "lr=9"],
        "holds a run already": [*base, f"out={tmp_path / 'run'}", "resume=never"],
        "is no run directory": [*base, f"out={tmp_path / 'other'}"],
        "cannot be shared": [*base, "samples_per_step=4"],
        "pass stdlib-code": [*base[:1], f"data=[{tmp_path / 'nothing.txt'}]"],
    }


def test_the_launcher_refuses_before_anything_starts(tmp_path):
    for message, words in bad_runs(tmp_path).items():
        with pytest.raises(UserError, match=message):
            check([str(next(p for p in RECIPES if p.name == "demo.yaml")), *words], 3, open_source)


def test_what_an_earlier_attempt_or_another_rank_left_is_no_obstacle(tmp_path, monkeypatch):
    model = fake_model(tmp_path / "model")
    recipe = Recipe(model=str(model), out=str(tmp_path / "run"), resume="never")
    (tmp_path / "run").mkdir()
    for name in (".lamella-abcd", ".config.yaml.7.tmp"):
        (tmp_path / "run" / name).touch()
    check_run_dir(recipe, model)
    RunDir(tmp_path / "run").create(recipe, model)
    with pytest.raises(UserError, match="holds a run already"):
        check_run_dir(recipe, model)
    monkeypatch.setenv("LAMELLA_ATTEMPT", "1")
    check_run_dir(recipe, model)


def test_a_run_that_another_rank_makes_while_one_looks_is_no_obstacle(tmp_path, monkeypatch):
    model = fake_model(tmp_path / "model")
    recipe, run = Recipe(model=str(model), out=str(tmp_path / "run")), RunDir(tmp_path / "run")
    (tmp_path / "run/log").mkdir(parents=True)

    def made_meanwhile(path):
        if path == run.path and not run.exists():
            run.create(recipe, model)
        return iter(sorted(path.glob("*")))

    monkeypatch.setattr(Path, "iterdir", made_meanwhile)
    assert check_run_dir(recipe, model).exists()


def test_a_child_of_process_1_is_no_orphan():
    code = "import os; os.getppid = lambda: 1\nfrom lamella.run.processes import die_with_parent\ndie_with_parent()"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    gone = f"{code.removesuffix('()')}(2)"  # not the parent that was expected
    assert subprocess.run([sys.executable, "-c", gone], check=False).returncode == -9


def test_values_that_yaml_cannot_make_are_refused():
    with pytest.raises(UserError, match="the value of out is not valid YAML"):
        make_stages({}, ["out=2024-13-45"])
    assert Path(make_stages({"stages": [{"name": "a"}], "out": None})[0].out).name == "a"


def test_bad_input_exits_with_2(tmp_path):
    command = [sys.executable, "-m", "lamella.cli", "train", "stepz=4", "--nproc", "3"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "error: the recipe has errors:\n  unknown key 'stepz' (did you mean 'steps'?)\n"


@pytest.mark.faults
@pytest.mark.parametrize(
    ("parallel", "num_ranks", "message"),
    [
        ({"replicate": 2}, 3, "3 ranks cannot be laid out as replicate 2; start a multiple of 2 ranks"),
        ({"replicate": 2, "context": 4}, 12, "laid out as replicate 2 x context 4; start a multiple of 8"),
        ({"expert": 4}, 6, "parallel.expert=4 does not divide the 6 ranks that hold"),
        ({"expert": 4, "replicate": 2}, 4, "does not divide the 2 ranks that hold"),
        ({"context": 2}, 10, "cannot be shared among 5 groups of ranks"),
        ({"pipeline": 4}, 16, "3 micro-batches for a pipeline of 4 stages; set samples_per_step=16 or more"),
    ],
)
def test_layouts_that_the_ranks_cannot_take_are_refused(parallel, num_ranks, message):
    recipe = make_recipe({"samples_per_step": 12, "parallel": parallel})
    with pytest.raises(UserError, match=message):
        recipe.check_world_size(num_ranks)


def test_the_layout_may_change_when_a_run_goes_on():
    assert differences(Recipe(), make_recipe({"parallel": {"expert": 2}})) == []
