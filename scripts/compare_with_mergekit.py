"""Run: uv run --no-sync scripts/compare_with_mergekit.py [--work DIR]

The same configs through mergekit-moe and `lamella convert`, on tiny models made here: both outputs are loaded by the
project's transformers and compared tensor by tensor. Where nothing is random all tensors but the router's must be
equal, and the router's rows must point the same way (cosine >= 0.999; mergekit computes them in bfloat16).
`scripts/install_readers.py` fetches mergekit.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

LEAST_COSINE = 0.999
DOMAINS = {
    "code": ["def add(a, b): return a + b", "import os, sys", "for i in range(10): print(i)", "class Tree: pass"],
    "law": ["the court finds for the plaintiff", "under section two of the act", "the parties agree", "appeal denied"],
    "sea": ["the waves rolled over the sand", "a ship left the harbour", "salt and wind", "gulls above the mast"],
}
# Of equal length in tokens of one byte each: mergekit's mean over positions counts its padding, too.
EQUAL = {name: [prompt.ljust(33)[:33] for prompt in prompts] for name, prompts in DOMAINS.items()}
_CHILD = """
import json, sys
from mergekit.scripts.moe import main
for config, out in json.load(sys.stdin):
    flags = ["--no-copy-tokenizer", "--i-understand-this-is-not-useful-without-training"]
    main([config, out, *flags], standalone_mode=False)
"""


def site() -> Path:
    """The folder that holds mergekit."""
    from lamella.architecture.embedded import cache_dir

    return Path(os.environ.get("LAMELLA_MERGEKIT") or cache_dir() / "mergekit")


def is_installed() -> bool:
    return (site() / "mergekit/__init__.py").is_file()


def run_mergekit(jobs: list[tuple[Path, Path]]) -> None:
    """(config, output folder) each, in one process."""
    environment = os.environ | {"PYTHONPATH": str(site()), "HF_HUB_OFFLINE": "1"}
    text = json.dumps([[str(part) for part in job] for job in jobs])
    done = subprocess.run([sys.executable, "-c", _CHILD], input=text, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])


def configs(models: dict[str, list[Path]]) -> dict[str, dict[str, Any]]:
    """Name -> config of mergekit-moe: every architecture and gate mode that is computed without random numbers."""

    def config(family: str, prompts: dict[str, list[str]] = DOMAINS, **more: Any) -> dict[str, Any]:
        experts = [
            {"source_model": str(folder), "positive_prompts": prompts[name]}
            for folder, name in zip(models[family], prompts, strict=True)
        ]
        return {"base_model": str(models[family][0]), "experts": experts, **more}

    found = {
        "hidden": config("llama"),
        "hidden_last": config("mistral", gate_mode="hidden_last", experts_per_token=1),
        "hidden_avg": config("llama", EQUAL, gate_mode="hidden_avg"),
        "cheap_embed": config("llama", gate_mode="cheap_embed", dtype="float32"),
        "qwen3": config("qwen3", dtype="float16"),
        "qwen2": config("qwen2"),
        "qwen2 of llama": config("llama", architecture="qwen moe"),
        "deepseek": config("llama", architecture="DeepSeek"),
        "negative": config("llama"),
        "residual_scale": config("llama"),
    }
    for name in ("qwen2", "qwen2 of llama"):
        shared = {"source_model": found[name]["experts"][1]["source_model"], "residual_scale": 0.1}
        found[name]["shared_experts"] = [shared | {"positive_prompts": ["anything at all"]}]
    for i, expert in enumerate(found["negative"]["experts"]):
        expert["negative_prompts"] = [prompts[i] for prompts in DOMAINS.values()]
    found["residual_scale"]["experts"][2]["residual_scale"] = 0.3
    found["deepseek"]["shared_experts"] = [{"source_model": found["deepseek"]["experts"][2]["source_model"]}]
    return found


def make_models(work: Path) -> dict[str, list[Path]]:
    """Three tiny models of each family, bfloat16, with a tokenizer of bytes."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    from support.models import BOS, EOS, VOCAB, save_tokenizer, tiny_checkpoint

    ids = {"vocab_size": VOCAB, "bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": EOS}
    return {
        family: [
            save_tokenizer(tiny_checkpoint(work / family / str(seed), family, dtype=torch.bfloat16, seed=seed, **ids))
            for seed in range(3)
        ]
        for family in ("llama", "mistral", "qwen2", "qwen3")
    }


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """As transformers holds them after loading; the file's own where the class is remote code."""
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    if json.loads((folder / "config.json").read_text())["model_type"] == "deepseek":
        return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    left = {kind: info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") if info[kind]}
    assert not left, (folder, left)
    return model.state_dict()


def compared(ours: Path, theirs: Path) -> tuple[list[str], float]:
    """(names of tensors that differ, the routers apart; the least cosine of a router's row)."""
    own, other = tensors_of(ours), tensors_of(theirs)
    differ = sorted(own.keys() ^ other.keys())
    cosine = 1.0
    for name in own.keys() & other.keys():
        a, b = own[name], other[name]
        if name.endswith((".gate.weight", ".shared_expert_gate.weight")):
            cosine = min(cosine, torch.cosine_similarity(a.double(), b.double(), dim=-1).min().item())
        elif a.dtype != b.dtype or not torch.equal(a, b):
            differ.append(name)
    return differ, cosine


def run_lamella(config: Path, out: Path) -> None:
    from lamella.conversion import convert
    from lamella.recipe.conversion import read_conversion

    recipe = read_conversion([str(config), str(out)])
    assert recipe.out is not None
    convert(recipe.model, recipe.out, recipe.options)


def compare_all(work: Path) -> dict[str, tuple[list[str], float]]:
    """Name of a config -> what `compared` finds."""
    jobs = {}
    for name, config in configs(make_models(work / "models")).items():
        path = work / f"{name}.yml"
        path.write_text(json.dumps(config))  # JSON is YAML
        jobs[name] = (path, work / "lamella" / name, work / "mergekit" / name)
    run_mergekit([(path, theirs) for path, _, theirs in jobs.values()])
    for path, ours, _ in jobs.values():
        run_lamella(path, ours)
    return {name: compared(ours, theirs) for name, (_, ours, theirs) in jobs.items()}


def main() -> int:
    """0 where everything agrees."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="Keep everything in this new folder.")
    arguments = parser.parse_args()
    if not is_installed():
        parser.error("mergekit is not there; scripts/install_readers.py fetches it")
    with tempfile.TemporaryDirectory() as temporary:
        found = compare_all((arguments.work or Path(temporary)).resolve())
    for name, (differ, cosine) in found.items():
        print(f"{name:16} {len(differ)} tensors differ {differ[:3] or ''}; least cosine of a router's row {cosine:.6f}")
    return int(any(differ or cosine < LEAST_COSINE for differ, cosine in found.values()))


if __name__ == "__main__":
    sys.exit(main())
