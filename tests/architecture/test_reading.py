"""transformers' own classes say what a config.json means; the rows of `architecture/` say the same of every tensor."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

from lamella.architecture import reading
from lamella.architecture.families import dense_tensors, sizes_of
from lamella.architecture.reading import answer
from lamella.architecture.rows import FAMILIES
from lamella.architecture.types import Family
from lamella.errors import UserError
from support.tiers import slow_but

SIZES = {
    "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 40,
    "max_position_embeddings": 64, "head_dim": 8, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64,
    "ffn_dim": 24,
}  # fmt: skip
# What people write, each with values that some family takes and some that none does.
ENTRIES: dict[str, list[Any]] = {
    "num_key_value_heads": [None, 1, 2, 4], "head_dim": [None, 8, 16], "attention_bias": [True, False, None],
    "mlp_bias": [True, False], "tie_word_embeddings": [True, False], "n_inner": [None, 48],
    "word_embed_proj_dim": [16, 32], "do_layer_norm_before": [True, False], "_remove_final_layer_norm": [True, False],
    "sliding_window": [None, 8], "use_sliding_window": [True, False], "max_window_layers": [0, 1],
    "layer_types": [["full_attention", "sliding_attention"]], "rope_theta": [1e4, 5e5],
    "rope_scaling": [None, {"type": "linear", "factor": 2.0}], "partial_rotary_factor": [0.5],
    "torch_dtype": ["bfloat16"],
}  # fmt: skip


def own_sizes(family: Family) -> dict[str, Any]:
    sizes = {key: value for key, value in SIZES.items() if key in family.required or key == "max_position_embeddings"}
    return sizes | {"pad_token_id": 0}  # classes have defaults beyond so small a vocabulary


@pytest.mark.parametrize("name", slow_but(FAMILIES, "qwen2", "opt"))
def test_the_tensors_are_those_of_the_class(name: str, tmp_path: Path) -> None:
    family = FAMILIES[name]

    @settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(st.fixed_dictionaries({}, optional={key: st.sampled_from(values) for key, values in ENTRIES.items()}))
    def check(entries: dict[str, Any]) -> None:
        config = own_sizes(family) | entries | {"model_type": family.name}
        (tmp_path / "config.json").write_text(json.dumps(config))
        try:
            expected = tensors_of_class(tmp_path)
        except Exception as error:  # whatever transformers raises: such a model cannot be loaded
            expected = error
        try:
            shapes, sizes = dense_tensors(config), sizes_of(config)
        except UserError:
            return  # refused: what is accepted must be right
        assert not isinstance(expected, Exception), f"transformers refuses {config}: {expected}"
        model, names = expected
        assert shapes == names
        theirs = model.config
        assert sizes.tied == theirs.tie_word_embeddings
        assert sizes.max_positions == theirs.max_position_embeddings
        layers = getattr(model.get_decoder(), family.modules.layers)
        assert [window_of(layer, theirs) for layer in layers] == list(sizes.windows)
        if sizes.rope is not None:
            ropes = (sizes.rope, theirs.rope_parameters)
            kinds = zip(*(r.values() for r in ropes), strict=True) if family.ropes_by_kind else [ropes]
            assert all(ours["rope_theta"] == own["rope_theta"] for ours, own in kinds)

    check()


def tensors_of_class(folder: Path) -> tuple[Any, dict[str, tuple[int, ...]]]:
    """transformers' model of a config.json, without storage, and the tensors that a file of it holds."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    model.tie_weights()
    tied = set(model.all_tied_weights_keys) if model.config.tie_word_embeddings else set()
    return model, {name: tuple(t.shape) for name, t in model.state_dict().items() if name not in tied}


def window_of(layer: torch.nn.Module, config: Any) -> int | None:
    """The window that transformers' attention has in a layer: of its own, or the config's where the class has one."""
    attention = layer.self_attn if hasattr(layer, "self_attn") else layer.attn
    if not getattr(attention, "is_sliding", True):  # EXAONE 4 keeps the window beside it
        return None
    if hasattr(attention, "sliding_window"):
        return attention.sliding_window
    return config.sliding_window if "sliding_window" in type(config).__dataclass_fields__ else None


def test_reading_imports_no_torch() -> None:
    code = """
import sys
from lamella.architecture import reading
from lamella.architecture.families import sizes_of
sizes = sizes_of({"model_type": "mistral", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
                  "num_attention_heads": 8, "vocab_size": 100, "head_dim": None})
assert (sizes.G, sizes.H, sizes.windows) == (8, 8, (4096, 4096)), sizes
assert "torch" not in sys.modules and "transformers" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", slow_but(FAMILIES, "mistral"))
def test_another_process_answers_the_same(name: str) -> None:
    family = FAMILIES[name]
    text = json.dumps(own_sizes(family) | {"model_type": family.name, "torch_dtype": "bfloat16"})
    done = subprocess.run(
        [sys.executable, "-m", "lamella.architecture.reading"],
        input=json.dumps([text]),
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout.splitlines()[-1]) == [answer(text)]


def test_a_reader_that_is_killed_says_nothing_about_the_config(tmp_path, monkeypatch) -> None:
    """In a long-lived process such as the service, what was no answer must not be kept as one."""
    killed = tmp_path / "python"
    killed.write_text("#!/bin/sh\nkill -9 $$\n")
    killed.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(killed))
    monkeypatch.setenv("LAMELLA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(reading, "_answers", {})
    monkeypatch.delitem(sys.modules, "transformers", raising=False)
    with pytest.raises(ChildProcessError, match="signal 9"):
        reading.read_meaning({"model_type": "llama"})
    assert reading._answers == {}


def test_an_answer_is_kept_for_as_long_as_the_libraries_stay(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("LAMELLA_CACHE", str(tmp_path / "cache"))
    monkeypatch.delitem(sys.modules, "transformers", raising=False)
    asked = []
    run = subprocess.run
    monkeypatch.setattr(reading.subprocess, "run", lambda *args, **kwargs: asked.append(1) or run(*args, **kwargs))

    def read(config: dict) -> reading.Reading:
        monkeypatch.setattr(reading, "_answers", {})  # as in another process
        return reading.read_meaning(config)

    first = read({"model_type": "llama"})
    assert read({"model_type": "llama"}) == first
    assert len(asked) == 1
    assert read({"model_type": "llama", "hidden_size": 64}) != first
    for file in (tmp_path / "cache/configs").iterdir():
        file.write_text("[]")
    assert read({"model_type": "llama"}) == first
    assert len(asked) == 3
    monkeypatch.setattr("lamella.architecture.kept._installed", lambda library: b"another version")
    assert read({"model_type": "llama"}) == first
    assert len(asked) == 4
    for _ in range(2):
        with pytest.raises(UserError, match="does not accept"):
            read({"model_type": "llama", "hidden_size": "wide"})
    assert len(asked) == 6
