"""Every family of the table, with all that it can: the converted model against plain transformers' dense one.

And the families that are not held: refused by name, with the reason.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from lamella.architecture.not_held import HAS_NO_CLASS, NOT_HELD
from lamella.architecture.rows import FAMILIES
from lamella.calibrate.layerwise import LayerwiseModel
from lamella.calibrate.passes import WatchedLayer
from lamella.checkpoint.source import Checkpoint
from lamella.conversion import convert
from lamella.errors import UserError
from lamella.evaluate.logit_match import logit_match
from lamella.evaluate.perplexity import evaluate
from lamella.export import TARGETS, export
from lamella.hf.models import load
from lamella.recipe.conversion import load_conversion
from lamella.titan.config import decoder_config
from support.models import CONFIGS, KIN, SIZES, TRAINABLE_FAMILIES, VOCAB, save_tokenizer, tiny_checkpoint
from support.tensors import bits_equal
from support.tiers import slow_but

EXACT = 5e-5  # fp32, logits of order 1 to 10, the FFN's sums in another order
LENGTH, NEW = 48, 8  # past the window of 7
METHODS = {
    "slice": ("slices=4",),
    "upcycle": ("experts=4", "top_k=2"),
    "partition": ("parts=4", "active=4", "neurons=contiguous", "router=random", "shared=1", "output=plain"),
}


def test_every_family_has_a_tiny_model() -> None:
    assert CONFIGS.keys() == FAMILIES.keys()


def dense_model(folder: Path, family: str) -> Path:
    return save_tokenizer(tiny_checkpoint(folder, family, **own(family)))


def own(family: str) -> dict[str, object]:
    return {"vocab_size": VOCAB} | TRAINABLE_FAMILIES.get(family, {}) | KIN.get(family, {})


def tokens() -> torch.Tensor:
    return torch.randint(3, VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def assert_computes_the_same(model: torch.nn.Module, plain: torch.nn.Module) -> None:
    ids = tokens()
    torch.testing.assert_close(model(ids).logits, plain(ids).logits, atol=EXACT, rtol=0)
    assert plain(ids).logits.std() > 0.05
    # with a cache, a token at a time behind a prompt
    both = []
    for one in (model, plain):
        out = one(ids[:, :-NEW], use_cache=True)
        steps = []
        for step in range(LENGTH - NEW, LENGTH):
            out = one(ids[:, step : step + 1], past_key_values=out.past_key_values, use_cache=True)
            steps.append(out.logits)
        both.append(torch.cat(steps, dim=1))
    torch.testing.assert_close(*both, atol=EXACT, rtol=0)
    torch.testing.assert_close(both[0], plain(ids).logits[:, -NEW:], atol=EXACT, rtol=0)


@pytest.mark.parametrize("family", slow_but(FAMILIES, "olmo2", "smollm3", "gemma2", "phi3"))
def test_every_method_gives_the_dense_model(family: str, tmp_path: Path) -> None:
    dense = dense_model(tmp_path / "dense", family)
    plain, info = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32, output_loading_info=True)
    assert type(plain).__module__.startswith("transformers.")
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    for method, words in METHODS.items():
        out = tmp_path / method
        convert(dense, out, load_conversion(None, [f"method={method}", *words]).options)
        assert_computes_the_same(load(out, torch.float32), plain.eval())
    export(tmp_path / "slice", "dense", tmp_path / "back", check=False)
    source, back = (load_file(folder / "model.safetensors") for folder in (dense, tmp_path / "back"))
    assert source.keys() == back.keys()
    assert all(bits_equal(source[name], back[name]) for name in source)


@pytest.mark.parametrize("family", slow_but(KIN, "granite"))
def test_it_is_verified_and_evaluated(family: str, tmp_path: Path) -> None:
    dense, moe = dense_model(tmp_path / "dense", family), tmp_path / "moe"
    convert(dense, moe, load_conversion(None, ["method=slice", "slices=4"]).options)
    lines = [json.dumps({"text": f"Layers {i} of a family differ in norms and windows. " * 2}) for i in range(100)]
    (tmp_path / "text.jsonl").write_text("\n".join(lines))
    data = str(tmp_path / "text.jsonl")
    checks = logit_match(str(dense), str(moe), data=data, tokens={"float32": 128}, seq_len=64, device="cpu")
    assert checks
    assert all(check.passed for check in checks)
    found = evaluate(str(moe), data, str(dense), split=None, max_tokens=256, seq_len=64, device="cpu")
    assert found["model"].nats_per_token == pytest.approx(found["dense"].nats_per_token, abs=1e-5)


@pytest.mark.parametrize("family", slow_but(KIN, "granite", "gemma2", "phi3"))
def test_what_it_cannot_is_refused_by_name(family: str, tmp_path: Path) -> None:
    dense = dense_model(tmp_path / "dense", family)
    convert(dense, tmp_path / "moe", load_conversion(None, ["method=slice", "slices=4"]).options)
    for folder in (dense, tmp_path / "moe") if not FAMILIES[family].trains else ():
        with pytest.raises(UserError, match=f"'{family}' cannot be trained: its? .*llama"):
            decoder_config(folder)
    for target in TARGETS.keys() - {"dense", "lamella"}:
        with pytest.raises(UserError, match=family):
            export(tmp_path / "moe", target, tmp_path / target)
    with pytest.raises(UserError, match=f"the attention of {family} cannot become experts"):
        convert(dense, tmp_path / "attention", load_conversion(None, ["method=attention"]).options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "moe"]


REASONS = {
    "gemma3": "images", "lfm2": "recurrent", "llama4_text": "chunked attention", "mixtral": "mixtures of experts",
    "qwen3_moe": "mixtures of experts", "olmoe": "mixtures of experts", "arcee": "without a gate",
    "phi": "without a gate",
}  # fmt: skip


@pytest.mark.parametrize("family", REASONS)
def test_a_family_that_is_not_held_is_refused_with_the_reason(family: str, tmp_path: Path) -> None:
    sizes = {key: value for key, value in SIZES.items() if key not in ("head_dim", "num_key_value_heads")}
    CONFIG_MAPPING[family](**sizes).save_pretrained(tmp_path / "dense")
    with pytest.raises(UserError, match=f"^{family} models cannot be converted: .*{REASONS[family]}") as refused:
        convert(tmp_path / "dense", tmp_path / "moe", load_conversion(None, ["method=slice"]).options)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "moe").exists()


@pytest.mark.parametrize("name", NOT_HELD)
def test_families_that_are_not_held_are_those_of_transformers(name: str) -> None:
    assert (name in CONFIG_MAPPING) != (name in HAS_NO_CLASS)
    assert name not in FAMILIES


def test_every_causal_model_of_transformers_is_held_or_refused_with_a_reason() -> None:
    assert set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) <= FAMILIES.keys() | NOT_HELD.keys()


def test_a_family_that_transformers_does_not_know_is_refused_and_its_code_never_run(tmp_path: Path) -> None:
    code = "import pathlib\npathlib.Path(__file__).with_name('it-ran').touch()\n"
    (tmp_path / "modeling_internlm2.py").write_text(code)
    config = SIZES | {
        "model_type": "internlm2", "architectures": ["InternLM2ForCausalLM"],
        "auto_map": {"AutoConfig": "modeling_internlm2.Config", "AutoModelForCausalLM": "modeling_internlm2.Model"},
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"^internlm2 models cannot be converted: .*code .* is never run"):
        convert(tmp_path, tmp_path.with_name("moe"), load_conversion(None, ["method=slice"]).options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "modeling_internlm2.py"]


@pytest.mark.parametrize("family", slow_but(KIN, "granite", "gemma2", "phi3"))
def test_calibration_sees_what_the_ffns_are_given(family: str, tmp_path: Path) -> None:
    dense = dense_model(tmp_path / "dense", family)
    plain = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32).eval()
    given: list[torch.Tensor] = []
    for layer in plain.get_decoder().layers:
        layer.mlp.register_forward_pre_hook(lambda _, args: given.append(args[0].flatten(0, 1)))
    ids_BL, positions_BL = tokens(), torch.arange(LENGTH).expand(2, LENGTH)
    model = LayerwiseModel(Checkpoint.open(dense))
    with torch.no_grad():
        plain(ids_BL)
        hidden_BLD = model.embed(ids_BL, positions_BL)
        for index, expected_TD in enumerate(given):
            watched = WatchedLayer(model, index)
            watched.up_to_ffn(hidden_BLD, positions_BL)
            assert "h_TF" not in watched.seen
            stopped_TD = watched.seen.pop("x_TD")
            hidden_BLD = watched(hidden_BLD, positions_BL)
            torch.testing.assert_close(watched.seen["x_TD"], expected_TD, atol=EXACT, rtol=0)
            assert torch.equal(stopped_TD, watched.seen["x_TD"])
    assert len(given) == model.num_layers
