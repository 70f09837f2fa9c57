"""`lamella data prepare`: the same bytes by any number of workers, after any kill, opened like any other source."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest
import torch
from typer.testing import CliRunner

from lamella.cli import app
from lamella.data.command import PrepareProgress
from lamella.data.packing import PackedSamples, token_file
from lamella.data.prepare import Done, prepare
from lamella.data.prepared import open_prepared, read_manifest
from lamella.data.sources import open_source
from lamella.errors import UserError
from lamella.evaluate.perplexity import text_samples
from lamella.recipe.sections import Portion
from lamella.train.data import open_samples
from support.models import VOCAB, save_llama, save_tokenizer

UNIT = 4000


@pytest.fixture
def model(tmp_path):
    return save_tokenizer(tmp_path / "model")


@pytest.fixture
def sources(tmp_path):
    """A jsonl file, a parquet file with another column, a folder."""
    texts = [f"document {i}: " + "word " * (i % 50) for i in range(300)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    pyarrow.parquet.write_table(pyarrow.table({"body": texts[:100]}), tmp_path / "b.parquet")
    (tmp_path / "c").mkdir()
    for i in range(30):
        (tmp_path / "c" / f"{i}.md").write_text(texts[i] * 5)
    return [str(tmp_path / "a.jsonl"), f"{tmp_path / 'b.parquet'}#body", str(tmp_path / "c")]


def digests(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.glob("*.shard"))}


@pytest.mark.slow
def test_any_number_of_workers_writes_the_same(sources, model, tmp_path):
    for workers in (1, 2):
        prepare(sources, model, tmp_path / str(workers), workers=workers, unit_bytes=UNIT)
    assert digests(tmp_path / "1") == digests(tmp_path / "2")
    assert len(digests(tmp_path / "1")) > 20
    assert {p.name for p in (tmp_path / "2").iterdir()} - digests(tmp_path / "2").keys() == {
        "lamella-data.json",
        ".lock",
    }


@pytest.fixture
def prepared(sources, model, tmp_path):
    prepare(sources, model, tmp_path / "out", unit_bytes=UNIT)
    return tmp_path / "out"


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_a_folder_is_a_source_of_the_same_samples(prepared, sources, model, tmp_path, split):
    """As the source itself, tokenised into the cache: for one source, token by token."""
    prepare(sources[:1], model, tmp_path / "one", unit_bytes=UNIT)
    one = token_file(str(tmp_path / "one"), split, model)
    other = token_file(sources[0], split, model, cache=tmp_path / "cache")
    assert len(one) == len(other)
    a, b = one.window(0, len(one)), other.window(0, len(other))
    assert (a.ids == b.ids).all()
    assert (a.starts == b.starts).all()
    assert len(one.entries) > 1 == len(other.entries)
    samples, expected = PackedSamples(one, 64), PackedSamples(other, 64)
    for i in range(len(samples)):
        assert all(torch.equal(x, y) for x, y in zip(samples.sample(i), expected.sample(i), strict=True))
    everything = token_file(str(prepared), split, model)
    assert everything.window(0, len(one)).ids.tolist() == a.ids.tolist()


def test_it_mixes_with_other_sources_and_is_evaluated(prepared, sources, model):
    portions = [Portion(source=str(prepared), weight=0.75), Portion(source=sources[0], weight=0.25)]
    samples = open_samples(portions, "train", model, 64, 0, 100, VOCAB)
    assert [samples.locate(i)[0] for i in range(8)].count(0) == 6
    assert len(text_samples(str(prepared), "heldout", str(model), 64, None)) > 3


def test_a_set_of_the_datasets_library_is_prepared_from_its_stream(sources, model, tmp_path, monkeypatch):
    """A local stream in place of one over the network; the documents are those of the file."""
    stream = datasets.load_dataset("json", data_files=sources[0], split="train", streaming=True)
    monkeypatch.setattr("lamella.data.sources.load_stream", lambda source: stream)
    streamed = prepare(["someone/texts"], model, tmp_path / "streamed", unit_bytes=UNIT)
    (streamed_folder := tmp_path / "streamed" / "train-00002.shard").unlink()
    again = prepare(["someone/texts"], model, tmp_path / "streamed", unit_bytes=UNIT)
    assert streamed_folder.is_file()
    read = prepare(sources[:1], model, tmp_path / "read", unit_bytes=UNIT)
    assert len(streamed) == len(again) == len(read)
    assert streamed.num_documents == read.num_documents == 300


@pytest.mark.parametrize("places", [[3], [0, -1]])
def test_missing_shards_are_made_again(prepared, sources, model, places):
    before = digests(prepared)
    lost = [sorted(before)[i] for i in places]
    times = {name: (prepared / name).stat().st_mtime_ns for name in before}
    for name in lost:
        (prepared / name).unlink()
    prepare(sources, model, prepared, unit_bytes=UNIT)
    assert digests(prepared) == before
    units = {name[-11:] for name in lost}
    again = {name for name in before if (prepared / name).stat().st_mtime_ns != times[name]}
    assert again == {name for name in before if name[-11:] in units}


@pytest.mark.slow
def test_a_killed_call_is_continued_and_leaves_no_worker(tmp_path):
    """kill -9 of the whole while it writes; the second call makes what is missing, the result is that of one call."""
    model = save_tokenizer(tmp_path / "model")
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": f"{i} " * 300}) + "\n" for i in range(20_000)))
    out = tmp_path / "out"
    command = [sys.executable, "-m", "lamella.cli", "data", "prepare", str(text), "--model", str(model)]
    command += ["--out", str(out), "--workers", "2", "--shard-mb", "1"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    while not list(out.glob("train-00001.shard")):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    children = [int(c) for c in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not read_manifest(out).complete
    finished = digests(out)
    with pytest.raises(UserError, match="is not finished"):
        open_prepared(out, None)
    for _ in range(100):
        if not any(Path(f"/proc/{c}/cmdline").exists() and Path(f"/proc/{c}/cmdline").read_text() for c in children):
            break
        time.sleep(0.1)
    else:
        raise AssertionError("workers outlived the call by 10 s")
    prepare([str(text)], model, out, workers=1, unit_bytes=1 << 20)
    assert finished.items() <= digests(out).items()
    prepare([str(text)], model, tmp_path / "whole", workers=1, unit_bytes=1 << 20)
    assert digests(out) == digests(tmp_path / "whole")


@pytest.mark.faults
def test_broken_records_are_named_or_skipped(model, tmp_path):
    file = tmp_path / "a.jsonl"
    lines = ['{"text": "good"}', '{"text": ""}', '{"text": "cut o', '{"text": 3}', '{"text": "good, too"}']
    file.write_text("\n".join(lines) + "\n")
    with pytest.raises(UserError, match=r"a.jsonl, line 3 \(byte 30\): not JSON"):
        prepare([str(file)], model, tmp_path / "out")
    tokens = prepare([str(file)], model, tmp_path / "out", on_bad_data="skip")
    assert tokens.num_documents == 2
    assert tokens.left_out == "1 blank and 2 broken records are left out"
    (tmp_path / "b.jsonl").write_text('{"messages": [{"role": "user", "content": "hello"}]}\n')
    with pytest.raises(UserError, match="has no chat template"):
        prepare([str(tmp_path / "b.jsonl")], model, tmp_path / "other")


def test_other_inputs_are_not_mixed_into_a_folder(prepared, sources, model, tmp_path):
    for changed, message in (
        ({"sources": sources[:2]}, "made with other sources"),
        ({"unit_bytes": 5000}, "made with other unit_bytes"),
        ({"model": save_tokenizer(tmp_path / "bos", add_bos=True)}, "made with other tokenizer"),
    ):
        arguments = {"sources": sources, "model": model, "out": prepared, "unit_bytes": UNIT} | changed
        with pytest.raises(UserError, match=message):
            prepare(**arguments)
    prepare(sources[:1], model, prepared, overwrite=True)
    assert len(digests(prepared)) == 2
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    for overwrite in (False, True):
        with pytest.raises(UserError, match=r"thesis\.txt, which is none of ours"):
            prepare(sources, model, tmp_path / "mine", overwrite=overwrite)


@pytest.mark.faults
def test_the_models_tokenizer_must_be_that_of_the_tokens(prepared, model, tmp_path):
    with pytest.raises(UserError, match="by another tokenizer"):
        token_file(str(prepared), "train", save_tokenizer(tmp_path / "bos", add_bos=True))
    with pytest.raises(UserError, match="has the token id 257, but the model's vocabulary has 200"):
        open_samples([Portion(source=str(prepared))], "train", model, 64, 0, 10, 200)
    assert len(token_file(str(prepared), "train", save_llama(tmp_path / "same tokenizer")))


def test_the_command(sources, model, tmp_path):
    out = tmp_path / "out"
    words = ["data", "prepare", *sources, "--model", str(model), "--out", str(out), "--workers", "1"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    assert f"Train on it with data=[{out}]" in result.output
    assert open_source(str(out)).kind == "prepared"
    with pytest.raises(UserError, match="is prepared already"):
        prepare([str(out)], model, tmp_path / "again")
    assert CliRunner().invoke(app, [*words[:-1], "0"]).exit_code != 0


def test_progress_tells_rate_and_time_left():
    progress = PrepareProgress(1000)
    progress.show(Done(200, 0, 0))  # an earlier call's
    progress.started -= 10
    assert progress.text(Done(600, 5000, 1)) == "shard 1  5,000 tokens  500 tokens/s  ETA 0:10"
    assert progress.text(Done(1000, 9000, 2)) == "shard 2  9,000 tokens  900 tokens/s"
    assert "ETA" not in PrepareProgress(0).text(Done(0, 10, 0))
