"""Folders as people have them: compressed, in capitals, linked, without suffixes; what is left out has a name."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import shutil
from collections.abc import Callable
from random import Random

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from datasets import load_dataset

from lamella.data.command import run_prepare
from lamella.data.packing import token_file
from lamella.data.readers import BadRecords, Place
from lamella.data.sources import describe_source, documents, open_source, records
from lamella.errors import UserError
from support.models import save_tokenizer

COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": lambda raw: raw,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.ZstdCompressor(write_checksum=True).compress,
}
TEXTS = [f"text {i} é 😀" for i in range(300)]
LINES = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()
ARRAY = json.dumps([{"text": text} for text in TEXTS], ensure_ascii=False).encode()
AT_LENGTH = "\n".join(json.dumps({"text": text, "id": i}, indent=2) for i, text in enumerate(TEXTS)).encode()


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize(
    ("name", "raw"),
    [
        ("a.jsonl", LINES),
        ("a.JSONL", LINES),
        ("a.ndjson", LINES),
        ("a.json", LINES),
        ("a.json", ARRAY),
        ("a.json", AT_LENGTH),
        ("a.jsonl", b"\xef\xbb\xbf" + LINES),
        ("a.json", b"\xef\xbb\xbf" + ARRAY),
        ("part-00000", LINES),
    ],
)
def test_records_are_those_that_datasets_reads(tmp_path, name, raw, suffix):
    file = tmp_path / (name + suffix)
    file.write_bytes(COMPRESS[suffix](raw))
    assert list(documents(str(file))) == TEXTS
    if raw in (LINES, ARRAY) and suffix in ("", ".gz"):
        assert list(load_dataset("json", data_files=str(file), split="train")["text"]) == TEXTS


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize("name", ["book.txt", "BOOK.TXT", "book.Md", "book", "LICENSE"])
def test_texts_are_read_in_capitals_and_without_a_suffix(tmp_path, name, suffix):
    text = "".join(f"line {i} é 😀\n" for i in range(5000))
    (tmp_path / (name + suffix)).write_bytes(COMPRESS[suffix](b"\xef\xbb\xbf" + text.encode()))
    assert list(documents(str(tmp_path / (name + suffix)))) == [text]
    (tmp_path / "other.md").write_text("another")
    assert text in list(documents(str(tmp_path)))


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz", ".zst"])
@pytest.mark.parametrize(("name", "raw"), [("a.jsonl", LINES), ("a.json", ARRAY), ("a.txt", LINES * 50)])
def test_reading_goes_on_within_compressed_files(tmp_path, name, raw, suffix, monkeypatch):
    monkeypatch.setattr("lamella.data.texts.PIECE_BYTES", 9000)
    (tmp_path / (name + suffix)).write_bytes(COMPRESS[suffix](raw))
    source = open_source(str(tmp_path / (name + suffix)))
    whole = list(records(source, BadRecords()))
    assert len(whole) >= 60
    for i in range(0, len(whole), 29):
        place = Place(*json.loads(json.dumps(whole[i].end)))
        assert [r[:3] for r in records(source, BadRecords(), place)] == [r[:3] for r in whole[i + 1 :]]
    assert whole[-1].end.read <= source.num_bytes


def test_what_is_left_out_has_a_name_and_a_number(tmp_path):
    folder = tmp_path / "folder"
    (folder / "sub").mkdir(parents=True)
    (folder / "a.jsonl").write_bytes(LINES)
    (folder / "b.TXT").write_text("text")
    for name in ("x.csv", "sub/y.csv", "z.CSV", "w.csv", "v.png", ".hidden", "t.tar.gz"):
        (folder / name).write_bytes(b"x")
    (folder / "empty.md").touch()
    (folder / "binary").write_bytes(b"\0\1\2")
    (folder / "dataset_info.json").write_text("{}")
    (folder / "gone.txt").symlink_to(folder / "nowhere")
    source = open_source(str(folder))
    assert [file.name for file in source.files] == ["a.jsonl", "b.TXT"]
    said = describe_source(source)
    assert said.startswith(f"{folder}: 2 files (1 .jsonl, 1 .txt), ")
    for part in (
        "4 .csv (sub/y.csv, w.csv, x.csv, ...)", "1 .png (v.png)", "1 hidden (.hidden)", "1 empty (empty.md)",
        "1 .tar.gz (t.tar.gz)", "1 without a suffix that is no text (binary)", "1 broken link (gone.txt)",
        "1 description of a data set (dataset_info.json)",
    ):  # fmt: skip
        assert part in said, said
    shutil.rmtree(folder / "sub")
    for name in ("a.jsonl", "b.TXT"):
        (folder / name).unlink()
    with pytest.raises(UserError, match=r"holds no text .*3 \.csv.*; pass stdlib-code"):
        open_source(str(folder))


def test_links_are_followed_and_nothing_comes_twice(tmp_path):
    """As in a hub's cache, whose snapshots link to blobs elsewhere; circles end."""
    folder, blobs = tmp_path / "snapshot", tmp_path / "blobs"
    for path in (folder / "data", blobs / "more"):
        path.mkdir(parents=True)
    (blobs / "0f3a").write_bytes(gzip.compress(LINES))
    (blobs / "more" / "m.md").write_text("more")
    (folder / "data" / "train.jsonl.gz").symlink_to("../../blobs/0f3a")
    (folder / "linked").symlink_to(blobs / "more")
    (folder / "again").symlink_to(folder / "data")
    (folder / "circle").symlink_to(folder)
    (folder / "hard.md").hardlink_to(blobs / "more" / "m.md")
    (folder / "zz.md").symlink_to(folder / "hard.md")
    (folder / "self").symlink_to(folder / "self")
    source = open_source(str(folder))
    assert [str(f.relative_to(folder)) for f in source.files] == ["again/train.jsonl.gz", "hard.md"]
    assert list(documents(str(folder))) == [*TEXTS, "more"]
    assert source.left_out["link to what is read already"] == ["circle", "data", "linked/m.md", "zz.md"]


@pytest.mark.faults
@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz", ".zst"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.txt", "a"])
def test_cut_and_changed_files_are_one_line(tmp_path, name, suffix):
    random = Random(0)
    raw = COMPRESS[suffix](random.randbytes(1 << 16).hex().encode() if name in ("a.txt", "a") else LINES * 30)
    file = tmp_path / (name + suffix)
    middle = len(raw) // 2
    changed = raw[:middle] + random.randbytes(64) + raw[middle + 64 :]
    for damaged in (raw[:middle], raw[:-3], changed, b"no such format"):
        file.write_bytes(damaged)
        with pytest.raises(UserError, match=r"damaged|not JSON|not valid Unicode|cannot read|holds no text|no text in"):
            list(documents(str(file)))


@pytest.mark.faults
def test_broken_json_is_named_with_its_place(tmp_path):
    file = tmp_path / "a.json"
    for raw, message in (
        (ARRAY[:-1], r"record 300 \(behind byte \d+\): not JSON \(the file ends within its array"),
        (ARRAY[:500], r"record \d+ \(behind byte \d+\): not JSON \(Unterminated string|Expecting"),
        (b'[{"text": "a"}, {"text": ]', r"record 1 \(behind byte 14\): not JSON"),
        (b'{"data": [{"text": "a"}]}', r"line 1 \(byte 0\): no text in the field 'text' or 'messages' \(it has 'data'"),
        (b"[" * 100_000 + b"]" * 100_000, "nested too deeply"),
        (b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
        (b"[1, 2]", "record 0 .*it is a number, not an object"),
        (b'["text", "text"]', "record 0 .*it is a string, not an object"),
        (b'{"text": "caf\xe9"}', "not JSON"),
        (b'[{"text": "caf\xe9"}]', "not JSON"),
        (b"null", "it is null, not an object"),
    ):
        file.write_bytes(raw)
        with pytest.raises(UserError, match=message):
            list(documents(str(file)))


def test_a_large_array_is_read_bit_by_bit(tmp_path, monkeypatch):
    monkeypatch.setattr("lamella.data.readers._CHUNK_BYTES", 100)
    rows = [{"text": "x" * (i % 700) + '\\"]},{[é'} for i in range(500)]
    (tmp_path / "a.json").write_text(json.dumps(rows, ensure_ascii=False, indent=1))
    assert list(documents(str(tmp_path / "a.json"))) == [row["text"] for row in rows]


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "json"])
def test_null_and_blank_texts_have_one_rule_in_training_and_prepare(tmp_path, kind):
    texts: list[str | None] = ["good", "", " \n", "good, too"]

    def write(values: list[str | None]) -> str:
        file = tmp_path / f"a.{kind}"
        if kind == "parquet":
            pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.array(values, pyarrow.string())}), file)
        else:
            rows = [{"text": value} for value in values]
            file.write_text(json.dumps(rows) if kind == "json" else "\n".join(map(json.dumps, rows)))
        return str(file)

    model = save_tokenizer(tmp_path / "model")
    cached = token_file(write(texts), None, model, cache=tmp_path / "cache")
    run_prepare([write(texts)], str(model), tmp_path / "out", workers=1)
    prepared = token_file(str(tmp_path / "out"), None, model)
    assert cached.num_documents == prepared.num_documents == 2
    assert cached.left_out == prepared.left_out == "2 blank records are left out"
    source = write([*texts, None])
    message = r"(row 4|line 5 \(byte \d+\)|record 4 .*): the field 'text' is null; remove the record"
    with pytest.raises(UserError, match=message):
        token_file(source, None, model, cache=tmp_path / "cache")
    with pytest.raises(UserError, match=message):
        run_prepare([source], str(model), tmp_path / "other", workers=1)


def test_prepare_says_what_was_found(tmp_path, capsys):
    model = save_tokenizer(tmp_path / "model")
    (tmp_path / "texts").mkdir()
    for i in range(30):
        (tmp_path / "texts" / f"{i}.md").write_text(f"text {i}\n" * 20)
    (tmp_path / "texts" / "table.csv").write_text("a,b")
    run_prepare([str(tmp_path / "texts")], str(model), tmp_path / "out", workers=1)
    said = capsys.readouterr().out
    assert f"{tmp_path / 'texts'}: 30 files (30 .md), " in said
    assert "left out: 1 .csv (table.csv)" in said
