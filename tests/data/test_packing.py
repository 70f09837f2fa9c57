"""Token files and samples: every token once, boundaries, order, resume, and several processes at once."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from lamella.data.packing import IGNORE_INDEX, PackedSamples, make_sample, token_file
from lamella.data.prepared import TokenFolder, open_prepared
from lamella.data.sources import MANIFEST, documents
from lamella.data.tokenizer import Tokens
from lamella.errors import UserError
from lamella.recipe.sections import Portion
from lamella.train import data
from support.models import BOS, EOS, save_tokenizer
from support.shards import write_folder

TEXTS = [f"document {i}: " + "word " * (i % 7) for i in range(300)]


@pytest.fixture
def tokenizer(tmp_path):
    return save_tokenizer(tmp_path / "tokenizer")


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return str(path)


@pytest.fixture
def tokens(source, tokenizer, tmp_path):
    return token_file(source, None, tokenizer, cache=tmp_path / "cache")


def make_tokens(folder, lengths: list[int]) -> TokenFolder:
    """Document d is d+1 repeated, then EOS."""
    documents = [Tokens(np.array([d + 1] * (n - 1) + [EOS], dtype=np.uint16)) for d, n in enumerate(lengths)]
    folder.mkdir()
    return write_folder(folder, [documents])


def everything(tokens: TokenFolder):
    """(all tokens, where documents start)"""
    whole = tokens.window(0, len(tokens))
    return whole.ids, whole.starts


def test_a_token_file_holds_every_document_and_its_eos(tokens):
    tokens_N, starts = everything(tokens)
    pieces = np.split(tokens_N, starts[1:])
    assert all(piece[-1] == EOS and EOS not in piece[:-1] for piece in pieces)
    # one token per byte, so lengths count bytes
    assert [len(piece) - 1 for piece in pieces] == [len(text) for text in TEXTS]
    assert tokens_N.dtype == np.uint16


def test_bos_comes_only_from_the_tokenizer(source, tmp_path):
    tokenizer = save_tokenizer(tmp_path / "with-bos", add_bos=True)
    tokens = token_file(source, None, tokenizer, cache=tmp_path)
    tokens_N, starts = everything(tokens)
    assert (tokens_N[starts] == BOS).all()
    assert (tokens_N == BOS).sum() == len(TEXTS)


def test_the_cache_knows_texts_split_and_tokenizer(source, tokenizer, tmp_path):
    def ask(split=None, tokenizer=tokenizer):
        return token_file(source, split, tokenizer, cache=tmp_path / "cache")

    first = ask()
    written = (first.folder / MANIFEST).stat().st_mtime_ns
    assert ask().folder == first.folder
    assert (first.folder / MANIFEST).stat().st_mtime_ns == written
    train, heldout = ask("train"), ask("heldout")
    assert len(train) + len(heldout) == len(first)
    assert ask(tokenizer=save_tokenizer(tmp_path / "with-bos", add_bos=True)).folder != first.folder
    with open(source, "a") as file:
        file.write('{"text": "one more", "body": "other"}\n')
    assert len(ask()) == len(first) + len("one more") + 1
    by_field = token_file(f"{source}#body", None, tokenizer, cache=tmp_path / "cache", on_bad_data="skip")
    assert len(by_field) == len("other") + 1
    left = {p.name for p in (tmp_path / "cache" / "tokens").iterdir() if not p.name.endswith(".lock")}
    assert all(len(name) == 32 for name in left)  # no temporary folders


def test_max_tokens_stops_at_a_document(source, tokenizer, tmp_path):
    short = token_file(source, None, tokenizer, cache=tmp_path, max_tokens=100)
    assert 100 <= len(short) < 100 + max(map(len, TEXTS)) + 1
    assert everything(short)[0][-1] == EOS


@pytest.mark.slow
def test_processes_that_ask_at_once_get_the_same_file(source, tokenizer, tmp_path):
    code = "import sys; from lamella.data.packing import token_file; from pathlib import Path\n"
    code += "t = token_file(sys.argv[1], None, sys.argv[2], cache=Path(sys.argv[3])); print(t.folder, len(t))"
    command = [sys.executable, "-c", code, source, str(tokenizer), str(tmp_path / "cache")]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    answers = {process.communicate(timeout=120)[0] for process in running}
    assert len(answers) == 1
    folder, length = answers.pop().split()
    assert len(open_prepared(tmp_path / folder, None)) == int(length) > 0


def test_boundaries_restart_positions_and_hide_the_label():
    sample = make_sample(np.array([5, 5, EOS, 6, 6, EOS, 7]), np.array([3, 6]))
    assert sample.input_ids_L.tolist() == [5, 5, EOS, 6, 6, EOS]
    assert sample.labels_L.tolist() == [5, EOS, IGNORE_INDEX, 6, EOS, IGNORE_INDEX]
    assert sample.positions_L.tolist() == [0, 1, 2, 0, 1, 2]
    assert all(t.dtype == torch.int64 for t in sample)


def test_a_document_that_starts_with_the_sample_hides_nothing():
    sample = make_sample(np.array([5, 5, 5]), np.array([0]))
    assert sample.labels_L.tolist() == [5, 5]
    assert sample.positions_L.tolist() == [0, 1]


@pytest.mark.parametrize("seed", [None, 0, 7])
def test_an_epoch_holds_every_window_once(seed, tmp_path):
    tokens = make_tokens(tmp_path / "tokens", [5, 1, 9, 30, 2, 40])
    packed = PackedSamples(tokens, 8, seed)
    assert len(packed) == (87 - 1) // 8
    for epoch in range(3):
        windows = [packed.sample(i).input_ids_L for i in range(epoch * len(packed), (epoch + 1) * len(packed))]
        seen = sorted(tuple(w.tolist()) for w in windows)
        stream = everything(tokens)[0][: len(packed) * 8].reshape(-1, 8)
        assert seen == sorted(map(tuple, stream.tolist()))
    # The labels that lead into another document are hidden, wherever the windows fall.
    hidden = sum(int((packed.sample(i).labels_L == IGNORE_INDEX).sum()) for i in range(len(packed)))
    assert hidden == sum(0 < start <= len(packed) * 8 for start in everything(tokens)[1])


def test_the_order_depends_on_seed_and_index_alone(tmp_path):
    tokens = make_tokens(tmp_path / "tokens", [100] * 20)
    first, again, other = PackedSamples(tokens, 16, 3), PackedSamples(tokens, 16, 3), PackedSamples(tokens, 16, 4)
    order = range(3 * len(first))
    walked = [first.sample(i).input_ids_L for i in order]
    jumped = {i: again.sample(i).input_ids_L for i in reversed(order)}
    assert all(torch.equal(walked[i], jumped[i]) for i in order)
    assert not all(torch.equal(walked[i], other.sample(i).input_ids_L) for i in order)
    n = len(first)
    assert not all(torch.equal(walked[i], walked[n + i]) for i in range(n))  # each epoch has an order of its own


def test_too_little_text_is_refused(tokens, source, tokenizer, tmp_path):
    with pytest.raises(UserError, match=r"has \d+ tokens, too few for one sample of 1000000"):
        PackedSamples(tokens, 1_000_000)
    with pytest.raises(UserError, match="at least 1"):
        PackedSamples(tokens, 0)
    (tmp_path / "one.jsonl").write_text('{"text": "one record only"}')
    sides = {}
    for split in ("train", "heldout"):
        sides[split] = len(list(documents(str(tmp_path / "one.jsonl"), split)))
    empty = min(sides, key=sides.__getitem__)
    with pytest.raises(UserError, match=f"\\({empty}\\) holds no text"):
        token_file(str(tmp_path / "one.jsonl"), empty, tokenizer, cache=tmp_path)
    with pytest.raises(UserError, match="no tokenizer in"):
        token_file(source, None, tmp_path, cache=tmp_path)
    with pytest.raises(UserError, match="there is no folder /not/there"):
        token_file(source, None, "/not/there", cache=tmp_path)
    with pytest.raises(UserError, match="is streamed"):
        token_file("someone/something", None, tokenizer, cache=tmp_path)


def test_samples_to_look_at_are_read_of_a_stream_that_nothing_trains_on(source, tokenizer, tokens, monkeypatch):
    read = {}
    monkeypatch.setattr(
        data, "token_file", lambda name, *_, max_tokens, **__: read.update({name: max_tokens}) or tokens
    )
    portions = [Portion(source=source, weight=1), Portion(source="owner/looked-at", weight=0)]
    data.open_samples(portions, "train", tokenizer, 64, 0, 20, 300, at_least=12)
    assert read == {source: None, "owner/looked-at": 13 * 64 + 1}
