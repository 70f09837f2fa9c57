"""Exports in another dtype and in several files, and what their cards say."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from lamella.cli import app
from lamella.errors import UserError
from lamella.export import export
from lamella.export.check import check_reloaded
from lamella.export.target import parse_size
from support.bpe import save_bpe
from support.models import save_tokenizer
from support.trained_model import save_trained

SOFTMAX = {"gate": "softmax", "routing": "flat"}
TARGETS: dict[str, dict[str, Any]] = {
    "glm4-moe": {},
    "mixtral": {"selection_bias": False, "moe": SOFTMAX},
    "qwen2-moe": {"selection_bias": False, "family": "qwen2", "moe": SOFTMAX},
    "ernie": {"moe": SOFTMAX},
    "dense": {},
}


@pytest.mark.parametrize("dtype", ["bf16", "f16"])
@pytest.mark.parametrize(("target", "changes"), TARGETS.items(), ids=TARGETS)
def test_narrowed_it_is_the_source_with_the_same_rounding(
    tmp_path: Path, target: str, changes: dict[str, Any], dtype: str
) -> None:
    source = save_trained(tmp_path / "moe", **changes)
    mode = "dense" if target == "dense" else None
    report = export(source, target, tmp_path / "out", dtype=dtype, mode=mode)
    assert report.max_abs_logit_diff is not None
    assert report.max_abs_logit_diff < 5e-5  # fp32 sums in another order
    assert report.parity is not None
    assert "to the source as it is top-1" in report.parity
    wanted = {"bf16": torch.bfloat16, "f16": torch.float16}[dtype]
    for name, tensor in load_file(tmp_path / "out/model.safetensors").items():
        routes = name.endswith((".gate.weight", "e_score_correction_bias"))
        assert tensor.dtype == (torch.float32 if routes else wanted), name
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").dtype == wanted


def test_widened_it_is_exact_and_holds_any_routing_scale(tmp_path: Path) -> None:
    changes = {"selection_bias": False, "moe": SOFTMAX | {"route_scale": 3.0}, "dtype": torch.bfloat16}
    source = save_trained(tmp_path / "moe", **changes)
    with pytest.raises(UserError, match="would be rounded; --dtype f32 holds them"):
        export(source, "mixtral", tmp_path / "out")
    report = export(source, "mixtral", tmp_path / "out", dtype="f32")
    assert report.max_abs_logit_diff is not None
    assert report.max_abs_logit_diff < 5e-5
    assert {tensor.dtype for tensor in load_file(tmp_path / "out/model.safetensors").values()} == {torch.float32}


@pytest.mark.faults
def test_the_check_of_a_narrowed_export_notices_what_is_lost(tmp_path: Path) -> None:
    source = save_trained(tmp_path / "moe")
    export(source, "glm4-moe", tmp_path / "out", dtype="bf16", check=False)
    file = tmp_path / "out/model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.mlp.experts.5.down_proj.weight"].zero_()
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match="differs"):
        check_reloaded(source, tmp_path / "out")


def test_values_that_float16_cannot_hold_are_refused(tmp_path: Path) -> None:
    source = save_trained(tmp_path / "moe")
    file = source / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"][0] = 1e5
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match="beyond float16's range; use dtype bfloat16 or float32"):
        export(source, "glm4-moe", tmp_path / "out", dtype="f16")
    assert [path.name for path in tmp_path.iterdir()] == ["moe"]


def test_files_are_as_small_as_asked(tmp_path: Path) -> None:
    source = save_trained(tmp_path / "moe")
    report = export(source, "glm4-moe", tmp_path / "out", max_shard_size="100KB")
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) == len(set(json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
                                 ["weight_map"].values())) >= 3  # fmt: skip
    for file in files:
        with safe_open(file, "pt") as opened:
            assert sum(opened.get_tensor(name).nbytes for name in opened.keys()) <= 100_000  # noqa: SIM118
    assert report.max_abs_logit_diff is not None
    assert report.max_abs_logit_diff < 2e-5


def test_sizes() -> None:
    assert (parse_size("2GB"), parse_size("1.5 KiB"), parse_size("500mb")) == (2 * 10**9, 1536, 5 * 10**8)
    for text in ("2", "GB", "-1GB", "0MB", "two GB", "2TB"):
        with pytest.raises(UserError, match="write a size such as 2GB"):
            parse_size(text)


def test_options_that_a_target_has_not_are_refused(tmp_path: Path) -> None:
    source = save_trained(tmp_path / "moe")
    with pytest.raises(UserError, match="a GGUF file is one file"):
        export(source, "gguf", tmp_path / "out", max_shard_size="1GB")
    with pytest.raises(UserError, match=r"unknown dtype 'FP32'.*known: F32, BF16, F16"):
        export(source, "glm4-moe", tmp_path / "out", dtype="fp32")
    assert [path.name for path in tmp_path.iterdir()] == ["moe"]


@pytest.fixture
def with_tokenizer(tmp_path: Path) -> Path:
    return save_tokenizer(save_trained(tmp_path / "moe", vocab_size=258))


def test_the_card_has_the_perplexities(with_tokenizer: Path, tmp_path: Path) -> None:
    """Of a report beside the model, of one that is named, and of a text that is measured now."""
    beside = {"data": "beside", "model": {"perplexity": 12.5, "tokens": 100}, "dense": {"perplexity": 13.0}}
    (with_tokenizer / "perplexity-a.json").write_text(json.dumps(beside))
    runner = CliRunner()
    words = ["evaluate", str(with_tokenizer), "--tokens", "64", "--seq-len", "32", "--json", str(tmp_path / "r.json")]
    assert runner.invoke(app, words).exit_code == 0
    (tmp_path / "text.md").write_text("# A text\n\nSome words that nobody has trained on.\n" * 400)
    words = ["export", str(with_tokenizer), "--to", "glm4-moe", "--out", str(tmp_path / "out"), "--no-check"]
    words += ["--perplexity", str(tmp_path / "r.json"), "--perplexity", str(tmp_path / "text.md")]
    result = runner.invoke(app, words)
    assert result.exit_code == 0, result.output
    card = (tmp_path / "out/README.md").read_text()
    assert "  - beside: 12.5000 over 100 tokens; dense 13.0000.\n" in card
    measured = json.loads((tmp_path / "r.json").read_text())["model"]
    assert f"  - python-docs: {measured['perplexity']:.4f} over {measured['tokens']} tokens.\n" in card
    assert f"  - {tmp_path / 'text.md'}: " in card


def test_a_report_that_is_none_is_refused(with_tokenizer: Path, tmp_path: Path) -> None:
    for name, text, words in (("no.json", None, "does not exist"), ("odd.json", "{}", "is no report of")):
        if text is not None:
            (tmp_path / name).write_text(text)
        asked = ["export", str(with_tokenizer), "--to", "glm4-moe", "--out", str(tmp_path / "out")]
        result = CliRunner().invoke(app, [*asked, "--perplexity", str(tmp_path / name)])
        assert isinstance(result.exception, UserError)
        assert words in str(result.exception)
        assert not (tmp_path / "out").exists()


@pytest.mark.faults
@pytest.mark.slow
@pytest.mark.parametrize("target", ["glm4-moe", "gguf"])
def test_a_disk_that_becomes_full_leaves_nothing(tmp_path: Path, target: str) -> None:
    """A real file system of 150 kB, where one can be mounted, and one line. The room is not looked at beforehand, as if
    somebody else had filled it meanwhile."""
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=150k", "tmpfs", small], capture_output=True)
    if mounted.returncode:
        pytest.skip("no file system can be mounted here")
    try:
        source = save_bpe(save_trained(tmp_path / "moe", vocab_size=320))
        code = "import lamella.checkpoint.folder as folder; folder._SPARE_BYTES = -(1 << 40); "
        code += "from lamella.cli import main; main()"
        words = ["export", str(source), "--to", target, "--out", str(small / "out")]
        done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
        assert done.returncode == 2, done.stderr
        said = f"error: the disk of {small / 'out'} became full; nothing was kept"
        assert done.stderr.strip().splitlines()[-1] == said
        assert list(small.iterdir()) == []
    finally:
        subprocess.run(["umount", small], check=True)
