"""Run: uv run --no-sync scripts/check_with_transformers_4.py SOURCE EXPORT [EXPORT ...]

Whether an older reader takes exports for the same model: SOURCE, a converted folder, is computed here, each EXPORT by
transformers 4.57 in a process of its own, and their logits are compared, fp32. `scripts/install_readers.py` fetches it;
torch and the rest are the project's.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

MAX_DIFFERENCE = 1e-3  # fp32, as in lamella.export.check


def site() -> Path:
    """The folder that holds the older packages."""
    from lamella.architecture.embedded import cache_dir

    return Path(os.environ.get("LAMELLA_TRANSFORMERS_4") or cache_dir() / "transformers-4.57")


def is_installed() -> bool:
    return (site() / "transformers/__init__.py").is_file()


def differences(pairs: dict[Path, Path], mode: str = "routed") -> dict[Path, float]:
    """Export -> largest |logit difference| to its source (the value) as transformers 4 reads the export."""
    from safetensors.torch import save_file

    from lamella.export.check import source_logits

    with tempfile.TemporaryDirectory() as temporary:
        jobs = []
        for i, (export, source) in enumerate(pairs.items()):
            for j, reference in enumerate(source_logits(source, mode)[0]):
                file = Path(temporary) / f"{i}-{j}.safetensors"
                tensors = {"ids": reference.ids_1L, "kept": reference.kept, "logits": reference.logits}
                if reference.positions_1L is not None:
                    tensors["positions"] = reference.positions_1L
                save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)
                jobs.append([str(export), str(file)])
        found = read_elsewhere(jobs)
    largest = dict.fromkeys(pairs, 0.0)
    for (export, _), difference in zip(jobs, found, strict=True):
        largest[Path(export)] = max(largest[Path(export)], difference)
    return largest


def read_elsewhere(jobs: list[list[str]]) -> list[float]:
    """`read` in a process of the older environment; RuntimeError with what it said where it fails."""
    # Nothing of the project is on this path: the exports must be read without it.
    environment = os.environ | {"PYTHONPATH": str(site()), "HF_HUB_OFFLINE": "1"}
    words = [sys.executable, __file__, "--read", json.dumps(jobs)]
    done = subprocess.run(words, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    found: list[float] = json.loads(done.stdout.splitlines()[-1])
    return found


def read(jobs: list[list[str]]) -> list[float]:
    """In the older environment: the difference of each (export, file of references)."""
    import torch
    import transformers
    from safetensors.torch import load_file

    assert transformers.__version__.startswith("4."), transformers.__version__
    found = []
    for export, file in jobs:
        reference = load_file(file)
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            export, torch_dtype=torch.float32, output_loading_info=True
        )
        if left := {kind: list(info[kind]) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")}:
            assert not any(left.values()), (export, left)
        places = {}
        if "positions" in reference:
            places = {"position_ids": reference["positions"], "attention_mask": torch.ones_like(reference["ids"])}
        with torch.no_grad():
            logits = model(reference["ids"], use_cache=False, **places).logits[0, reference["kept"]].float()
        found.append((logits - reference["logits"]).abs().max().item())
    return found


def main() -> int:
    """0 where every export computes what its source does."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--mode", default="routed", help="what the source computes: routed, or dense for a dense export"
    )
    parser.add_argument("--read", help=argparse.SUPPRESS)
    parser.add_argument("folders", nargs="*", type=Path)
    args = parser.parse_args()
    if args.read:
        print(json.dumps(read(json.loads(args.read))))
        return 0
    if not is_installed():
        parser.error("transformers 4.57 is not there; scripts/install_readers.py fetches it")
    if len(args.folders) < 2:
        parser.error("give a converted folder and its exports")
    source, *exports = args.folders
    found = differences(dict.fromkeys(exports, source), args.mode)
    for export, difference in found.items():
        print(f"{export}: max |logit difference| {difference:.2e} in transformers 4.57")
    return int(not all(difference <= MAX_DIFFERENCE for difference in found.values()))


if __name__ == "__main__":
    sys.exit(main())
