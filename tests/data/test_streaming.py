"""Streams: the samples of the token file, from any place on, the same on any number of ranks."""

from __future__ import annotations

import json
import shutil
import threading
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import torch
from datasets import load_dataset

from lamella.data import streaming, texts
from lamella.data.packing import PackedSamples, Sample, token_file
from lamella.data.prepare import prepare
from lamella.data.readers import BadRecords, Place
from lamella.data.sources import open_source, records
from lamella.data.streaming import Ranks, StreamedSamples
from lamella.errors import BadData, UserError
from lamella.recipe.sections import Portion
from lamella.recipe.training import make_recipe
from lamella.train.data import MixedSamples, SampleLoader, open_samples
from support.models import save_tokenizer

TEXTS = [f"document {i}: " + "word " * (i % 7) for i in range(300)]
L = 64


@pytest.fixture
def tokenizer(tmp_path):
    return save_tokenizer(tmp_path / "tokenizer")


@pytest.fixture(autouse=True)
def many_batches(monkeypatch):
    """So that a stream of so little text is read in several goes."""
    monkeypatch.setattr(streaming, "BATCH_CHARS", 500)
    monkeypatch.setattr(texts, "PIECE_BYTES", 4000)


def write_jsonl(file: Path, texts: list[str] = TEXTS) -> Path:
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return file


def write_parquet(file: Path) -> Path:
    pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS}), file, row_group_size=70)
    return file


def write_book(file: Path) -> Path:
    """All three newlines, in characters of several bytes."""
    ends = ("\n", "\r\n", "\r")
    file.write_bytes("".join(f"line {i} é ※ " + "word " * (i % 30) + ends[i % 3] for i in range(900)).encode())
    return file


def write_folder(folder: Path) -> Path:
    folder.mkdir()
    write_jsonl(folder / "a.jsonl", TEXTS[:100])
    (folder / "b.jsonl").write_text('\n{"text": "behind an empty line"}\n{"text": "no newline"}')
    write_parquet(folder / "c.parquet")
    for i in range(5):
        (folder / f"d{i}.md").write_text(f"page {i} " * 40)
    write_jsonl(folder / "e.jsonl", [])  # empty: no file of the source
    return folder


WRITERS = {"a.jsonl": write_jsonl, "a.parquet": write_parquet, "book.txt": write_book, "folder": write_folder}
KINDS = [*WRITERS, "python-docs", "datasets"]


def open_stream(tmp_path: Path, kind: str, tokenizer: Path, split=None) -> StreamedSamples:
    if kind == "python-docs":
        return StreamedSamples(kind, split, tokenizer, 4096)
    if kind == "datasets":
        file = str(WRITERS["a.jsonl"](tmp_path / "set.jsonl"))
        stream = load_dataset("json", data_files=file, split="train", streaming=True)
        return StreamedSamples("owner/set", split, tokenizer, L, stream=stream)
    path = tmp_path / kind
    source = str(path if path.exists() else WRITERS[kind](path))
    return StreamedSamples(source, split, tokenizer, L)


def equal(a: Sample, b: Sample) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("split", [None, "train"])
@pytest.mark.parametrize("kind", [k for k in KINDS if k != "datasets"])
def test_a_stream_gives_the_samples_of_the_token_file(tmp_path, tokenizer, kind, split):
    stream = open_stream(tmp_path, kind, tokenizer, split)
    packed = PackedSamples(token_file(stream.source, split, tokenizer, cache=tmp_path / "cache"), stream.seq_len)
    assert len(packed) > 20
    # The file's last windows aside: the stream goes on into its next epoch.
    assert all(equal(stream.sample(i), packed.sample(i)) for i in range(len(packed)))


def test_a_set_gives_the_samples_of_the_same_text_in_a_file(tmp_path, tokenizer):
    as_set = open_stream(tmp_path, "datasets", tokenizer)
    as_file = StreamedSamples(str(tmp_path / "set.jsonl"), None, tokenizer, L)
    assert all(equal(as_set.sample(i), as_file.sample(i)) for i in range(150))


@pytest.mark.parametrize("kind", WRITERS)
def test_reading_goes_on_at_any_place(tmp_path, kind):
    source = open_source(str(WRITERS[kind](tmp_path / kind)))
    whole = list(records(source, BadRecords()))
    assert len(whole) > 7
    for i in range(0, len(whole), 7):
        place = Place(*json.loads(json.dumps(whole[i].end)))
        rest = list(records(source, BadRecords(), place))
        assert [(r.name, r.content, r.where) for r in rest] == [(r.name, r.content, r.where) for r in whole[i + 1 :]]


def test_broken_records_are_passed_over_from_any_place_on(tmp_path, tokenizer):
    lines = [json.dumps({"text": text}) if i % 9 else "not JSON" for i, text in enumerate(TEXTS)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    with pytest.raises(UserError, match=r"a\.jsonl, line 1 \(byte 0\): not JSON"):
        StreamedSamples(str(tmp_path / "a.jsonl"), None, tokenizer, L)
    options = {"tokenizer": tokenizer, "seq_len": L, "on_bad_data": "skip"}
    stream, resumed = (StreamedSamples(str(tmp_path / "a.jsonl"), None, **options) for _ in range(2))
    stream.advance(20)
    resumed.load_state_dict(json.loads(json.dumps(stream.state_dict())))
    assert all(equal(stream.sample(i), resumed.sample(i)) for i in range(20, 150))
    assert stream.passes() > 1


@pytest.mark.parametrize("done", [1, 40, 150, 400])  # 400: in the third epoch of most
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.slow
def test_a_resumed_stream_goes_on_where_it_was(tmp_path, tokenizer, kind, done):
    stream, resumed = (open_stream(tmp_path, kind, tokenizer) for _ in range(2))
    stream.sample(done - 1)
    state = json.dumps(stream.state_dict())
    expected = [stream.sample(i) for i in range(done, done + 150)]
    # also of a stream that was further on, which a fall back to an older checkpoint is
    for ahead in (0, 600):
        resumed.advance(ahead)
        resumed.load_state_dict(json.loads(state))
        assert all(equal(resumed.sample(done + i), sample) for i, sample in enumerate(expected))


def test_a_resumed_stream_does_not_read_what_came_before(tmp_path, tokenizer):
    stream = open_stream(tmp_path, "folder", tokenizer)
    stream.advance(160)
    state = stream.state_dict()
    assert state["place"][0] == 2  # c.parquet
    before = tmp_path / "folder" / "a.jsonl"
    before.write_text("x\n" * (before.stat().st_size // 2))
    resumed = StreamedSamples(stream.source, None, tokenizer, L, on_bad_data="skip")
    skipped = resumed.reading.bad.skipped
    assert skipped > 1000
    resumed.load_state_dict(state)
    assert equal(resumed.sample(200), stream.sample(200))
    assert resumed.reading.bad.skipped == skipped


def mixture(tmp_path: Path, tokenizer: Path) -> MixedSamples:
    for name in ("a.jsonl", "a.parquet", "b.jsonl"):
        if not (tmp_path / name).exists():
            WRITERS.get(name, write_jsonl)(tmp_path / name)
    portions = [
        Portion(source=str(tmp_path / "a.jsonl"), weight=2, stream=True),
        Portion(source=str(tmp_path / "b.jsonl"), weight=1),
        Portion(source=str(tmp_path / "a.parquet"), weight=1, stream=True),
    ]
    return open_samples(portions, "train", tokenizer, L, 3, 100, 300)


def loaders(tmp_path: Path, tokenizer: Path, ranks: int) -> list[SampleLoader]:
    return [
        SampleLoader.Config(samples=mixture(tmp_path, tokenizer)).build(
            dp_world_size=ranks, dp_rank=rank, local_batch_size=12 // ranks
        )
        for rank in range(ranks)
    ]


def steps(of_ranks: list[SampleLoader], count: int) -> list[torch.Tensor]:
    """The tokens of each step of 12 samples, over all ranks."""
    iterators = [iter(loader) for loader in of_ranks]
    return [torch.cat([next(it)[0]["input"] for it in iterators]) for _ in range(count)]


def test_streams_give_each_step_the_same_samples_on_any_number_of_ranks(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setenv("LAMELLA_CACHE", str(tmp_path / "cache"))
    alone = steps(loaders(tmp_path, tokenizer, 1), 30)
    state = None
    for ranks, first in ((3, 0), (2, 11), (1, 17), (3, 24)):
        of_ranks = loaders(tmp_path, tokenizer, ranks)
        for loader in of_ranks:
            loader.state_dict()  # as a checkpoint is loaded
            if state is not None:
                loader.load_state_dict(state)
        count = {0: 11, 11: 6, 17: 7, 24: 6}[first]
        expected = alone[first : first + count]
        assert all(torch.equal(a, b) for a, b in zip(steps(of_ranks, count), expected, strict=True))
        states = [loader.state_dict() for loader in of_ranks]
        assert all(other == states[0] for other in states)
        state = states[0]
    samples = of_ranks[0].samples
    assert samples.locate(0)[0] in (0, 1, 2)
    described = samples.describe(100)
    assert "a.jsonl 50.0% of the samples, streamed; " in described
    assert "b.jsonl 25.0% of the samples, 0." in described
    epochs = samples.epochs(360)
    a, b, c = (epochs[name] for name in samples.names)
    assert 1 < a < 1.6 > 2 * b > 1  # half and a quarter of the same text
    assert 0.5 < c < 0.8


def test_the_held_out_part_of_a_stream_is_kept_as_far_as_it_is_needed(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setenv("LAMELLA_CACHE", str(tmp_path / "cache"))
    portion = Portion(source=str(write_jsonl(tmp_path / "a.jsonl")), stream=True)
    heldout = open_samples([portion], "heldout", tokenizer, 16, None, 4, 300)
    assert not heldout.streams
    assert 4 <= len(heldout) < 10


def test_what_cannot_be_streamed_is_refused_at_once(tmp_path, tokenizer):
    def open_it(name: str, text: str, **options):
        (tmp_path / name).write_text(text)
        return StreamedSamples(str(tmp_path / name), None, tokenizer, L, **options)

    with pytest.raises(UserError, match="has 6 tokens, too few for one sample of 64"):
        open_it("short.jsonl", '{"text": "short"}\n')
    with pytest.raises(UserError, match="conversation where a text is wanted"):
        open_it("chat.jsonl", '{"messages": [{"role": "user", "content": "x"}]}\n')
    with pytest.raises(UserError, match=r"line 1 \(byte 0\): no text in the field 'text'"):
        open_it("other.jsonl", '{"body": "x"}\n')
    with pytest.raises(UserError, match=r"has the token id \d+, but the model's vocabulary has 100 ids"):
        open_it("z.md", "z" * 100, vocab_size=100)
    write_jsonl(tmp_path / "a.jsonl")
    prepare([str(tmp_path / "a.jsonl")], tokenizer, tmp_path / "prepared")
    with pytest.raises(UserError, match=r"is prepared.* leave out stream: true"):
        StreamedSamples(str(tmp_path / "prepared"), None, tokenizer, L)
    stream = load_dataset("json", data_files=str(tmp_path / "a.jsonl"), split="train", streaming=True)
    with pytest.raises(UserError, match="record 0: no text in the field 'body'"):
        StreamedSamples("owner/set#body", None, tokenizer, L, stream=stream)


@pytest.mark.faults
def test_a_file_that_goes_while_it_is_streamed_is_bad_data_and_can_come_back(tmp_path, tokenizer):
    stream, whole = (open_stream(tmp_path, "folder", tokenizer) for _ in range(2))
    shutil.move(tmp_path / "folder" / "d3.md", tmp_path / "away")
    with pytest.raises(BadData, match=r"cannot be read any more: .*d3\.md"):
        stream.advance(500)
    shutil.move(tmp_path / "away", tmp_path / "folder" / "d3.md")
    assert equal(stream.sample(500), whole.sample(500))


def test_recipes_say_what_streams_need():
    def problem(**values) -> str:
        with pytest.raises(UserError) as error:
            make_recipe(values)
        return str(error.value)

    one = {"source": "a", "stream": True}
    assert make_recipe({"data": [one]}).data[0].stream
    assert make_recipe({"data": [one]}).model_dump()["data"] == [one]
    assert "give each source a weight" in problem(data=[one, "b"])
    assert "streams only repeat" in problem(data=[one], on_exhausted="stop")
    weighted = [one | {"weight": 1}, {"source": "b", "weight": 1}]
    fit = {"to_slices": ["a"], "to_twins": ["b"]}
    assert "router_fit needs samples from all over 'a'" in problem(data=weighted, router_fit=fit)
    assert "(did you mean 'stream'?)" in problem(data=[{"source": "a", "streem": True}])


class Meeting:
    """Gathers what the threads of several ranks give, as `all_gather_object` does."""

    def __init__(self, size: int):
        self.barrier, self.given = threading.Barrier(size, timeout=20), [None] * size

    def ranks(self, rank: int) -> Ranks:
        def gather(mine: object) -> list[object]:
            self.given[rank] = mine
            self.barrier.wait()
            everyones = list(self.given)
            self.barrier.wait()
            return everyones

        return Ranks(rank, len(self.given), gather)


def together(streams: list[StreamedSamples], job) -> list:
    """What `job` gives for each stream, in a thread each, with their tokenising shared out."""
    meeting = Meeting(len(streams))
    for rank, stream in enumerate(streams):
        stream.ranks = meeting.ranks(rank)
    with ThreadPoolExecutor(len(streams)) as pool:
        return list(pool.map(job, streams))


@pytest.mark.parametrize("kind", ["folder", "datasets"])
def test_ranks_tokenise_a_share_each_and_have_the_same_samples(tmp_path, tokenizer, kind, monkeypatch):
    alone, *shared = (open_stream(tmp_path, kind, tokenizer) for _ in range(4))
    expected = [alone.sample(i) for i in range(120)]  # into the second epoch
    texts: defaultdict[int, int] = defaultdict(int)
    tokenised = StreamedSamples._tokenised

    def counted(stream, share):
        texts[id(stream)] += len(share)
        return tokenised(stream, share)

    monkeypatch.setattr(StreamedSamples, "_tokenised", counted)

    def read(stream: StreamedSamples) -> tuple[list[Sample], dict]:
        samples = []
        for first in range(0, 120, 10):
            stream.read_ahead(first + 10)
            samples += [stream.sample(i) for i in range(first, first + 10)]
        return samples, stream.state_dict()

    found = together(shared, read)
    for samples, state in found:
        assert all(equal(a, b) for a, b in zip(samples, expected, strict=True))
        assert state == found[0][1]
    assert max(texts.values()) < 0.6 * sum(texts.values())
    later = open_stream(tmp_path, kind, tokenizer)
    later.load_state_dict(json.loads(json.dumps(found[0][1])))
    assert equal(later.sample(130), alone.sample(130))


@pytest.mark.faults
def test_what_one_rank_cannot_read_all_ranks_say_and_go_on_from(tmp_path, tokenizer):
    whole, *shared = (open_stream(tmp_path, "folder", tokenizer) for _ in range(3))
    start, broken = shared[1].reading.start, [True]

    def fails(place, epoch):
        for record in start(place, epoch):
            if broken and record.end.file == 4:
                raise OSError("gone")
            yield record

    shared[1].reading.start = fails

    def read(stream: StreamedSamples) -> str:
        stream.read_ahead(500)
        with pytest.raises(BadData) as error:
            stream.advance(500)
        return str(error.value)

    messages = together(shared, read)
    assert messages[0] == messages[1]
    assert "cannot be read any more: gone" in messages[0]
    broken.clear()
    expected = whole.sample(500)
    samples = together(shared, lambda stream: (stream.read_ahead(501), stream.sample(500))[1])
    assert all(equal(sample, expected) for sample in samples)
