"""The parts of training that need no process group."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from lamella.architecture.names import is_trained
from lamella.conversion import convert
from lamella.display import TrainingProgress, duration
from lamella.errors import BadData, UserError
from lamella.plan.command import make_layout
from lamella.plan.model import read_model
from lamella.recipe.methods.attention import AttentionOptions
from lamella.recipe.training import Recipe, TwinShare, make_recipe
from lamella.run.folder import RunDir
from lamella.train.assemble import model_config, trainer_config
from lamella.train.balance import Balance, start_routing
from lamella.train.data import MixedSamples, SampleLoader, spread, steps_of_data
from lamella.train.heldout import HeldOut
from lamella.train.metrics import known_peak_flops, scalars
from lamella.train.overlay import OWNED, REFUSED, WORKS, is_known, overlay
from lamella.train.stage import prepare
from support.models import save_llama, tiny_moe, trainable_moe
from support.titan import load_titan


class Numbers:
    """Samples that are their own index."""

    def __init__(self, first: int, count: int):
        self.first, self.count = first, count

    def __len__(self):
        return self.count

    def sample(self, index):
        from lamella.data.packing import Sample

        value = torch.tensor([self.first + index % self.count])
        return Sample(value, value, torch.zeros_like(value))


def indices(samples) -> list[int]:
    return [int(s.input_ids_L) for s in samples]


def mixed(seed=None, weights=None) -> MixedSamples:
    return MixedSamples([Numbers(0, 7), Numbers(100, 5)], seed, weights, ["low", "high"])


def test_mixture_holds_every_sample_once_an_epoch():
    every = [*range(7), *range(100, 105)]
    in_order = indices(mixed().sample(i) for i in range(12))
    assert sorted(in_order) == every
    assert [x for x in in_order if x < 100] == every[:7]
    shuffled = mixed(seed=3)
    first, second = ([int(shuffled.sample(i).input_ids_L) for i in r] for r in (range(12), range(12, 24)))
    assert sorted(first) == sorted(second) == every
    assert first != second
    assert [int(mixed(seed=3).sample(i).input_ids_L) for i in reversed(range(12))][::-1] == first
    assert [int(mixed(seed=4).sample(i).input_ids_L) for i in range(12)] != first


def test_weights_hold_in_every_step_and_epochs_are_counted():
    replay = mixed(seed=3, weights=[0.75, 0.25])
    taken = indices(replay.sample(i) for i in range(28))
    for first in range(28 - 4):
        assert sum(x >= 100 for x in taken[first : first + 4]) == 1
    low = [x for x in taken if x < 100]
    assert [sorted(low[i : i + 7]) for i in (0, 7, 14)] == [list(range(7))] * 3
    assert replay.epochs(28) == {"low": 3, "high": 7 / 5}
    assert indices(mixed(seed=3, weights=[3, 1]).sample(i) for i in range(28)) == taken
    said = "low 75.0% of the samples, 3.00 epochs; high 25.0% of the samples, 1.40 epochs"
    assert replay.describe(28) == said


def test_a_source_without_weight_gives_nothing():
    assert all(x >= 100 for x in indices(mixed(seed=1, weights=[0, 2]).sample(i) for i in range(30)))


@pytest.mark.faults
def test_exhaustion_follows_the_policy():
    replay = mixed(seed=3, weights=[0.75, 0.25])  # the 10th sample, or the one before or behind it, is low's 8th
    assert steps_of_data(replay, 100, 4, "repeat") == 100
    assert steps_of_data(replay, 2, 4, "error") == 2
    assert steps_of_data(replay, 100, 4, "stop") == 2
    taken = indices(replay.sample(i) for i in range(replay.num_before_exhaustion(100)))
    assert len(set(taken)) == len(taken) >= 8
    assert replay.num_before_exhaustion(3) == 3
    with pytest.raises(UserError, match=r"epochs: low 42.86, high 20.00.*enough are there for 2 steps"):
        steps_of_data(replay, 100, 4, "error")
    with pytest.raises(UserError, match="enough are there for 0 steps"):
        steps_of_data(replay, 100, 12, "stop")


def test_spread_takes_part_of_each_source():
    assert indices(chosen(spread(mixed(), 4))) == [0, 3, 100, 102]
    assert indices(chosen(spread(mixed(weights=[0.25, 0.75]), 4))) == [0, 100, 101, 103]
    assert len(chosen(spread(mixed(), 100))) == 12


@pytest.mark.faults
def test_bad_data_are_skipped_on_the_held_out_side_too(tmp_path):
    class Damaged(Numbers):
        def sample(self, index):
            if index == 0:
                raise BadData("block 0")
            return super().sample(index)

    assert indices(chosen(spread(MixedSamples([Damaged(0, 9)], on_bad_data="skip"), 3))) == [1, 3, 6]
    with pytest.raises(BadData):
        spread(MixedSamples([Damaged(0, 9)]), 3)
    trainable_moe(tmp_path / "model")
    lines = [json.dumps({"text": f"line {i} of some text"}) for i in range(300)]
    (tmp_path / "a.jsonl").write_text("\n".join([*lines, "not JSON"]))
    settings = {"model": str(tmp_path / "model"), "out": str(tmp_path / "run"), "data": [str(tmp_path / "a.jsonl")]}
    settings |= {"seq_len": 16, "steps": 1, "samples_per_step": 1, "heldout_samples": 2, "warmup_steps": 0}
    assert prepare(make_recipe(settings | {"on_bad_data": "skip"}), 0).heldout is not None
    with pytest.raises(UserError, match=r"line 301 .*not JSON"):
        prepare(make_recipe(settings), 0)


def global_batches(num_ranks, per_micro_batch, micro_batches, first=0):
    loaders = []
    for rank in range(num_ranks):
        config = SampleLoader.Config(samples=mixed(seed=1))
        loader = config.build(dp_world_size=num_ranks, dp_rank=rank, local_batch_size=per_micro_batch)
        loader.load_state_dict({"consumed_samples": first})
        loaders.append((loader, iter(loader)))
    batches = [next(it)[1].flatten().tolist() for _ in range(micro_batches) for _, it in loaders]
    return sorted(x for batch in batches for x in batch), loaders[0][0].state_dict()


@pytest.mark.faults
def test_loader_gives_the_same_global_batch_on_any_number_of_ranks():
    one, state = global_batches(1, 6, 1)
    assert state == {"consumed_samples": 6}
    assert one == global_batches(3, 2, 1)[0] == global_batches(3, 1, 2)[0] == global_batches(2, 1, 3)[0]
    assert global_batches(3, 2, 1, first=6)[0] == global_batches(1, 6, 1, first=6)[0] != one


def chosen(of_sources):
    return [sample for samples in of_sources.values() for sample in samples]


def test_heldout_shares_are_padded_with_blanks():
    parts = [HeldOut(spread(mixed(), 7), rank, 3, 2, None) for rank in range(3)]
    by_source = {
        name: [x for p in parts for _, y in p.batches[name] for x in y.flatten().tolist()] for name in ("low", "high")
    }
    assert {len(batches) for p in parts for batches in p.batches.values()} == {1}  # as many forwards on every rank
    assert {name: labels.count(-100) for name, labels in by_source.items()} == {
        name: 3 * 2 - len(samples) for name, samples in spread(mixed(), 7).items()
    }
    for name, samples in spread(mixed(), 7).items():
        assert sorted(x for x in by_source[name] if x != -100) == sorted(indices(samples))


def test_what_trains():
    frozen, twin = "layers.0.moe.experts.frozen_down_proj", "layers.0.moe.experts.trainable_down_proj"
    router, norm = "layers.0.moe.router.weight", "norm.weight"
    trained = {
        t: [n for n in (frozen, twin, router, norm) if is_trained(n, t)] for t in ("experts", "experts+router", "all")
    }
    assert trained == {"experts": [twin], "experts+router": [twin, router], "all": [twin, router, norm]}


def test_router_rows_are_drawn_once_and_the_same(tmp_path):
    tiny_moe("llama", tmp_path, random_router=False)
    a, b = load_titan(tmp_path), load_titan(tmp_path)
    assert start_routing(a, Recipe())
    assert start_routing(b, Recipe())
    for one, other in zip(a.moe_layers, b.moe_layers, strict=True):
        assert torch.equal(one.router.weight, other.router.weight)
        assert one.router.selection_bias.eq(0).all()
    assert not torch.equal(a.moe_layers[0].router.weight, a.moe_layers[1].router.weight)
    before = a.moe_layers[0].router.weight.clone()
    assert not start_routing(a, Recipe(seed=1))  # trained rows are left alone
    assert torch.equal(a.moe_layers[0].router.weight, before)
    c = load_titan(tmp_path)
    start_routing(c, Recipe(twin_share=TwinShare(ramp_steps=9)))
    assert c.moe_layers[0].router.selection_bias.eq(-1).all()


def test_balance_holds_the_share_over_micro_batches(tmp_path):
    tiny_moe("llama", tmp_path)
    model = load_titan(tmp_path).train()
    balance = Balance(model, Recipe(twin_share=TwinShare(target=0.25)), None)
    tokens = torch.randint(128, (4, 64), generator=torch.Generator().manual_seed(0))
    for _ in range(2):  # the second step computes with the bias of the first
        balance.aim(1)
        for micro_batch in tokens.chunk(2):
            model(micro_batch)
        balance.update()
    report = balance.report()
    # layer 0 sees the same inputs in both steps; the mean of two halves' quantiles is not quite the whole's
    assert report.twin_share[0] == pytest.approx(0.25, abs=0.04)
    assert all(0 < e <= 1 for e in report.router_entropy)
    assert model.moe_layers[0].statistics.eq(0).all()


def test_flops_count_active_and_trained_weights(tmp_path):
    tiny_moe("qwen3", tmp_path)
    config = model_config(make_recipe({"model": str(tmp_path), "seq_len": 16}))
    model = load_titan(tmp_path)
    per_expert = 3 * 32 * 16
    attention = 32 * 64 * 2 + 32 * 32 * 2  # q, o, k, v
    fixed = 3 * attention + 3 * 32 * 64 + 32 * 128  # of 3 layers, the dense FFN, the head
    experts = 2 * 4 * per_expert  # 2 MoE layers, 4 of 8 experts, half of them trained
    router = 2 * 4 * 32
    expected = 4 * fixed + (4 + 6) / 2 * experts + 6 * router + 12 * 3 * 4 * 16 * 16
    assert config.get_nparams_and_flops(model, 16)[1] == expected


def trainer(tmp_path, **settings):
    trainable_moe(tmp_path / "moe")
    recipe = make_recipe({"model": str(tmp_path / "moe"), "out": str(tmp_path / "run"), "seq_len": 16} | settings)
    return trainer_config(recipe, RunDir(tmp_path / "run"), model_config(recipe), mixed(), None)


def test_recipe_reaches_torchtitan(tmp_path):
    config = trainer(
        tmp_path, steps=7, max_grad_norm=0.5, torchtitan={"training": {"gc_freq": 9}, "comm": {"trace_buf_size": 3}}
    )
    assert (config.training.steps, config.training.max_norm, config.training.gc_freq) == (7, 0.5, 9)
    assert config.comm.trace_buf_size == 3
    assert not config.checkpoint.last_save_model_only


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"trainning": {}}, r"'trainning' \(did you mean 'training'\?\)"),
        ({"training": {"gc_freqq": 1}}, r"'training.gc_freqq' \(did you mean 'gc_freq'\?\)"),
        ({"training": {"gc_debug": "maybe"}}, "training.gc_debug: .*boolean"),
        ({"training": {"steps": 3}}, "training.steps is set by the recipe: use steps"),
        ({"parallelism": {"spmd_backend": "spmd_types"}}, "has no use here: the experts are plain tensors"),
        ({"parallelism": {"pipeline_parallel_schedule": "GPipe"}}, "is for pipelines; set parallel.pipeline"),
        ({"parallelism": {"enable_fsdp_symm_mem": True}}, "enable_fsdp_symm_mem=True has no use here"),
        ({"compile": {"enable": True}}, "compile.enable is set by the recipe: use compile"),
        ({"compile": {"enable_async_tensor_parallel": True}}, "enable_async_tensor_parallel=True has no use"),
        ({"activation_checkpoint": {"memory_budget": 0.5}}, "activation_checkpoint is off; .*memory_budget: set"),
        ({"activation_checkpoint": {"early_stop": True}}, "activation_checkpoint is off"),
        ({"float8": {"recipe_name": "rowwise"}}, "float8 cannot be set: set dense_products: float8"),
        ({"mxfp8": {}}, "mxfp8 cannot be set"),
        ({"loss": {"num_chunks": 8}}, "loss is set by the recipe: use"),
        ({"debug": {"moe_force_load_balance": True}}, "see `balancing`"),
        ({"parallelism": {"expert_parallel_degree": 2}}, "is set by the recipe: use parallel.expert"),
        ({"checkpoint": {"async_mode": "sometimes"}}, "checkpoint.async_mode"),
    ],
)
def test_bad_torchtitan_sections_are_refused(section, message, tmp_path):
    with pytest.raises(UserError, match=message):
        trainer(tmp_path, torchtitan=section)


def leaves(config, prefix=""):
    """Paths of all options, sections that the recipe owns left out."""
    for field in dataclasses.fields(config):
        path, value = f"{prefix}{field.name}", getattr(config, field.name)
        if path not in OWNED and dataclasses.is_dataclass(value):
            yield from leaves(value, f"{path}.")
        else:
            yield path


def test_what_becomes_of_every_option_is_known(tmp_path):
    """All of torchtitan's config: set by the recipe, refused but for one value, or works. A new option fails here."""
    config = trainer(tmp_path, activation_checkpointing="selective")
    paths = list(leaves(config))
    assert [path for path in paths if not is_known(path)] == []
    sections = {path.rpartition(".")[0] for path in paths}
    assert {*OWNED, *REFUSED, *WORKS} - {*paths, *sections} == set()  # else the tables went stale
    for path, (only, _) in REFUSED.items():
        value = config
        for part in path.split("."):
            value = getattr(value, part)
        assert value == only, path
    assert overlay(config, {}) == config
    changed = overlay(config, {"activation_checkpoint": {"preserve_rng_state": False}})
    assert not changed.activation_checkpoint.preserve_rng_state
    with pytest.raises(UserError, match=r"memory_budget cannot be set: set activation_checkpointing"):
        overlay(config, {"activation_checkpoint": {"memory_budget": 0.5}})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"seq_len": 999}, "longer than the model's 256 positions"),
        ({"attention": "flex"}, "no backward pass on CPU"),
        ({"compile": True}, "compile: on cannot be had: the expert path that auto takes on a CPU waits for the host"),
        ({"compile": True, "expert_path": "grouped"}, "no compiled form in float32 on a CPU; set precision: bfloat16"),
        ({"dense_products": "float8"}, "dense_products: float8 needs a GPU, and there is none here"),
        ({"parallel": {"tensor": 4, "expert": 4}}, "parallel.tensor=4 does not divide 4 heads and 2 key/value heads"),
        ({"parallel": {"tensor": 2}}, "set that to a multiple of 2"),
        ({"parallel": {"pipeline": 2}}, "ties them"),
        ({"parallel": {"expert": 3}}, "parallel.expert=3 does not divide 4 frozen and 4 trainable experts"),
    ],
)
@pytest.mark.skipif(torch.accelerator.is_available(), reason="flex runs on a GPU")
def test_recipes_that_do_not_fit_the_model_are_refused(settings, message, tmp_path):
    with pytest.raises(UserError, match=message):
        trainer(tmp_path, **settings)


@pytest.mark.parametrize(
    ("settings", "changes", "message"),
    [
        ({"twin_share": {"target": 0.5}}, {"routing": "flat"}, "twin_share is for twin routing"),
        ({"parallel": {"pipeline": 3}}, {"family": "mistral"}, "=3 gives stage 2 no layer, so no experts"),
        ({"parallel": {"pipeline": 6}}, {"family": "mistral"}, "=6 is too many stages for 3 layers"),
        ({"parallel": {"pipeline": 2}}, {"family": "mistral", "moe_changes": {"moe_layers": (2,)}},
         "=2 gives stage 0 the layers 0-1, none of which has experts"),
        ({"parallel": {"tensor": 2, "expert": 2}, "objective": "distil"}, {}, "no way for a teacher"),
        ({"parallel": {"expert": 2}, "lora": {"rank": 2}}, {}, "with LoRA; set it to 1"),
    ],
)  # fmt: skip
def test_training_and_plan_refuse_the_same(settings, changes, message, tmp_path):
    changes = {"family": "llama"} | changes
    tiny_moe(changes.pop("family"), tmp_path, **changes)
    recipe = make_recipe({"model": str(tmp_path), "seq_len": 16, "samples_per_step": 12} | settings)
    with pytest.raises(UserError, match=message):
        model_config(recipe)
    with pytest.raises(UserError, match=message):
        make_layout(recipe, read_model(tmp_path), 6, "cpu", name=str(tmp_path))


def test_dense_models_train_as_a_whole_only(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    LlamaForCausalLM(
        LlamaConfig(hidden_size=32, num_attention_heads=4, num_hidden_layers=1, vocab_size=64)
    ).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="dense model without experts"):
        model_config(make_recipe({"model": str(tmp_path), "seq_len": 16}))
    assert (
        model_config(make_recipe({"model": str(tmp_path), "seq_len": 16, "trains": "all"})).layers[0].moe_layer is None
    )


def test_of_attention_experts_alone_the_routers_train_or_everything(tmp_path):
    convert(save_llama(tmp_path / "dense"), tmp_path / "model", AttentionOptions(top_k=1, router="random"))
    settings = {"model": str(tmp_path / "model"), "seq_len": 16}
    for allowed in ({}, {"trains": "all"}, {"objective": "distil"}):
        assert model_config(make_recipe(settings | allowed)).layers[0].attention.heads.moe.num_experts == 2
    with pytest.raises(UserError, match=r"set trains: experts\+router, or all"):
        model_config(make_recipe(settings | {"trains": "experts"}))
    with pytest.raises(UserError, match=r"parallel\.tensor has no way for attention experts"):
        model_config(make_recipe(settings | {"parallel": {"tensor": 2}}))
    titan = load_titan(tmp_path / "model")
    trained = [name for name, _ in titan.named_parameters() if is_trained(name, "experts+router")]
    assert trained == [f"layers.{i}.attention.heads.router.{name}" for i in (0, 1) for name in ("weight", "gate_scale")]


def test_no_peak_is_claimed_for_unknown_devices(monkeypatch):
    assert known_peak_flops("CPU") is None
    monkeypatch.setattr("lamella.train.metrics.device_type", "cuda")
    assert known_peak_flops("NVIDIA T4") is None
    assert known_peak_flops("NVIDIA H200") == 989e12
    assert known_peak_flops("NVIDIA A100-SXM4-80GB") == 312e12


def test_scalars_are_what_tensorboard_takes():
    line = {"step": 3, "time": 1.0, "loss": 2.0, "mfu": None, "twin_share": [0.2, 0.4], "dead_experts": 1}
    expected = {"loss": 2.0, "routing/twin_share": pytest.approx(0.3), "dead_experts": 1.0, "data_epochs/books": 0.5}
    assert scalars(line | {"data_epochs": {"books": 0.5}}) == expected


def test_progress_says_what_people_want_to_know(capsys):
    import sys

    progress = TrainingProgress(sys.stdout, first_step=0, steps=10)
    progress.started -= 30
    progress.show({"step": 0, "heldout_loss": 3.25})
    progress.show({"step": 5, "heldout_loss": None, "loss": 2.5, "tokens_per_s": 1234.4, "twin_share": [0.5, 0.4]})
    first, second = capsys.readouterr().out.splitlines()
    assert first == "step 0/10  held-out 3.250"
    assert second == "step 5/10  loss 2.500  held-out 3.250  1,234 tokens/s  twins 45%  ETA 0:30"
    assert (duration(59.6), duration(3725)) == ("1:00", "1:02:05")
    TrainingProgress(None, 0, 1).show({"step": 1, "heldout_loss": None})


def test_weights_that_the_precision_would_round_are_not_replicated(tmp_path):
    tiny_moe("llama", tmp_path)  # float32
    chosen = {p: model_config(Recipe(model=str(tmp_path), precision=p, seq_len=32)) for p in ("float32", "bfloat16")}
    assert {p: c.frozen_weights for p, c in chosen.items()} == {"float32": "replicated", "bfloat16": "sharded"}
    with pytest.raises(UserError, match="would round the float32 weights"):
        model_config(Recipe(model=str(tmp_path), precision="bfloat16", frozen_weights="replicated", seq_len=32))
