"""Learning from the dense teacher, without a process group."""

from __future__ import annotations

import pytest
import torch
from torchtitan.config import TrainingConfig

from lamella.errors import UserError
from lamella.moe.learning import summed_kl
from lamella.recipe.sections import Distil
from lamella.recipe.training import Recipe, make_recipe
from lamella.titan.flops import forward_flops_per_token
from lamella.train import distil
from lamella.train.assemble import model_config, teacher_config
from lamella.train.distil import DistilLoss, Lesson
from support.models import PARTITIONED, tiny_moe, trainable_moe
from support.titan import load_titan


def test_the_loss_mixes_in_the_distance_to_the_teacher():
    loss = DistilLoss.Config(distil=Distil(weight=0.25)).build()
    pred, labels = torch.randn(2, 5, 7), torch.randint(7, (2, 5))
    tokens = torch.tensor(10)
    plain = loss(pred, labels, tokens)[0]
    teacher = torch.randn(2, 5, 7)
    kl = summed_kl(pred.flatten(0, 1), teacher.flatten(0, 1)) / 10
    assert torch.allclose(loss(pred, Lesson(labels, teacher), tokens)[0], 0.25 * kl + 0.75 * plain)
    assert torch.equal(loss(pred, labels, tokens)[0], plain)  # as the held-out loss is measured
    assert torch.allclose(loss(pred, Lesson(labels, pred), tokens)[0], 0.75 * plain, atol=1e-6)


@pytest.mark.parametrize("routing", ["twin", "flat"])
def test_the_model_inside_is_the_frozen_slices_alone(routing, tmp_path):
    tiny_moe("llama", tmp_path, routing=routing)
    model = load_titan(tmp_path).train()
    tokens = torch.randint(128, (2, 16), generator=torch.Generator().manual_seed(0))
    routed = model(tokens)
    dense = model(tokens, mode="dense")
    counted = [layer.statistics.clone() for layer in model.moe_layers]
    with torch.no_grad():
        for layer in model.moe_layers:
            layer.experts.trainable_down_proj.add_(1)
            layer.router.weight.add_(1)
    assert torch.equal(model(tokens, mode="dense"), dense)
    assert not torch.allclose(routed, dense, atol=1e-3)
    for layer, counts in zip(model.moe_layers, counted, strict=True):
        assert torch.equal(layer.statistics, counts)  # a teacher's forward counts nothing
    assert not torch.allclose(model(tokens), routed, atol=1e-3)


def test_a_teachers_flops_are_those_of_a_forward(tmp_path):
    tiny_moe("qwen3", tmp_path)
    config = model_config(make_recipe({"model": str(tmp_path), "seq_len": 16}))
    model = load_titan(tmp_path)
    config.trains = "nothing"
    frozen = config.get_nparams_and_flops(model, 16)[1]  # 4 per weight, 12 per attention product
    attention = 3 * 4 * 16 * 16
    assert (
        forward_flops_per_token(model, config.layers, 16, tied=config.enable_weight_tying)
        == (frozen - 12 * attention) / 2 + 4 * attention
    )


def test_what_cannot_teach_is_refused(tmp_path):
    tiny_moe("llama", tmp_path / "twin")
    tiny_moe("llama", tmp_path / "partitioned", moe_changes=PARTITIONED)
    trainable_moe(tmp_path / "other")

    def check(model, **settings):
        recipe = make_recipe({"model": str(tmp_path / model), "seq_len": 16, "objective": "distil"} | settings)
        return teacher_config(recipe, model_config(recipe))

    assert check("twin") is None
    with pytest.raises(UserError, match=r"trains: all changes it; set distil\.teacher"):
        check("twin", trains="all")
    with pytest.raises(UserError, match="not all of its neurons in frozen slices"):
        check("partitioned")
    beside = check("partitioned", distil={"teacher": str(tmp_path / "twin")})
    assert beside.trains == "nothing"
    with pytest.raises(UserError, match="has 257 token ids, the model 128"):
        check("twin", distil={"teacher": str(tmp_path / "other")})
    recipe = Recipe(model=str(tmp_path / "twin"), seq_len=16, distil=Distil(teacher="nowhere"))
    assert teacher_config(recipe, model_config(recipe)) is None  # another objective has no teacher


@pytest.mark.slow
def test_a_teacher_makes_its_own_masks_and_no_longer_caches_than_samples(tmp_path):
    """The student's attention is flex, without a window; the teacher's is sdpa, within 4 tokens."""
    tiny_moe("llama", tmp_path / "student")
    tiny_moe("mistral", tmp_path / "teacher", sliding_window=4)
    settings = {"objective": "distil", "distil": {"teacher": str(tmp_path / "teacher")}, "seq_len": 16}
    recipe = make_recipe({"model": str(tmp_path / "student")} | settings)
    config = teacher_config(recipe, model_config(recipe))
    assert config is not None
    teacher = config.build()
    for layer in teacher.layers.values():
        assert layer.attention.rope.cache.shape[0] == 16 < config.dim * 16
    teacher = load_titan(tmp_path / "teacher")
    student = load_titan(tmp_path / "student", attention="flex")
    tokens = torch.randint(128, (2, 16), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(16).expand(2, 16)
    told = {"positions": positions, "attention_masks": student.get_attention_masks(positions)}
    assert torch.equal(distil.teacher_logits(teacher, tokens, told), teacher(tokens, positions))
    unlimited = load_titan(tmp_path / "teacher")
    unlimited.config.sliding_window = None
    assert not torch.allclose(unlimited(tokens, positions), teacher(tokens, positions), atol=1e-3)


def test_an_offloaded_teachers_weights_wait_in_main_memory(monkeypatch):
    monkeypatch.setattr(distil, "device_type", "cuda")
    for offload, where in ((True, "cpu"), (False, "cuda")):
        weights, buffers = distil.devices_of(TrainingConfig(enable_cpu_offload=offload))
        assert (weights.type, buffers.type) == (where, "cuda")
