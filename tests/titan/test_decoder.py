"""The two homes of the model give the same logits, for every family."""

from __future__ import annotations

import json

import pytest
import torch

from lamella.errors import UserError
from lamella.titan.config import decoder_config
from lamella.titan.context import ContextShare
from lamella.titan.masks import document_mask
from lamella.titan.routed import Aim
from support.models import HEADS, PARTITIONED, TRAINABLE_FAMILIES, TRAINED_KIN, tiny_moe
from support.tiers import slow_but
from support.titan import load_titan

# fp32, logits of order 1 to 10, another order of summation in attention and experts
FP32 = 2e-5


@pytest.mark.parametrize(
    "family", slow_but([*TRAINABLE_FAMILIES, *TRAINED_KIN], *TRAINABLE_FAMILIES, "olmo2", "granite")
)
@pytest.mark.parametrize("routing", ["twin", "flat"])
def test_logits_equal_those_of_transformers(family, routing, tmp_path):
    hf = tiny_moe(family, tmp_path, routing=routing)
    titan = load_titan(tmp_path)
    tokens = torch.randint(hf.config.vocab_size, (2, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        difference = (titan(tokens) - hf(tokens).logits).abs().max()
    assert difference < FP32


@pytest.mark.parametrize("family", TRAINABLE_FAMILIES)
def test_logits_of_a_partitioned_model_equal_those_of_transformers(family, tmp_path):
    hf = tiny_moe(family, tmp_path, moe_changes=PARTITIONED)
    titan = load_titan(tmp_path)
    tokens = torch.randint(hf.config.vocab_size, (2, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        difference = (titan(tokens) - hf(tokens).logits).abs().max()
    assert difference < FP32
    first, last = (len(layer.experts.trainable.down_proj) for layer in hf.moe_layers)
    assert (first, last) == (6, 5)


@pytest.mark.parametrize("activation", ["gelu", "gelu_pytorch_tanh", "relu"])
def test_other_activations_equal_those_of_transformers(activation, tmp_path):
    """Of the experts and of the layer that stays dense."""
    hf = tiny_moe("llama", tmp_path, moe_changes={"activation": activation}, hidden_act=activation)
    titan, tokens = load_titan(tmp_path), torch.arange(48).view(2, 24)
    with torch.no_grad():
        assert (titan(tokens) - hf(tokens).logits).abs().max() < FP32


SOFT = {"layers": [1], "num_experts": 2, "num_experts_per_tok": 1, "gate": "softmax", "route_scale": 2.0}


@pytest.mark.parametrize("family", TRAINABLE_FAMILIES)
@pytest.mark.parametrize("heads", [HEADS, SOFT], ids=["heads", "groups"])
def test_logits_with_attention_experts_equal_those_of_transformers(family, heads, tmp_path):
    hf = tiny_moe(family, tmp_path, heads=heads)
    titan = load_titan(tmp_path)
    tokens = torch.randint(hf.config.vocab_size, (2, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert (titan(tokens) - hf(tokens).logits).abs().max() < FP32
        hf.set_mode("dense")
        difference = (titan(tokens, mode="dense") - hf(tokens).logits).abs().max()
        assert (titan(tokens) - hf(tokens).logits).abs().max() > 0.01
    assert difference < FP32


@pytest.mark.faults
def test_attention_experts_learn_where_one_gets_no_token(tmp_path):
    tiny_moe("llama", tmp_path, heads=HEADS)
    titan = load_titan(tmp_path).train()
    titan.routed_heads[0].router.selection_bias[2] = -100
    titan.routed_heads[0].aim = Aim(auxiliary_factor=1.0)
    tokens = torch.arange(32).view(2, 16)
    titan(tokens).square().mean().backward()
    assert all(p.grad.isfinite().all() for p in titan.parameters() if p.grad is not None)
    first, second = (heads.router for heads in titan.routed_heads)
    assert first.weight.grad[:3].any()
    assert second.gate_scale.grad.all()
    assert titan.routed_heads[0].statistics[:4].tolist() == [32, 32, 0, 32]


@pytest.mark.parametrize("heads", [None, HEADS], ids=["dense attention", "attention experts"])
def test_packed_documents_equal_documents_alone(heads, tmp_path):
    hf = tiny_moe("llama", tmp_path, heads=heads)
    titan = load_titan(tmp_path)
    a, b = torch.arange(3, 12)[None], torch.arange(20, 27)[None]
    positions = torch.cat([torch.arange(9), torch.arange(7)])[None]
    with torch.no_grad():
        packed = titan(torch.cat([a, b], dim=1), positions)
        alone = torch.cat([hf(a).logits, hf(b).logits], dim=1)
    assert (packed - alone).abs().max() < FP32


def test_document_mask_has_window_and_documents():
    mask = document_mask(torch.tensor([[0, 1, 2, 0, 1]]), window=2)[0, 0].int().tolist()
    assert mask == [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 1, 1, 0, 0], [0, 0, 0, 1, 0], [0, 0, 0, 1, 1]]


def test_tied_head_is_one_parameter_and_saved_once(tmp_path):
    tiny_moe("llama", tmp_path)
    titan = load_titan(tmp_path)
    assert titan.lm_head.weight is titan.tok_embeddings.weight
    assert "lm_head.weight" not in titan.state_dict()


def test_statistics_are_gathered_in_training_only(tmp_path):
    tiny_moe("llama", tmp_path)
    titan = load_titan(tmp_path)
    tokens = torch.arange(32).view(2, 16)
    titan.eval()(tokens)
    layer = titan.moe_layers[0]
    assert layer.statistics.eq(0).all()
    layer.aim = Aim(next_share=torch.tensor(1.0, dtype=torch.float64))
    titan.train()(tokens)
    E = layer.moe.num_experts
    assert layer.statistics[:E].sum() == 32 * layer.moe.num_experts_per_tok
    assert layer.statistics[E] == 32
    assert torch.equal(layer.statistics[E + 1 :] / 32, torch.ones(layer.moe.num_frozen_experts))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "lamella_gpt2"}, "model_type 'gpt2' cannot be trained"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}}, "rope scaling 'yarn'"),
        ({"hidden_act": "mish"}, "hidden_act is 'mish'"),
        ({"model_type": "lamella_cohere"}, "'cohere' cannot be trained: its norms subtract the mean"),
    ],
)
def test_other_architectures_are_refused(change, message, tmp_path):
    tiny_moe("llama", tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=message):
        decoder_config(tmp_path)


def test_a_window_of_some_layers_is_theirs_alone(tmp_path):
    hf = tiny_moe("qwen2", tmp_path, use_sliding_window=True, sliding_window=5, max_window_layers=1)
    titan, tokens = load_titan(tmp_path), torch.arange(40).view(2, 20)
    assert titan.config.windows == (None, 5)
    with torch.no_grad():
        assert (titan(tokens) - hf(tokens).logits).abs().max() < FP32
        for block in titan.layers.values():
            block.window = None
        assert (titan(tokens) - hf(tokens).logits).abs().max() > 1e-3


@pytest.mark.parametrize("window", [None, 3])
def test_the_parts_of_a_document_mask_are_rows_of_the_whole(window):
    positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2], [0, 0, 1, 2, 3, 4, 5, 6]])
    whole = document_mask(positions, window)
    parts = [document_mask(positions, window, ContextShare(rank, 2)) for rank in range(2)]
    order = ContextShare(0, 2).order(8)
    assert order.tolist() == [0, 1, 6, 7, 2, 3, 4, 5]
    assert torch.equal(torch.cat(parts, dim=2), whole[:, :, order][..., order])


@pytest.mark.slow
def test_flex_attention_is_asked_for_the_same_mask(tmp_path):
    tiny_moe("llama", tmp_path)
    config = decoder_config(tmp_path, "flex")
    positions = torch.cat([torch.arange(100), torch.arange(156)])[None]
    with torch.device("meta"):
        model = config.build()
    model.context = ContextShare(1, 2)
    mask = model.get_attention_masks(positions)
    every = [torch.arange(n) for n in (128, 256)]
    asked = mask.mask_mod(torch.tensor(0), torch.tensor(0), every[0][:, None], every[1][None])
    assert torch.equal(asked, document_mask(positions, context=model.context)[0, 0])
    assert mask.shape == (1, 1, 128, 256)
