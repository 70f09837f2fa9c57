"""Run: uv run benchmarks/convert.py [--layers 8] [--rounds 3] [--json FILE]

Conversion of a synthetic Llama-3-8B-shaped stack (widths 4096 and 14336, vocabulary 128,256, bf16) beside `cp` of as
many bytes as the conversion writes; interleaved, medians. Needs about three times the bytes written on disk, by default
under the current folder (--work DIR). Both sides end with their bytes synced to the disk.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from lamella.convert.families import dense_tensors, family_of
from lamella.convert.tensors import encode_header

LLAMA3_8B = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5, "hidden_act": "silu", "tie_word_embeddings": False, "dtype": "bfloat16",
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
}  # fmt: skip
CHUNK_BYTES = 16 << 20
IMPORT_ONLY = "import torch"
CONVERT = (
    "import sys, torch; from lamella.convert import convert\n"
    "report = convert(sys.argv[1], sys.argv[2])\n"
    "print(report.bytes_written)"
)


def synthetic_llama(folder: Path, layers: int) -> Path:
    """A dense checkpoint of finite random bf16 numbers, one file per layer and one for the rest."""
    config = LLAMA3_8B | {"num_hidden_layers": layers}
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
    "print(json.dumps([row | {'peak_rss_mib': used.ru_maxrss / 1024}, done.stdout]))"
)


def measured(command: list[str]) -> tuple[dict[str, Any], str]:
    """({wall_s, cpu_s, peak_rss_mib}, stdout) of a process; CalledProcessError if it fails."""
    done = subprocess.run([sys.executable, "-c", MEASURE, *command], stdout=subprocess.PIPE, text=True, check=True)
    row, output = json.loads(done.stdout)
    return row, output


def convert_once(dense: Path, work: Path) -> dict[str, Any]:
    row, output = measured([sys.executable, "-c", CONVERT, str(dense), str(work / "moe")])
    row["bytes_written"] = int(output)
    return row


def copy_once(work: Path) -> dict[str, Any]:
    """`cp` of the converted files, synced."""
    command = f"cp {work}/moe/*.safetensors {work}/copy/ && sync {work}/copy/*"
    (work / "copy").mkdir()
    row, _ = measured(["sh", "-c", command])
    row["bytes_written"] = sum(path.stat().st_size for path in (work / "copy").iterdir())
    shutil.rmtree(work / "copy")
    return row


def import_once() -> dict[str, Any]:
    row, _ = measured([sys.executable, "-c", IMPORT_ONLY])
    return row | {"bytes_written": 0}


def compare(work: Path, layers: int, rounds: int) -> list[dict[str, Any]]:
    dense = synthetic_llama(work / "dense", layers)
    samples: dict[str, list[dict[str, Any]]] = {"import torch": [], "lamella convert": [], "cp": []}
    runs: dict[str, Callable[[], dict[str, Any]]] = {
        "import torch": import_once,
        "lamella convert": lambda: convert_once(dense, work),
        "cp": lambda: copy_once(work),
    }
    for _ in range(rounds):
        for name, run in runs.items():
            samples[name].append(run())
        shutil.rmtree(work / "moe")
    return [
        {"impl": name} | {key: statistics.median(row[key] for row in rows) for key in rows[0]}
        for name, rows in samples.items()
    ]


def table(rows: list[dict[str, Any]]) -> str:
    lines = [f"{'':<16} {'wall s':>8} {'cpu s':>8} {'peak MiB':>9} {'GB written':>11}"]
    for row in rows:
        written = row["bytes_written"] / 1e9
        lines.append(
            f"{row['impl']:<16} {row['wall_s']:>8.1f} {row['cpu_s']:>8.1f} {row['peak_rss_mib']:>9.0f} {written:>11.2f}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--work", type=Path, default=Path())
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.work, prefix="convert-benchmark.") as work:
        rows = compare(Path(work), arguments.layers, arguments.rounds)
    print(table(rows))
    if arguments.json:
        arguments.json.write_text(json.dumps({"rows": rows}, indent=2))


if __name__ == "__main__":
    main()
