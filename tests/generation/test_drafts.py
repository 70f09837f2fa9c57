"""A draft writes ahead, the model keeps what it would write: the same text, in fewer passes."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

import lamella
from lamella import cli
from lamella.conversion import convert
from lamella.errors import UserError
from lamella.generation import Generator
from lamella.generation.command import converse
from lamella.generation.drafts import Guess, keep
from lamella.generation.sampling import Sampling, probabilities
from lamella.recipe.conversion import make_conversion
from support.models import VOCAB, save_tokenizer, tiny_checkpoint

PROMPT = "import numpy as np"
SAMPLING = Sampling(max_tokens=40, ignore_eos=True)


@pytest.fixture(scope="module")
def near(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A draft that is often right: the dense model with noise."""
    folder = tmp_path_factory.mktemp("near") / "model"
    shutil.copytree(dense, folder)
    model, _ = lamella.load(folder)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * parameter.std() * torch.randn_like(parameter) if parameter.dim() > 1 else 0
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def flat(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A partition: half of its parts active."""
    how = {"method": "partition", "parts": 8, "active": 4, "calibration": {"num_tokens": 512, "sequence_length": 64}}
    return convert(dense, tmp_path_factory.mktemp("flat") / "model", make_conversion(how).options).out


def with_draft(folder: Path, draft: Path | str, ahead: int = 4, **options: str) -> Generator:
    generator = Generator.open(str(folder), "float32", "cpu", **options)
    generator.use_draft(str(draft), ahead)
    return generator


@pytest.mark.parametrize("ahead", [1, 4, 7])
@pytest.mark.parametrize(
    ("model", "draft"), [("dense", "near"), ("dense", "dense"), ("moe", "near"), ("moe", "self"), ("flat", "self")]
)
def test_the_same_tokens(model: str, draft: str, ahead: int, request: pytest.FixtureRequest) -> None:
    """Whatever length is asked for, also one that ends within a draft."""
    folder = request.getfixturevalue(model)
    generator = with_draft(folder, draft if draft == "self" else request.getfixturevalue(draft), ahead)
    plain = Generator.open(str(folder), "float32", "cpu")
    for max_tokens in (1, 2, 3, 40, 41):
        sampling = Sampling(max_tokens, ignore_eos=True)
        for prompt in (PROMPT, "x = 1"):
            assert generator.generate([prompt], sampling) == plain.generate([prompt], sampling)
    counts, drafted = generator.counts, generator.counts.draft
    assert drafted is not None
    assert (counts.new_tokens, counts.steps) == (41, 40)
    assert drafted.passes + drafted.accepted == counts.steps
    assert 0 < drafted.accepted <= drafted.drafted
    if draft == "dense":
        assert drafted.accepted == drafted.drafted
    else:
        assert drafted.accepted < drafted.drafted  # so that forgetting is tried, too


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3"])
def test_windows_and_norms_of_heads(family: str, tmp_path: Path) -> None:
    """Past sliding windows of 7 tokens, within which a draft of as many ends."""
    changes = {"sliding_window": 7} if family == "mistral" else {}
    tiny_checkpoint(tmp_path / "dense", family, vocab_size=VOCAB, **changes)
    tiny_checkpoint(tmp_path / "draft", family, vocab_size=VOCAB + 30, seed=1, **changes)
    for folder in ("dense", "draft"):
        save_tokenizer(tmp_path / folder)
    plain = Generator.open(str(tmp_path / "dense")).generate([PROMPT], SAMPLING)
    for draft in ("dense", "draft"):
        generator = with_draft(tmp_path / "dense", tmp_path / draft, 7)
        assert generator.generate([PROMPT], SAMPLING) == plain
        assert generator.counts.draft is not None
        assert (generator.counts.draft.accepted == generator.counts.draft.drafted) == (draft == "dense")


@pytest.mark.parametrize("draft", ["near", "self"])
def test_a_conversation(moe: Path, draft: str, request: pytest.FixtureRequest) -> None:
    """Over turns, of which what was read and drafted before is known."""
    lines, sampling = "hello\nand then\nwhat else\n", Sampling(max_tokens=9)
    plain = Generator.open(str(moe), "float32", "cpu")
    drafting = with_draft(moe, draft if draft == "self" else request.getfixturevalue(draft))
    said = [converse(g, [], sampling, io.StringIO(lines), io.StringIO()) for g in (plain, drafting)]
    assert said[0] == said[1]
    assert len(said[1]) == 6


def test_experts_on_disk(moe: Path, near: Path) -> None:
    expected = Generator.open(str(moe), "float32", "cpu").generate([PROMPT], SAMPLING)
    for draft in (near, "self"):
        generator = with_draft(moe, draft, expert_memory="100KB")
        assert generator.generate([PROMPT], SAMPLING) == expected


def test_what_is_drawn_is_of_the_model() -> None:
    """Two drafted tokens and the one after, 30,000 times: each place's shares are the model's, whatever was drafted."""
    sampling, generator = Sampling(temperature=0.8, top_p=0.95), torch.Generator().manual_seed(0)
    theirs_KV = torch.tensor([[2.0, 0.0, 1.0, -1.0], [0.0, 0.5, 3.0, 0.0]])
    ours_KV = torch.tensor([[0.0, 1.0, 1.5, 0.5], [1.0, 0.0, 1.0, 2.0], [0.5, 0.0, 0.0, 1.0]])
    drawn, num = probabilities(theirs_KV, sampling), 30_000
    places: list[list[int]] = [[], [], []]
    for _ in range(num):
        guess = Guess(torch.multinomial(drawn, 1, generator=generator)[:, 0].tolist(), theirs_KV)
        accepted, token = keep(guess, ours_KV, sampling, generator)
        for place, got in zip(places, [*guess.tokens[:accepted], token], strict=False):
            place.append(got)
    for place, wanted_V in zip(places, probabilities(ours_KV, sampling), strict=True):
        shares_V = torch.tensor(place).bincount(minlength=4) / len(place)
        torch.testing.assert_close(shares_V, wanted_V, atol=4 * 0.5 / len(place) ** 0.5, rtol=0)  # 4 deviations
    assert len(places[0]) == num
    assert num > len(places[1]) > len(places[2]) > 1000


def test_draws_of_a_whole_text(dense: Path, near: Path) -> None:
    """The second token, where the first is the likeliest: its shares are those without a draft."""
    plain, drafting = Generator.open(str(dense), "float32", "cpu"), with_draft(dense, near, 2)
    how = {"temperature": 2.0, "top_k": 3, "ignore_eos": True}
    with torch.inference_mode():
        logits_1V = plain.decoding.read([plain.encode(PROMPT)], 4)
        first = int(logits_1V.argmax())
        wanted_V = probabilities(plain.decoding.next(torch.tensor([first])), Sampling(**how))[0]
    texts = [drafting.generate([PROMPT], Sampling(3, seed=seed, **how))[0].tokens for seed in range(300)]
    seen = [tokens[1] for tokens in texts if tokens[0] == first]
    assert len(seen) > 80
    shares_V = torch.tensor(seen).bincount(minlength=VOCAB) / len(seen)
    torch.testing.assert_close(shares_V, wanted_V, atol=4 * 0.5 / len(seen) ** 0.5, rtol=0)  # 4 standard deviations


def test_the_command(moe: Path, near: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["generate", str(moe), "--prompt", PROMPT, "--max-tokens", "12", "--dtype", "float32"]
    texts = []
    for more in ([], ["--draft", "self"], ["--draft", str(near), "--draft-tokens", "2", "--draft-dtype", "int8"]):
        cli.app([*words, *more, "--json", str(tmp_path / "out.json")], standalone_mode=False)
        shown = capsys.readouterr()
        texts.append(shown.out)
        assert ("drafted tokens kept" in shown.err) == bool(more)
        counts = json.loads((tmp_path / "out.json").read_text())["counts"]
        assert (counts["draft"] is not None) == bool(more)
    assert texts[0] == texts[1] == texts[2]


@pytest.mark.faults
@pytest.mark.parametrize(
    ("model", "words", "complaint"),
    [
        ("moe", ["--draft", "BYTES"], "another vocabulary (257 tokens) than the model (258)"),
        ("moe", ["--draft", "none/at/all"], "no such model: none/at/all"),
        ("moe", ["--draft", "EMPTY"], "holds no config.json"),
        ("moe", ["--draft", "HOLLOW"], "tokenizer of the draft"),
        ("moe", ["--draft", "self", "--prompt", "b"], "one prompt at a time"),
        ("moe", ["--draft", "self", "--draft-tokens", "0"], "at least 1"),
        ("moe", ["--draft", "self", "--draft-dtype", "int8"], "its own dtype"),
        ("moe", ["--draft-tokens", "3"], "give --draft, too"),
        ("moe", ["--draft", "self", "--twins", "0"], "computes no less"),
        ("flat", ["--draft", "self", "--top-k", "1"], "computes no less"),
        ("dense", ["--draft", "self"], "no experts of lamella's"),
        ("moe", ["--draft", "GPT2"], "no model of Llama's layers"),
        ("moe", ["--draft", "SHORT"], "reads 64 tokens at most"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_line(
    model: str, words: list[str], complaint: str, tmp_path: Path, request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Exit code 2, nothing else said, nothing written."""
    drafts = {name: tmp_path / name for name in ("BYTES", "EMPTY", "HOLLOW", "GPT2", "SHORT")}
    tiny_checkpoint(drafts["BYTES"], vocab_size=VOCAB)
    save_tokenizer(drafts["BYTES"], has_bos=False)
    drafts["EMPTY"].mkdir()
    tiny_checkpoint(drafts["HOLLOW"], vocab_size=VOCAB)
    save_tokenizer(tiny_checkpoint(drafts["GPT2"], "gpt2", vocab_size=VOCAB))
    save_tokenizer(tiny_checkpoint(drafts["SHORT"], vocab_size=VOCAB, max_position_embeddings=64))
    given = [str(drafts.get(word, word)) for word in words]
    folder = request.getfixturevalue(model)
    report = tmp_path / "out.json"
    monkeypatch.setattr(
        "sys.argv", ["lamella", "generate", str(folder), "--prompt", "a", *given, "--json", str(report)]
    )
    with pytest.raises(SystemExit) as ended:
        cli.main()
    shown = capfd.readouterr()
    assert ended.value.code == 2
    assert shown.out == ""
    assert shown.err.count("\n") == 1
    assert complaint in shown.err
    assert not report.exists()


def test_a_batch_is_refused_from_python_too(dense: Path) -> None:
    generator = with_draft(dense, dense)
    with pytest.raises(UserError, match="one prompt at a time"):
        generator.generate([PROMPT, PROMPT])
    assert len(AutoTokenizer.from_pretrained(dense)) == VOCAB
