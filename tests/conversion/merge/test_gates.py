"""The router's rows against plain transformers, and what is said about them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoTokenizer

from lamella.calibrate import CalibrationStep
from lamella.conversion import plan_conversion
from lamella.conversion.plan import Workspace
from lamella.recipe.conversion import make_conversion
from support.merging import DOMAINS, config, loaded, merge, save_models


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return save_models(tmp_path_factory.mktemp("models"))


def rows_of(folder: Path) -> Tensor:
    """[L, E, D]"""
    written = load_file(folder / "model.safetensors")
    return torch.stack([written[f"model.layers.{i}.block_sparse_moe.gate.weight"] for i in range(3)])


def unit(rows: Tensor) -> Tensor:
    return rows / rows.norm(dim=-1, keepdim=True)


@torch.no_grad()
def plain(folder: Path, prompts: list[str], mode: str) -> Tensor:
    """[L, D]: what mergekit's formula gives, each prompt alone in plain transformers, without padding."""
    model, tokenizer = loaded(folder), AutoTokenizer.from_pretrained(folder)
    found = []
    for prompt in prompts:
        ids = tokenizer(tokenizer.bos_token + prompt, add_special_tokens=False, return_tensors="pt").input_ids
        states = torch.stack(model(ids, output_hidden_states=True).hidden_states[:-1])[:, 0]
        found.append(states.mean(1) if mode == "hidden_avg" else states[:, -1])
    return torch.stack(found).mean(0)


@pytest.mark.parametrize("mode", ["hidden", "hidden_last", "hidden_avg"])
def test_hidden_gates_are_mergekits_formula(mode: str, models: list[Path], tmp_path: Path) -> None:
    values = config(models, gate_mode=mode)
    values["experts"][1]["negative_prompts"] = ["abc", "xyz xyz"]
    merge(values, tmp_path / "out")
    wanted = []
    for expert in values["experts"]:
        row = plain(models[0], expert["positive_prompts"], mode)
        if "negative_prompts" in expert:
            row = row - plain(models[0], expert["negative_prompts"], mode)
        wanted.append(unit(row))
    torch.testing.assert_close(rows_of(tmp_path / "out"), torch.stack(wanted, dim=1), atol=2e-5, rtol=1e-4)


def test_gates_of_a_model_in_bfloat16_are_those_of_float32(tmp_path: Path) -> None:
    """Some processors multiply bfloat16 faster: then the pass does, and rounds like mergekit, which always does."""
    models = save_models(tmp_path / "models", dtype=torch.bfloat16)
    values = config(models, gate_mode="hidden", dtype="float32")
    merge(values, tmp_path / "out")
    wanted = [unit(plain(models[0], expert["positive_prompts"], "hidden")) for expert in values["experts"]]
    cosine = (unit(rows_of(tmp_path / "out")) * torch.stack(wanted, dim=1)).sum(-1)
    assert cosine.min() > 0.999, cosine
    merge(values | {"gate_mode": "ridge"}, tmp_path / "ridge")
    assert routed_right(tmp_path / "ridge", models, NEW_TEXTS) > 0.6


def test_cheap_embed_is_the_sum_of_the_prompts_embeddings(models: list[Path], tmp_path: Path) -> None:
    values = config(models, gate_mode="cheap_embed")
    merge(values, tmp_path / "out")
    table, tokenizer = (
        loaded(models[0]).get_input_embeddings().weight.detach(),
        AutoTokenizer.from_pretrained(models[0]),
    )
    wanted = []
    for expert in values["experts"]:
        prompts = [tokenizer.bos_token + prompt for prompt in expert["positive_prompts"]]
        ids = tokenizer(prompts, add_special_tokens=False).input_ids
        wanted.append(unit(sum(table[row].sum(0) for row in ids)))  # type: ignore[arg-type]
    for rows_ED in rows_of(tmp_path / "out"):
        torch.testing.assert_close(rows_ED, torch.stack(wanted), atol=1e-6, rtol=1e-5)


@torch.no_grad()
def routed_right(folder: Path, models: list[Path], texts: dict[str, list[str]]) -> float:
    """Top-1 accuracy of the routers on the base model's own stream, from plain transformers."""
    model, tokenizer = loaded(models[0]), AutoTokenizer.from_pretrained(models[0])
    seen: list[Tensor] = []
    for layer in model.model.layers:
        layer.post_attention_layernorm.register_forward_hook(lambda module, args, y: seen.append(y[0]))
    right = []
    for e, prompts in enumerate(texts.values()):
        for prompt in prompts:
            seen.clear()
            model(tokenizer(tokenizer.bos_token + prompt, add_special_tokens=False, return_tensors="pt").input_ids)
            for x_LD, rows_ED in zip(seen, rows_of(folder), strict=True):
                right.append(((x_LD[1:] @ rows_ED.T).argmax(-1) == e).float().mean())
    return torch.stack(right).mean().item()


NEW_TEXTS = {
    "low": ["abdc cadb", "bbad caad"],
    "middle": ["mpon onmp", "ppom nmmo"],
    "high": ["wzyx yxwz", "zzxw yxxw"],
}


def test_the_better_gates_route_new_text_better_than_mergekits(models: list[Path], tmp_path: Path) -> None:
    accuracy = {}
    for mode in ("hidden", "mean", "ridge"):
        values = config(models, gate_mode=mode)
        for expert in values["experts"]:  # prompts that end alike, as questions do: mergekit looks at their ends
            expert["positive_prompts"] = [f"{prompt} the" for prompt in expert["positive_prompts"]]
        merge(values, tmp_path / mode)
        accuracy[mode] = routed_right(tmp_path / mode, models, NEW_TEXTS)
    assert accuracy["ridge"] > accuracy["hidden"] + 0.2, accuracy
    assert accuracy["ridge"] > 0.6, accuracy


def test_what_is_reported_is_what_held_out_prompts_do(models: list[Path], tmp_path: Path) -> None:
    report = merge(config(models, gate_mode="ridge"), tmp_path / "out")
    gates = report.notes["gates"]
    assert gates["measured_on"] == "held-out prompts"
    assert len(gates["layers"]) == 3
    for layer in gates["layers"]:
        assert 0 <= layer["accuracy"] <= 1
        assert 0 <= layer["entropy"] <= 1
        assert sum(layer["load"]) == pytest.approx(1, abs=1e-3)
    few = config(models, gate_mode="ridge")
    for expert in few["experts"]:
        expert["positive_prompts"] = expert["positive_prompts"][:2]
    gates = merge(few, tmp_path / "few").notes["gates"]
    assert gates["measured_on"] == "the prompts themselves"


def test_prompts_come_from_files_and_texts(models: list[Path], tmp_path: Path) -> None:
    lines, records = tmp_path / "low.txt", tmp_path / "middle.jsonl"
    lines.write_text("\n".join(DOMAINS["low"]))
    records.write_text("\n".join(f'{{"prompt": "{prompt}"}}' for prompt in DOMAINS["middle"]))
    values = config(models[:2], gate_mode="hidden")
    merge(values, tmp_path / "said")
    for expert, path in zip(values["experts"], (lines, records), strict=True):
        del expert["positive_prompts"]
        expert["prompts_from"] = str(path)
    merge(values, tmp_path / "read")
    assert torch.equal(rows_of(tmp_path / "said"), rows_of(tmp_path / "read"))
    values["experts"][1]["prompts_from"] = "python-docs"
    report = merge(values | {"prompts_per_expert": 5, "prompt_tokens": 20}, tmp_path / "docs")
    assert report.notes["gates"]["prompts"] == 5 + 5


def test_an_interrupted_pass_goes_on(models: list[Path], tmp_path: Path) -> None:
    recipe = make_conversion(config(models, gate_mode="ridge"))
    steps: list[int] = []

    def stop(step: CalibrationStep) -> None:
        steps.append(step.layer)
        if steps == [0, 1]:
            raise KeyboardInterrupt

    plan = plan_conversion(recipe.model, recipe.options)
    with pytest.raises(KeyboardInterrupt):
        plan.decided(Workspace(tmp_path / "work", stop))
    resumed = plan.decided(Workspace(tmp_path / "work", stop))
    assert steps == [0, 1, 2]
    whole = plan.decided(Workspace(tmp_path / "other"))
    assert resumed.notes == whole.notes
    pieces: list[Any] = [
        [tensor.piece for tensor in done.tensors if tensor.name.endswith("gate.weight")] for done in (resumed, whole)
    ]
    assert all((a.values == b.values).all() for a, b in zip(*pieces, strict=True))


def test_parts_have_rows_of_their_own(models: list[Path], tmp_path: Path) -> None:
    report = merge(config(models, gate_mode="ridge", parts=4, parts_per_token=3), tmp_path / "out")
    rows = rows_of(tmp_path / "out")
    assert rows.shape == (3, 12, 32)
    assert (rows[:, 0] - rows[:, 1]).abs().max() > 1e-4
    assert len(report.notes["gates"]["layers"][0]["load"]) == 12
    merge(config(models, gate_mode="hidden", parts=4), tmp_path / "equal")
    rows = rows_of(tmp_path / "equal")
    assert torch.equal(rows[:, 0], rows[:, 3])
