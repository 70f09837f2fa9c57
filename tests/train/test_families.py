"""Runs of two steps for every family that trains, and for models whose config is wrong about their output head."""

from __future__ import annotations

import json
from pathlib import Path
from pydoc_data import topics

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lamella.conversion import convert
from lamella.data.packing import IGNORE_INDEX
from lamella.errors import UserError
from lamella.export import export
from lamella.export.check import check_reloaded
from lamella.export.trained import materialise
from lamella.hf.models import load
from lamella.recipe.conversion import load_conversion
from lamella.recipe.sections import Portion
from lamella.train.data import open_samples, spread
from support.models import KIN, TRAINED_KIN, VOCAB, save_tokenizer, tiny_checkpoint
from support.training import COMMON, heldout, losses, run_many
from support.training_inputs import write_texts

pytestmark = pytest.mark.slow
TIED = ("tied in config.json", "tied in the converted config.json")
STEPS = 2
SETTINGS = COMMON | {"steps": STEPS, "save_every_steps": STEPS, "heldout_every_steps": STEPS, "data": "[{}/text.md]"}


def place(name: str) -> str:
    return name.replace(" ", "-")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    write_texts(folder / "text.md", "\n".join(topics.topics[name] for name in sorted(topics.topics)[:20]))
    jobs = []
    for name in (*TRAINED_KIN, *TIED):
        dense, moe = folder / f"{place(name)}-dense", folder / f"{place(name)}-moe"
        save_tokenizer(tiny_checkpoint(dense, *((name,) if name in KIN else ()), **KIN.get(name, {}), vocab_size=VOCAB))
        if name == TIED[0]:
            change_config(dense)
        convert(dense, moe, load_conversion(None, ["method=slice", "slices=4", "noise=0"]).options)
        if name == TIED[1]:
            change_config(moe)
        words = SETTINGS | {"model": str(moe), "out": str(folder / place(name))}
        jobs.append([f"{key}={str(value).format(folder)}" for key, value in words.items()])
    run_many(folder, 1, jobs)
    return folder


def change_config(folder: Path) -> None:
    """What the file says of the head is no longer what it holds."""
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"tie_word_embeddings": True}))


@torch.no_grad()
def transformers_loss(model: torch.nn.Module, runs: Path, tokenizer: Path) -> float:
    """The held-out loss by transformers: nats per token over the same samples."""
    samples = open_samples([Portion(source=str(runs / "text.md"))], "heldout", tokenizer, 32, None, 0, VOCAB)
    total = count = 0.0
    (chosen,) = spread(samples, 8).values()
    for sample in chosen:
        logits = model(
            input_ids=sample.input_ids_L[None], position_ids=sample.positions_L[None], use_cache=False
        ).logits
        total += float(torch.nn.functional.cross_entropy(logits[0].float(), sample.labels_L, reduction="sum"))
        count += int((sample.labels_L != IGNORE_INDEX).sum())
    return total / count


@pytest.mark.parametrize("name", [*TRAINED_KIN, *TIED])
def test_a_run_begins_at_the_dense_models_loss_and_gives_it_back(name: str, runs: Path) -> None:
    dense = runs / f"{place(name)}-dense"
    plain = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32).eval()
    # router rows of std 0.02 move the weights of pairs, whose copies are the slices, by about 1 in 100
    assert heldout(runs, place(name))[0] == pytest.approx(transformers_loss(plain, runs, dense), abs=5e-3)
    trained = materialise(runs / place(name))
    reported = transformers_loss(load(trained, torch.float32), runs, dense)
    assert heldout(runs, place(name))[-1] == pytest.approx(reported, abs=2e-5)  # fp32, the other home's sums
    assert all(loss > 0 for loss in losses(runs, place(name)))
    report = export(trained, "dense", runs / f"{place(name)}-back", mode="dense", overwrite=True)
    assert report.max_abs_logit_diff is not None
    back = AutoModelForCausalLM.from_pretrained(report.out, dtype=torch.float32).eval()
    ids = torch.arange(64)[None] % VOCAB  # past the windows of 7
    with torch.no_grad():
        assert torch.equal(back(ids).logits, plain(ids).logits)
    assert load_file(report.out / "model.safetensors").keys() == load_file(dense / "model.safetensors").keys()


@pytest.mark.parametrize("name", TIED)
def test_the_check_of_an_export_sees_a_lost_head(name: str, runs: Path) -> None:
    trained = materialise(runs / place(name))
    report = export(trained, "glm4-moe", runs / f"{place(name)}-glm", overwrite=True)
    assert report.max_abs_logit_diff is not None
    stock = AutoModelForCausalLM.from_pretrained(report.out, dtype=torch.float32).eval()
    ids = torch.arange(40)[None]
    with torch.no_grad():
        difference = (stock(ids).logits - load(trained, torch.float32)(ids).logits).abs().max()
    assert difference < 5e-5
    exported = load_file(report.out / "model.safetensors")
    assert not torch.equal(exported["lm_head.weight"], exported["model.embed_tokens.weight"])
    exported["lm_head.weight"] = exported["model.embed_tokens.weight"].clone()
    save_file(exported, report.out / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="differs"):
        check_reloaded(trained, report.out)
