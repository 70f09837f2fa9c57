"""What moves in a step, what layouts are suggested, and what faults cost."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lamella.errors import UserError
from lamella.plan.command import make_layout, run
from lamella.plan.compute import gpu
from lamella.plan.faults import FAULTS_PER_GPU_HOUR, faults
from lamella.plan.links import Group, step_traffic
from lamella.plan.memory import fullest
from lamella.plan.model import read_model
from lamella.plan.report import plan_values, suggestion_text
from lamella.plan.roofline import roofline
from lamella.plan.suggest import GPU_RESERVE_BYTES, suggest
from lamella.recipe.methods.slice import SliceOptions
from lamella.recipe.stages import prepare_recipe
from support.planning import LLAMA3_8B, recipe

SLICES = SliceOptions()
SHIPPED = Path(__file__).parents[2] / "launch" / "recipes"
WEIGHTS, TRAINED = 13_668_454_400, 5_638_193_152
T, D = 8192, 4096


@pytest.fixture
def model(llama3):
    llama3.write_text(json.dumps(json.loads(llama3.read_text()) | {"dtype": "bfloat16"}))
    return read_model(llama3, SLICES)


def layout(model, ranks=8, **settings):
    return make_layout(recipe(**{"seq_len": T, "samples_per_step": 64} | settings), model, ranks, "H100")


@pytest.mark.parametrize(("size", "stride", "per_node"), [(8, 1, 8), (16, 1, 8), (24, 1, 8), (4, 8, 8), (8, 2, 8)])
def test_a_node_receives_once_what_it_does_not_hold(size, stride, per_node):
    moved, inside = Group(size, stride).gather(1000.0, per_node), max(1, min(size, per_node // stride))
    assert moved.inside + moved.network == pytest.approx(1000 * (size - 1) / size)
    assert moved.network * inside == pytest.approx(1000 * (size - inside) / size)


def test_within_a_node_nothing_crosses_the_network(model):
    """Gathered in bfloat16 forwards and backwards, summed in float32, for each of 8 micro-batches."""
    moved = step_traffic(layout(model)).all
    assert moved.network == 0
    assert moved.inside == pytest.approx(8 * 7 / 8 * (2 * 2 * WEIGHTS + 4 * TRAINED))


def test_with_a_copy_in_each_node_only_sums_cross(model):
    one, copies = (step_traffic(layout(model, 16, parallel={"replicate": n})).all for n in (1, 2))
    assert copies.network == pytest.approx(4 * TRAINED / 8)  # once a step; 2 (2 - 1)/2 of an eighth
    assert one.network > 1.7 * copies.network


def test_frozen_weights_that_are_whole_do_not_move(model):
    moved = step_traffic(layout(model, frozen_weights="replicated")).all
    assert moved.inside == pytest.approx(8 * 7 / 8 * (2 * 2 + 4) * TRAINED)


@pytest.mark.parametrize(("again", "passes"), [("none", 2), ("full", 3)])
def test_experts_on_other_ranks_get_every_token(again, passes, model):
    """As lamella.moe.expert_parallel counts: 2 (P-1) T D b in each pass of a layer."""
    step = step_traffic(layout(model, parallel={"expert": 8}, activation_checkpointing=again))
    assert step.activations.inside == pytest.approx(8 * 32 * passes * 2 * 7 * T * D * 2)
    assert step.activations.network == 0


def test_stages_of_a_pipeline_hand_on_activations_alone(model):
    moved = step_traffic(layout(model, 16, parallel={"pipeline": 2})).all
    assert moved.network == 8 * T * D * 2


def test_a_step_of_8b_reaches_45_percent_by_roofline(model):
    """Without recomputation, as 8 GPUs of 80 GB leave room for."""
    plain, again = (roofline(layout(model, activation_checkpointing=c), "H100") for c in ("none", "full"))
    assert 0.45 < plain.mfu < 0.7
    assert again.mfu < plain.mfu
    assert again.step_s == pytest.approx(plain.step_s + again.recomputed_s)


def test_slow_links_are_waited_for(model):
    near, far = (roofline(layout(model, 64), "H100", per_node=n) for n in (8, 1))
    assert near.waited_s == 0 < far.waited_s
    assert far.mfu < near.mfu


def test_the_suggestion_is_the_fastest_that_fits(model):
    found = suggest(layout(model, activation_checkpointing="full"), "H100", 8)
    assert found[0].settings == {"activation_checkpointing": "none"}
    seconds = [suggestion.roofline.step_s for suggestion in found]
    assert seconds == sorted(seconds)
    for suggestion in found:
        words = [f"{key}={value}" for key, value in suggestion.settings.items()]
        laid = make_layout(prepare_recipe(None, [f"seq_len={T}", "samples_per_step=64", *words]), model, 8, "H100")
        assert fullest(laid).peak().total_bytes == suggestion.peak_bytes < gpu("H100")[1] - GPU_RESERVE_BYTES


def test_where_nothing_fits_it_says_so(model):
    assert suggest(layout(model, 1, samples_per_micro_batch=64), "RTX4090", 8) == []
    assert "no layout of these ranks fits" in suggestion_text([])


def test_the_command_suggests(llama3, tmp_path, capsys):
    out = tmp_path / "plan.json"
    recipe_file = str(SHIPPED / "llama3-8b.yaml")
    words = [recipe_file, "activation_checkpointing=full"]
    run(words, dense=str(llama3), conversion=["slices=8"], ranks=8, suggests=True, json_path=out)
    values = json.loads(out.read_text())
    assert values["suggestions"][0]["settings"] == {"activation_checkpointing": "none"}
    assert values["suggestions"][0]["roofline_mfu"] > values["step"]["roofline_mfu"]
    printed = capsys.readouterr().out
    assert "suggested         activation_checkpointing=none\n" in printed
    assert "over the network; nodes of 8 ranks" in printed
    with pytest.raises(UserError, match="name one with --gpu"):
        run([recipe_file], dense=str(llama3), gpu_name="cpu", suggests=True)


def test_ranks_that_do_not_divide_the_experts_rows_are_told_a_layout(model, tmp_path):
    """Rows of all experts together are cut, so it takes narrow experts and many ranks."""

    def uneven(model, ranks, **settings):
        found = plan_values(layout(model, ranks, samples_per_step=ranks, **settings), "H100")["warnings"]
        return [warning for warning in found if warning.startswith("uneven experts")]

    assert [uneven(model, ranks) for ranks in (3, 7, 24)] == [[], [], []]
    narrow = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 4}
    (tmp_path / "config.json").write_text(json.dumps(LLAMA3_8B | narrow))
    small = read_model(tmp_path, SLICES)
    (warning,) = uneven(small, 24)
    assert warning.endswith("Set parallel.replicate=3")
    assert uneven(small, 24, parallel={"replicate": 3}) == []
    (warning,) = uneven(small, 17)
    assert warning.endswith("Take a number of ranks that divides the experts")


def test_faults_come_as_often_as_llama_3_had_them(model):
    many = layout(model, 16384, samples_per_step=16384)
    assert faults(many, 10.0).hours_between * 419 == pytest.approx(54 * 24)
    assert faults(layout(model), 10.0).hours_between == pytest.approx(1 / (8 * FAULTS_PER_GPU_HOUR))


@pytest.mark.parametrize("asynchronous", [False, True])
def test_saving_as_often_as_is_best_costs_least(asynchronous, model):
    def lost(every):
        many = layout(model, 512, samples_per_step=512, save_every_steps=every, checkpoint_async=asynchronous)
        return 1 - faults(many, 5.0).effective

    best = faults(layout(model, 512, samples_per_step=512, checkpoint_async=asynchronous), 5.0).best_save_every_steps
    assert lost(best) <= min(lost(2 * best), lost(max(best // 2, 2)))
    assert 0 < lost(best) < 0.02
