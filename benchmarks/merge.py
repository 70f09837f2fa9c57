"""Run: uv run benchmarks/merge.py [--rounds 3] [--prompts 12] [--modes random cheap_embed hidden] [--json FILE]

`lamella convert` beside mergekit-moe on the same configs: four synthetic Llamas of 190 million bf16 parameters (width
1024, FFN 2816, 11 layers, SmolLM2's tokenizer) become one Mixtral. CPU seconds are user and system of the process and
its children, imports included; peak memory is of the largest process. Interleaved, medians. The sources are in the page
cache; what is written is synced within each run. lamella keeps what transformers says of a config and a tokenizer; rows
with "first time" begin with an empty cache.

mergekit runs on the project's own torch and transformers; `uv run --no-sync scripts/install_readers.py` fetches it.
Without it the rows of lamella alone are measured. Needs 4 GB under --work, by default the current folder.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from convert import measured
from measure import positive, print_table, provenance, write_json
from safetensors.torch import save_file

from lamella.architecture.embedded import cache_dir
from lamella.architecture.families import dense_tensors, family_of
from lamella.checkpoint.embedded import embedded_model
from lamella.checkpoint.source import copy_sidecars
from lamella.data.sources import documents

LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 1024, "intermediate_size": 2816,
    "num_attention_heads": 16, "num_key_value_heads": 16, "num_hidden_layers": 11, "vocab_size": 49152,
    "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "hidden_act": "silu", "tie_word_embeddings": True,
    "torch_dtype": "bfloat16", "rope_theta": 10000.0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
EXPERTS = 4
CHARACTERS_PER_PROMPT = 256
MODES = ("random", "cheap_embed", "hidden", "ridge")
PEER = "mergekit==0.1.5"
FIRST, EMPTY_CACHE = ", first time", "empty-cache"


def mergekit_site() -> Path | None:
    """The folder that scripts/install_readers.py puts mergekit into; None where it is not."""
    site = Path(os.environ.get("LAMELLA_MERGEKIT") or cache_dir() / "mergekit")
    return site if (site / "mergekit").is_dir() else None


def save_model(folder: Path, seed: int) -> Path:
    """A Llama of random weights, with SmolLM2's tokenizer."""
    folder.mkdir(parents=True)
    random = torch.Generator().manual_seed(seed)
    tensors = {
        name: (torch.randn(shape, generator=random) * 0.02 + (1.0 if len(shape) == 1 else 0.0)).bfloat16()
        for name, shape in dense_tensors(LLAMA, family_of(LLAMA)).items()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(LLAMA))
    copy_sidecars(embedded_model(), folder)
    return folder


def save_configs(work: Path, models: list[Path], modes: list[str], prompts: int) -> dict[str, Path]:
    """One config of mergekit-moe for each gate mode, with as many prompts of about 64 tokens for each expert."""
    texts = (text[:CHARACTERS_PER_PROMPT] for text in documents("python-docs") if len(text) > CHARACTERS_PER_PROMPT)
    experts = [{"source_model": str(model), "positive_prompts": list(islice(texts, prompts))} for model in models]
    found = {}
    for mode in modes:
        found[mode] = work / f"{mode}.yml"
        config = {"base_model": str(models[0]), "gate_mode": mode, "dtype": "bfloat16", "experts": experts}
        found[mode].write_text(json.dumps(config))  # JSON is YAML
    return found


def run_once(command: list[str], out: Path) -> dict[str, Any]:
    """Measure a command that makes `out`, with the time until its weights are on the disk."""
    for folder in (out, out.with_name(EMPTY_CACHE)):
        shutil.rmtree(folder, ignore_errors=True)
    row, _ = measured(["sh", "-c", '"$@" >/dev/null 2>&1 && sync "$0"/*.safetensors', str(out), *command])
    row["bytes_written"] = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    return row


def commands(configs: dict[str, Path], out: Path, site: Path | None) -> dict[str, list[str]]:
    """Name of a row -> the command line."""
    found = {}
    for mode, config in configs.items():
        own = [sys.executable, "-m", "lamella.cli", "convert", str(config), str(out)]
        found[f"lamella, {mode}"] = own
        if mode == "ridge":  # a mode of ours alone
            continue
        found[f"lamella, {mode}{FIRST}"] = ["env", f"LAMELLA_CACHE={out.with_name(EMPTY_CACHE)}", *own]
        if site is not None:
            peer = ["env", f"PYTHONPATH={site}", "HF_HUB_OFFLINE=1", sys.executable, "-m", "mergekit.scripts.moe"]
            found[f"mergekit, {mode}"] = [*peer, str(config), str(out)]
    return found


def compare(work: Path, modes: list[str], prompts: int, rounds: int) -> list[dict[str, Any]]:
    """Medians of each row, measured in turn, and what a gigabyte costs `cp`."""
    models = [save_model(work / f"model-{seed}", seed) for seed in range(EXPERTS)]
    out = work / "out"
    runs: dict[str, Callable[[], dict[str, Any]]] = {}
    for name, command in commands(save_configs(work, models, modes, prompts), out, mergekit_site()).items():
        runs[name] = lambda command=command: run_once(command, out)
    samples: dict[str, list[dict[str, Any]]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            samples[name].append(run())
            print(name, {key: round(value, 1) for key, value in samples[name][-1].items()}, flush=True)
    return [
        {"impl": name} | {key: statistics.median(row[key] for row in rows) for key in rows[0]}
        for name, rows in samples.items()
    ]


def print_rows(rows: list[dict[str, Any]]) -> None:
    """The table, each row of ours with its share of mergekit's."""
    by_name = {row["impl"]: row for row in rows}
    cells = []
    for row in rows:
        peer = by_name.get(row["impl"].removesuffix(FIRST).replace("lamella", "mergekit"))
        peer = None if peer is row else peer
        shares = [f"1/{peer[key] / row[key]:.1f}" if peer else "" for key in ("cpu_s", "peak_rss_mib")]
        figures = [f"{row['wall_s']:.1f}", f"{row['cpu_s']:.1f}", shares[0], f"{row['peak_rss_mib']:.0f}", shares[1]]
        cells.append([row["impl"], *figures, f"{row['bytes_written'] / 1e9:.2f}"])
    print_table("Merge", ["", "wall s", "CPU s", "of the peer's", "peak MiB", "of the peer's", "GB"], cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=positive, default=3)
    parser.add_argument("--prompts", type=positive, default=12)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--work", type=Path, default=Path())
    arguments = parser.parse_args()
    if mergekit_site() is None:
        print("mergekit is left out: scripts/install_readers.py fetches it")
    with tempfile.TemporaryDirectory(dir=arguments.work, prefix="merge-benchmark.") as work:
        rows = compare(Path(work).resolve(), arguments.modes, arguments.prompts, arguments.rounds)
    print_rows(rows)
    settings = {"experts": EXPERTS, "prompts": arguments.prompts, "rounds": arguments.rounds, "peer": PEER}
    write_json(arguments.json, {"rows": rows, **settings, **provenance(torch.device("cpu"))})


if __name__ == "__main__":
    main()
