"""GGUF in: the same tensors as transformers dequantises, and clear refusals."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from lamella.checkpoint.source import Checkpoint
from lamella.conversion import SliceOptions, convert
from lamella.errors import UserError
from lamella.hf.models import load
from support.gguf_file import write_gguf


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_tensors_are_those_of_transformers(family: str, tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(path, family)
    source = Checkpoint.open(path)
    # For qwen3 transformers does not read head_dim from the file: it is told here.
    config = AutoConfig.from_pretrained(tmp_path, gguf_file=path.name)
    config.head_dim = source.config["head_dim"]
    dense = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, config=config, dtype=torch.float32)
    expected = dense.state_dict()
    assert source.tensors.keys() == expected.keys()
    for name, tensor in source.tensors.items():
        whole = tensor.read(0, tensor.numel)
        assert torch.equal(whole.view(tensor.shape), expected[name]), name
        start, count = tensor.numel // 3, tensor.numel // 2
        assert torch.equal(tensor.read(start, count), whole[start : start + count]), name


def test_conversion_keeps_the_logits(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(path)
    convert(path, tmp_path / "moe", SliceOptions(slices=4))
    dense = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32).eval()
    tokens = torch.arange(64).view(2, 32)
    with torch.no_grad():
        difference = load(tmp_path / "moe")(tokens).logits - dense(tokens).logits
    assert difference.abs().max() <= 1e-5  # fp32, another order of summation; see test_convert.FP32_BOUND
    assert "license: mit" in (tmp_path / "moe/README.md").read_text()
    assert (tmp_path / "moe/generation_config.json").exists()


def test_refusals(tmp_path: Path) -> None:
    path, out = tmp_path / "tiny.gguf", tmp_path / "moe"
    write_gguf(path)
    data = path.read_bytes()
    path.write_bytes(data[:-5000])
    with pytest.raises(UserError, match="truncated"):
        convert(path, out)
    path.write_bytes(b"GGML" + data[4:])
    with pytest.raises(UserError, match="not a GGUF file"):
        convert(path, out)
    write_gguf(path, extra={"rope_freqs.weight": np.ones(4, np.float32)})
    with pytest.raises(UserError, match="scales its rope"):
        convert(path, out)
    write_gguf(path, rope="yarn")
    with pytest.raises(UserError, match="scales its rope"):
        convert(path, out)
    write_gguf(path, extra={"blk.0.strange.weight": np.ones(4, np.float32)})
    with pytest.raises(UserError, match=r"not of this architecture: model\.layers\.0\.strange"):
        convert(path, out)
    assert [p.name for p in tmp_path.iterdir()] == ["tiny.gguf"]


@pytest.mark.slow
def test_the_embedded_model_is_its_gguf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd) -> None:
    """As it is made at its first use, which draws no bars of libraries."""
    from lamella.architecture.embedded import embedded_gguf

    monkeypatch.setenv("LAMELLA_CACHE", str(tmp_path))
    from_gguf, folder = Checkpoint.open(embedded_gguf()), Checkpoint.open(None)
    assert list(tmp_path.glob("*/config.json"))
    assert capfd.readouterr() == ("", "")
    assert from_gguf.tensors.keys() == folder.tensors.keys()
    assert Checkpoint.open("embedded").name == folder.name
    for name, tensor in folder.tensors.items():
        assert torch.equal(from_gguf.tensors[name].read(0, tensor.numel), tensor.read(0, tensor.numel)), name


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("LAMELLA_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match="set LAMELLA_CACHE to another folder"):
        Checkpoint.open("embedded")
