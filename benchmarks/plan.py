"""Run: uv run benchmarks/plan.py [--json FILE]

The memory that `lamella plan` predicts for a rank, beside what ranks of real training runs on CPU reached: recipes
that differ in what trains, how frozen weights lie, checkpointing of activations, sample length and ranks, one with a
teacher, one with an asynchronous save and one with the stages of a pipeline.

Measured is the kernel's own high-water mark of a rank's resident memory (VmHWM) from the end of loading to the end of
the last checkpoint, less what was resident before the model was built, and less the same difference of a model of a
few thousand weights on as many ranks: what the interpreter, the communication and the saving come to by themselves.
Freed blocks go back to the system at once (a setting of malloc), so that resident memory is memory in use. The model
is drawn; every run is a process group of its own, started by torchrun.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))  # runs where lamella is not installed, too

from lamella.plan.command import make_layout
from lamella.plan.memory import fullest
from lamella.plan.model import Model, read_model
from lamella.recipe.training import make_recipe

SMALL = {
    "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 6, "num_attention_heads": 12,
    "num_key_value_heads": 4, "vocab_size": 16384,
}  # fmt: skip
TINY = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 512,
}  # fmt: skip
SLICES = 8
COMMON = {
    "data": ["python-docs"], "steps": 3, "save_every_steps": 2, "heldout_samples": 0, "tensorboard": False,
    "threads_per_rank": 1, "samples_per_step": 6, "warmup_steps": 0,
}  # fmt: skip
RUNS: dict[str, tuple[int, dict[str, Any]]] = {
    "experts": (1, {"seq_len": 512, "frozen_weights": "sharded"}),
    "replicated": (2, {
        "seq_len": 1024, "frozen_weights": "replicated", "activation_checkpointing": "full", "samples_per_step": 4,
    }),
    "all trains": (3, {"seq_len": 256, "frozen_weights": "sharded", "trains": "all"}),
    "teacher": (2, {"seq_len": 512, "frozen_weights": "sharded", "objective": "distil", "samples_per_step": 4}),
    "asynchronous save": (2, {"seq_len": 512, "frozen_weights": "sharded", "checkpoint_async": True}),
    "pipeline": (2, {"seq_len": 512, "frozen_weights": "sharded", "parallel": {"pipeline": 2}}),
}  # fmt: skip
LEAST_BLOCK_BYTES = 1 << 16
"""Of memory that malloc takes from the system for itself, and gives back when it is freed."""


def write_model(folder: Path, sizes: dict[str, int], is_dense: bool = False, tied: bool = True) -> Model:
    """A converted Llama of these sizes with drawn weights, or a dense one."""
    import torch
    from safetensors.torch import save_file

    from lamella.architecture.names import hf_name
    from lamella.recipe.methods.slice import SliceOptions, slice_sizes

    folder.mkdir()
    moe = None if is_dense else slice_sizes(SliceOptions(slices=SLICES), {"model_type": "llama", **sizes})
    values = sizes | {
        "model_type": "llama" if moe is None else "lamella_llama", "max_position_embeddings": 2048,
        "tie_word_embeddings": tied, "dtype": "float32", "moe": None if moe is None else moe.to_dict(),
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(values))
    model = read_model(folder)
    tensors = {}
    for weight in model.weights():
        is_norm = "norm" in weight.name
        tensors[hf_name(weight.name)] = torch.ones(weight.shape) if is_norm else 0.02 * torch.randn(weight.shape)
    if moe is not None:
        for layer in range(model.num_layers):
            tensors[f"model.layers.{layer}.mlp.router.selection_bias"] = torch.zeros(moe.num_router_rows)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    _write_tokenizer(folder)
    return model


def _write_tokenizer(folder: Path) -> None:
    """Of single bytes and an end of text."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={"<eos>": 0} | {c: i for i, c in enumerate(alphabet, 1)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(folder)


def resident(key: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM at most since it was last reset."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(key)


def reset_high_water_mark() -> None:
    Path("/proc/self/clear_refs").write_text("5")  # man 5 proc


def rank(words: list[str]) -> None:
    """Under torchrun: train as `lamella train` does, and write what this rank's memory came to."""
    from lamella.recipe.files import arguments
    from lamella.recipe.stages import prepare_recipe
    from lamella.run.folder import RunDir
    from lamella.train.stage import prepare, redirected_output, return_freed_memory, train_run
    from lamella.train.trainer import LamellaTrainer

    number = int(os.environ["RANK"])
    recipe = prepare_recipe(*arguments(words))
    config = prepare(recipe, number)
    assert config is not None
    return_freed_memory(LEAST_BLOCK_BYTES)
    restore = LamellaTrainer.restore

    def restore_then_count(trainer: LamellaTrainer) -> None:
        restore(trainer)
        reset_high_water_mark()

    LamellaTrainer.restore = restore_then_count  # type: ignore[method-assign]
    before = resident("VmRSS")
    with redirected_output(RunDir(Path(recipe.out)).log_file(number)) as terminal:
        config.stream = terminal
        train_run(config, recipe, number, terminal)
    figures = {"before": before, "peak": resident("VmHWM")}
    (Path(recipe.out) / f"memory-{number}.json").write_text(json.dumps(figures))


def measure(folder: Path, name: str, model: str, ranks: int, settings: dict[str, Any]) -> tuple[int, float]:
    """(bytes above what was there before, of the fullest rank; seconds of the whole launch)."""
    out = folder / f"{name} of {model}"
    is_stage = "parallel" in settings
    settings = COMMON | settings | {"model": str(folder / (f"{model} untied" if is_stage else model)), "out": str(out)}
    if settings.get("objective") == "distil":
        settings["distil"] = {"teacher": str(folder / f"{model} dense")}
    recipe = folder / f"{out.name}.yaml"
    recipe.write_text(json.dumps(settings))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    start = time.perf_counter()
    subprocess.run([*torchrun, __file__, "--rank", str(recipe)], check=True, stdout=subprocess.DEVNULL)
    seconds = time.perf_counter() - start
    figures = [json.loads(f.read_text()) for f in out.glob("memory-*.json")]
    assert len(figures) == ranks
    return max(f["peak"] - f["before"] for f in figures), seconds


def compare(folder: Path, name: str, ranks: int, settings: dict[str, Any]) -> dict[str, Any]:
    teacher = read_model(folder / "small dense") if settings.get("objective") == "distil" else None
    model = read_model(folder / ("small untied" if "parallel" in settings else "small"))
    planned = fullest(make_layout(make_recipe(COMMON | settings), model, ranks, "cpu", teacher)).peak()
    fixed, _ = measure(folder, name, "tiny", ranks, settings)
    reached, seconds = measure(folder, name, "small", ranks, settings)
    return {
        "name": name,
        "ranks": ranks,
        "settings": settings,
        "planned_bytes": planned.total_bytes,
        "planned_moment": planned.name,
        "planned_parts": planned.parts,
        "measured_bytes": reached - fixed,
        "fixed_bytes": fixed,
        "planned_over_measured": planned.total_bytes / (reached - fixed),
        "wall_s": seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=RUNS, default=list(RUNS))
    args = parser.parse_args()
    import torch
    from measure import print_table, provenance, write_json

    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for size, sizes in {"small": SMALL, "tiny": TINY}.items():
            write_model(folder / size, sizes)
            write_model(folder / f"{size} dense", sizes, is_dense=True)
            write_model(folder / f"{size} untied", sizes, tied=False)
        for run in args.only:
            rows.append(compare(folder, run, *RUNS[run]))
            print(json.dumps(rows[-1]), flush=True)
    print_table(
        "memory of the fullest rank",
        ["recipe", "ranks", "planned MiB", "measured MiB", "planned / measured"],
        [[r["name"], str(r["ranks"]), f"{r['planned_bytes'] / 2**20:.0f}", f"{r['measured_bytes'] / 2**20:.0f}",
          f"{r['planned_over_measured']:.3f}"] for r in rows],
    )  # fmt: skip
    write_json(args.json, provenance(torch.device("cpu")) | {"model": SMALL, "slices": SLICES, "runs": rows})


if __name__ == "__main__":
    if sys.argv[1:2] == ["--rank"]:
        rank(sys.argv[2:])
    else:
        main()
