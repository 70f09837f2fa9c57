"""GGUF files computed by llama.cpp, which had no part in writing them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from lamella.errors import UserError
from lamella.export import export
from lamella.export.gguf.check import check_gguf
from lamella.export.gguf.llama_cpp import find, log_probabilities
from support.bpe import VOCAB, save_bpe
from support.trained_model import LLAMA3_ROPE, save_trained

needs_llama_cpp = pytest.mark.skipif(find() is None, reason="xllamacpp is not installed")


def save_source(folder: Path, **changes: Any) -> Path:
    return save_bpe(save_trained(folder, vocab_size=VOCAB, **changes))


YARN = {"rope_type": "yarn", "rope_theta": 20000.0, "factor": 4.0, "original_max_position_embeddings": 64}
SOFTMAX = {"gate": "softmax", "routing": "flat"}
CASES: dict[str, dict[str, Any]] = {
    "theta, tied": {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}, "tie_word_embeddings": True},
    "linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 20000.0, "factor": 2.0}},
    "yarn": {"rope_parameters": YARN},
    "yarn, other range": {"rope_parameters": YARN | {"beta_fast": 16.0}},
    "yarn, other attention": {"rope_parameters": YARN | {"attention_factor": 1.5, "beta_fast": 16.0}},
    "llama3, tied": {"rope_parameters": LLAMA3_ROPE, "tie_word_embeddings": True},
    "llama3, qwen3": {"family": "qwen3", "rope_parameters": LLAMA3_ROPE},
    "llama3, first layer dense": {"rope_parameters": LLAMA3_ROPE, "moe": {"moe_layers": (1, 2)}},
    "qwen2 with biases": {"family": "qwen2"},
    "qwen3": {"family": "qwen3"},
    "flat, top 3": {"moe": {"routing": "flat", "num_experts_per_tok": 3}},
    "not normalised": {"moe": {"norm_topk_prob": False, "route_scale": 2.5}},
    "softmax with bias": {"moe": SOFTMAX},
    "softmax, llama3": {"moe": SOFTMAX, "rope_parameters": LLAMA3_ROPE},
    "first layer dense": {"moe": {"moe_layers": (1, 2)}},
    "shared": {
        "moe": {
            "routing": "flat", "num_frozen_experts": 0, "num_trainable_experts": 6, "num_experts_per_tok": 2,
            "shared_intermediate_size": 32,
        }
    },
    "shared, llama3": {
        "rope_parameters": LLAMA3_ROPE,
        "moe": {
            "routing": "flat", "num_frozen_experts": 0, "num_trainable_experts": 6, "num_experts_per_tok": 2,
            "shared_intermediate_size": 32,
        },
    },
}  # fmt: skip


@needs_llama_cpp
@pytest.mark.slow
@pytest.mark.parametrize("changes", CASES.values(), ids=CASES)
def test_llama_cpp_computes_the_same(tmp_path: Path, changes: dict[str, Any]) -> None:
    source = save_source(tmp_path / "moe", **changes)
    export(source, "gguf", tmp_path / "out", check=False)
    checked = check_gguf(source, tmp_path / "out")
    assert checked is not None
    assert checked.max_abs_logit_diff < 2e-4  # fp32, other kernels
    quality = checked.quality
    assert quality is not None
    assert quality.top_1 == 1
    assert -1e-9 < quality.divergence <= quality.largest_divergence < 1e-6
    assert checked.spans.uncovered is None


@needs_llama_cpp
@pytest.mark.parametrize("digits", [False, True])
def test_llama_cpp_makes_the_same_tokens(tmp_path: Path, digits: bool) -> None:
    """A text and its token ids must be followed by the same token."""
    source = save_bpe(save_trained(tmp_path / "moe", vocab_size=VOCAB), digits)
    export(source, "gguf", tmp_path / "out", check=False)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(source)
    texts = ["def area(width):\n    return 12 * 345", " äöü 10 years'll\t x"]
    file = next((tmp_path / "out").glob("*.gguf"))
    prompts = [*texts, *(tokenizer(text).input_ids for text in texts)]
    from_text, from_ids = np.split(log_probabilities(file, prompts), 2)
    assert np.abs(from_text - from_ids).max() < 1e-4


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16", "Q8_0", "Q4_0"])
def test_the_file_holds_every_tensor(tmp_path: Path, dtype: str) -> None:
    bound = {"F32": 0, "F16": 1e-3, "BF16": 5e-3, "Q8_0": 1e-2, "Q4_0": 0.12}[dtype]  # relative error of a tensor
    source = save_source(tmp_path / "moe", hidden_size=64)
    exact = gguf.GGUFReader(next(export(source, "gguf", tmp_path / "f32", check=False).out.glob("*.gguf")))
    # Random routers change their minds at 4 bits: the check refuses that, rightly.
    report = export(source, "gguf", tmp_path / "out", dtype=dtype, check=dtype != "Q4_0")
    file = next(report.out.glob(f"*-{dtype}.gguf"))
    reader = gguf.GGUFReader(file)
    assert reader.get_field("glm4moe.expert_count").contents() == 8
    assert [t.name for t in reader.tensors] == [t.name for t in exact.tensors]
    for found, wanted in zip(reader.tensors, exact.tensors, strict=True):
        a, b = (gguf.dequantize(t.data, t.tensor_type).ravel() for t in (found, wanted))
        assert np.abs(a - b).max() <= bound * np.abs(b).max() + 1e-12, found.name
        if "exps" in found.name and "sh" not in found.name:
            assert found.tensor_type.name == (dtype if found.shape[0] % 32 == 0 or dtype[0] != "Q" else "F32")
        if found.name.endswith(("ffn_gate_inp.weight", "exp_probs_b.bias")):
            assert found.tensor_type.name == "F32"
    assert report.bytes_written == file.stat().st_size
    assert sorted(path.name for path in report.out.iterdir()) == ["README.md", file.name]
    assert "all-zero shared expert" in (report.out / "README.md").read_text()


@needs_llama_cpp
@pytest.mark.faults
@pytest.mark.parametrize("rope", [{"rope_type": "default", "rope_theta": 1e4}, LLAMA3_ROPE], ids=["glm4moe", "step35"])
def test_the_check_notices_what_is_lost(tmp_path: Path, rope: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """An expert whose weights are lost on the way into the file."""
    from lamella.export.gguf import write

    source, values = save_source(tmp_path / "moe", rope_parameters=rope), write._values

    def without_an_expert(tensor):
        array = values(tensor)
        return np.where(np.arange(len(array))[:, None, None] == 5, 0, array) if "down_exps" in tensor.name else array

    monkeypatch.setattr(write, "_values", without_an_expert)
    with pytest.raises(UserError, match=r"differs from .* nothing was kept"):
        export(source, "gguf", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["moe"]


UNFIT = {
    "o_proj bias": ({"attention_bias": True}, "output projection"),
    "window": ({"family": "mistral", "sliding_window": 16}, "sliding window"),
    "dynamic rope": ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "is dynamic"),
    "biases and llama3 rope": ({"family": "qwen2", "rope_parameters": LLAMA3_ROPE}, "no biases"),
    "gaps": ({"moe": {"moe_layers": (0, 2)}}, "dense layers can only come first"),
    "softmax pairs with a bias": ({"moe": {"gate": "softmax"}}, "no top-k of all experts"),
}


@pytest.mark.parametrize(("changes", "message"), UNFIT.values(), ids=UNFIT)
def test_refuses_what_llama_cpp_cannot_hold(tmp_path: Path, changes: dict, message: str) -> None:
    source = save_source(tmp_path / "moe", **changes)
    with pytest.raises(UserError, match="gguf cannot hold") as error:
        export(source, "gguf", tmp_path / "out")
    assert message in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["moe"]


def test_bad_input_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    bare = save_trained(tmp_path / "bare", vocab_size=VOCAB)
    with pytest.raises(UserError, match=r"no tokenizer\.json; pass --tokenizer"):
        export(bare, "gguf", tmp_path / "out")
    source = save_source(tmp_path / "moe")
    with pytest.raises(UserError, match=r"unknown GGUF dtype 'Q8' .did you mean 'Q8_0'"):
        export(source, "gguf", tmp_path / "out", dtype="Q8")
    with pytest.raises(UserError, match="does not exist"):
        export(source, "gguf", tmp_path / "out", tokenizer=tmp_path / "none.gguf")
    (tmp_path / "broken.gguf").write_bytes(b"GGUF no")
    with pytest.raises(UserError, match="truncated or not a GGUF file"):
        export(source, "gguf", tmp_path / "out", tokenizer=tmp_path / "broken.gguf")
    small = save_bpe(save_trained(tmp_path / "small", vocab_size=200))
    with pytest.raises(UserError, match=r"the tokenizer has \d+ tokens, the model 200"):
        export(small, "gguf", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_is_copied_from_another_file(tmp_path: Path) -> None:
    source = save_source(tmp_path / "moe")
    first = next(export(source, "gguf", tmp_path / "first", check=False).out.glob("*.gguf"))
    bare = save_trained(tmp_path / "bare", vocab_size=VOCAB)
    second = next(export(bare, "gguf", tmp_path / "second", tokenizer=first).out.glob("*.gguf"))
    a, b = (
        {key: field.contents() for key, field in gguf.GGUFReader(file).fields.items() if key.startswith("tokenizer.")}
        for file in (first, second)
    )
    assert a == b
    assert len(a["tokenizer.ggml.tokens"]) == VOCAB
    assert a["tokenizer.chat_template"] == "{{ messages[0].content }}"
    export(source, "gguf", tmp_path / "first", check=False, overwrite=True)
