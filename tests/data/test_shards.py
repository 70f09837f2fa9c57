"""Shards: what is written is read, and what is not what was written is named by file and offset."""

import os
import random

import numpy as np
import pytest
import torch

from lamella.data.packing import IGNORE_INDEX, PackedSamples
from lamella.data.prepared import MAX_OPEN_SHARDS, TokenFolder, open_prepared, read_manifest
from lamella.data.shards import BLOCK_TOKENS, Shard, ShardWriter
from lamella.data.tokenizer import Tokens
from lamella.errors import BadData, UserError
from lamella.train.data import MAX_BAD_IN_A_ROW, MixedSamples
from support.models import EOS, VOCAB
from support.shards import write_folder

pytestmark = pytest.mark.faults


def made_up(count: int, mean: int, seed: int = 0, masked: bool = False, dtype=np.uint16) -> list[Tokens]:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 2 * mean, count)
    ids = [rng.integers(0, EOS, n).astype(dtype) for n in lengths]
    return [Tokens(i, rng.random(len(i)) < 0.5 if masked and d % 2 else None) for d, i in enumerate(ids)]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("vocab_size", [VOCAB, 70_000])
def test_every_window_is_what_was_written(folder, masked, vocab_size):
    """Three shards of two blocks and more, windows across both."""
    units = [made_up(300, 250, seed, masked, np.uint16 if vocab_size == VOCAB else np.uint32) for seed in range(3)]
    tokens = write_folder(folder, units, vocab_size)
    documents = [d for unit in units for d in unit]
    ids = np.concatenate([d.ids for d in documents])
    starts = np.cumsum([0, *(len(d.ids) for d in documents)])[:-1]
    learned = np.concatenate([np.ones(len(d.ids), bool) if d.learned is None else d.learned for d in documents])
    assert len(tokens) == len(ids) > 3 * 2 * BLOCK_TOKENS
    assert tokens.num_documents == len(documents)
    assert (tokens.document_starts() == starts).all()
    rng = random.Random(0)
    for _ in range(200):
        start = rng.randrange(len(ids) - 1)
        end = min(len(ids), start + rng.choice([1, 100, BLOCK_TOKENS, 3 * BLOCK_TOKENS]))
        window = tokens.window(start, end)
        assert (window.ids == ids[start:end]).all()
        assert (window.starts == starts[(starts >= start) & (starts < end)] - start).all()
        assert (window.learned is None) == (not masked)
        assert not masked or (window.learned == learned[start:end]).all()
    assert tokens.is_chat() == masked
    file = folder / read_manifest(folder).shards(None)[0].file
    mapped = np.memmap(file, dtype=np.uint16 if vocab_size == VOCAB else np.uint32, mode="r", offset=128, shape=1000)
    assert (mapped == ids[:1000]).all()


def test_few_files_are_open_at_once(folder):
    tokens = write_folder(folder, [made_up(2, 20, seed) for seed in range(MAX_OPEN_SHARDS + 20)])
    before = len(os.listdir("/proc/self/fd"))
    for start in range(0, len(tokens) - 10, 7):
        tokens.window(start, start + 10)
    assert len(os.listdir("/proc/self/fd")) <= before


def flip(file, offset):
    raw = bytearray(file.read_bytes())
    raw[offset] ^= 4
    file.write_bytes(raw)


def damaged(folder, damage) -> TokenFolder:
    """Two shards of a few blocks, opened before the second is damaged."""
    write_folder(folder, [made_up(300, 250, seed) for seed in range(2)])
    tokens = TokenFolder(folder, None, read_manifest(folder))
    damage(folder / "train-00001.shard")
    return tokens


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: f.unlink(), r"train-00001.shard: cannot be opened \(No such file"),
        (lambda f: os.truncate(f, 1000), r"train-00001.shard, offset 1000: it has 1000 bytes of \d+"),
        (lambda f: os.truncate(f, 10), r"train-00001.shard, offset 10: the file ends there"),
        (lambda f: f.write_bytes(f.read_bytes() + b"x"), r"train-00001.shard, offset \d+: it has \d+ bytes"),
        (lambda f: flip(f, 0), "train-00001.shard, offset 0: no shard of version 1"),
        (lambda f: flip(f, 16), r"train-00001.shard, offset \d+: its index is not what was written"),
        (lambda f: flip(f, -500), r"train-00001.shard, offset \d+: its index is not what was written"),
        (lambda f: flip(f, -1), r"train-00001.shard, offset \d+: its index is not what was written"),
    ],
)
def test_damage_to_size_header_or_index_is_found_when_opened(folder, damage, message):
    damaged(folder, damage)
    with pytest.raises(BadData, match=message):
        open_prepared(folder, None)


def test_damage_to_tokens_is_found_in_the_samples_that_have_it(folder):
    """A flipped bit in the second block of the second shard."""
    tokens = damaged(folder, lambda f: flip(f, 128 + 2 * (BLOCK_TOKENS + 5)))
    assert len(open_prepared(folder, None)) == len(tokens)  # opening reads no tokens
    first = read_manifest(folder).shards(None)[0].num_tokens
    bad = range(first + BLOCK_TOKENS, first + 2 * BLOCK_TOKENS)
    samples = PackedSamples(tokens, 512)
    found, messages = set(), set()
    for i in range(len(samples)):
        try:
            samples.sample(i)
        except BadData as error:
            found.add(i)
            messages.add(str(error).partition("/train-")[2])
    expected = {i for i in range(len(samples)) if i * 512 < bad.stop and (i + 1) * 512 >= bad.start}
    assert found == expected
    assert len(messages) == 1
    assert messages.pop().startswith(f"00001.shard, offset {128 + 2 * BLOCK_TOKENS}: the 64 KiB from there")


@pytest.mark.parametrize("damage", [lambda f: os.truncate(f, 70_000), lambda f: f.write_bytes(b"")])
def test_data_that_shrink_while_they_are_read_are_named(folder, damage):
    write_folder(folder, [made_up(300, 250)])
    tokens = TokenFolder(folder, None, read_manifest(folder))
    tokens.window(0, 100)
    damage(folder / "train-00000.shard")
    with pytest.raises(BadData, match=r"train-00000.shard, offset (70000|0): the file ends there"):
        tokens.window(len(tokens) - 100, len(tokens))


def test_an_open_file_outlives_its_name(folder):
    write_folder(folder, [made_up(300, 250)])
    tokens = TokenFolder(folder, None, read_manifest(folder))
    first = tokens.window(0, 100).ids
    (folder / "train-00000.shard").unlink()
    assert (tokens.window(0, 100).ids == first).all()


def mixed(tokens, policy) -> MixedSamples:
    return MixedSamples([PackedSamples(tokens, 512)], 3, names=["x"], on_bad_data=policy)


def test_by_policy_bad_samples_have_nothing_to_predict(folder):
    tokens = damaged(folder, lambda f: flip(f, 128 + 2 * 5))
    failing, skipping, whole = mixed(tokens, "fail"), mixed(tokens, "skip"), mixed(tokens, "fail")
    with pytest.raises(BadData):
        [failing.sample(i) for i in range(len(failing))]
    bad = []
    for i in range(len(skipping)):
        sample = skipping.sample(i)
        if (sample.labels_L == IGNORE_INDEX).all():
            bad.append(i)
            assert {len(t) for t in sample} == {512}
        else:  # all others keep their place
            assert all(torch.equal(a, b) for a, b in zip(sample, whole.sample(i), strict=True))
    assert len(bad) == skipping.skipped == BLOCK_TOKENS // 512 + 1


def test_by_policy_another_sample_is_read_where_one_is_damaged(folder):
    tokens = damaged(folder, lambda f: os.truncate(f, 70_000))
    failing, skipping = mixed(tokens, "fail"), mixed(tokens, "skip")
    places = range(len(skipping))
    assert all((skipping.readable(0, i).labels_L != IGNORE_INDEX).any() for i in places)
    assert torch.equal(skipping.readable(0, 3).input_ids_L, skipping.sources[0].sample(3).input_ids_L)
    with pytest.raises(BadData, match=r"00001.shard, offset 70000"):
        [failing.readable(0, i) for i in places]


def test_data_that_have_gone_end_the_run_by_any_policy(folder):
    tokens = damaged(folder, lambda f: None)
    for entry in read_manifest(folder).shards(None):
        (folder / entry.file).write_bytes(b"")
    samples = mixed(tokens, "skip")
    with pytest.raises(BadData):
        [samples.sample(i) for i in range(len(samples))]
    assert samples.skipped == MAX_BAD_IN_A_ROW


def test_an_id_past_the_vocabulary_is_named(folder):
    """As another program may write it, hashes and all."""
    documents = [Tokens(np.array([1, 2, 9, EOS], dtype=np.uint16)) for _ in range(10)]
    tokens = write_folder(folder, [documents], vocab_size=9)
    with pytest.raises(BadData, match=rf"offset {128 + 2 * 14}: the token id 9 is past the vocabulary of 9"):
        tokens.window(12, 20)
    assert tokens.largest_id == EOS


def test_a_document_of_length_0_is_named(folder):
    documents = [Tokens(np.array(ids, dtype=np.uint16)) for ids in ([1, 2], [], [3, 4])]
    tokens = write_folder(folder, [documents])
    with pytest.raises(BadData, match=r"train-00000.shard, offset \d+: a document of length 0"):
        tokens.window(0, 4)


def test_a_writer_that_fails_leaves_nothing(folder):
    writer = ShardWriter(folder / "a.shard", VOCAB, np.dtype(np.uint16), "0" * 32)
    writer.add(made_up(1, 10)[0])
    writer.abandon()
    assert list(folder.iterdir()) == []
    with pytest.raises(BadData, match="cannot be opened"):
        Shard(folder / "a.shard")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text[:50], "is damaged"),
        (lambda text: text.replace('"version": 2', '"version": 99'), "of version 99"),
        (lambda text: text.replace('"complete": true', '"complete": false'), "is not finished"),
        (lambda text: text.replace('"num_tokens"', '"tokens"'), "is damaged"),
        (lambda text: text.replace('"lamella tokens"', '"other"'), "is damaged"),
    ],
)
def test_a_bad_manifest_is_refused(folder, change, message):
    write_folder(folder, [made_up(5, 20)])
    file = folder / "lamella-data.json"
    file.write_text(change(file.read_text()))
    with pytest.raises(UserError, match=message):
        open_prepared(folder, None)
