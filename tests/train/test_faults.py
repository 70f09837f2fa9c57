"""Faults that ranks survive, or fail of together: many runs of a tiny model on 2 ranks, in one launch of torchrun."""

from __future__ import annotations

import json
import math
import os
import shutil
from pathlib import Path
from pydoc_data import topics

import pytest
import torch
from safetensors.torch import load_file, save_file

from lamella.errors import UserError
from lamella.export.trained import materialise
from lamella.recipe.training import Recipe
from lamella.run.folder import RunDir
from lamella.titan.config import read_hf_config
from lamella.train.data import open_samples
from support.models import tiny_moe, trainable_moe
from support.training import torchrun

pytestmark = [pytest.mark.slow, pytest.mark.faults]
STEPS = 10
SAMPLES_PER_STEP = 4
COMMON = {
    "seq_len": 32, "steps": STEPS, "samples_per_step": SAMPLES_PER_STEP, "lr": 1e-2, "warmup_steps": 2,
    "save_every_steps": 2, "keep_checkpoints": 0, "heldout_every_steps": 100, "heldout_samples": 0,
    "threads_per_rank": 1, "tensorboard": "false",
}  # fmt: skip


def words(folder: Path, name: str, **changes) -> list[str]:
    settings = {"model": "model", "out": name} | COMMON | changes
    for key in ("model", "out"):
        settings[key] = folder / settings[key]
    return [f"{key}={value}" for key, value in ({"data": f"[{folder / 'text.md'}]"} | settings).items()]


def jobs(folder: Path) -> list[dict]:
    def job(name: str, fault: str = "", damage: tuple = (), **changes) -> dict:
        damaged = [[str(folder / path), how] for path, how in damage]
        return {"words": words(folder, name, **changes), "fault": fault, "damage": damaged}

    remote = f"file://{folder / 'bucket'}"
    ruined = [
        ("ruined/checkpoints/step-7/__1_0.distcp", "truncate"), ("ruined/checkpoints/step-6/__0_0.distcp", "flip"),
        ("ruined/checkpoints/step-5/__1_0.distcp", "remove"), ("ruined/checkpoints/step-4/.metadata", "flip"),
        ("ruined/checkpoints/step-3/manifest.json", "remove"), ("ruined/checkpoints/step-2/manifest.json", "seal"),
    ]  # fmt: skip
    return [
        job("whole"),
        job("async", checkpoint_async="true", keep_checkpoints=2),
        job("ruined", stop_at_step=7, save_every_steps=1),
        job("ruined", damage=ruined, log_every_steps=2),
        job("hopeless", stop_at_step=2),
        job("hopeless", damage=[("hopeless/checkpoints/step-2/.metadata", "flip")]),
        job("gone", stop_at_step=2),
        job("gone", damage=[("gone/checkpoints/step-2", "remove")]),
        job("full", fault="disk-full:rank=1,step=4"),
        job("full"),
        job("full-async", fault="disk-full:rank=1,step=4", checkpoint_async="true"),
        job("skips", fault="nan-loss:rank=1,step=3; inf-grad:rank=0,step=5", save_every_steps=1, steps=6),
        job("six", steps=6),
        job("hopeless-nan", fault="nan-loss:rank=1,step=4-9", max_skips_in_a_row=3),
        job("remote", checkpoint_folder=remote, stop_at_step=5),
        job("remote", checkpoint_folder=remote, damage=[("remote", "remove")]),
        job("stranger", checkpoint_folder=remote, lr=3e-2),
        job("changed", stop_at_step=2, data=f"[{folder / 'changing.md'}]"),
        job("changed", data=f"[{folder / 'changing.md'}]", damage=[("changing.md", "halve")]),
        job("slow", fault="slow:rank=1,seconds=0.2", steps=4),
        job("collapsed", model="collapsed-model", bias_rate=0, steps=2),
        job("whole", damage=[("whole/status.json", "unfinished")]),
    ]


def collapsed_model(folder: Path) -> None:
    """Flat routing that gives expert 0 every token and expert 1 none."""
    trainable_moe(folder, routing="flat", moe_changes={"num_experts_per_tok": 2})
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith("router.weight"):
            tensor.normal_(std=0.3, generator=torch.Generator().manual_seed(0))
        if name.endswith("selection_bias"):
            tensor[:2] = torch.tensor([1e3, -1e3])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faults")
    trainable_moe(folder / "model")
    collapsed_model(folder / "collapsed-model")
    (folder / "text.md").write_text("\n".join(topics.topics[name] for name in sorted(topics.topics)[:2])[:500])
    shutil.copyfile(folder / "text.md", folder / "changing.md")
    os.environ["LAMELLA_CACHE"] = str(folder / "cache")
    torchrun("faults_many.py", folder, 2, jobs(folder))
    yield folder
    shutil.rmtree(folder)


def losses(folder: Path, name: str) -> list[float]:
    return [line["loss"] for line in RunDir(folder / name).metrics() if line["step"] > 0]


def events(folder: Path, name: str, kind: str) -> list[dict]:
    return RunDir(folder / name).events(kind)


def raised(folder: Path, name: str) -> list[tuple[str, str]]:
    """(class, reason) by rank."""
    files = sorted((folder / name).glob("raised-*.json"))
    return [tuple(json.loads(file.read_text())) for file in files]


def same_weights(folder: Path, a: str, b: str) -> bool:
    x, y = (load_file(materialise(folder / name, STEPS) / "model.safetensors") for name in (a, b))
    return x.keys() == y.keys() and all(torch.equal(x[key], y[key]) for key in x)


def test_the_order_of_samples_passes_the_end_of_an_epoch(runs):
    """So that every comparison below covers it."""
    samples = open_samples(Recipe(data=[str(runs / "text.md")]).data, "train", runs / "model", 32, 0, 0, 257)
    assert 1 < len(samples) < 5 * SAMPLES_PER_STEP


def test_commits_are_listed_and_leave_nothing_half_written(runs):
    run = RunDir(runs / "whole")
    assert run.steps() == [2, 4, 6, 8, 10]
    assert not raised(runs, "whole")
    assert [e["step"] for e in run.events("save")] == [2, 4, 6, 8, 10]
    assert not list(run.checkpoints.glob("*.tmp"))
    manifest = run.store().manifest(6)
    assert manifest["world_size"] == 2
    assert manifest["data"]["consumed_samples"] == 6 * SAMPLES_PER_STEP
    assert manifest["files"].keys() == {".metadata", "__0_0.distcp", "__1_0.distcp"}
    assert {"recipe", "model", "tokenizer", "torch"} <= manifest.keys()


def test_a_run_killed_between_its_last_save_and_its_status_is_finished(runs):
    """The last job: its status said "running", its newest checkpoint was of the last step."""
    assert RunDir(runs / "whole").status()["state"] == "finished"
    assert len(losses(runs, "whole")) == STEPS
    assert [e["step"] for e in events(runs, "whole", "running")] == [0, STEPS]


def test_asynchronous_saves_are_the_same(runs):
    run = RunDir(runs / "async")
    assert losses(runs, "async") == losses(runs, "whole")
    assert run.steps() == [8, 10]
    assert not list(run.store().problems(STEPS))
    assert same_weights(runs, "async", "whole")


def test_a_damaged_checkpoint_is_passed_over_and_said(runs):
    assert losses(runs, "ruined")[:7] == losses(runs, "whole")[:7]
    assert losses(runs, "ruined")[-1] == losses(runs, "whole")[-1]
    (fallback,) = events(runs, "ruined", "fallback")
    assert fallback["step"] == 1
    said = ["has", "has other bytes", "is missing", ".metadata has other bytes", "manifest.json is missing", "trusted"]
    for step, damage, words in zip(range(7, 1, -1), fallback["damage"], said, strict=True):
        assert damage.startswith(f"step {step}: ")
        assert words in damage
    assert "log_every_steps: 1 -> 2" in events(runs, "ruined", "running")[-1]["changed"]


@pytest.mark.parametrize(("name", "why"), [("hopeless", ".metadata has other bytes"), ("gone", "and is gone")])
def test_without_a_whole_checkpoint_a_run_does_not_start_again_silently(runs, name, why):
    for kind, reason in raised(runs, name):
        assert kind == "storage"
        assert why in reason
    status = RunDir(runs / name).status()
    assert (status["state"], status["failure"], status["retryable"]) == ("failed", "storage", False)
    assert len(losses(runs, name)) == 2


def test_damage_is_found_before_weights_are_taken_out(runs):
    with pytest.raises(UserError, match=r"step-2 is damaged: \.metadata has other bytes"):
        materialise(runs / "hopeless")


@pytest.mark.parametrize("name", ["full", "full-async"])
def test_a_full_disk_fails_on_all_ranks_and_commits_nothing(runs, name):
    assert [kind for kind, _ in raised(runs, name)] == ["storage", "storage"]
    assert all("rank 1" in reason and "File too large" in reason for _, reason in raised(runs, name))
    if name == "full":  # was continued after that
        assert losses(runs, name) == losses(runs, "whole")
        assert [e["step"] for e in events(runs, name, "running")] == [0, 2]
        assert not list(RunDir(runs / name).checkpoints.glob("*.tmp"))
    else:
        assert RunDir(runs / name).steps() == [2]
        status = RunDir(runs / name).status()
        assert (status["failure"], status["retryable"]) == ("storage", True)


def test_a_step_that_is_not_finite_on_one_rank_changes_nothing_on_any(runs):
    run = RunDir(runs / "skips")
    assert not raised(runs, "skips")
    assert [e["step"] for e in run.events("skip")] == [3, 5]
    lines = {line["step"]: line for line in run.metrics()}
    assert lines[6]["skipped_steps"] == 2
    assert all(math.isfinite(line["loss"]) for line in lines.values() if "loss" in line)
    rates = [line["lr"] for line in RunDir(runs / "six").metrics() if line["step"]]
    # the schedule waits with the optimizer: the step after a skipped one has the rate of the skipped one
    assert [lines[step]["lr"] for step in (2, 4, 6)] == rates[1:4]
    assert rates[3] < rates[1]
    for skipped in (3, 5):
        before, after = (torch_checkpoint(run, step) for step in (skipped - 1, skipped))
        kept = [key for key in before if not key.startswith(("dataloader.", "train_state."))]
        assert any(key.startswith("optimizer.state.") for key in kept)
        assert all(torch.equal(torch.as_tensor(before[key]), torch.as_tensor(after[key])) for key in kept)


def torch_checkpoint(run: RunDir, step: int) -> dict:
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    file = run.path / "flat.pt"
    dcp_to_torch_save(run.checkpoint(step), file)
    return flatten(torch.load(file, weights_only=False))


def flatten(values: dict, prefix: str = "") -> dict:
    flat = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def test_a_run_that_stays_not_finite_stops_with_its_last_good_checkpoint(runs):
    run = RunDir(runs / "hopeless-nan")
    assert [kind for kind, _ in raised(runs, "hopeless-nan")] == ["numerics", "numerics"]
    status = run.status()
    assert (status["failure"], status["retryable"], status["step"]) == ("numerics", False, 6)
    weights = load_file(materialise(run.path) / "model.safetensors")
    assert all(tensor.isfinite().all() for tensor in weights.values())


def test_a_run_is_continued_from_a_remote_folder_when_its_own_is_lost(runs):
    """file:// goes through fsspec, as s3:// does: no rename, the manifest alone commits."""
    assert [e["step"] for e in events(runs, "remote", "running")] == [5]
    assert losses(runs, "remote") == losses(runs, "whole")[5:]
    assert RunDir(runs / "remote").steps() == [2, 4, 5, 6, 8, 10]
    assert same_weights(runs, "remote", "whole")


def test_checkpoints_of_another_run_are_refused(runs):
    assert [kind for kind, _ in raised(runs, "stranger")] == ["user_config", "user_config"]
    assert all("belong to another run (another recipe)" in reason for _, reason in raised(runs, "stranger"))


def test_changed_text_is_refused_on_all_ranks(runs):
    assert [kind for kind, _ in raised(runs, "changed")] == ["user_config", "user_config"]
    assert all("changing.md is not that of" in reason for _, reason in raised(runs, "changed"))


def test_a_slow_rank_is_named_and_the_run_goes_on(runs):
    assert {e["rank"] for e in events(runs, "slow", "straggler")} == {1}
    assert RunDir(runs / "slow").status()["state"] == "finished"


def test_experts_without_and_with_all_tokens_raise_an_alarm(runs):
    assert RunDir(runs / "collapsed").status()["state"] == "finished"
    assert {e["what"] for e in events(runs, "collapsed", "alarm")} >= {"experts without a token"}
    assert any(e.get("moe_layers") == [0, 1] for e in events(runs, "collapsed", "alarm"))
    assert all(math.isfinite(loss) for loss in losses(runs, "collapsed"))
    weights = load_file(materialise(runs / "collapsed") / "model.safetensors")
    assert all(tensor.isfinite().all() for tensor in weights.values())


CHANGES = {
    "slices": ({"slices": 2}, "moe.num_frozen_experts: 4 -> 2"),
    "top-k": ({"routing": "flat", "moe_changes": {"num_experts_per_tok": 2}}, "moe.num_experts_per_tok: 4 -> 2"),
    "width": ({"hidden_size": 48}, "hidden_size: 32 -> 48"),
}


@pytest.mark.parametrize("change", [*CHANGES, "dtype", "tokenizer", "chat template"])
def test_another_model_is_refused_with_the_difference(tmp_path, change):
    trainable_moe(tmp_path / "a")
    recipe = RunDir(tmp_path / "run")
    settings = Recipe(model=str(tmp_path / "a"))
    recipe.create(settings, tmp_path / "a")
    options, said = CHANGES.get(change, ({}, ""))
    trainable_moe(tmp_path / "b", **options)
    if change == "dtype":
        tiny_moe("llama", tmp_path / "b", random_router=False, vocab_size=257).bfloat16().save_pretrained(
            tmp_path / "b"
        )
        said = "dtype: 'float32' -> 'bfloat16'"
    if change == "tokenizer":
        file = tmp_path / "b" / "tokenizer.json"
        file.write_text(file.read_text().replace("<eos>", "<end>"))
        said = "the model's tokenizer"
    if change == "chat template":
        (tmp_path / "b" / "chat_template.jinja").write_text("{{ messages }}")
        said = "the model's chat template"
    assert read_hf_config(tmp_path / "b")
    with pytest.raises(UserError, match="holds another run") as error:
        recipe.check_same_run(settings, tmp_path / "b")
    assert said in str(error.value)
