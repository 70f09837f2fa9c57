"""Everything that reads what users bring: a sound folder, the files in it that may be damaged, and the reading."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash
import yaml

from lamella.checkpoint.source import Checkpoint
from lamella.conversion import SliceOptions, convert
from lamella.data.prepared import open_prepared
from lamella.data.readers import BadRecords
from lamella.data.records import Conversation
from lamella.data.sources import open_source, records, text_of
from lamella.data.tokenizer import DocumentTokenizer, Tokens
from lamella.recipe.conversion import load_conversion, read_conversion
from lamella.recipe.stages import prepare_stages
from lamella.run.folder import RunDir
from lamella.run.store import seal
from lamella.titan.config import read_hf_config
from support.gguf_file import write_gguf
from support.models import save_tokenizer, tiny_checkpoint
from support.shards import write_folder

CHAT = {"messages": [{"role": "user", "content": "1?"}, {"role": "assistant", "content": "2", "thinking": None}]}
TEXTS = [{"text": f"line {i}", "meta": {"id": i, "tags": ["a", None]}} for i in range(6)]
PARTITION = {
    "method": "partition", "model": "m", "out": "o", "parts": 8, "active": 4, "neurons": "kmeans", "router": "ridge",
    "layers": "every:2", "calibration": {"num_tokens": 1024, "sequence_length": 128}, "guard": None, "balance": 0.5,
}  # fmt: skip
TRAINING = {
    "model": "m", "out": "o", "data": [{"source": "a.md", "weight": 2}, {"source": "b.jsonl#text", "weight": 1}],
    "steps": 10, "seq_len": 128,
    "lr": 1e-3, "parallel": {"expert": 2}, "lora": {"rank": 4, "alpha": 8}, "twin_share": {"target": 0.5},
    "top_k_schedule": {"start": 8, "ramp_steps": 4}, "torchtitan": {"debug": {"seed": 1}}, "warmup_steps": 2,
}  # fmt: skip
STAGES = {
    "model": "m", "out": "o", "steps": 4,
    "stages": [{"name": "first", "data": ["a.md"]}, {"name": "second", "data": ["b.jsonl"], "objective": "sft"}],
}  # fmt: skip


class Reader(NamedTuple):
    """What is read, and how many of 10,000 cases it gets."""

    name: str
    make: Callable[[Path], Any]
    """Fills an empty folder."""
    files: tuple[str, ...]
    """Those that are damaged, one at a time."""
    read: Callable[[Path], Any]
    share: int


def open_model(folder: Path) -> None:
    Checkpoint.open(folder / "model")


def make_converted(folder: Path) -> None:
    tiny_checkpoint(folder / "dense")
    convert(folder / "dense", folder / "model", SliceOptions(slices=4))


def make_recipes(folder: Path) -> None:
    for name, values in (("partition", PARTITION), ("training", TRAINING), ("stages", STAGES)):
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(values))
    data = "data=[{source: a, weight: 1}, {source: b, weight: 2}]"
    (folder / "words.txt").write_text(f"model=m\nout=o\nsteps=10\nlora.rank=4\n{data}\n")
    (folder / "conversion.txt").write_text("model=m\nout=o\nmethod=upcycle\nexperts=4\ntop_k=2\nlayers=0-1\n")


def words(file: Path) -> list[str]:
    return file.read_text(errors="replace").splitlines()


def make_records(folder: Path) -> None:
    rows = [*TEXTS, *({"text": None, **CHAT} for _ in range(2))]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in TEXTS))
    (folder / "chat.jsonl").write_text("".join(json.dumps(CHAT) + "\n" for _ in range(3)))
    (folder / "array.json").write_text(json.dumps(rows[:3]))
    pq.write_table(pa.Table.from_pylist(TEXTS), folder / "rows.parquet", row_group_size=2)


def read_records(folder: Path) -> None:
    for name in ("rows.jsonl", "chat.jsonl", "array.json", "rows.parquet"):
        for record in records(open_source(str(folder / name)), BadRecords()):
            if not isinstance(record.content, Conversation):
                text_of(record)


def make_tokens(folder: Path) -> None:
    (folder / "tokens").mkdir()
    units = [[Tokens(np.arange(9, dtype=np.uint16))] * 3, [Tokens(np.arange(5, dtype=np.uint16), np.arange(5) > 2)]]
    write_folder(folder / "tokens", units)


def read_tokens(folder: Path) -> None:
    tokens = open_prepared(folder / "tokens", None)
    tokens.verify()
    if len(tokens):
        tokens.window(0, min(len(tokens), 8))


def make_run(folder: Path) -> None:
    run = RunDir(folder)
    (folder / "config.yaml").write_text(yaml.safe_dump(TRAINING))
    run.write_status("finished", 4, 4)
    run.event("started", ranks=2)
    run.event("checkpoint", step=4)
    lines = [{"step": step, "loss": 1.5, "time": 1.0, "heldout_loss": None} for step in range(5)]
    run.metrics_file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    checkpoint = run.checkpoint(4)
    checkpoint.mkdir(parents=True)
    (checkpoint / "a.distcp").write_bytes(b"1234")
    files = {"a.distcp": {"bytes": 4, "xxh3_128": xxhash.xxh3_128_hexdigest(b"1234")}}
    (checkpoint / "manifest.json").write_text(seal({"step": 4, "world_size": 2, "files": files}))
    (run.checkpoints / "latest").write_text("4")


def read_run(folder: Path) -> None:
    run = RunDir(folder)
    run.status()
    list(run.metrics())
    run.events("checkpoint")
    run.recipe()
    for step in run.steps():
        list(run.store().problems(step))
    run.store().latest()


ALL = [
    Reader("config", lambda f: tiny_checkpoint(f / "model"), ("model/config.json",), open_model, 1500),
    Reader("index", lambda f: tiny_checkpoint(f / "model", sharded=True), ("model/model.safetensors.index.json",),
           open_model, 1000),
    Reader("safetensors", lambda f: tiny_checkpoint(f / "model"), ("model/model.safetensors",), open_model, 1200),
    Reader("gguf", lambda f: write_gguf(f / "model.gguf"), ("model.gguf",),
           lambda f: Checkpoint.open(f / "model.gguf"), 1000),
    Reader("converted", make_converted, ("model/config.json",), lambda f: read_hf_config(f / "model"), 800),
    Reader("conversion recipe", make_recipes, ("partition.yaml",), lambda f: load_conversion(f / "partition.yaml"),
           900),
    Reader("conversion words", make_recipes, ("conversion.txt",),
           lambda f: read_conversion(words(f / "conversion.txt")), 300),
    Reader("training recipe", make_recipes, ("training.yaml",),
           lambda f: prepare_stages(str(f / "training.yaml"), []), 900),
    Reader("training stages", make_recipes, ("stages.yaml",), lambda f: prepare_stages(str(f / "stages.yaml"), []),
           300),
    Reader("training words", make_recipes, ("words.txt",),
           lambda f: prepare_stages(str(f / "training.yaml"), words(f / "words.txt")), 300),
    Reader("tokenizer", lambda f: save_tokenizer(f / "model"), ("model/tokenizer.json", "model/tokenizer_config.json"),
           lambda f: DocumentTokenizer(f / "model")(["some text", ""]), 500),
    Reader("records", make_records, ("rows.jsonl", "chat.jsonl", "array.json", "rows.parquet"), read_records, 1000),
    Reader("prepared tokens", make_tokens, ("tokens/lamella-data.json", "tokens/train-00000.shard"), read_tokens, 300),
    Reader("run folder", make_run,
           ("config.yaml", "status.json", "events.jsonl", "metrics.jsonl", "checkpoints/step-4/manifest.json",
            "checkpoints/latest"), read_run, 1000),
]  # fmt: skip
READERS = {reader.name: reader for reader in ALL}
