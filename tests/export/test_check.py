"""What the check of an export reaches, and what stands beside the weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, MistralConfig, Qwen2Config

from lamella.errors import UserError
from lamella.export import check, export
from lamella.export.check import Difference, check_reloaded, untipped
from lamella.export.spans import MIN_TOKENS, layer_windows, spans_to_check
from support.models import save_tokenizer
from support.trained_model import LLAMA3_ROPE, save_trained

WINDOW = {"sliding_window": 192, "max_position_embeddings": 512}


def change_config(folder: Path, **changes) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_the_check_reaches_past_the_window(tmp_path: Path) -> None:
    source = save_trained(tmp_path / "moe", family="mistral", **WINDOW)
    report = export(source, "dense", tmp_path / "dense", mode="dense")
    assert report.parity is not None
    assert report.parity.endswith("224 tokens, and 64 tokens spread up to position 511")
    change_config(tmp_path / "dense", sliding_window=None)
    with pytest.raises(UserError, match="differs"):
        check_reloaded(source, tmp_path / "dense", "dense")
    # 128 tokens see nothing of it
    assert check_reloaded(source, tmp_path / "dense", "dense", tokens=128).max_abs_logit_diff < 2e-5


@pytest.mark.parametrize("rope_type", ["dynamic", "llama3"])
def test_the_check_reaches_past_the_scaling_threshold(tmp_path: Path, rope_type: str) -> None:
    rope = LLAMA3_ROPE if rope_type == "llama3" else {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
    source = save_trained(tmp_path / "moe", rope_parameters=rope, max_position_embeddings=512)
    export(source, "glm4-moe", tmp_path / "glm")
    lost = {"rope_type": "default", "rope_theta": rope["rope_theta"]}
    change_config(tmp_path / "glm", rope_parameters=lost, rope_scaling=None)
    with pytest.raises(UserError, match="differs"):
        check_reloaded(source, tmp_path / "glm")


def test_a_length_that_costs_too_much_is_said() -> None:
    config = MistralConfig(sliding_window=4096, max_position_embeddings=32768)
    small, large = spans_to_check(config, 100_000_000), spans_to_check(config, 7_000_000_000)
    assert (small.tokens, small.uncovered) == (4128, None)
    assert large.tokens == pytest.approx(MIN_TOKENS, rel=0.2)
    assert large.describe().endswith("not covered: the attention window of 4096 tokens")
    assert large.last_position == 32767
    assert spans_to_check(config, 7_000_000_000, tokens=4200).uncovered is None


def test_windows_are_those_that_the_class_applies() -> None:
    assert set(layer_windows(LlamaConfig(sliding_window=16))) == {None}
    assert set(layer_windows(MistralConfig())) == {4096}
    assert set(layer_windows(Qwen2Config(sliding_window=16))) == {None}
    mixed = Qwen2Config(sliding_window=16, use_sliding_window=True, num_hidden_layers=4, max_window_layers=1)
    assert layer_windows(mixed) == [None, 16, 16, 16]


@pytest.mark.parametrize("target", ["glm4-moe", "dense"])
def test_a_head_that_is_not_the_embedding_survives(tmp_path: Path, target: str) -> None:
    """The config says tied, the file holds another head; both readers must take the file's."""
    source = save_trained(tmp_path / "moe", tie_word_embeddings=True)
    tensors = load_file(source / "model.safetensors")
    tensors["lm_head.weight"] = torch.randn_like(tensors["model.embed_tokens.weight"])
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    export(source, target, tmp_path / "out", mode="dense" if target == "dense" else None)
    assert json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"] is False
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(model.lm_head.weight, tensors["lm_head.weight"])


def test_sidecars_survive(tmp_path: Path) -> None:
    source = save_tokenizer(save_trained(tmp_path / "moe", vocab_size=258))
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.chat_template = {"default": "{{ messages[0].content }}", "tools": "TOOLS {{ messages[0].content }}"}
    tokenizer.save_pretrained(source)
    (source / "LICENSE").write_text("free")
    export(source, "glm4-moe", tmp_path / "glm")
    assert (tmp_path / "glm/LICENSE").read_text() == "free"
    messages = [{"role": "user", "content": "hello"}]
    reloaded = AutoTokenizer.from_pretrained(tmp_path / "glm")
    rendered = reloaded.apply_chat_template(messages, chat_template="tools", tokenize=False)
    assert rendered == "TOOLS hello"


@pytest.mark.parametrize(
    ("changed", "first_tie", "expected"),
    [
        ({}, 40, Difference(1e-4, 0)),
        ({19: 0.04}, 40, Difference(0.04, 0)),  # no tie explains it
        ({19: 0.04}, 12, Difference(1e-4, 1)),
        ({11: 0.04, 19: 0.04}, 12, Difference(0.04, 1)),  # one is before the tie
        ({19: 0.5}, 12, Difference(0.5, 0)),  # more than a tipped choice moves
        (dict.fromkeys(range(15, 20), 0.04), 12, Difference(0.04, 0)),  # five of forty are too many
    ],
)
def test_what_a_tipped_choice_explains_is_left_out(changed, first_tie, expected) -> None:
    by_place = torch.full((40,), 1e-4, dtype=torch.float64)
    for place, value in changed.items():
        by_place[place] = value
    assert untipped(by_place, first_tie) == pytest.approx(expected)


def test_a_wrong_export_is_refused_where_every_choice_might_tip(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check, "TIE", 10.0)
    source = save_trained(tmp_path / "moe")
    assert check.source_logits(source, "routed")[0][0].first_tie == 0
    assert export(source, "glm4-moe", tmp_path / "glm").max_abs_logit_diff < 1e-4
    file = tmp_path / "glm" / "model.safetensors"
    damaged = load_file(file)
    lost = next(name for name in damaged if name.endswith("experts.0.down_proj.weight"))
    save_file(damaged | {lost: torch.zeros_like(damaged[lost])}, file, {"format": "pt"})
    with pytest.raises(UserError, match="differs"):
        check_reloaded(source, tmp_path / "glm")
