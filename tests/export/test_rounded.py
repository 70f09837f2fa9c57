"""Lamella's own form with frozen experts in int8 or int4: what it holds, who reads it, and who refuses it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel
from typer.testing import CliRunner

from lamella.cli import app
from lamella.errors import UserError
from lamella.export import export
from lamella.generation import open_model
from lamella.hf.models import load
from lamella.hf.offload import expert_cache
from lamella.hf.packing import packed_bytes
from lamella.moe.matrices import dequantised, rounded
from support.models import PARTITIONED, save_tokenizer, tiny_moe
from support.trained_model import save_trained

DTYPES = ("int8", "int4")
# Products round inputs and outputs to bfloat16, by 2^-9 of each; some of these add up over the layers.
BFLOAT16 = 2e-2


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Routers, biases and twins by chance."""
    return save_trained(tmp_path_factory.mktemp("source") / "moe", vocab_size=512)


@pytest.fixture(scope="module")
def exports(source: Path) -> dict[str, Path]:
    found = {}
    for dtype in DTYPES:
        report = export(source, "lamella", source.parent / dtype, dtype=dtype)
        assert report.parity is not None
        assert "to the source as it is top-1" in report.parity
        found[dtype] = report.out
    return found


def logits(model: PreTrainedModel, tokens: int = 12) -> torch.Tensor:
    ids = torch.arange(tokens)[None] * 7 % model.config.vocab_size
    with torch.inference_mode():
        return model(ids).logits


def stands_for(source: Path, dtype: str) -> PreTrainedModel:
    """The source in float32, with the frozen experts that the rounded ones stand for."""
    model = load(source, torch.float32)
    for layer in model.moe_layers:
        for parameter in layer.experts.frozen_parameters():
            parameter.data = dequantised(*rounded(parameter.data, dtype), parameter.shape[-1])
    return model


@pytest.mark.parametrize("dtype", DTYPES)
def test_frozen_experts_are_rounded_and_all_else_is_copied(source: Path, exports: dict[str, Path], dtype: str) -> None:
    before, after = (load_file(folder / "model.safetensors") for folder in (source, exports[dtype]))
    frozen = {name for name in before if ".experts.frozen_" in name}
    assert frozen
    assert after.keys() == before.keys() | {f"{name}_scales" for name in frozen}
    for name, tensor in before.items():
        if name not in frozen:
            assert after[name].equal(tensor)
            continue
        numbers, scales = rounded(tensor, dtype)
        assert after[name].equal(numbers)
        assert after[f"{name}_scales"].equal(scales)


@pytest.mark.parametrize("dtype", DTYPES)
def test_it_computes_what_the_rounded_experts_stand_for(source: Path, exports: dict[str, Path], dtype: str) -> None:
    """All in memory; read by ranges, for which rounded ones become float32; and with all slices in memory."""
    folder, expected = str(exports[dtype]), logits(stands_for(source, dtype))
    resident = open_model(folder, "float32")
    read = open_model(folder, "float32", expert_memory="1MiB")
    kept = open_model(folder, "float32", expert_memory="1MiB", slices=dtype)
    for model, near in ((resident, BFLOAT16), (read, 1e-5), (kept, BFLOAT16)):
        assert (logits(model) - expected).norm() < near * expected.norm()
        assert (logits(model, 1) - expected[:, :1]).norm() < near * expected[:, :1].norm()
    assert logits(load(exports[dtype])).equal(logits(resident))
    assert packed_bytes(resident) < packed_bytes(open_model(str(source), "float32"))
    cache = expert_cache(read)
    assert cache is not None
    least, most = (sum(r.moved for r in cache.home.ranges[0, e]) for e in (0, 4))  # type: ignore[attr-defined]
    assert least < most
    assert cache.counts.bytes_read > 0


def test_evaluate_says_its_perplexity_as_that_of_a_model(exports: dict[str, Path], tmp_path: Path) -> None:
    save_tokenizer(exports["int4"])
    (tmp_path / "text.md").write_text("The quick brown fox jumps over the lazy dog. " * 40)
    words = ["evaluate", str(exports["int4"]), "--data", str(tmp_path / "text.md"), "--tokens", "64", "--seq-len", "32"]
    done = CliRunner().invoke(app, [*words, "--split", "all", "--device", "cpu"])
    assert done.exit_code == 0, done.output
    assert "perplexity" in done.output


@pytest.mark.faults
@pytest.mark.parametrize(
    "words",
    [
        pytest.param(["train", "model=DIR", "out=OUT", "steps=1", "warmup_steps=0"], marks=pytest.mark.slow),
        ["plan", "model=DIR", "seq_len=16", "samples_per_step=8"],
        ["export", "DIR", "--to", "glm4-moe", "--out", "OUT"],
        ["export", "DIR", "--to", "lamella", "--dtype", "int8", "--out", "OUT"],
    ],
    ids=lambda words: words[0],
)
def test_commands_that_cannot_read_it_refuse_it(exports: dict[str, Path], tmp_path: Path, words: list[str]) -> None:
    places = {"DIR": str(exports["int4"]), "OUT": str(tmp_path / "out")}
    for name, place in places.items():
        words = [word.replace(name, place) for word in words]
    done = CliRunner().invoke(app, words)
    assert isinstance(done.exception, UserError), done.output
    assert "are stored in int4, which `lamella generate` and `lamella evaluate` read" in str(done.exception)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.faults
def test_other_readers_refuse_it(exports: dict[str, Path]) -> None:
    folder = str(exports["int4"])
    with pytest.raises(UserError, match="stored in int4; take --slices int4"):
        open_model(folder, expert_memory="1MiB", slices="int8")
    with pytest.raises(UserError, match=r"open it with lamella\.load"):
        logits(AutoModelForCausalLM.from_pretrained(folder))


@pytest.mark.faults
def test_what_cannot_be_rounded_is_not_written(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for dtype in (None, "bf16", "q8_0"):
        with pytest.raises(UserError, match="say in how many: --dtype int8 or int4"):
            export(source, "lamella", out, dtype=dtype)
    tiny_moe("llama", tmp_path / "parts", moe_changes=PARTITIONED)
    with pytest.raises(UserError, match="rounds frozen experts, which this model has not"):
        export(tmp_path / "parts", "lamella", out, dtype="int8")
    tiny_moe("llama", tmp_path / "deltas", moe_changes={"lora_rank": 2, "lora_alpha": 4.0})
    with pytest.raises(UserError, match="no low-rank deltas beside rounded experts"):
        export(tmp_path / "deltas", "lamella", out, dtype="int8")
    damaged = save_trained(tmp_path / "damaged")
    tensors = load_file(damaged / "model.safetensors")
    next(t for name, t in tensors.items() if ".frozen_down" in name)[0, 0, 0] = torch.nan
    save_file(tensors, damaged / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="holds NaN or infinite values"):
        export(damaged, "lamella", out, dtype="int8")
    assert {path.name for path in tmp_path.iterdir()} == {"parts", "deltas", "damaged"}


@pytest.mark.faults
@pytest.mark.parametrize("memory", [None, "1MiB"])
def test_a_file_that_does_not_fit_its_config_is_refused(exports: dict[str, Path], tmp_path: Path, memory: str) -> None:
    for file in exports["int4"].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    name = next(name for name in tensors if name.endswith("frozen_down_proj"))
    for change in ({f"{name}_scales": None}, {name: tensors[name][:, :, :1].contiguous()}):
        kept = {key: value for key, value in (tensors | change).items() if value is not None}
        save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(UserError, match=rf"{name}.*write it again"):
            open_model(str(tmp_path), expert_memory=memory)


def test_the_check_notices_another_expert(source: Path, exports: dict[str, Path], tmp_path: Path) -> None:
    from lamella.export.check import check_rounded

    for file in exports["int8"].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    for name, tensor in tensors.items():
        if ".frozen_" in name and tensor.dtype == torch.int8:
            tensor.neg_()
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"nats from .* rounded alike"):
        check_rounded(source, tmp_path)
