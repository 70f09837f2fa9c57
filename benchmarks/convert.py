"""Run: uv run benchmarks/convert.py [--layers 8] [--rounds 3] [--work DIR] [--json FILE]

Conversion of a synthetic Llama-3-8B stack (widths 4096 and 14336, bf16; a 32nd of the vocabulary per layer, so that
every kind of tensor has its share of the whole model's bytes) beside mergekit-moe and `cp` with as many bytes written;
interleaved, medians. mergekit-moe makes a Mixtral of two experts with random gates, from this checkpoint taken twice:
the same FFNs twice and the same rest, so the bytes are equal within a thousandth. It adds no noise, so the row to put
beside it is "no noise"; it is installed by uvx, outside the timing, and left out if that fails.

The source is in the page cache; what is written is synced within each run, and before it what came earlier. CPU
seconds are user and system of the process and its children, imports included. Needs about three times the bytes written
under --work, by default the current folder; /dev/shm shows the CPU side alone.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import positive, print_table, provenance, write_json

from lamella.architecture.families import dense_tensors, family_of
from lamella.checkpoint.tensors import encode_header

LLAMA3_8B = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5, "hidden_act": "silu", "tie_word_embeddings": False, "dtype": "bfloat16",
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
}  # fmt: skip
CHUNK_BYTES = 16 << 20
VOCAB_PER_LAYER = 128256 // 32
MERGEKIT = "mergekit==0.1.5"
IMPORT_ONLY = "import torch"
CONVERT = (
    "import sys, torch; from lamella.conversion import SliceOptions, convert\n"
    "report = convert(sys.argv[1], sys.argv[2], SliceOptions(noise=float(sys.argv[3])))\n"
    "print(report.bytes_written)"
)


def synthetic_llama(folder: Path, layers: int, vocab: int = LLAMA3_8B["vocab_size"]) -> Path:
    """A dense checkpoint of finite random bf16 numbers, one file per layer and one for the rest."""
    config = LLAMA3_8B | {"num_hidden_layers": layers, "vocab_size": vocab}
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    shapes = dense_tensors(config, family_of(config))
    weight_map = {}
    for name in shapes:
        part = name.split(".")[2] if name.startswith("model.layers.") else "rest"
        weight_map[name] = f"model-{part}.safetensors"
    for file in sorted(set(weight_map.values())):
        names = [name for name in shapes if weight_map[name] == file]
        _write_random(folder / file, [(name, shapes[name]) for name in names])
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def _write_random(path: Path, tensors: list[tuple[str, tuple[int, ...]]]) -> None:
    header = encode_header([(name, "BF16", shape) for name, shape in tensors])
    left = sum(2 * int(np.prod(shape)) for _, shape in tensors)
    random = np.random.default_rng(0)
    with open(path, "wb") as file:
        file.write(header)
        while left:
            # Top byte 0x3c or 0xbc: exponents of about 2**-7, so every number is finite and small.
            words = random.integers(0, 1 << 16, min(left, CHUNK_BYTES) // 2, dtype=np.uint16)
            file.write(((words & 0x80FF) | 0x3C00).tobytes())
            left -= words.nbytes


# A child inherits the peak of the process it was forked from, so a bare interpreter stands between this one and it.
MEASURE = (
    "import json, resource, subprocess, sys, time\n"
    "began = time.perf_counter()\n"
    "done = subprocess.run(sys.argv[1:], stdout=subprocess.PIPE, text=True, check=True)\n"
    "used = resource.getrusage(resource.RUSAGE_CHILDREN)\n"
    "row = {'wall_s': time.perf_counter() - began, 'cpu_s': used.ru_utime + used.ru_stime}\n"
    "row |= {'user_s': used.ru_utime, 'system_s': used.ru_stime, 'peak_rss_mib': used.ru_maxrss / 1024}\n"
    "print(json.dumps([row, done.stdout]))"
)


def measured(command: list[str]) -> tuple[dict[str, Any], str]:
    """({wall_s, cpu_s, user_s, system_s, peak_rss_mib}, stdout) of a process; CalledProcessError if it fails."""
    done = subprocess.run([sys.executable, "-c", MEASURE, *command], stdout=subprocess.PIPE, text=True, check=True)
    row, output = json.loads(done.stdout)
    return row, output


def convert_once(dense: Path, work: Path, noise: float = 0.05) -> dict[str, Any]:
    row, output = measured([sys.executable, "-c", CONVERT, str(dense), str(work / "moe"), str(noise)])
    row["bytes_written"] = int(output)
    return row


def import_once() -> dict[str, Any]:
    row, _ = measured([sys.executable, "-c", IMPORT_ONLY])
    return row | {"bytes_written": 0}


def copy_once(work: Path) -> dict[str, Any]:
    """`cp` of a converted checkpoint."""
    (work / "copy").mkdir()
    return _synced(f"cp {work}/moe/*.safetensors {work}/copy/", work / "copy")


def _synced(command: str, out: Path) -> dict[str, Any]:
    row, _ = measured(["sh", "-c", f"{command} && sync {out}/*"])
    row["bytes_written"] = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    return row


def install_mergekit() -> Path | None:
    """mergekit-moe's path, in an environment of its own, byte-compiled; None, and a line says so, without it."""
    find = "import shutil; print(shutil.which('mergekit-moe'))"
    command = ["uvx", "--python", "3.11", "--compile-bytecode", "--from", MERGEKIT, "python", "-c", find]
    try:
        path = Path(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.strip())
        subprocess.run([path, "--help"], stdout=subprocess.DEVNULL, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"mergekit-moe is left out: {error}")
        return None
    return path


def prepare_merge(dense: Path, work: Path) -> None:
    """A second name for the model and the config to merge the two. mergekit needs a tokenizer, whatever the gates."""
    model = {"type": "WordLevel", "vocab": {"<unk>": 0}, "unk_token": "<unk>"}
    parts = dict.fromkeys(("truncation", "padding", "normalizer", "pre_tokenizer", "post_processor", "decoder"))
    (dense / "tokenizer.json").write_text(json.dumps({"version": "1.0", **parts, "added_tokens": [], "model": model}))
    (dense / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>", "pad_token": "<unk>"})
    )
    (work / "twin").mkdir()
    for path in dense.iterdir():
        (work / "twin" / path.name).symlink_to(path)
    experts = [{"source_model": str(folder), "positive_prompts": [""]} for folder in (dense, work / "twin")]
    config = {"base_model": str(dense), "gate_mode": "random", "dtype": "bfloat16", "experts": experts}
    (work / "merge.yaml").write_text(json.dumps(config))  # JSON is YAML


def merge_once(mergekit: Path, work: Path) -> dict[str, Any]:
    flags = "--no-copy-tokenizer --i-understand-this-is-not-useful-without-training 2> /dev/null"
    return _synced(f"HF_HUB_OFFLINE=1 {mergekit} {work}/merge.yaml {work}/merged {flags}", work / "merged")


def import_mergekit(mergekit: Path) -> dict[str, Any]:
    row, _ = measured([str(mergekit), "--help"])
    return row | {"bytes_written": 0}


def compare(work: Path, layers: int, rounds: int, mergekit: Path | None) -> list[dict[str, Any]]:
    """Medians of each, the checkpoints made in turn; what one made is removed before the next, but for cp's source."""
    dense = synthetic_llama(work / "dense", layers, layers * VOCAB_PER_LAYER)
    runs: dict[str, Callable[[], dict[str, Any]]] = {
        "import torch": import_once,
        "lamella convert": lambda: convert_once(dense, work),
        "cp": lambda: copy_once(work),
        "lamella convert, no noise": lambda: convert_once(dense, work, noise=0),
    }
    if mergekit is not None:
        prepare_merge(dense, work)
        runs["mergekit-moe --help"] = lambda: import_mergekit(mergekit)
        runs["mergekit-moe"] = lambda: merge_once(mergekit, work)
    samples: dict[str, list[dict[str, Any]]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            for made in ("copy", "merged") if name == "cp" else ("moe", "copy", "merged"):
                shutil.rmtree(work / made, ignore_errors=True)
            os.sync()
            samples[name].append(run())
    return [
        {"impl": name} | {key: statistics.median(row[key] for row in rows) for key in rows[0]}
        for name, rows in samples.items()
    ]


def print_rows(rows: list[dict[str, Any]]) -> None:
    cells = [
        [row["impl"], *(f"{row[key]:.1f}" for key in ("wall_s", "cpu_s", "user_s", "system_s"))]
        + [f"{row['peak_rss_mib']:.0f}", f"{row['bytes_written'] / 1e9:.2f}"]
        + [
            f"{row[key] / row['bytes_written'] * 1e9:.2f}" if row["bytes_written"] else ""
            for key in ("wall_s", "cpu_s")
        ]
        for row in rows
    ]
    header = ["", "wall s", "CPU s", "user", "system", "peak MiB", "GB written", "wall s/GB", "CPU s/GB"]
    print_table("Conversion, synced", header, cells)


def file_system(folder: Path) -> str:
    command = ["stat", "-f", "-c", "%T", str(folder)]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=positive, default=8)
    parser.add_argument("--rounds", type=positive, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--work", type=Path, default=Path())
    arguments = parser.parse_args()
    mergekit = install_mergekit()
    with tempfile.TemporaryDirectory(dir=arguments.work, prefix="convert-benchmark.") as work:
        rows = compare(Path(work).resolve(), arguments.layers, arguments.rounds, mergekit)
    print_rows(rows)
    settings = {"layers": arguments.layers, "rounds": arguments.rounds, "peer": MERGEKIT, "cpus": os.cpu_count()}
    settings["file_system"] = file_system(arguments.work)
    write_json(arguments.json, {"rows": rows, **settings, **provenance(torch.device("cpu"))})


if __name__ == "__main__":
    main()
