"""What the training benchmarks share: train a variant on a new text, measure what it learned and what it forgot.

New text: this Python's C headers (code). Old text: the Python docs (prose), on which no variant trains. Replayed text:
the READMEs of the installed packages (prose, too). Every Python installation has all three.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import shutil
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from measure import positive, provenance, write_json

from lamella.conversion import convert
from lamella.conversion.recipe import make_conversion
from lamella.embedded import embedded_model
from lamella.evaluate.perplexity import perplexity, text_samples
from lamella.models.hf import load
from lamella.recipe import make_recipe
from lamella.run_dir import RunDir
from lamella.train.processes import StopRequest
from lamella.train.weights import materialise
from lamella.train.worker import alone_without_torchrun, train_stage

RESULTS = Path(__file__).parent / "results"
NEW, OLD, REPLAYED = "headers", "python-docs", "readmes"
QUICK = {"steps": 4, "seq_len": 64, "tokens": 512}


@dataclass(frozen=True)
class Variant:
    axis: str
    """What it varies."""
    conversion: dict[str, Any] | None = field(default_factory=dict)
    """Keys of a conversion recipe; None trains the dense model."""
    recipe: dict[str, Any] = field(default_factory=dict)


def replay(**settings: Any) -> dict[str, Any]:
    return {"data": [{"source": NEW, "weight": 0.75}, {"source": REPLAYED, "weight": 0.25}]} | settings


def copy_headers(folder: Path) -> None:
    """This Python's C headers, as text files."""
    source = Path(sysconfig.get_paths()["include"])
    headers = sorted(source.rglob("*.h"))
    if not headers:
        sys.exit(f"error: no C headers in {source}; install those of this Python (python3-dev)")
    folder.mkdir()
    for i, header in enumerate(headers):
        shutil.copyfile(header, folder / f"{i:03}-{header.stem}.txt")


def copy_readmes(folder: Path) -> None:
    """The READMEs of the installed packages, as text files."""
    folder.mkdir()
    for package in importlib.metadata.distributions():
        text = package.metadata.json.get("description", "")
        if isinstance(text, str) and len(text) > 1000:
            (folder / f"{package.name.lower()}.txt").write_text(text, encoding="utf-8", errors="replace")


def recipe_of(variant: Variant, args: argparse.Namespace, seed: int, model: Path, work: Path) -> dict[str, Any]:
    """Plain values of a recipe, the texts' folders in the place of their names, half the steps in that of "half"."""
    common = {
        "model": str(model), "out": str(work / "run"), "data": [NEW], "heldout_data": [NEW], "seq_len": args.seq_len,
        "samples_per_step": 2, "steps": args.steps, "warmup_steps": max(1, args.steps // 10), "lr": 3e-4,
        "seed": seed, "save_every_steps": args.steps, "heldout_every_steps": args.steps,
        "heldout_samples": args.tokens // args.seq_len, "tensorboard": False,
    }  # fmt: skip
    places = {NEW: str(work / NEW), REPLAYED: str(work / REPLAYED), "half": args.steps // 2}

    def placed(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: placed(v) for key, v in value.items()}
        return [placed(v) for v in value] if isinstance(value, list) else places.get(value, value)

    return placed(common | variant.recipe)


@contextmanager
def converted(variant: Variant, work: Path) -> Iterator[Path]:
    if variant.conversion is None:
        yield embedded_model()
        return
    folder = work / "model"
    convert(out=folder, options=make_conversion(variant.conversion).options)
    yield folder
    shutil.rmtree(folder)


def run(variant: Variant, args: argparse.Namespace, seed: int, work: Path) -> dict[str, Any]:
    """Train one variant and measure it; its folders are gone afterwards."""
    out = work / "run"
    with converted(variant, work) as model:
        began = time.perf_counter()
        if not train_stage(make_recipe(recipe_of(variant, args, seed, model, work)), 0, StopRequest()):
            sys.exit(f"error: a run of {variant} did not finish")
        seconds = time.perf_counter() - began
        metrics = list(RunDir(out).metrics())
        last = metrics[-1]
        row = {
            "wall_s": seconds, "new_start": metrics[0]["heldout_loss"],
            "new_end": last["heldout_loss"], "old_end": old_loss(materialise(out), args),
            "twin_share": mean(last["twin_share"]), "max_vio": mean(last["max_vio"]),
            "tokens_per_s": mean([line["tokens_per_s"] for line in metrics[2:]]),
        }  # fmt: skip
        shutil.rmtree(out)
    return row


def mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


def old_loss(folder: Path, args: argparse.Namespace) -> float:
    """Nats per token on the text that no variant trains on."""
    from transformers import AutoTokenizer

    samples = text_samples(OLD, "heldout", str(folder), args.seq_len, args.tokens)
    with torch.no_grad():
        return perplexity(
            load(folder, torch.float32), samples, AutoTokenizer.from_pretrained(folder), args.tokens
        ).nats_per_token


def measure(args: argparse.Namespace, runs: list[tuple[dict[str, Any], Variant]]) -> dict[str, Any]:
    """Run every variant whose row the JSON file does not hold yet, so that hours of work may come in pieces.

    Args:
        runs: what tells a row from the others (its "seed" among it), and the variant.
    """
    alone_without_torchrun()
    settings = {key: getattr(args, key) for key in QUICK}
    rows = earlier_rows(args.json, settings)
    with tempfile.TemporaryDirectory(prefix="adaptation.", dir=args.work) as folder:
        work = Path(folder)
        copy_headers(work / NEW)
        copy_readmes(work / REPLAYED)
        report = {**settings, "old_start": old_loss(embedded_model(), args), "rows": rows}
        for identity, variant in runs:
            if any(identity.items() <= row.items() for row in rows):
                continue
            rows.append(identity | run(variant, args, identity["seed"], work) | provenance(torch.device("cpu")))
            line = ", ".join(f"{value}" for value in identity.values())
            print(f"{line}: new {rows[-1]['new_end']:.3f}, old {rows[-1]['old_end']:.3f}", flush=True)
            write_json(args.json, report)
    return report


def earlier_rows(path: Path | None, settings: dict[str, Any]) -> list[dict[str, Any]]:
    if path is None or not path.exists():
        return []
    report = json.loads(path.read_text())
    if any(report.get(key) != value for key, value in settings.items()):
        sys.exit(f"error: {path} holds runs of other {', '.join(settings)}; give another --json, or remove it")
    return report["rows"]


def options(doc: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--steps", type=positive, default=60)
    parser.add_argument("--seq-len", type=positive, default=256, help="tokens of a sample; a step has two")
    parser.add_argument("--tokens", type=positive, default=4096, help="held-out tokens of each text")
    parser.add_argument("--quick", action="store_true", help="a few variants, four steps, little text")
    parser.add_argument("--work", type=Path, help="folder for models and runs, of which one at a time is kept (4 GB)")
    parser.add_argument("--json", type=Path, help="rows that it holds are not run again")
    parser.add_argument("--picture", type=Path)
    return parser


def parse(parser: argparse.ArgumentParser, name: str, quick: dict[str, Any]) -> argparse.Namespace:
    """The arguments; files in `results` are the default, but not of a quick run."""
    args = parser.parse_args()
    if args.quick:
        return argparse.Namespace(**(vars(args) | QUICK | quick))
    args.json = args.json or RESULTS / f"{name}-cpu.json"
    args.picture = args.picture or RESULTS / f"{name}-cpu.png"
    return args


@contextmanager
def picture(path: Path, old_start: float, titles: list[str], **settings: Any) -> Iterator[Any]:
    """A plot for each title, old text across, new text up: down is learned, left is remembered. Saved at the end."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    size = (7 * len(titles), 5.5)
    figure, plots = plt.subplots(1, len(titles), figsize=size, layout="constrained", squeeze=False, **settings)
    for plot, title in zip(plots[0], titles, strict=True):
        plot.axvline(old_start, color="0.7", linewidth=1, label="old text before training")
        plot.set(title=title, xlabel="old text, never trained on (nats per token)")
    plots[0][0].set_ylabel("new text (nats per token)")
    yield plots[0]
    for plot in plots[0]:
        plot.legend(loc="best")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
