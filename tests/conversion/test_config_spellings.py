"""config.json as people have it: every spelling means what plain transformers computes, in both homes, after export and
in the plan, or it is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lamella.conversion import convert
from lamella.errors import UserError
from lamella.export import export
from lamella.hf.models import load
from lamella.plan.model import read_model
from lamella.recipe.methods.slice import SliceOptions
from lamella.titan.config import decoder_config
from support.models import SIZES, tiny_checkpoint
from support.tiers import slow_but
from support.titan import load_titan

LENGTH = 40
WINDOW = 5
HEAD = "lm_head.weight"
LEFT_OUT = object()
Tensors = dict[str, torch.Tensor]


class Spelling(NamedTuple):
    """How a saved model's folder is changed."""

    family: str
    config: dict[str, Any]
    """Entries of config.json; `LEFT_OUT` removes one."""
    model: dict[str, Any] = {}  # noqa: RUF012
    """What the model itself is made with."""
    tensors: Callable[[Tensors], object] = lambda tensors: None
    glm: str | None = None
    """Why the export to glm4-moe is refused; None: it computes the same."""


def same_head(tensors: Tensors) -> None:
    tensors[HEAD] = tensors["model.embed_tokens.weight"].clone()


LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0}
ROPE = {"rope_parameters": LEFT_OUT}
MIXED = {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}
RIGHT = {
    "tied by the config, another head in the file": Spelling("llama", {"tie_word_embeddings": True}),
    "the same in Qwen2": Spelling("qwen2", {"tie_word_embeddings": True}, glm=None),
    "tied, the same head in the file": Spelling("llama", {"tie_word_embeddings": True}, tensors=same_head),
    "not tied, the same head in the file": Spelling("llama", {}, tensors=same_head),
    "a window in Llama": Spelling("llama", {"sliding_window": WINDOW, "use_sliding_window": True}),
    "layer_types in Llama": Spelling("llama", {"layer_types": ["sliding_attention"] * 3, "sliding_window": WINDOW}),
    "attention_bias in Mistral": Spelling("mistral", {"attention_bias": True}),
    "attention_bias in Qwen2": Spelling("qwen2", {"attention_bias": True}),
    "mlp_bias in Mistral": Spelling("mistral", {"mlp_bias": True}),
    "a window in Mistral": Spelling("mistral", {"sliding_window": WINDOW}, glm="sliding window"),
    "no window in Mistral": Spelling("mistral", {"sliding_window": None}),
    "the window that Mistral has by default": Spelling("mistral", {"sliding_window": LEFT_OUT}),
    "a window that Qwen3 does not use": Spelling("qwen3", {"use_sliding_window": False, "sliding_window": WINDOW}),
    "windows in all layers of Qwen2": Spelling(
        "qwen2", {**MIXED, "max_window_layers": 0, "layer_types": LEFT_OUT}, glm="sliding window"
    ),
    "windows in some layers of Qwen3": Spelling("qwen3", {**MIXED, "layer_types": LEFT_OUT}, glm="sliding window"),
    "gelu": Spelling("llama", {"hidden_act": "gelu"}, {"hidden_act": "gelu"}, glm="its experts compute silu"),
    "layer_types against max_window_layers": Spelling(
        "qwen3", {**MIXED, "max_window_layers": 0, "layer_types": ["full_attention"] * 3}
    ),
    "swish": Spelling("llama", {"hidden_act": "swish"}),
    "rope as before transformers 5": Spelling("llama", ROPE | {"rope_theta": 500.0}),
    "rope scaling as before transformers 5": Spelling(
        "llama", ROPE | {"rope_theta": 500.0, "rope_scaling": {"type": "linear", "factor": 4.0}}
    ),
    "rope in both spellings": Spelling(
        "llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}, "rope_scaling": LINEAR}
    ),
    "another rope_theta beside the rope": Spelling("qwen3", {"rope_parameters": LINEAR, "rope_theta": 9.0}),
    "a factor of rotation that Llama ignores": Spelling("llama", {"partial_rotary_factor": 0.5}),
    "no rms_norm_eps": Spelling("llama", {"rms_norm_eps": LEFT_OUT}),
    "no max_position_embeddings": Spelling("llama", {"max_position_embeddings": LEFT_OUT}),
    "key/value heads null": Spelling("llama", {"num_key_value_heads": None}, {"num_key_value_heads": 4}),
    "Llama's default of key/value heads": Spelling(
        "llama", {"num_key_value_heads": LEFT_OUT}, {"num_key_value_heads": 4}
    ),
    "Mistral's default of key/value heads": Spelling(
        "mistral", {"num_key_value_heads": LEFT_OUT}, {"num_attention_heads": 8, "num_key_value_heads": 8}
    ),
    "Qwen3's default head width": Spelling("qwen3", {"head_dim": LEFT_OUT}, {"head_dim": 128}),
    "a head width of Qwen2": Spelling("qwen2", {"head_dim": 16}, {"head_dim": 16}),
    "torch_dtype": Spelling("llama", {"dtype": LEFT_OUT, "torch_dtype": "float32"}),
}


def save(folder: Path, spelling: Spelling) -> Path:
    tiny_checkpoint(folder, spelling.family, **spelling.model)
    config = json.loads((folder / "config.json").read_text()) | spelling.config
    config = {key: value for key, value in config.items() if value is not LEFT_OUT}
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "model.safetensors")
    spelling.tensors(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def plain(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    """The logits of transformers' own class."""
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert type(model).__module__.startswith("transformers.")
    assert not info["missing_keys"]
    with torch.no_grad():
        return model.eval()(ids).logits


QUICK = ("tied by the config, another head in the file", "windows in some layers of Qwen3", "rope in both spellings")


@pytest.mark.parametrize("name", slow_but(RIGHT, *QUICK))
def test_every_home_computes_what_transformers_does(name: str, tmp_path: Path) -> None:
    spelling = RIGHT[name]
    dense, moe = save(tmp_path / "dense", spelling), tmp_path / "moe"
    convert(dense, moe, SliceOptions(slices=4))
    ids = torch.randint(SIZES["vocab_size"], (2, LENGTH), generator=torch.Generator().manual_seed(1))
    expected = plain(dense, ids)
    with torch.no_grad():
        assert_close(load(moe)(ids).logits, expected)
        for folder in (dense, moe):
            titan = load_titan(folder)
            assert_close(titan(ids), expected)
        planned = sum(weight.numel for weight in read_model(moe).weights())
        assert planned == sum(parameter.numel() for parameter in titan.parameters())
    export(moe, "dense", tmp_path / "back")
    assert_close(plain(tmp_path / "back", ids), expected)
    if spelling.glm:
        with pytest.raises(UserError, match=spelling.glm):
            export(moe, "glm4-moe", tmp_path / "glm")
    else:
        export(moe, "glm4-moe", tmp_path / "glm")
        assert_close(plain(tmp_path / "glm", ids), expected)


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    # fp32, the FFN's sum in another order; logits are of the order of 1
    torch.testing.assert_close(actual, expected, atol=5e-5, rtol=0)


REFUSED = {
    "layer_types in Mistral": (Spelling("mistral", {"layer_types": ["full_attention"] * 3}), "'ministral'"),
    "null layer_types in Mistral": (Spelling("mistral", {"layer_types": None}), "'ministral'"),
    "a window of nothing": (Spelling("mistral", {"sliding_window": 0}), "sliding_window is 0"),
    "sliding layers without a window": (
        Spelling("qwen2", {"layer_types": ["sliding_attention"] * 3}), "there is no window",
    ),
    "sliding layers of SmolLM3 whose window is not used": (
        Spelling("smollm3", {"layer_types": ["sliding_attention"] * 3, "sliding_window": WINDOW}), "there is no window",
    ),
    "a head width of StableLM": (Spelling("stablelm", {"head_dim": 16}), "take head_dim out"),
    "mlp_bias in Granite": (Spelling("granite", {"mlp_bias": True}), r"mlp_bias \(or use_bias\) is true"),
    "mish in OLMo 2": (Spelling("olmo2", {"hidden_act": "mish"}), "hidden_act is 'mish'"),
    "another number of layer_types": (Spelling("qwen3", {"layer_types": ["full_attention"]}), "layer_types"),
    "layers of a kind that the model lacks": (
        Spelling("qwen3", {"layer_types": ["chunked_attention"] * 3}), "chunked_attention",
    ),
    "mlp_bias in Llama": (Spelling("llama", {"mlp_bias": True}), r"mlp_bias \(or use_bias\) is true"),
    "mish": (Spelling("llama", {"hidden_act": "mish"}), "hidden_act is 'mish'"),
    "half of each head rotated, and scaled": (
        Spelling("llama", {"rope_parameters": LINEAR | {"partial_rotary_factor": 0.5}}), "partial_rotary_factor 0.5",
    ),
    "a null rope_theta": (Spelling("llama", ROPE | {"rope_theta": None}), "rope_theta of the rope is None"),
    "a null head_dim in Qwen2": (Spelling("qwen2", {"head_dim": None}), "head_dim is null"),
    "a word for a flag": (Spelling("llama", {"tie_word_embeddings": "yes"}), "tie_word_embeddings"),
    "a null tie": (Spelling("llama", {"tie_word_embeddings": None}), "tie_word_embeddings"),
    "scaling without a factor": (Spelling("llama", {"rope_parameters": {"rope_type": "linear"}}), "factor"),
}  # fmt: skip


@pytest.mark.parametrize(("spelling", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_is_refused(spelling: Spelling, message: str, tmp_path: Path) -> None:
    dense = save(tmp_path / "dense", spelling)
    with pytest.raises(UserError, match=message):
        convert(dense, tmp_path / "moe", SliceOptions(slices=4))
    assert not (tmp_path / "moe").exists()


def test_a_single_file_beside_an_index_is_read_as_transformers_does(tmp_path: Path, caplog) -> None:
    dense, other = tiny_checkpoint(tmp_path / "dense", sharded=True), tiny_checkpoint(tmp_path / "other", seed=1)
    shutil.copyfile(other / "model.safetensors", dense / "model.safetensors")
    ids = torch.arange(LENGTH)[None]
    expected = plain(dense, ids)
    torch.testing.assert_close(expected, plain(other, ids))
    convert(dense, tmp_path / "moe", SliceOptions(slices=4))
    assert "model.safetensors is read, as transformers does" in caplog.text
    with torch.no_grad():
        assert_close(load(tmp_path / "moe")(ids).logits, expected)
    with pytest.raises(UserError, match="a second time; move what is not wanted away"):
        decoder_config(dense)  # torch's reader would load either


def test_an_untied_head_is_said(tmp_path: Path, caplog) -> None:
    dense = save(tmp_path / "dense", RIGHT["tied by the config, another head in the file"])
    convert(dense, tmp_path / "moe", SliceOptions(slices=4))
    assert "the file holds another lm_head.weight" in caplog.text
    assert json.loads((tmp_path / "moe/config.json").read_text())["tie_word_embeddings"] is False
