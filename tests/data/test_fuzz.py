"""Readers of data given anything: records or one line (UserError), never another exception."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import io
import json
import lzma
import os
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from lamella.data.chat import ChatRenderer
from lamella.data.readers import BadRecords, Record
from lamella.data.records import record_content
from lamella.data.sources import open_source, records
from lamella.data.tokenizer import DocumentTokenizer
from lamella.errors import UserError
from support.models import save_tokenizer

pytestmark = pytest.mark.faults
EXAMPLES = int(os.environ.get("LAMELLA_FUZZ_EXAMPLES", "150"))
FUZZ = settings(max_examples=EXAMPLES, deadline=5000, suppress_health_check=list(HealthCheck), database=None)

ROWS: list[dict[str, Any]] = [
    {"text": "é one", "messages": None},
    {"text": None, "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
] * 20
TEMPLATE = (
    "{% for t in tools or [] %}{{ t | tojson }}{% endfor %}{% for m in messages %}{{ '<' + m.role + '>' }}"
    "{{ m.content or '' }}{% for c in m.tool_calls or [] %}{{ c | tojson }}{% endfor %}{{ '<end>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)


def parquet() -> bytes:
    out = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), out, row_group_size=7)
    return out.getvalue()


LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
SEEDS: dict[str, bytes] = {
    "a.jsonl": LINES,
    "a.json": json.dumps(ROWS, indent=1).encode(),
    "a.txt": b"\xef\xbb\xbf" + "é line\r\n".encode() * 300,
    "a": LINES,
    "a.parquet": parquet(),
    "a.jsonl.gz": gzip.compress(LINES),
    "a.json.bz2": bz2.compress(json.dumps(ROWS).encode()),
    "a.txt.xz": lzma.compress(LINES),
    "a.jsonl.zst": zstandard.ZstdCompressor().compress(LINES),
}
EDITS = st.lists(st.tuples(st.floats(0, 1), st.integers(0, 40), st.binary(max_size=12)), max_size=5)


def edited(raw: bytes, edits: list[tuple[float, int, bytes]], kept: float) -> bytes:
    """At places along the bytes, some are removed and others put there; what lies behind `kept` is cut off."""
    for place, removed, put in edits:
        at = int(place * len(raw))
        raw = raw[:at] + put + raw[at + removed :]
    return raw[: int(kept * len(raw))]


def read(source: str) -> list[Record]:
    """All records, or none where the source is refused in one line; with both policies."""
    found: list[Record] = []
    for policy in ("skip", "fail"):
        refusal = ""
        try:
            found = list(records(open_source(source), BadRecords(policy, named=0)))
        except UserError as error:
            refusal = str(error)
        assert "\n" not in refusal
    return found


@pytest.mark.parametrize("name", SEEDS)
def test_files(tmp_path, monkeypatch, name):
    monkeypatch.setattr("lamella.data.texts.PIECE_BYTES", 900)
    monkeypatch.setattr("lamella.data.readers._CHUNK_BYTES", 300)
    (tmp_path / name).write_bytes(SEEDS[name])
    assert len(read(str(tmp_path / name))) > 1

    @FUZZ
    @given(edits=EDITS, kept=st.sampled_from([1.0, 1.0, 0.9, 0.5, 0.01]))
    def run(edits, kept):
        (tmp_path / name).write_bytes(edited(SEEDS[name], edits, kept))
        read(str(tmp_path / name))

    run()


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
JSON = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
)
CALLS = st.fixed_dictionaries({}, optional={
    "type": st.just("function"), "function": JSON | st.fixed_dictionaries({"name": JSON}, optional={"arguments": JSON}),
    "name": JSON, "arguments": JSON,
})  # fmt: skip
PARTS = st.fixed_dictionaries({"type": st.just("text") | JSON}, optional={"text": st.text(max_size=5) | JSON})
MESSAGES = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "system", "tool"]) | JSON},
    optional={
        "content": st.text(max_size=8) | st.lists(PARTS, max_size=3) | JSON,
        "tool_calls": st.lists(CALLS, max_size=2) | JSON,
        "weight": JSON,
        "reasoning_content": JSON,
        "name": JSON,
    },
)  # fmt: skip
CHATS = st.fixed_dictionaries(
    {"messages": st.lists(MESSAGES, max_size=4) | JSON | st.lists(MESSAGES, max_size=2).map(json.dumps)},
    optional={
        "tools": st.lists(CALLS, max_size=2) | JSON | JSON.map(json.dumps), "chat_template_kwargs": JSON, "text": JSON,
        "functions": JSON,
    },
)  # fmt: skip


@pytest.mark.slow
def test_records(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(save_tokenizer(tmp_path / "model"))
    tokenizer.chat_template = TEMPLATE
    render = ChatRenderer(tokenizer, "model")

    @settings(FUZZ, max_examples=10 * EXAMPLES)
    @given(record=CHATS | JSON)
    def run(record):
        refusal, text = "", ""
        try:
            content = record_content(record, None, "here")
            text = content if isinstance(content, str) else render(content, "here").text
        except UserError as error:
            refusal = str(error)
        assert isinstance(text, str)
        assert not refusal or refusal.startswith("here: ")

    run()


def test_tokenizer_files(tmp_path):
    folder = save_tokenizer(tmp_path / "model")
    seeds = {file.name: file.read_bytes() for file in folder.iterdir()}

    @settings(FUZZ, max_examples=EXAMPLES // 3)
    @given(name=st.sampled_from(sorted(seeds)), edits=EDITS, kept=st.sampled_from([1.0, 1.0, 1.0, 0.5]))
    def run(name, edits, kept):
        for other, raw in seeds.items():
            (folder / other).write_bytes(raw)
        (folder / name).write_bytes(edited(seeds[name], edits, kept))
        with contextlib.suppress(UserError):
            DocumentTokenizer(folder)(["some text"])

    run()
