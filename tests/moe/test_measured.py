"""The expert path that is measured to be the fastest is taken, measured once, and kept."""

from __future__ import annotations

import json

import pytest
import torch

from lamella.moe.packed import Experts
from lamella.moe.paths import measured
from lamella.moe.paths.choose import PATHS
from lamella.moe.paths.measured import fastest
from lamella.moe.routing import Routing

T, D, F, S, K = 300, 16, 8, 2, 2
NAMES = ("loop", "grouped", "tiled")


@pytest.fixture(autouse=True)
def nothing_known():
    measured.forget()
    yield
    measured.forget()


def layer(tokens: int = T) -> tuple[torch.Tensor, Routing, Experts, Experts]:
    torch.manual_seed(0)
    frozen, trainable = (Experts(torch.randn(S, 2 * F, D), torch.randn(S, D, F)) for _ in range(2))
    trainable = Experts(*(t.requires_grad_() for t in trainable))
    ids_TK = torch.zeros(tokens, K, dtype=torch.int64) + torch.arange(K)  # all rows to two experts, two without any
    return torch.randn(tokens, D), Routing(ids_TK, torch.ones(tokens, K)), frozen, trainable


class Clock:
    """Says how long each path takes, and what it was asked to run."""

    def __init__(self, **seconds: float):
        self.seconds = seconds
        self.counts: list[list[int]] = []

    def __call__(self, path, x_TD, routing, frozen, trainable) -> float:
        name = next(name for name, function in PATHS.items() if function is path)
        E = len(frozen.down_proj) + len(trainable.down_proj)
        self.counts.append(torch.bincount(routing.expert_ids_TK.flatten(), minlength=E).tolist())
        assert all(len(set(ids)) == K for ids in routing.expert_ids_TK.tolist())
        return self.seconds[name]


def take(clock: Clock | None, file, tokens: int = T) -> str:
    return fastest(*layer(tokens), {name: PATHS[name] for name in NAMES}, clock, file)


def test_the_fastest_is_taken_on_balanced_rows_and_not_measured_again(tmp_path):
    file = tmp_path / "cache" / "paths.json"
    clock = Clock(loop=3.0, grouped=1.0, tiled=2.0)
    assert take(clock, file) == "grouped"
    assert clock.counts == [[150, 150, 150, 150]] * 3  # though the layer's own rows go to two experts
    assert take(clock, file) == take(clock, file, tokens=T + 1) == "grouped"  # both are up to 512 tokens
    assert len(clock.counts) == 3
    assert take(Clock(loop=1.0, grouped=2.0, tiled=3.0), file, tokens=600) == "loop"
    assert sorted(json.loads(file.read_text()).values()) == ["grouped", "loop"]


def test_another_process_takes_what_was_kept(tmp_path):
    file = tmp_path / "paths.json"
    take(Clock(loop=3.0, grouped=1.0, tiled=2.0), file)
    measured.forget()
    assert take(None, file) == "grouped"


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"a": "grouped"}'])
def test_a_damaged_file_is_measured_again(tmp_path, content):
    file = tmp_path / "paths.json"
    file.write_text(content)
    assert take(Clock(loop=3.0, grouped=2.0, tiled=1.0), file) == "tiled"


def test_nothing_is_measured_for_a_few_tokens_or_one_path(tmp_path):
    assert take(None, tmp_path / "no", tokens=measured.LEAST_TOKENS - 1) == "loop"
    assert fastest(*layer(), {"tiled": PATHS["tiled"]}, None, tmp_path / "no") == "tiled"
    assert not (tmp_path / "no").exists()


def test_the_clock_runs_every_path_and_leaves_the_layers_gradients_alone(tmp_path):
    x_TD, routing, frozen, trainable = layer()
    paths = {name: PATHS[name] for name in NAMES}
    assert fastest(x_TD, routing, frozen, trainable, paths, None, tmp_path / "paths.json") in NAMES
    assert trainable.down_proj.grad is None
    assert torch.is_grad_enabled()
    with torch.no_grad():
        forward = measured.shape_of(x_TD, routing, frozen, trainable)
    assert not forward.trains
    assert measured.shape_of(x_TD, routing, frozen, trainable).trains


def test_a_path_without_memory_is_not_taken(tmp_path):
    def too_large(*_):
        raise torch.OutOfMemoryError("as much as there is")

    assert fastest(*layer(), {"loop": too_large, "tiled": PATHS["tiled"]}, None, tmp_path / "p.json") == "tiled"


def test_under_compilation_the_first_is_taken(tmp_path):
    arguments = layer()

    def named(x):
        path = fastest(x, *arguments[1:], {name: PATHS[name] for name in NAMES}, None, tmp_path / "p.json")
        return x + NAMES.index(path)

    torch.compiler.reset()
    assert torch.equal(torch.compile(named, backend="eager")(arguments[0]), arguments[0])
    assert not (tmp_path / "p.json").exists()
