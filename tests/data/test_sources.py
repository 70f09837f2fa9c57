"""Sources: what is a document, the split, and what is refused."""

import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from lamella.data.sources import EMBEDDED_SOURCES, documents, split_of
from lamella.errors import UserError


def write_jsonl(path: Path, texts: list[str], field: str = "text") -> Path:
    path.write_text("".join(json.dumps({field: text, "id": i}) + "\n" for i, text in enumerate(texts)))
    return path


def write_parquet(path: Path, texts: list[str], field: str = "text") -> Path:
    pyarrow.parquet.write_table(pyarrow.table({field: texts, "id": list(range(len(texts)))}), path)
    return path


@pytest.mark.parametrize("source", EMBEDDED_SOURCES)
@pytest.mark.slow
def test_embedded_sources_split_in_two_parts_that_make_the_whole(source):
    train, heldout, everything = (list(documents(source, split)) for split in ("train", "heldout", None))
    assert sorted(train + heldout) == sorted(everything)
    assert len(heldout) >= 3
    # One in ten by hash: for 79 topics the share lies within 10% -+ 4 standard deviations (3.4% each).
    assert 0.01 < len(heldout) / len(everything) < 0.24
    assert everything == list(documents(source))  # the order is fixed


@pytest.mark.slow
def test_embedded_sources_do_not_leak_into_each_other():
    topic = next(iter(documents("python-docs", "heldout")))
    assert topic[:200] not in "".join(documents("stdlib-code"))


def test_the_split_depends_on_the_name_alone():
    sides = [split_of(f"doc{i}") for i in range(10_000)]
    assert abs(sides.count("heldout") - 1000) < 120  # 4 standard deviations (30) of a binomial


@pytest.mark.parametrize(("write", "suffix"), [(write_jsonl, "jsonl"), (write_parquet, "parquet")])
def test_records_are_documents(tmp_path, write, suffix):
    texts = [f"text {i}" for i in range(200)]
    path = write(tmp_path / f"a.{suffix}", texts)
    assert list(documents(str(path))) == texts
    train, heldout = list(documents(str(path), "train")), list(documents(str(path), "heldout"))
    assert sorted(train + heldout) == sorted(texts)
    assert len(heldout) > 5
    other = write(tmp_path / f"b.{suffix}", texts, "body")
    assert list(documents(f"{other}#body")) == texts
    with pytest.raises(UserError, match=r"no text in the field 'text'.*'body'"):
        list(documents(str(other)))


def test_a_single_text_file_is_one_document_of_which_the_last_tenth_is_held_out(tmp_path):
    text = "".join(f"line {i} of a long text\n" for i in range(50_000)) + "no newline at the end"
    path = tmp_path / "book.txt"
    path.write_text(text)
    assert list(documents(str(path))) == [text]
    (train,), (heldout,) = (list(documents(str(path), split)) for split in ("train", "heldout"))
    assert train + heldout == text
    assert train.endswith("\n")
    assert 0 <= len(text) / 10 - len(heldout) < 40


def test_files_of_a_folder_are_documents_in_the_order_of_their_paths(tmp_path):
    for name in ("b.md", "a/z.txt", "c.py", ".hidden/x.txt", "picture.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "empty.py").touch()
    assert list(documents(str(tmp_path))) == ["a/z.txt", "b.md", "c.py"]


def test_broken_records_name_file_and_line(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", ["good"])
    path.write_text(path.read_text() + '\n{"text": "cut o')
    with pytest.raises(UserError, match=r"a\.jsonl, line 3 \(byte 27\): not JSON"):
        list(documents(str(path)))
    path.write_text('{"text": "good"}\n{"text": null}\n')
    with pytest.raises(UserError, match=r"a\.jsonl, line 2 \(byte 17\): the field 'text' is null"):
        list(documents(str(path)))
    path.write_text('{"text": "cut emoji \\ud83d"}\n')
    with pytest.raises(UserError, match=r"a\.jsonl, line 1 \(byte 0\): not valid Unicode"):
        list(documents(str(path)))
    path.write_text('"only a string"\n')
    with pytest.raises(UserError, match="it is a string, not an object"):
        list(documents(str(path)))


@pytest.mark.faults
def test_broken_files_are_refused(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"not parquet")
    with pytest.raises(UserError, match="not a parquet file"):
        list(documents(str(tmp_path / "a.parquet")))
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    with pytest.raises(UserError, match=r"not UTF-8 text .* at byte 3"):
        list(documents(str(tmp_path / "a.txt")))
    (tmp_path / "b.txt").touch()
    with pytest.raises(UserError, match="is empty"):
        documents(str(tmp_path / "b.txt"))
    (tmp_path / "a.png").write_bytes(b"x")
    with pytest.raises(UserError, match=r"cannot read \.png"):
        documents(str(tmp_path / "a.png"))


@pytest.mark.parametrize(
    "source", ["missing.txt", "./missing", "/missing", "no such thing", "stdlib_code", "python-doc"]
)
def test_what_is_no_source_is_refused_at_once(source):
    with pytest.raises(UserError, match=r"no such data.*pass stdlib-code"):
        documents(source)


def test_misspelt_names_are_mended():
    with pytest.raises(UserError, match="did you mean 'stdlib-code'"):
        documents("stdlib_code")
    with pytest.raises(UserError, match="split is 'test'"):
        documents("python-docs", "test")  # type: ignore[arg-type]


def test_a_folder_without_text_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds no text"):
        documents(str(tmp_path))
