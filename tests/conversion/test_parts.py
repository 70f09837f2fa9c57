"""Conversions shard by shard, in parts, interrupted, from and to remote folders: the bytes are those of one."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import fsspec
import pytest

from lamella.checkpoint.source import Checkpoint
from lamella.checkpoint.write import write_index, write_tensors
from lamella.cli import main
from lamella.conversion import SliceOptions, convert, plan_conversion
from lamella.conversion.parts import Part, write_part
from lamella.conversion.plan import ConversionPlan
from lamella.errors import UserError
from lamella.hf.models import load
from support.models import save_tokenizer, tiny_checkpoint

OPTIONS = SliceOptions(slices=4)
SHARD_BYTES = 60_000
"""The tiny model's tensors make several shards of this size."""


@pytest.fixture
def dense(tmp_path) -> Path:
    return save_tokenizer(tiny_checkpoint(tmp_path / "dense", sharded=True))


@pytest.fixture
def bucket():
    files = fsspec.filesystem("memory")
    yield files
    files.rm("/bucket", recursive=True) if files.exists("/bucket") else None


def planned(model: str | Path, options: SliceOptions = OPTIONS) -> ConversionPlan:
    plan = plan_conversion(model, options)
    return replace(plan, listing=replace(plan.listing, max_shard_bytes=SHARD_BYTES))


def by_one(model: Path, folder: Path) -> dict[str, bytes]:
    """The weights and their index, written as a local conversion writes them."""
    folder.mkdir()
    plan = planned(model).listing
    write_tensors(plan, folder)
    write_index(plan, folder)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def send(files: fsspec.AbstractFileSystem, folder: Path, place: str) -> None:
    files.makedirs(place, exist_ok=True)
    for path in folder.iterdir():
        files.pipe_file(f"{place}/{path.name}", path.read_bytes())


def test_remote_parts_are_the_bytes_of_a_local_conversion(dense, tmp_path, bucket):
    expected = by_one(dense, tmp_path / "whole")
    assert len(expected) > 4
    send(bucket, dense, "/bucket/dense")
    reports = [write_part(planned("memory://bucket/dense"), OPTIONS, "memory://bucket/moe", Part(i, 2)) for i in (1, 2)]
    assert [report.is_whole for report in reports] == [False, True]
    assert sum(report.made for report in reports) == len(expected) - 1
    found = {path.rpartition("/")[2]: bucket.cat_file(path) for path in bucket.find("/bucket/moe")}
    assert {name: found[name] for name in expected} == expected
    convert(dense, tmp_path / "local", OPTIONS)
    local = {path.name: path.read_bytes() for path in (tmp_path / "local").iterdir()}
    assert found.keys() - expected.keys() == local.keys() - {"model.safetensors"}
    for name in ("config.json", "tokenizer.json", "modeling_lamella.py"):
        assert found[name] == local[name]
    manifests = [json.loads(files["lamella.json"]) for files in (found, local)]
    assert manifests[0]["tensors"] == manifests[1]["tensors"]


@pytest.mark.parametrize("broken_after", [1, 40_000, 150_000])
def test_an_interrupted_part_makes_what_is_missing(broken_after, dense, tmp_path, bucket):
    expected, written = by_one(dense, tmp_path / "whole"), 0

    def breaks(count: int) -> None:
        nonlocal written
        written += count
        if written >= broken_after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_part(planned(dense), OPTIONS, "memory://bucket/moe", Part(), on_bytes=breaks)
    assert not bucket.exists("/bucket/moe/config.json")
    there = len([path for path in bucket.find("/bucket/moe") if path.endswith(".json")])
    report = write_part(planned(dense), OPTIONS, "memory://bucket/moe", Part())
    assert (report.found, report.made) == (there, len(expected) - 1 - there)
    assert report.is_whole
    assert {name: bucket.cat_file(f"/bucket/moe/{name}") for name in expected} == expected
    again = write_part(planned(dense), OPTIONS, "memory://bucket/moe", Part(2, 2))
    assert (again.made, again.is_whole) == (0, True)


def test_a_shard_that_is_not_as_it_was_sent_is_made_again(dense, tmp_path, bucket):
    expected = by_one(dense, tmp_path / "whole")
    write_part(planned(dense), OPTIONS, "memory://bucket/moe", Part(1, 2))
    (first, *_) = [path for path in bucket.find("/bucket/moe") if path.endswith(".safetensors")]
    bucket.pipe_file(first, b"half")
    for i in (2, 1):
        report = write_part(planned(dense), OPTIONS, "memory://bucket/moe", Part(i, 2))
    assert (report.made, report.is_whole) == (1, True)
    assert {name: bucket.cat_file(f"/bucket/moe/{name}") for name in expected} == expected


def test_a_folder_here_appears_whole(dense, tmp_path):
    out = tmp_path / "moe"
    for i in (1, 2, 3):
        assert not out.exists()
        write_part(planned(dense), OPTIONS, str(out), Part(i, 3))
    assert not list(tmp_path.glob(".moe*"))
    assert not (out / ".parts").exists()
    whole = by_one(dense, tmp_path / "whole")
    assert {name: (out / name).read_bytes() for name in whole} == whole
    load(out)


def test_the_command_makes_parts_and_joins_them(dense, tmp_path, monkeypatch, capsys):
    def run(*words: str) -> str:
        monkeypatch.setattr(sys, "argv", ["lamella", "convert", "--model", str(dense), *words])
        with pytest.raises(SystemExit) as ended:
            main()
        said = capsys.readouterr()
        return said.out if not ended.value.code else said.err

    out, url = tmp_path / "moe", (tmp_path / "url").as_uri()
    assert "make their parts first" in run("slices=4", "--out", str(out), "--join")
    assert "1 shards made, 0 were there" in run("slices=4", "--out", str(out), "--part", "1/2")
    assert "The model is whole" in run("slices=4", "--out", str(out), "--join")  # the tiny model is one shard
    assert "The model is whole" in run("slices=4", "--out", url)
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "url" / name).read_bytes() == (out / name).read_bytes()
    assert "holds another model" in run("slices=2", "--out", url)
    assert "exists" in run("slices=2", "--out", str(out), "--part", "1/2")
    assert "as in --part 3/16" in run("--out", str(out), "--part", "3")
    assert "never replace" in run("--out", str(out), "--part", "1/1", "--overwrite")


def test_what_is_no_part_of_this_conversion_is_refused(dense, tmp_path, bucket):
    write_part(planned(dense), OPTIONS, "memory://bucket/moe", Part(1, 2))
    other = SliceOptions(slices=2)
    with pytest.raises(UserError, match="parts of another conversion"):
        write_part(planned(dense, other), other, "memory://bucket/moe", Part(1, 2))
    bucket.pipe_file("/bucket/notes/a.txt", b"mine")
    with pytest.raises(UserError, match="holds something else"):
        write_part(planned(dense), OPTIONS, "memory://bucket/notes", Part())
    with pytest.raises(UserError, match="there is no folder"):
        Checkpoint.open("memory://bucket/nowhere")
    with pytest.raises(UserError, match="cannot be opened"):
        Checkpoint.open("nosuchscheme://bucket/moe")


@pytest.mark.parametrize("text", ["", "0/2", "3/2", "1", "a/b", "1/2/3", "-1/2"])
def test_parts_that_are_none(text):
    with pytest.raises(UserError, match="which part of how many"):
        Part.parse(text)


LARGE = """
import json, struct, sys
from dataclasses import replace
from pathlib import Path
from lamella.conversion import SliceOptions, plan_conversion, peak_rss_mib
from lamella.conversion.parts import Part, write_part

folder, D, F, layers = Path(sys.argv[1]), 2048, 8192, 16
config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": D, "intermediate_size": F,
          "num_hidden_layers": layers, "num_attention_heads": 16, "num_key_value_heads": 16, "vocab_size": 32000,
          "tie_word_embeddings": True, "dtype": "bfloat16", "max_position_embeddings": 2048}
from lamella.architecture.families import dense_tensors, family_of
(folder / "config.json").write_text(json.dumps(config))
shapes, weight_map, size = dense_tensors(config, family_of(config)), {}, 0
names = list(shapes)
for i in range(4):
    file, header, at = f"model-{i}.safetensors", {}, 0
    for name in names[i::4]:
        count = 2
        for n in shapes[name]:
            count *= n
        header[name], at = {"dtype": "BF16", "shape": shapes[name], "data_offsets": [at, at + count]}, at + count
        weight_map[name] = file
    text = json.dumps(header).encode()
    with open(folder / file, "wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        out.truncate(8 + len(text) + at)  # sparse: zeros that take no disk
    size += at
(folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
options = SliceOptions(noise=0.0)
plan = plan_conversion(folder.as_uri(), options)
plan = replace(plan, listing=replace(plan.listing, max_shard_bytes=200_000_000))
before = peak_rss_mib()
report = write_part(plan, options, (folder / "moe").as_uri(), Part(*map(int, sys.argv[2:])), scratch=folder)
print(json.dumps([size, report.bytes_written, peak_rss_mib() - before]))
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_model(tmp_path):
    """2 GB of weights in four files, of which one of twelve parts is made."""
    command = [sys.executable, "-c", LARGE, str(tmp_path), "1", "12"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    size, written, peak_mib = json.loads(done.stdout.splitlines()[-1])
    assert size > 2e9
    assert written > 2e8
    # 16 threads at most, each with blocks of 4 MiB, and a block of 16 MiB that is sent
    assert peak_mib < 200
