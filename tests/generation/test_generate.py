"""`lamella generate` writes what transformers' own generate writes, in batches, in conversations, in fewer bytes."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import lamella
from lamella import cli
from lamella.conversion import SliceOptions, convert
from lamella.errors import UserError
from lamella.generation import Generator
from lamella.generation.command import converse, run
from lamella.generation.sampling import Sampling, next_tokens
from lamella.hf.decode import has_step
from lamella.hf.packing import packed_bytes
from support.models import CONFIGS, VOCAB, save_tokenizer, tiny_checkpoint

PROMPTS = ["import numpy as np", "x = 1"]
SAMPLING = Sampling(max_tokens=12, ignore_eos=True)


def by_transformers(folder: Path, prompts: list[str], new_tokens: int) -> list[list[int]]:
    """Greedy tokens by transformers' own loop."""
    import lamella.hf.models  # noqa: F401  registers converted models

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token_id = 0
    inputs = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
    model.generation_config.eos_token_id = None  # min_new_tokens would never choose it
    out = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False, pad_token_id=0)
    return out[:, inputs.input_ids.shape[1] :].tolist()


@pytest.mark.parametrize("family", CONFIGS)
def test_the_tokens_of_transformers(family: str, tmp_path: Path) -> None:
    """Past sliding windows of 7 tokens, alone and padded; the converted model, too, which starts as the dense one."""
    tiny_checkpoint(tmp_path / "dense", family, vocab_size=VOCAB)
    save_tokenizer(tmp_path / "dense")
    convert(tmp_path / "dense", tmp_path / "moe", SliceOptions(slices=4))
    expected = [by_transformers(tmp_path / "dense", [prompt], 12)[0] for prompt in PROMPTS]
    for folder in ("dense", "moe"):
        generator = Generator.open(str(tmp_path / folder))
        assert has_step(generator.model) or family not in ("llama", "mistral", "qwen2", "qwen3")
        assert [generator.generate([prompt], SAMPLING)[0].tokens for prompt in PROMPTS] == expected
        if family != "opt":  # the positions of its padding begin elsewhere; transformers' own batch differs likewise
            assert [answer.tokens for answer in generator.generate(PROMPTS, SAMPLING)] == expected


def test_routed_experts_and_counts(moe: Path) -> None:
    generator = Generator.open(str(moe))
    assert [a.tokens for a in generator.generate(PROMPTS, SAMPLING)] == by_transformers(moe, PROMPTS, 12)
    counts = generator.counts
    assert (counts.new_tokens, counts.steps, counts.prompt_tokens) == (24, 11, sum(map(len, PROMPTS)))
    assert counts.prompt_s > 0
    assert counts.decode_s > 0


@pytest.mark.parametrize(("dtype", "near"), [("float16", 2e-3), ("int8", 4e-2)])
def test_weights_in_fewer_bytes(moe: Path, dtype: str, near: float) -> None:
    """Prompts and single tokens are near float32's logits, relative to their spread; rounding errs no further."""
    whole, packed = Generator.open(str(moe)), Generator.open(str(moe), dtype)
    assert packed_bytes(packed.model) < packed_bytes(whole.model)
    ids = whole.encode(PROMPTS[0])
    with torch.inference_mode():
        for read in (
            lambda g: g.decoding.read([ids], 4),
            lambda g: g.decoding.next(torch.tensor([65])),
            lambda g: g.decoding.read([ids, ids[3:]], 4),
        ):
            expected, got = read(whole), read(packed)
            assert (got - expected).norm() / expected.norm() < near


def test_an_export_generates_the_same_in_int8_too(moe: Path, tmp_path: Path) -> None:
    from lamella.export import export

    out = export(moe, "glm4-moe", tmp_path / "glm", check=False).out
    expected = by_transformers(moe, PROMPTS[:1], 12)
    assert [a.tokens for a in Generator.open(str(out)).generate(PROMPTS[:1], SAMPLING)] == expected
    ours, stock = (Generator.open(str(folder), "int8") for folder in (moe, out))
    assert packed_bytes(stock.model) < 0.7 * packed_bytes(Generator.open(str(out)).model)
    a, b = (generator.decoding.read([generator.encode(PROMPTS[0])], 4) for generator in (ours, stock))
    torch.testing.assert_close(a, b, rtol=0, atol=1e-2 * float(b.abs().max()))  # bf16 activations, another order


def test_a_conversation_goes_on_from_what_was_read(dense: Path) -> None:
    generator, out = Generator.open(str(dense)), io.StringIO()
    said = converse(generator, [], Sampling(max_tokens=5), io.StringIO("hello\n\nand then\n/bye\nnever\n"), out)
    assert [turn["role"] for turn in said] == ["user", "assistant"] * 2
    assert out.getvalue() == f"{said[1]['content']}\n{said[3]['content']}\n"
    fresh = Generator.open(str(dense)).generate([said[:3]], Sampling(max_tokens=5))
    assert fresh[0].text == said[3]["content"]


def test_stops_and_the_end(dense: Path) -> None:
    generator = Generator.open(str(dense))
    whole = generator.generate(["abc"], Sampling(max_tokens=30, ignore_eos=True))[0]
    stop = whole.text[3:5]
    cut = generator.generate(["abc"], Sampling(max_tokens=30, stop=(stop,), ignore_eos=True))[0]
    assert (cut.text, cut.end) == (whole.text[: whole.text.index(stop)], "stop")
    generator.model.generation_config.eos_token_id = whole.tokens[4]
    ended = generator.generate(["abc"], Sampling(max_tokens=30))[0]
    assert ended.end == "eos"
    assert ended.tokens == whole.tokens[: whole.tokens.index(whole.tokens[4])]


def test_draws() -> None:
    logits_BV = torch.tensor([[0.0, 2.0, 1.0, -1.0]]).expand(4000, -1)
    draw = lambda **options: next_tokens(logits_BV, Sampling(**options), Sampling(seed=1).generator(logits_BV.device))  # noqa: E731
    assert draw().unique().tolist() == [1]
    assert sorted(draw(temperature=1.0, top_k=2).unique().tolist()) == [1, 2]
    # softmax: 0.087, 0.644, 0.237, 0.032; the first two have 0.88
    assert sorted(draw(temperature=1.0, top_p=0.85).unique().tolist()) == [1, 2]
    assert sorted(draw(temperature=1.0, top_p=0.9).unique().tolist()) == [0, 1, 2]
    shares = draw(temperature=2.0).bincount() / 4000
    torch.testing.assert_close(shares, (logits_BV[0] / 2).softmax(-1), atol=0.03, rtol=0)  # 4 standard deviations
    assert torch.equal(draw(temperature=1.0), draw(temperature=1.0))


def test_the_command(dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "prompts").write_text("a = 1\n\nb = 2\n")
    words = ["--prompt-file", str(tmp_path / "prompts"), "--max-tokens", "4", "--json", str(tmp_path / "out.json")]
    cli.app(["generate", str(dense), *words], standalone_mode=False)
    shown = capsys.readouterr()
    report = json.loads((tmp_path / "out.json").read_text())
    assert "--- a = 1\n" in shown.out
    assert "steps/s" in shown.err
    assert [row["text"] for row in report["answers"]] == lamella.generate(dense, ["a = 1", "b = 2"], max_tokens=4)
    cli.app(["generate", str(dense), "--chat", "--prompt", "hi", "--max-tokens", "4"], standalone_mode=False)
    assert capsys.readouterr().out == lamella.generate(dense, "hi", chat=True, max_tokens=4)[0] + "\n"


@pytest.mark.faults
def test_refusals(dense: Path, tmp_path: Path) -> None:
    what = {"chat": False, "system": None, "json_path": None, "dtype": "auto", "device": "cpu"}
    for prompts, file, changed, complaint in (
        ([], None, {}, "there is no prompt"),
        (["x" * 600], None, {}, "the prompt has 600 tokens, but the model reads 512"),
        ([""], None, {}, "a prompt is empty"),
        (["x"], None, {"dtype": "int4"}, "dtype is 'int4'"),
        (["x"], None, {"system": "be kind"}, "add --chat"),
        ([], tmp_path / "none", {}, "cannot be read"),
    ):
        with pytest.raises(UserError, match=complaint):
            run(str(dense), prompts, file, Sampling(), **what | changed)
    with pytest.raises(UserError, match=r"top-p is 2.*; .*stop text"):
        Sampling(top_p=2, stop=("",))


@pytest.mark.faults
@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--expert-memory", "lots"], "the memory for experts is 'lots'; write a size such as 2GiB or 800MB"),
        (["--expert-memory", "1KB"], "give at least "),
        (["--expert-memory", "1MB", "--slices", "int3"], "slices is 'int3'"),
        (["--expert-memory", "1MB", "--dtype", "int8"], "not packed into int8"),
        (["--prompt", "x" * 600], "the prompt has 600 tokens, but the model reads 512 at most"),
        (["--slices", "int8"], "give --expert-memory, too"),
    ],
    ids=lambda value: value[-1][:9] if isinstance(value, list) else "",
)
def test_bad_input_is_one_line(
    moe: Path, tmp_path: Path, words: list[str], complaint: str, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Exit code 2, nothing else said, nothing written."""
    command = ["lamella", "generate", str(moe), "--prompt", "a", *words, "--json", str(tmp_path / "out.json")]
    monkeypatch.setattr("sys.argv", command)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    shown = capfd.readouterr()
    assert ended.value.code == 2
    assert shown.out == ""
    assert shown.err.count("\n") == 1
    assert shown.err.startswith("error: ")
    assert complaint in shown.err
    assert not list(tmp_path.iterdir())
