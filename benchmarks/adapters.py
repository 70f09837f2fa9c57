"""Run: uv run benchmarks/adapters.py --lrs 1e-3 2e-3 4e-3 --seeds 0

The story of `lamella demo adapters` at several learning rates and seeds: adapters as experts beside one adapter of the
same total rank that learned all texts from as many tokens. Both sides are trained at each rate, so that each can be
judged at the one that is best for it. A rate is chosen on the same held-out tokens that are shown; other seeds, at the
rates that were chosen, are the ones to believe.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))  # runs where lamella is not installed, too

import torch
from measure import positive, print_table, provenance, work_folder, write_json

from lamella.demo_adapters import DOMAINS, run_adapters_demo


def row_of(report: dict[str, Any]) -> list[str]:
    """A line of the table: nats per token of each domain."""
    nats = report["nats"]
    own = [f"{nats[domain][domain]:.4f}" for domain in DOMAINS]
    others = [f"{nats[model][domain]:.4f}" for model in ("mix", "all") for domain in DOMAINS]
    return [f"{report['lr']:g}", str(report["seed"]), *own, *others, f"{report['wall_s']:.0f}"]


def mean_nats(report: dict[str, Any], model: str) -> float:
    """Over the domains."""
    return sum(report["nats"][model].values()) / len(DOMAINS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lrs", type=float, nargs="+", default=[1e-3, 2e-3, 4e-3])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=positive, default=60, help="twice as many on both texts, half as many on each")
    parser.add_argument("--tokens", type=positive, default=4096, help="held out, of each domain")
    parser.add_argument("--work", type=work_folder, default=Path("artifacts/adapters-benchmark"))
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    reports = []
    for lr in arguments.lrs:
        for seed in arguments.seeds:
            out = arguments.work / f"lr-{lr:g}-seed-{seed}"
            out.parent.mkdir(parents=True, exist_ok=True)
            told = {"steps": arguments.steps, "tokens": arguments.tokens, "questions": 1}
            reports.append(run_adapters_demo(out, seed=seed, lr=lr, **told))
    columns = [f"{model} {domain}" for model in ("own", "mix", "all") for domain in DOMAINS]
    print_table("nats per held-out token", ["lr", "seed", *columns, "s"], [row_of(report) for report in reports])
    for model, title in (("mix", "adapters as experts"), ("all", "one adapter of all")):
        best = min(reports, key=lambda report: mean_nats(report, model))
        print(f"{title}: best at lr {best['lr']:g}, seed {best['seed']}: {mean_nats(best, model):.4f}")
    write_json(arguments.json, provenance(torch.device("cpu")) | {"rows": reports})


if __name__ == "__main__":
    main()
