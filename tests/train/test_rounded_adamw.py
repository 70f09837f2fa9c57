"""AdamW with bfloat16 moments: beside torch's own, and in a run whose checkpoints it makes smaller."""

from __future__ import annotations

import copy
from pydoc_data import topics

import pytest
import torch

from lamella.plan.command import make_layout
from lamella.plan.memory import Memory
from lamella.plan.model import read_model
from lamella.recipe.training import make_recipe
from lamella.run.folder import RunDir
from lamella.train.rounded_adamw import MOMENTS, RoundedAdamW, stochastically_rounded
from support.models import trainable_moe
from support.training import COMMON, losses, run_many


def test_rounding_gives_a_neighbour_and_the_value_in_the_mean():
    x = torch.tensor([1.0, 1.001, -3.1415, 1e-20, 0.0, 12345.678]).repeat(20000, 1)
    rounded = stochastically_rounded(x, torch.Generator().manual_seed(0)).float()
    assert torch.equal(rounded[:, [0, 4]], x[:, [0, 4]])
    spacing = x[0].abs() / 128
    assert ((rounded - x).abs() <= spacing).all()
    error = (rounded.double().mean(0) - x[0].double()).abs()
    assert (error <= 4 * spacing / 20000**0.5).all()  # 4 standard deviations of a mean of 20,000


def train(optimizer: torch.optim.Optimizer, weights: torch.Tensor, steps: int) -> torch.Tensor:
    """The distances from a goal over the steps, with noisy gradients."""
    generator, goal = torch.Generator().manual_seed(1), torch.linspace(-1, 1, len(weights))
    distances = []
    for _ in range(steps):
        weights.grad = weights.detach() - goal + 0.1 * torch.randn(weights.shape, generator=generator)
        optimizer.step()
        distances.append((weights.detach() - goal).norm())
    return torch.stack(distances)


@pytest.mark.parametrize("beta2", [0.95, 0.999])
def test_it_goes_the_way_of_torchs_adamw(beta2):
    options = {"lr": 0.02, "betas": (0.9, beta2), "eps": 1e-8, "weight_decay": 0.01}
    weights = [torch.nn.Parameter(torch.full((512,), 2.0)) for _ in range(2)]
    ours = train(RoundedAdamW([weights[0]], **options), weights[0], 200)
    theirs = train(torch.optim.AdamW([weights[1]], **options), weights[1], 200)
    # moments are off by at most 1/128 each, by chance, so steps are by about half a percent
    torch.testing.assert_close(ours[:150], theirs[:150], rtol=0.01, atol=0.02)
    assert ours[-1] < 0.1 * ours[0]


def test_it_goes_on_from_a_saved_state_to_the_bit():
    weights = torch.nn.Parameter(torch.full((64,), 2.0))
    optimizer = RoundedAdamW([weights])
    train(optimizer, weights, 5)
    state, there = copy.deepcopy(optimizer.state_dict()), weights.detach().clone()
    train(optimizer, weights, 5)
    again = torch.nn.Parameter(there)
    resumed = RoundedAdamW([again])
    resumed.load_state_dict(state)
    assert all(resumed.state[again][name].dtype == torch.bfloat16 for name in MOMENTS)
    train(resumed, again, 5)
    assert torch.equal(weights, again)


@pytest.mark.slow
def test_a_run_learns_the_same_and_its_checkpoints_are_smaller(tmp_path):
    trainable_moe(tmp_path / "model")
    (tmp_path / "text.md").write_text("\n".join(topics.topics[name] for name in sorted(topics.topics)[:40]))

    def words(out: str, **changes) -> list[str]:
        settings = COMMON | {"model": tmp_path / "model", "out": tmp_path / out, "samples_per_step": 8} | changes
        return [f"{key}={value}" for key, value in settings.items()] + [f"data=[{tmp_path / 'text.md'}]"]

    half = {"optimizer.states": "bfloat16", "parallel.replicate": 2}
    runs = [words("full"), words("half", **half), words("resumed", stop_at_step=5, **half), words("resumed", **half)]
    run_many(tmp_path, 2, runs)
    assert losses(tmp_path, "half") == pytest.approx(losses(tmp_path, "full"), abs=5e-3)
    assert losses(tmp_path, "half") != losses(tmp_path, "full")
    assert losses(tmp_path, "resumed") == losses(tmp_path, "half")
    sizes = {}
    for name, states in (("full", "float32"), ("half", "bfloat16")):
        store = RunDir(tmp_path / name).store()
        files = store.manifest(store.steps()[-1])["files"]
        sizes[name] = sum(entry["bytes"] for file, entry in files.items() if file.endswith(".distcp"))
        values = {"model": str(tmp_path / "model"), "seq_len": 32, "optimizer": {"states": states}}
        layout = make_layout(make_recipe(values), read_model(tmp_path / "model"), 2, "cpu")
        planned = Memory(layout).checkpoint_bytes()
        assert planned < sizes[name] < planned + 200_000  # torch's headers, one for each tensor and rank
    assert sizes["full"] - sizes["half"] > 0.95 * (sizes["full"] - 200_000) / 3
