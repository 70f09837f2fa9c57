"""Run: uv run benchmarks/balance.py [--quick] [--targets X ...] [--active N ...] [--json FILE]

How even the experts' loads are after conversion: SmolLM2, all layers, selection biases moved until MaxVio on the
calibration text is at most the target. MaxVio of a layer is (highest load - mean) / mean over a whole text
(MaxVio_global, arXiv 2408.15664); shown are the mean over the layers and the worst layer, on the calibration text, on
other text of the same source, and on text of that source that is held out of everything.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))  # runs where lamella is not installed, too

from measure import earlier_rows, positive, print_table, provenance, work_folder, write_json

from lamella.calibrate import CalibrationOptions, calibration_tokens
from lamella.checkpoint.embedded import embedded_model
from lamella.checkpoint.source import Checkpoint
from lamella.conversion import convert
from lamella.evaluate.perplexity import perplexity, text_samples
from lamella.hf.models import load
from lamella.moe.balancing import expert_counts, max_violation
from lamella.recipe.conversion import make_conversion

SOURCE, LENGTH, PARTS = "python-docs", 512, 16
PERPLEXITY_TOKENS = 4096


def texts(dense: Path, args: argparse.Namespace) -> dict[str, Tensor]:
    """name -> token ids [N, L]; calibration text and other text of its source have no window in common."""
    source = Checkpoint.open(dense)
    seen, drawn = (
        calibration_tokens(source, CalibrationOptions(data=SOURCE, num_tokens=tokens, seed=seed)).ids_NL
        for tokens, seed in ((args.calibration_tokens, 0), (args.calibration_tokens + args.tokens, 1))
    )
    known = {tuple(window) for window in seen.tolist()}
    other = torch.stack([window for window in drawn if tuple(window.tolist()) not in known])
    heldout = text_samples(SOURCE, "heldout", str(dense), LENGTH, None)
    return {
        "calibration": seen,
        "same source": other[: args.tokens // LENGTH],
        "held out": torch.stack([heldout.sample(i)[0] for i in range(min(len(heldout), args.tokens // LENGTH))]),
    }


@torch.no_grad()
def violations(model: Any, ids_NL: Tensor) -> list[float]:
    """MaxVio of each MoE layer over the text."""
    loads = [torch.zeros(layer.config.num_experts) for layer in model.moe_layers]
    for ids_BL in ids_NL.split(4):
        model.get_decoder()(ids_BL, use_cache=False)
        for layer, load_E in zip(model.moe_layers, loads, strict=True):
            load_E += expert_counts(layer.last_routing.expert_ids_TK, len(load_E))
    return [float(max_violation(load_E)) for load_E in loads]


def measure(target: float | None, active: int, args: argparse.Namespace, found: dict[str, Tensor]) -> dict[str, Any]:
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory(prefix="balance.", dir=args.work) as folder:
        out = Path(folder) / "model"
        recipe = {"method": "partition", "parts": PARTS, "active": active, "balance": target}
        recipe["calibration"] = {"data": SOURCE, "num_tokens": args.calibration_tokens}
        convert(embedded_model(), out, make_conversion(recipe).options)
        model: Any = load(out, torch.float32)
        samples = text_samples(SOURCE, "heldout", str(out), LENGTH, PERPLEXITY_TOKENS)
        with torch.no_grad():
            score = perplexity(model, samples, AutoTokenizer.from_pretrained(out), PERPLEXITY_TOKENS)
        of_texts = {name: violations(model, ids_NL) for name, ids_NL in found.items()}
    return {
        "target": target, "active": active / PARTS, "perplexity": score.perplexity,
        "max_vio": {name: statistics.mean(values) for name, values in of_texts.items()},
        "worst_max_vio": {name: max(values) for name, values in of_texts.items()},
        "tokens": {name: ids_NL.numel() for name, ids_NL in found.items()},
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="+", type=float, default=[0.1, 0.01], help="0: no balancing")
    parser.add_argument(
        "--active", nargs="+", type=int, choices=range(1, PARTS), default=[8, 4], metavar="N", help="parts"
    )
    parser.add_argument("--calibration-tokens", type=positive, default=16384)
    parser.add_argument("--tokens", type=positive, default=32768, help="of the other texts; held out there are fewer")
    parser.add_argument("--quick", action="store_true", help="one target, one share, little text")
    parser.add_argument("--work", type=work_folder, help="folder for calibration and models")
    parser.add_argument("--json", type=Path, help="rows that it holds are not measured again")
    args = parser.parse_args()
    if args.quick:
        quick = {"targets": [0.1], "active": [8], "calibration_tokens": 1024, "tokens": 2048}
        args = argparse.Namespace(**(vars(args) | quick))
    found = texts(embedded_model(), args)
    settings = {"calibration_tokens": args.calibration_tokens, "other_tokens": args.tokens}
    rows = earlier_rows(args.json, settings)
    for active in args.active:
        for target in (value or None for value in args.targets):
            if not any((row["active"], row["target"]) == (active / PARTS, target) for row in rows):
                rows.append(measure(target, active, args, found) | provenance(torch.device("cpu")))
                write_json(args.json, settings | {"rows": rows})
    table = [
        [f"{row['active']:.0%}", str(row["target"]), f"{row['perplexity']:.2f}"]
        + [f"{row['max_vio'][name]:.2f} ({row['worst_max_vio'][name]:.2f})" for name in found]
        for row in rows
    ]
    print_table("MaxVio, mean over the layers (worst layer)", ["active", "target", "perplexity", *found], table)


if __name__ == "__main__":
    main()
