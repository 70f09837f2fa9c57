"""Perplexity, routing controls and their commands, on a tiny model."""

import gc
import inspect
import json
import math
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.nn.modules.module import register_module_forward_pre_hook
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedModel

from lamella import cli
from lamella.conversion import SliceOptions, convert
from lamella.data.packing import IGNORE_INDEX
from lamella.errors import UserError
from lamella.evaluate.checkpoints import model_path, open_checkpoint
from lamella.evaluate.commands import verify
from lamella.evaluate.differences import Difference, compare, compare_reordered, kl_divergence, logits_of
from lamella.evaluate.logit_match import Check, fp32_bounds, logit_match
from lamella.evaluate.perplexity import evaluate, perplexity, text_samples
from lamella.evaluate.routing_controls import copies_without_noise, mode, routed_as, routing_controls
from lamella.hf.computing import Computing
from support.models import EOS, VOCAB, save_llama


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return str(save_llama(tmp_path_factory.mktemp("dense") / "model", std=0.4))


@pytest.fixture(scope="module")
def moe(dense, tmp_path_factory):
    folder = tmp_path_factory.mktemp("moe") / "model"
    convert(dense, folder, SliceOptions(slices=4, noise=0.5))
    return str(folder)


@pytest.fixture
def text(tmp_path):
    """Documents with letters of two bytes, so that tokens and characters differ."""
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": f"naïve café {i} " * 5}) + "\n" for i in range(100)))
    return str(path)


def test_perplexity_is_the_mean_over_scored_tokens(dense, text):
    samples, tokenizer = text_samples(text, None, dense, 64, None), AutoTokenizer.from_pretrained(dense)
    result = perplexity(open_checkpoint(dense), samples, tokenizer, 640)
    plain, nats, scored = LlamaForCausalLM.from_pretrained(dense), 0.0, []
    for i in range(10):
        ids_L, labels_L, _ = samples.sample(i)
        with torch.no_grad():
            log_p_LV = plain(ids_L[None]).logits[0].double().log_softmax(-1)
        for log_p_V, label in zip(log_p_LV, labels_L.tolist(), strict=True):
            if label != IGNORE_INDEX:
                nats -= log_p_V[label].item()
                scored.append(label)
    assert result.tokens == len(scored) < 640
    assert result.nats_per_token == pytest.approx(nats / len(scored), rel=1e-6)  # fp32 sums of 64 terms
    assert result.perplexity == pytest.approx(math.exp(nats / len(scored)), rel=1e-5)
    # One byte a token, none for the end of a document; a letter cut by the end of the text may be one byte off, or two.
    assert abs(result.bytes - sum(label != EOS for label in scored)) <= 2
    assert result.bits_per_byte == pytest.approx(nats / math.log(2) / result.bytes, rel=1e-6)


def test_a_model_that_knows_nothing_has_the_vocabulary_as_perplexity(dense, text):
    model = open_checkpoint(dense)
    model.model.norm.weight.data.zero_()
    result = perplexity(model, text_samples(text, None, dense, 64, None), AutoTokenizer.from_pretrained(dense), 256)
    assert result.perplexity == pytest.approx(VOCAB, rel=1e-5)


def test_evaluate_puts_the_dense_model_beside_it(dense, moe, text):
    results = evaluate(moe, text, dense, split=None, max_tokens=512, seq_len=128)
    assert results["model"].tokens == results["dense"].tokens
    # fp32, another order of summation
    assert results["model"].nats_per_token == pytest.approx(results["dense"].nats_per_token, rel=1e-5)
    learned = evaluate(moe, text, split=None, max_tokens=512, seq_len=128, mode="learned")["model"]
    assert abs(learned.nats_per_token - results["dense"].nats_per_token) > 0.01  # copies with a noise of 0.5
    half = evaluate(moe, text, split=None, max_tokens=512, seq_len=128, dtype="bfloat16")["model"]
    assert half.nats_per_token == pytest.approx(results["dense"].nats_per_token, rel=0.02)  # bf16: 8 bits
    assert half.nats_per_token != results["dense"].nats_per_token


def test_random_twins_keep_the_model_and_flat_ones_do_not(dense, moe, text):
    model, tokenizer = open_checkpoint(moe), AutoTokenizer.from_pretrained(moe)
    samples = text_samples(text, None, moe, 128, None)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    controls = routing_controls(model, samples, tokenizer, 1024)
    assert controls.twin_ppl_ratio == pytest.approx(1, abs=1e-5)  # fp32, another order of summation
    assert abs(controls.flat_ppl_ratio - 1) > 0.02
    assert controls == routing_controls(model, samples, tokenizer, 1024)  # drawn from a seed
    measured = perplexity(open_checkpoint(dense), samples, tokenizer, 1024).perplexity
    assert controls.dense_perplexity == pytest.approx(measured, rel=1e-5)
    # Everything is put back.
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.computing == Computing()


def fail_inside(model):
    with copies_without_noise(model), routed_as(model, "flat"), mode(model, "random"):
        layer = model.moe_layers[0]
        assert layer.weights.experts.trainable[0] is layer.experts.frozen[0]
        layer(torch.zeros(64, layer.router.weight.shape[1]))
        drawn = layer.last_routing.expert_ids_TK % layer.config.num_frozen_experts
        assert any(len(set(row)) < len(row) for row in drawn.tolist())  # flat: a slice and its copy together
        raise RuntimeError("inside")


def test_contexts_restore_after_an_error(moe):
    model = open_checkpoint(moe)
    trainable = model.moe_layers[0].experts.trainable
    with pytest.raises(RuntimeError, match="inside"):
        fail_inside(model)
    assert all(a is b for a, b in zip(model.moe_layers[0].weights.experts.trainable, trainable, strict=True))
    assert model.computing == Computing()


def test_differences_of_known_logits():
    a, b = torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([[0.0, 2.0], [0.0, 1.0]])
    p, q = F.softmax(a[0].double(), -1), F.softmax(b[0].double(), -1)
    assert kl_divergence(a, b) == pytest.approx((p * (p / q).log()).sum().item())
    assert kl_divergence(a, a) == 0


def test_reordered_sums_are_the_same_model_and_leave_it_alone(dense, text):
    model = open_checkpoint(dense)
    windows = [text_samples(text, None, dense, 128, None).sample(i).input_ids_L for i in range(4)]
    references = logits_of(model, windows)
    floor = compare_reordered(references, model, 4, [0, 1], windows, seed=0)
    assert 0 < floor.max_abs < 1e-4
    assert floor.top1_agreement == 1
    assert floor.tokens == 512
    again = compare(references, model, windows)
    assert again.max_abs == 0
    assert type(model.model.layers[0].mlp).__name__ == "LlamaMLP"


def test_bounds_and_verdicts():
    floor = Difference(max_abs=1e-5, max_logit=43.5)
    assert fp32_bounds(1536, 30, floor).max_abs == pytest.approx(5.57e-4, rel=0.01)
    assert fp32_bounds(14336, 80, replace(floor, max_logit=100)).max_abs == 1e-3
    # logits that are capped say nothing of the rounding behind them
    capped = fp32_bounds(1536, 30, replace(floor, max_logit=0.1))
    assert (capped.max_abs, capped.reason) == (2e-5, "2x the floor")
    assert fp32_bounds(1536, 30, replace(floor, max_abs=1.0)).max_abs == 1e-3
    assert Check("float32", "dense", "x", 1.0, 1.0).passed
    assert not Check("float32", "dense", "x", 1.1, 1.0).passed
    assert Check("float32", "dense", "x", 1.1, 1.0, at_least=True).passed
    assert not Check("float32", "dense", "x", float("nan"), 1.0).passed
    assert not Check("float32", "dense", "x", float("nan"), 1.0, at_least=True).passed


def test_bad_input_is_refused(dense, moe, text, tmp_path):
    with pytest.raises(UserError, match="no such model: /missing"):
        evaluate("/missing", text)
    with pytest.raises(UserError, match=r"holds no config\.json"):
        model_path(tmp_path)
    with pytest.raises(UserError, match="is a dense model, so it has no mode"):
        evaluate(dense, text, split=None, max_tokens=64, mode="dense")
    with pytest.raises(UserError, match="mode is 'rooted'"):
        evaluate(moe, text, split=None, max_tokens=64, mode="rooted")  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"dtype is 'float23'.*did you mean 'float32'"):
        evaluate(dense, text, split=None, max_tokens=64, dtype="float23")
    with pytest.raises(UserError, match="cannot be scored"):
        evaluate(dense, text, max_tokens=1)
    with pytest.raises(UserError, match=r"windows of 600 tokens are longer .*; lower --seq-len"):
        evaluate(dense, text, split=None, max_tokens=None, seq_len=600)
    with pytest.raises(UserError, match="too few for one sample of 100000"):
        evaluate(dense, text, max_tokens=None, seq_len=100_000)
    samples = text_samples(text, None, dense, 64, None)
    with pytest.raises(UserError, match="need a converted model"):
        routing_controls(open_checkpoint(dense), samples, AutoTokenizer.from_pretrained(dense))


def run_cli(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "lamella.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=900)


@pytest.mark.slow
def test_the_commands(dense, moe, text, tmp_path):
    report = tmp_path / "report.json"
    done = run_cli(
        "evaluate", moe, "--dense", dense, "--data", text, "--tokens", "256", "--split", "train", "--json", str(report)
    )
    assert done.returncode == 0, done.stderr
    assert "bits per byte" in done.stdout
    values = json.loads(report.read_text())
    assert values["model"]["perplexity"] == pytest.approx(values["dense"]["perplexity"], rel=1e-4)
    done = run_cli("verify", "--dense", dense, "--moe", moe, "--tokens", "512", "--json", str(report))
    assert done.returncode == 0, done.stdout + done.stderr
    checks = json.loads(report.read_text())["checks"]
    ratios = {check["what"].rpartition(" ")[2]: check["figure"] for check in checks if "perplexity" in check["name"]}
    assert ratios["twin"] == pytest.approx(1, abs=1e-4)
    assert abs(ratios["flat"] - 1) > 0.01
    done = run_cli("evaluate", "/missing")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert done.stderr.startswith("error: no such model: /missing")


@pytest.fixture
def most_models_at_once():
    """A list whose last entry is the largest number of models with weights that were alive in a forward pass."""
    most = [0]

    def count(module, _):
        if isinstance(module, PreTrainedModel) and hasattr(module, "lm_head"):
            models = [m for m in gc.get_objects() if isinstance(m, PreTrainedModel) and hasattr(m, "lm_head")]
            most.append(max(most[-1], sum(m.lm_head.weight.device.type != "meta" for m in models)))

    gc.collect()
    handle = register_module_forward_pre_hook(count)
    yield most
    handle.remove()


@pytest.mark.slow
def test_one_model_is_loaded_at_a_time(dense, moe, text, most_models_at_once):
    evaluate(moe, text, dense, split=None, max_tokens=128, seq_len=128)
    assert most_models_at_once[-1] == 1
    assert all(check.passed for check in logit_match(dense, moe, data=text, tokens={"float32": 128}, seq_len=128))
    assert most_models_at_once[-1] == 1


def test_the_device_is_the_gpu_where_there_is_one():
    """Defaults, in Python and on the command line."""
    for function in (evaluate, logit_match, verify, cli.verify, cli.evaluate):
        assert inspect.signature(function).parameters["device"].default == "auto", function
