"""Real runs of a tiny model on 3 ranks and on 1, all in two launches of torchrun."""

from __future__ import annotations

from pathlib import Path
from pydoc_data import topics

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint import FileSystemReader

from lamella.data.packing import IGNORE_INDEX
from lamella.data.prepare import prepare
from lamella.export import export
from lamella.export.trained import materialise
from lamella.hf.models import load
from lamella.recipe.sections import Portion
from lamella.run.folder import RunDir
from lamella.titan.masks import document_mask
from lamella.train.data import open_samples, spread
from support.models import PARTITIONED, trainable_moe
from support.training import COMMON, REORDERED, STEPS, heldout, lines, losses, run_many
from support.training_inputs import write_conversations, write_half_models, write_texts

pytestmark = pytest.mark.slow
REPLAY = "[{{source: {0}/text.md, weight: 3}}, {{source: {0}/short.md, weight: 1}}]"
STREAMS = "[{{source: {0}/text.md, weight: 3, stream: true}}, {{source: {0}/short.md, weight: 1, stream: true}}]"
FITTED = "[{{source: {0}/digits.md, weight: 1}}, {{source: {0}/text.md, weight: 0}}]"
RUNS_ON_3 = {
    "whole": {"tensorboard": "true", "torchtitan.debug.print_config": "true"},
    "accumulated": {"samples_per_micro_batch": 1},
    "moved": {"samples_per_micro_batch": 1},
    "held": {"twin_share": "{target: 0.5, ramp_steps: 6}", "lr": 1e-3},
    "experts": {"trains": "experts", "activation_checkpointing": "full", "steps": 4},
    "all": {"trains": "all", "activation_checkpointing": "selective", "weight_decay": 0.1},
    "full_ac": {"activation_checkpointing": "full"},
    "replicated": {"frozen_weights": "replicated", "activation_checkpointing": "full"},
    "replicated_all": {"frozen_weights": "replicated", "trains": "all", "steps": 4},
    "chunked": {"loss_chunk_tokens": 8},
    "chunked_all": {"loss_chunk_tokens": 8, "trains": "all", "weight_decay": 0.1},
    "half": {"model": "half-model", "steps": 4},
    "half_in_float32": {"model": "half-in-float32", "steps": 4},
    "flat": {"model": "flat-model", "bias_rate": 0.05},
    "flat_quantile": {"model": "flat-model", "balancing": "quantile"},
    "annealed": {"model": "flat-model", "top_k_schedule": "{start: 8, ramp_steps: 4}"},
    "warmed_router": {"router_warmup_steps": 4, "trains": "all", "rest_lr_scale": 0.1},
    "sent_to_slices": {"routing_loss": "{coefficient: 1.0, to_slices: [text.md]}"},
    "fitted": {
        "router_fit": "{to_slices: [text.md], to_twins: [digits.md], samples: 12}",
        "trains": "experts",
        "data": FITTED,
        "heldout_data": "[{0}/text.md]",
    },
    "flat_aux": {"model": "flat-model", "balancing": "aux", "aux_coefficient": 0.3},
    "partitioned": {"model": "partitioned-model"},
    "two_slices": {"model": "two-slices", "steps": 4},  # fewer than ranks: a rank holds parts of an expert
    "uneven": {"model": "uneven-model", "steps": 4},  # and where the ranks do not divide its rows
    "lora": {"lora": "{rank: 4, alpha: 8}", "lora_lr_scale": 2.0},
    "distilled": {"objective": "distil", "distil": "{weight: 1.0, temperature: 2.0}"},
    "distilled_beside": {"objective": "distil", "distil": "{weight: 1.0, temperature: 2.0, teacher: twin-model}"},
    "flat_unbalanced": {"model": "flat-model", "bias_rate": 0.0},
    "prepared-run": {"data": "[{0}/prepared]"},
    "chat": {"data": "[{0}/chat.jsonl]", "trains": "all"},
    "streamed": {"data": STREAMS, "heldout_data": "[{0}/text.md]"},
    "streamed_moved": {"data": STREAMS, "heldout_data": "[{0}/text.md]", "samples_per_micro_batch": 1},
    "replay": {"data": REPLAY, "on_exhausted": "stop", "heldout_data": "[{0}/text.md]"},
}


def words(folder: Path, name: str, **changes) -> list[str]:
    settings = {"model": "twin-model", "out": name} | COMMON | RUNS_ON_3.get(name, {}) | changes
    for key in ("model", "out"):
        settings[key] = folder / settings[key]
    named = (
        ("routing_loss", "text.md"),
        ("router_fit", "text.md"),
        ("router_fit", "digits.md"),
        ("distil", "twin-model"),
    )
    for key, name in named:
        if key in settings:
            settings[key] = settings[key].replace(name, str(folder / name))
    settings = {"data": "[{0}/text.md]"} | settings
    return [f"{key}={value.format(folder) if 'data' in key else value}" for key, value in settings.items()]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    trainable_moe(folder / "twin-model")
    write_half_models(folder)
    trainable_moe(folder / "flat-model", routing="flat")
    trainable_moe(folder / "partitioned-model", moe_changes=PARTITIONED | {"router": "linear"})
    write_texts(folder / "text.md", "\n".join(topics.topics[name] for name in sorted(topics.topics)[:40]))
    write_texts(folder / "digits.md", " ".join(str(i**3) for i in range(4000)))
    (folder / "short.md").write_text("a short text, " * 26)  # 10 samples, and a tenth that is held out
    trainable_moe(folder / "two-slices", slices=2, hidden_size=48, intermediate_size=96)
    trainable_moe(folder / "uneven-model", slices=2)
    prepare([str(folder / "text.md")], folder / "twin-model", folder / "prepared", unit_bytes=20_000)
    write_conversations(folder)
    moved = ("moved", "streamed_moved")
    jobs = [words(folder, name) for name in RUNS_ON_3 if name not in moved]
    jobs += [words(folder, "resumed", stop_at_step=6), words(folder, "resumed")]
    jobs += [words(folder, name, stop_at_step=9) for name in moved]
    jobs += [words(folder, "lora_resumed", **RUNS_ON_3["lora"], stop_at_step=6)]
    jobs += [words(folder, "lora_resumed", **RUNS_ON_3["lora"])]
    run_many(folder, 2, [words(folder, name, stop_at_step=6) for name in moved])
    run_many(folder, 3, jobs)
    alone = [words(folder, name, out=f"{name}-alone") for name in ("two_slices", "uneven", "fitted")]
    run_many(folder, 1, [words(folder, "alone"), *(words(folder, name) for name in moved), *alone])
    return folder


def test_losses_fall_and_everything_is_reported(runs):
    run = RunDir(runs / "whole")
    assert run.status() | {"time": 0} == {
        "state": "finished", "step": STEPS, "steps": STEPS, "reason": "", "failure": None, "retryable": False, "time": 0
    }  # fmt: skip
    measured = heldout(runs, "whole")
    assert len(measured) == 4  # steps 0, 4, 8 and 12
    assert measured[-1] < measured[0] - 0.02  # experts and router between random embeddings can do little
    assert heldout(runs, "all")[-1] < heldout(runs, "all")[0] - 1
    line = lines(runs, "whole")[-1]
    assert line["mfu"] is None  # nobody knows a CPU's peak
    assert len(line["twin_share"]) == len(line["max_vio"]) == len(line["router_entropy"]) == 2  # MoE layers
    assert line["tokens"] == STEPS * 6 * 32
    assert line["router_lr"] == pytest.approx(5 * line["lr"])
    assert list((run.tensorboard).rglob("events*"))
    assert (run.model / "tokenizer.json").is_file()
    assert "Trainer is initialized" in run.log_file(1).read_text()
    assert '"pipeline_parallel_degree": 1' in run.log_file(0).read_text()  # torchtitan.debug.print_config


@torch.no_grad()
def transformers_loss(folder: Path, text: Path, mode: str) -> float:
    """The held-out loss as transformers computes it: nats per token over the same samples."""
    model = load(folder, torch.float32)
    model.set_mode(mode)
    samples = open_samples([Portion(source=str(text))], "heldout", folder, 32, None, 0, 257)
    total = count = 0.0
    (chosen,) = spread(samples, 8).values()
    for sample in chosen:
        inputs = {"input_ids": sample.input_ids_L[None], "position_ids": sample.positions_L[None]}
        logits = model(**inputs, attention_mask=document_mask(sample.positions_L[None]), use_cache=False).logits[0]
        total += float(torch.nn.functional.cross_entropy(logits, sample.labels_L, reduction="sum"))
        count += int((sample.labels_L != IGNORE_INDEX).sum())
    return total / count


def test_heldout_loss_starts_at_the_dense_models(runs):
    # share 0 at the start: the frozen slices alone, at weights that router rows of std 0.02 move by about 1 in 100
    dense = transformers_loss(runs / "twin-model", runs / "text.md", "dense")
    assert heldout(runs, "held")[0] == pytest.approx(dense, abs=5e-3)


def test_materialised_model_has_the_reported_loss(runs):
    folder = materialise(runs / "whole")
    assert folder == runs / "whole" / "hf" / f"step-{STEPS}"
    # fp32, the other home's order of summation
    assert heldout(runs, "whole")[-1] == pytest.approx(transformers_loss(folder, runs / "text.md", "routed"), abs=1e-5)


@pytest.mark.faults
def test_resume_is_bit_equal(runs):
    assert losses(runs, "resumed") == losses(runs, "whole")
    assert heldout(runs, "resumed") == heldout(runs, "whole")
    a, b = (load_file(materialise(runs / name) / "model.safetensors") for name in ("whole", "resumed"))
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.faults
@pytest.mark.parametrize("other", ["accumulated", "alone", "moved", "full_ac", "replicated"])
def test_the_same_global_batch_gives_the_same_losses(runs, other):
    """Micro-batches, 1 rank in place of 3, from 2 ranks to 3 to 1, recomputed activations, whole weights."""
    assert losses(runs, other) == pytest.approx(losses(runs, "whole"), abs=REORDERED)


@pytest.mark.faults
def test_streams_go_on_where_a_checkpoint_stood_on_other_ranks(runs):
    """From 2 ranks to 3 to 1; nothing of the training text is written, and the short stream begins again on the way."""
    assert losses(runs, "streamed_moved") == pytest.approx(losses(runs, "streamed"), abs=REORDERED)
    assert losses(runs, "streamed")[0] != pytest.approx(losses(runs, "whole")[0], abs=1e-4)  # another order
    epochs = lines(runs, "streamed")[-1]["data_epochs"]
    assert epochs[str(runs / "short.md")] > 1 > epochs[str(runs / "text.md")] > 0
    manifest = RunDir(runs / "streamed_moved").store().manifest(9)
    assert manifest["data"] == {"consumed_samples": 9 * 6}


@pytest.mark.faults
@pytest.mark.parametrize("name", ["two_slices", "uneven"])
def test_more_ranks_than_slices(runs, name):
    assert losses(runs, name) == pytest.approx(losses(runs, f"{name}-alone"), abs=REORDERED)


@pytest.mark.faults
@pytest.mark.parametrize("name", ["whole", "all", "held", "flat", "replicated", "replicated_all"])
def test_frozen_experts_keep_their_bytes(runs, name):
    before = load_file(runs / ("flat-model" if name == "flat" else "twin-model") / "model.safetensors")
    after = load_file(materialise(runs / name) / "model.safetensors")
    assert before.keys() == after.keys()
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert not any("frozen" in key for key in changed)
    assert all(key in changed for key in before if "trainable" in key or "router.weight" in key)
    others = {key for key in before if ".mlp.experts." not in key and ".mlp.router." not in key}
    assert others <= changed if name in ("all", "replicated_all") else not others & changed


def test_a_loss_in_chunks_is_that_of_all_logits(runs):
    for chunked, whole in (("chunked", "whole"), ("chunked_all", "all")):
        assert losses(runs, chunked) == pytest.approx(losses(runs, whole), abs=REORDERED)
        assert heldout(runs, chunked) == pytest.approx(heldout(runs, whole), abs=REORDERED)


def test_frozen_weights_in_the_files_precision_change_nothing(runs):
    assert losses(runs, "half") == losses(runs, "half_in_float32")
    assert heldout(runs, "half") == heldout(runs, "half_in_float32")
    before = load_file(runs / "half-model" / "model.safetensors")
    after = load_file(materialise(runs / "half") / "model.safetensors")
    assert all(torch.equal(before[key], after[key]) for key in before if "frozen" in key)
    assert {key: t.dtype for key, t in before.items()} == {key: t.dtype for key, t in after.items()}


@pytest.mark.faults
def test_checkpoints_hold_what_was_trained_and_nothing_else(runs):
    def saved(name: str) -> set[str]:
        run = RunDir(runs / name)
        entries = FileSystemReader(run.checkpoint(run.steps()[-1])).read_metadata().state_dict_metadata
        return {key for key in entries if key.startswith(("layers.", "tok_embeddings.", "norm.", "lm_head."))}

    trained = ("trainable_gate_up_proj", "trainable_down_proj")
    router = ("router.weight", "router.selection_bias")  # drawn, and moved, at the start of a run
    assert {key.partition(".moe.")[2].removeprefix("experts.") for key in saved("whole")} == {*trained, *router}
    assert {key.partition(".moe.")[2].removeprefix("experts.") for key in saved("experts")} == {*trained, *router}
    assert not any("frozen" in key for key in saved("all"))
    assert {"tok_embeddings.weight", "norm.weight"} <= saved("all")


def test_only_experts_train_when_told_so(runs):
    after = load_file(materialise(runs / "experts", step=4) / "model.safetensors")
    start = load_file(materialise(runs / "whole", step=4) / "model.safetensors")
    key = "model.layers.0.mlp.router.weight"
    assert after[key].std() == pytest.approx(0.02, rel=0.3)  # as drawn
    assert not torch.equal(after[key], start[key])


@pytest.mark.faults
@pytest.mark.parametrize(("name", "kinds"), [("whole", {"trainable", "router"}), ("experts", {"trainable"})])
def test_optimizer_state_only_for_what_trains(runs, name, kinds):
    run = RunDir(runs / name)
    entries = FileSystemReader(run.checkpoint(run.steps()[-1])).read_metadata().state_dict_metadata
    state = {key for key in entries if key.startswith("optimizer.state.")}
    assert {
        kind for key in state for kind in ("trainable", "router", "frozen", "attention", "emb") if kind in key
    } == kinds
    assert len(state) == 3 * 2 * (2 * ("trainable" in kinds) + ("router" in kinds))  # step and 2 moments, 2 layers


def test_share_ramps_to_its_target(runs):
    shares = [sum(line["twin_share"]) / 2 for line in lines(runs, "held") if line["step"] > 0]
    assert shares[0] == 0
    assert shares[3] == pytest.approx(0.25, abs=0.1)
    # each step's bias is the last step's quantile: other text, some weight change
    assert sum(shares[7:]) / len(shares[7:]) == pytest.approx(0.5, abs=0.06)


def test_bias_balances_flat_routing(runs):
    end, unbalanced = (
        sum(sum(line["max_vio"]) for line in lines(runs, name)[-4:]) for name in ("flat", "flat_unbalanced")
    )
    assert end < 0.8 * unbalanced
    bias = load_file(materialise(runs / "flat") / "model.safetensors")["model.layers.0.mlp.router.selection_bias"]
    assert bias.dtype == torch.float32
    assert bias.abs().sum() > 0


def violations(folder: Path, name: str) -> list[float]:
    """The layers' mean at each step."""
    return [sum(line["max_vio"]) / 2 for line in lines(folder, name) if line["step"] > 0]


def test_quantiles_of_the_last_step_balance_the_next(runs):
    quantile, unbalanced = (sum(violations(runs, name)[4:]) for name in ("flat_quantile", "flat_unbalanced"))
    assert quantile < 0.7 * unbalanced  # 0.49 was seen: 192 tokens a step, whose texts differ


def test_top_k_is_annealed(runs):
    """8 of 8 experts at first, so every load is the same; the model's own 4 from step 5 on."""
    assert violations(runs, "annealed")[0] == 0
    assert all(v > 0 for v in violations(runs, "annealed")[4:])
    assert losses(runs, "annealed")[-1] < losses(runs, "annealed")[0]


def test_the_router_alone_trains_in_its_warmup(runs):
    before = load_file(runs / "twin-model" / "model.safetensors")
    at_4, at_8 = (load_file(materialise(runs / "warmed_router", step=s) / "model.safetensors") for s in (4, 8))
    changed = {key for key in before if not torch.equal(before[key], at_4[key])}
    assert changed == {key for key in before if ".router." in key and torch.any(before[key] != at_4[key])}
    assert any(key.endswith("router.weight") for key in changed)
    assert not torch.equal(at_4["model.norm.weight"], at_8["model.norm.weight"])
    rates = [(line["lr"], line["router_lr"], line["rest_lr"]) for line in lines(runs, "warmed_router")[1:]]
    assert [lr > 0 for lr, _, _ in rates] == [False] * 4 + [True] * 8
    assert all(router > 0 for _, router, _ in rates)
    assert all(rest == pytest.approx(0.1 * lr) for lr, _, rest in rates)


def test_a_fitted_router_tells_the_sides_apart_from_the_first_step(runs):
    """On 3 ranks as on 1; the old text, of weight 0, is never trained on."""
    # 0.99 was seen; drawn rows give about half. Behind the first layer's random mixing a digit is no longer one: that
    # the fit is the best linear one there is in test_schedules.py.
    assert lines(runs, "fitted")[1]["twin_share"][0] > 0.9
    assert losses(runs, "fitted") == pytest.approx(losses(runs, "fitted-alone"), abs=REORDERED)
    assert all(line["data_epochs"][str(runs / "text.md")] == 0 for line in lines(runs, "fitted") if line["step"])


def test_the_routing_loss_sends_tokens_to_the_slices(runs):
    told, free = (
        [sum(line["twin_share"]) / 2 for line in lines(runs, name)[1:]] for name in ("sent_to_slices", "whole")
    )
    assert told[-1] < free[-1] - 0.1


def test_low_rank_deltas_train_and_leave_the_dense_model_alone(runs, tmp_path):
    assert losses(runs, "lora_resumed") == losses(runs, "lora")
    # B is zero at the start: nothing is different before the first step
    assert heldout(runs, "lora")[0] == pytest.approx(heldout(runs, "whole")[0], abs=REORDERED)
    assert heldout(runs, "lora")[-1] != heldout(runs, "whole")[-1]
    rates = [(line["lr"], line["lora_lr"]) for line in lines(runs, "lora")[1:]]
    assert all(lora == pytest.approx(2 * lr) for lr, lora in rates)
    folder = materialise(runs / "lora")
    before, after = (load_file(f / "model.safetensors") for f in (runs / "twin-model", folder))
    assert len(after) == len(before) + 4 * 2  # 2 layers
    assert all(torch.equal(before[key], after[key]) for key in before if "frozen" in key)
    assert all(after[key].any() for key in after if ".lora_" in key)
    assert heldout(runs, "lora")[-1] == pytest.approx(transformers_loss(folder, runs / "text.md", "routed"), abs=1e-5)
    for source, out in ((runs / "twin-model", "before"), (folder, "after")):
        export(source, "dense", tmp_path / out, mode="dense", check=False)
    a, b = (load_file(tmp_path / out / "model.safetensors") for out in ("before", "after"))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_the_dense_teacher_inside_is_the_one_beside(runs):
    """The folder's router rows are zero and its bias chooses the slices: as a model it is the dense one."""
    assert losses(runs, "distilled_beside") == pytest.approx(losses(runs, "distilled"), abs=REORDERED)
    assert losses(runs, "distilled")[-1] < 0.7 * losses(runs, "distilled")[0]


def test_the_auxiliary_loss_balances_without_a_bias(runs):
    end, unbalanced = (
        sum(sum(line["max_vio"]) for line in lines(runs, name)[-4:]) for name in ("flat_aux", "flat_unbalanced")
    )
    assert end < 0.9 * unbalanced
    assert losses(runs, "flat_aux")[-1] < losses(runs, "flat_aux")[0]
    bias = load_file(materialise(runs / "flat_aux") / "model.safetensors")["model.layers.0.mlp.router.selection_bias"]
    assert not bias.any()


@pytest.mark.faults
def test_a_mixture_whose_source_ends_ends_the_run(runs):
    """10 samples at a weight of 1 in 4 last for 40 to 43 of the run's samples: 6 steps and a half."""
    assert RunDir(runs / "replay").status()["state"] == "finished"
    epochs = [line["data_epochs"] for line in lines(runs, "replay") if line["step"] > 0]
    assert len(epochs) in (6, 7)
    first, last = epochs[0], epochs[-1]
    assert first[f"{runs}/short.md"] in (0.1, 0.2)
    assert last[f"{runs}/short.md"] in (0.9, 1.0)
    assert lines(runs, "replay")[-1]["lr"] < 0.3 * COMMON["lr"]  # the decay ends with the run
    assert "25.0% of the samples" in RunDir(runs / "replay").log_file(0).read_text()


def test_prepared_data_are_the_same_data(runs):
    assert len(list((runs / "prepared").glob("train-*.shard"))) > 1
    assert losses(runs, "prepared-run") == losses(runs, "whole")
    assert heldout(runs, "prepared-run") == heldout(runs, "whole")


def test_answers_are_learned(runs):
    """The same 11 letters after every question: nothing of the questions is in the loss, so it falls far."""
    measured = heldout(runs, "chat")
    assert measured[-1] < 0.6 * measured[0]


def test_a_partitioned_model_trains(runs):
    """Shared expert, unit gates, output bias, fields that differ by layer: all of it moves, and the loss falls."""
    assert losses(runs, "partitioned")[-1] < losses(runs, "partitioned")[0]
    before = load_file(runs / "partitioned-model" / "model.safetensors")
    after = load_file(materialise(runs / "partitioned") / "model.safetensors")
    for name in ("shared.gate_up_proj", "experts.trainable_down_proj", "router.gate_scale", "output_bias"):
        key = f"model.layers.0.mlp.{name}"
        assert not torch.equal(before[key], after[key]), name


def test_tied_embeddings_stay_tied(runs):
    folder = materialise(runs / "all")
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    model = load(folder)
    assert model.lm_head.weight is model.model.embed_tokens.weight
