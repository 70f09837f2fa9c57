"""The name map is invertible and covers every tensor of every family, in both homes."""

from __future__ import annotations

import pytest

from lamella.architecture import names
from lamella.errors import UserError
from support.models import TRAINABLE_FAMILIES, TRAINED_KIN, tiny_moe
from support.titan import load_titan


def test_no_name_stands_twice():
    hf, titan = zip(*names.NAMES, strict=True)
    assert len(set(hf)) == len(hf)
    assert len(set(titan)) == len(titan)


@pytest.mark.parametrize("family", [*TRAINABLE_FAMILIES, *TRAINED_KIN])
def test_map_is_invertible_on_whole_models(family, tmp_path):
    hf = dict(tiny_moe(family, tmp_path).state_dict())
    if family in ("llama", "qwen2", "granite", "gemma"):
        del hf["lm_head.weight"]  # tied: in neither form
    titan = names.from_hf(hf)
    assert names.to_hf(titan) == hf
    assert titan.keys() == load_titan(tmp_path).state_dict().keys()


def test_examples():
    assert names.titan_name("model.layers.11.mlp.router.selection_bias") == "layers.11.moe.router.selection_bias"
    assert names.hf_name("layers.0.attention.qkv_linear.wk.bias") == "model.layers.0.self_attn.k_proj.bias"


def test_unknown_name_is_refused():
    with pytest.raises(UserError, match="has no place"):
        names.titan_name("model.layers.0.mlp.shared_expert.weight")
