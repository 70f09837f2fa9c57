"""Fewer experts per token, and fewer twins, than a model was made for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import lamella
from lamella import cli
from lamella.conversion import SliceOptions, convert
from lamella.errors import UserError
from lamella.evaluate.checkpoints import lower
from lamella.hf.models import ConvertedForCausalLM
from lamella.moe.routing import choose_pairs
from support.models import save_llama

IDS = torch.arange(1, 40)[None]


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("dense") / "model", std=0.4)


@pytest.fixture
def twins(dense: Path, tmp_path: Path) -> ConvertedForCausalLM:
    convert(dense, tmp_path / "moe", SliceOptions(slices=4, noise=0.5))
    model, _ = lamella.load(tmp_path / "moe")
    for layer in model.moe_layers:
        torch.nn.init.normal_(layer.router.weight)
        layer.router.selection_bias.zero_()
    return model


@pytest.fixture(scope="module")
def partition(dense: Path) -> ConvertedForCausalLM:
    recipe = {"parts": 4, "active": 3, "calibration": {"num_tokens": 256, "sequence_length": 64}}
    return lamella.convert(dense, method="partition", **recipe)[0]


@torch.no_grad()
def test_a_share_of_twins(twins: ConvertedForCausalLM) -> None:
    routed, chosen = twins(IDS).logits, twins.moe_layers[0].last_routing
    assert chosen is not None
    num_copies_T = (chosen.expert_ids_TK >= 4).sum(1)
    assert num_copies_T.max() > 2  # so that half of them is fewer
    lower(twins, None, 1.0)
    assert torch.equal(twins(IDS).logits, routed)
    lower(twins, None, 0.5)
    halved, fewer = twins(IDS).logits, twins.moe_layers[0].last_routing
    assert fewer is not None
    assert torch.equal((fewer.expert_ids_TK >= 4).sum(1), num_copies_T.clamp(max=2))
    assert not torch.equal(halved, routed)
    lower(twins, None, 0.0)
    twins(IDS)
    assert all(int(layer.last_routing.expert_ids_TK.max()) < 4 for layer in twins.moe_layers if layer.last_routing)


def test_those_that_exceed_most_stay() -> None:
    scores_TE = torch.tensor([[0.1, 0.4, 0.2, 0.9, 0.6, 0.8]])  # of slices, then copies: by 0.8, 0.2 and 0.6
    assert choose_pairs(scores_TE, torch.zeros(3)).tolist() == [[3, 4, 5]]
    assert choose_pairs(scores_TE, torch.zeros(3), 2 / 3).tolist() == [[3, 1, 5]]
    assert choose_pairs(scores_TE, torch.tensor([-0.5, 0.0, 0.0]), 1 / 3).tolist() == [[0, 1, 5]]


@torch.no_grad()
def test_fewer_experts(partition: ConvertedForCausalLM) -> None:
    own, top_k = partition(IDS).logits, partition.moe_layers[0].config.num_experts_per_tok
    lower(partition, top_k, None)
    assert torch.equal(partition(IDS).logits, own)
    lower(partition, top_k - 1, None)
    assert not torch.equal(partition(IDS).logits, own)
    routing = partition.moe_layers[0].last_routing
    assert routing is not None
    assert routing.expert_ids_TK.shape[1] == top_k - 1


def test_refusals(twins: ConvertedForCausalLM, partition: ConvertedForCausalLM, dense: Path) -> None:
    for model, top_k, share, complaint in (
        (twins, 2, None, "twin routing takes one expert of each pair"),
        (twins, None, 1.5, "must be between 0 and 1"),
        (partition, 9, None, r"between 1 and the \d experts"),
        (partition, None, 0.5, "a share of twins is of sliced models"),
        (lamella.load(dense)[0], 1, None, "no experts"),
    ):
        with pytest.raises(UserError, match=complaint):
            lower(model, top_k, share)


def test_the_commands(dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    convert(dense, tmp_path / "moe", SliceOptions(slices=4))
    (tmp_path / "text.txt").write_text("some text to score " * 40)
    words = ["evaluate", str(tmp_path / "moe"), "--data", str(tmp_path / "text.txt"), "--split", "all"]
    cli.app([*words, "--tokens", "64", "--twins", "0.5"], standalone_mode=False)
    cli.app(
        ["generate", str(tmp_path / "moe"), "--prompt", "x", "--max-tokens", "2", "--twins", "0"], standalone_mode=False
    )
    with pytest.raises(UserError, match="takes one expert of each pair"):
        cli.app([*words, "--tokens", "64", "--top-k", "2"], standalone_mode=False)
