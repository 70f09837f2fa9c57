"""A layer's sample is what the whole model in transformers sees there, in every family and every mode."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from lamella.calibrate import CalibrationTokens, calibrate, passes
from lamella.calibrate.anatomy import anatomy_of
from lamella.calibrate.sample import hidden, output
from lamella.checkpoint.source import Checkpoint
from lamella.errors import UserError
from support.calibration import (
    MODELS,
    busiest,
    checkpoint,
    ffn_modules,
    only_kept,
    random_tokens,
    whole_model,
    whole_model_samples,
    whole_sample,
)
from support.gguf_file import write_gguf
from support.models import tiny_checkpoint


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several batches, the last one short, and several chunks in the head."""
    monkeypatch.setattr(passes, "BATCH_TOKENS", 96)
    monkeypatch.setattr(passes, "_HEAD_ELEMENTS", 128 * 100)


def assert_equal(ours: Tensor, theirs: Tensor) -> None:
    """fp32 sums in another order (batches, masked against causal kernels) through three layers."""
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * float(theirs.abs().max()))


@pytest.mark.parametrize("name", MODELS)
def test_samples_are_those_of_the_whole_model(name: str, tmp_path: Path) -> None:
    source, tokens = checkpoint(tmp_path / "model", name), random_tokens()
    results = calibrate(source, tokens, tmp_path / "out", whole_sample, method={}, gradients=True)
    model = whole_model(source)
    expected = whole_model_samples(model, tokens)
    assert list(results) == [0, 1, 2]
    for layer, (x_TD, h_TF, dh_TF) in enumerate(expected):
        assert_equal(results[layer]["x"], x_TD)
        assert_equal(results[layer]["h"], h_TF)
        assert_equal(results[layer]["dh"], dh_TF)
        assert dh_TF.abs().max() > 0
    forward = calibrate(source, tokens, tmp_path / "forward", whole_sample, method={}, layers=[1])
    assert list(forward) == [1]
    assert "dh" not in forward[1]
    assert_equal(forward[1]["x"], expected[1][0])
    assert_equal(forward[1]["h"], expected[1][1])


@pytest.mark.parametrize("name", MODELS)
def test_the_samples_ffn_is_the_layers(name: str, tmp_path: Path) -> None:
    """h and y computed from the sample's matrices, with its activation, are the model's."""
    source, tokens = checkpoint(tmp_path / "model", name), random_tokens(2)
    checked = []

    def compare(layer: int, sample) -> dict[str, Tensor]:
        assert_equal(hidden(sample.ffn, sample.x_TD), sample.h_TF)
        checked.append(output(sample.ffn, sample.h_TF))
        return {}

    calibrate(source, tokens, tmp_path / "out", compare, method={})
    model, seen = whole_model(source), []
    for _, down in ffn_modules(model):
        down.register_forward_hook(lambda module, args, y: seen.append(y.detach().flatten(0, -2)))
    whole_model_samples(model, tokens)
    assert len(checked) == 3
    for ours, theirs in zip(checked, seen, strict=True):
        assert_equal(ours, theirs)


@pytest.mark.parametrize("name", MODELS)
def test_sequential_samples_are_what_the_converted_model_sees(name: str, tmp_path: Path) -> None:
    source, tokens = checkpoint(tmp_path / "model", name), random_tokens()
    results = calibrate(source, tokens, tmp_path / "out", busiest, method={}, replacement=only_kept, layers=[0, 2])
    model = whole_model(source)
    dense = whole_model_samples(model, tokens)
    _, down = ffn_modules(model)[0]
    dropped = torch.ones(48, dtype=torch.bool)
    dropped[results[0]["kept"]] = False
    weight_FD = down.weight.data if name.startswith("gpt2") else down.weight.data.T
    weight_FD[dropped] = 0  # layer 0 keeps half of its neurons, layer 1 all
    converted = whole_model_samples(model, tokens)
    for layer in (0, 2):
        assert_equal(results[layer]["x"], converted[layer][0])
        assert_equal(results[layer]["h"], converted[layer][1])
    assert (converted[2][0] - dense[2][0]).abs().max() > 1e-2  # the replacement matters
    assert set(results) == {0, 2}


def test_a_document_sees_nothing_of_the_one_before(tmp_path: Path) -> None:
    source, tokens = checkpoint(tmp_path / "model", "llama"), random_tokens(1)
    start = 20
    ids_1L, positions_L = tokens.ids_NL, torch.arange(48)
    positions_L[start:] -= start
    both = CalibrationTokens(ids_1L, tokens.labels_NL, positions_L[None])
    alone = CalibrationTokens(ids_1L[:, start:], tokens.labels_NL[:, start:], positions_L[None, start:])
    inside, outside = (
        calibrate(source, t, tmp_path / str(i), whole_sample, method={})[2]["x"] for i, t in enumerate((both, alone))
    )
    assert_equal(inside[start:], outside)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_gguf(family: str, tmp_path: Path) -> None:
    path, tokens = tmp_path / "tiny.gguf", random_tokens(2)
    write_gguf(path, family)
    source = Checkpoint.open(path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32).eval()
    results = calibrate(source, tokens, tmp_path / "out", whole_sample, method={}, gradients=True)
    for layer, (x_TD, _, dh_TF) in enumerate(whole_model_samples(model, tokens)):
        assert_equal(results[layer]["x"], x_TD)
        assert_equal(results[layer]["dh"], dh_TF)


@pytest.mark.slow
def test_the_embedded_model(tmp_path: Path) -> None:
    source, tokens = Checkpoint.open(None), random_tokens(2, 32)
    small = lambda layer, sample: {"x": sample.x_TD, "dh": sample.dh_TF[:, ::16].clone()}  # noqa: E731
    results = calibrate(source, tokens, tmp_path / "out", small, method={}, gradients=True)
    for layer, (x_TD, _, dh_TF) in enumerate(whole_model_samples(whole_model(source), tokens)):
        # Rounding grows through 30 layers: relative to the largest entry, fp32 (6e-8) times a few thousand.
        assert (results[layer]["x"] - x_TD).abs().max() < 3e-4 * x_TD.abs().max()
        assert (results[layer]["dh"] - dh_TF[:, ::16]).abs().max() < 3e-4 * dh_TF.abs().max()


def test_what_cannot_be_calibrated_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="mixtral models cannot be converted"):
        anatomy_of({"model_type": "mixtral"})
    source = checkpoint(tmp_path / "model", "llama")
    for layers in ([3], [], [-1]):
        with pytest.raises(UserError, match="the model has 0 to 2"):
            calibrate(source, random_tokens(), tmp_path / "out", whole_sample, method={}, layers=layers)
    tokens = random_tokens()
    tokens.ids_NL[0, 0] = 128
    with pytest.raises(UserError, match="gives token 128, but the model has 128"):
        calibrate(source, tokens, tmp_path / "out", whole_sample, method={})


_PEAKS = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from support.calibration import random_tokens
from lamella.calibrate import calibrate
from lamella.checkpoint.source import Checkpoint
from lamella.conversion import peak_rss_mib

tokens = random_tokens(16, 128)
for name in {names!r}:
    folder = Path({folder!r}) / name
    mean = lambda layer, sample: {{"x": sample.dh_TF.mean(0)}}
    calibrate(Checkpoint.open(folder), tokens, folder / "out", mean, method={{}}, gradients=True)
    print(peak_rss_mib())
"""


@pytest.mark.slow
def test_peak_memory_does_not_grow_with_the_layers(tmp_path: Path) -> None:
    D, F, V, T = 128, 512, 16384, 2048
    sizes = {"hidden_size": D, "head_dim": 32, "intermediate_size": F, "vocab_size": V}
    depths = {"warm": 2, "shallow": 8, "deep": 56}
    for name, layers in depths.items():
        tiny_checkpoint(tmp_path / name, num_hidden_layers=layers, **sizes)
    code = _PEAKS.format(tests=str(Path(__file__).parents[1]), folder=str(tmp_path), names=list(depths))
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    warm, shallow, deep = (float(line) for line in run.stdout.split())
    one_layer = (4 * D * D + 3 * D * F + T * D) * 4 / 2**20  # its weights and its input: 2 MiB
    assert deep - shallow < 0.25 * 48 * one_layer  # modules without storage, the allocator's slack
    assert deep - warm < T * V * 4 / 2**20  # all logits at once would be 128 MiB
