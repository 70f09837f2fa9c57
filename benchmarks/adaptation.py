"""What the training benchmarks share: train a variant on a new text, measure what it learned and what it forgot.

New text: this Python's C headers (code). Old text, on which no variant trains: news (prose; the Lee corpus, which the
package gensim ships) and the Python docs (technical prose). Replayed text: the READMEs of the installed packages.

The embedded model comes from a quantised file, so that training on anything mends it, and old text gets better at
first whatever the new text is. Therefore the dense model is healed before: trained, all of it, on the training parts of
the old and the replayed text. What is measured is held out of that.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from measure import earlier_rows, figure, positive, provenance, work_folder, write_json
from texts import c_headers, news, readmes, write_documents

from lamella.calibrate.text import written_documents
from lamella.checkpoint.embedded import embedded_model
from lamella.checkpoint.source import Checkpoint
from lamella.conversion import convert
from lamella.evaluate.perplexity import perplexity, text_samples
from lamella.export.trained import materialise
from lamella.hf.models import load
from lamella.recipe.conversion import make_conversion
from lamella.recipe.training import make_recipe
from lamella.run.folder import RunDir
from lamella.run.processes import StopRequest
from lamella.train.stage import train_stage
from lamella.worker import alone_without_torchrun

RESULTS = Path(__file__).parent / "results"
NEW, NEWS, REPLAYED = "headers", "news", "readmes"
GENERATED = "generated"
"""Text that the dense model wrote before it was converted."""
GENERATED_TOKENS = 65_536
OLD = (NEWS, "python-docs")
QUICK = {"steps": 4, "seq_len": 64, "tokens": 512, "heal_steps": 2}


@dataclass(frozen=True)
class Variant:
    axis: str
    """What it varies."""
    conversion: dict[str, Any] | None = field(default_factory=dict)
    """Keys of a conversion recipe; None trains the dense model."""
    recipe: dict[str, Any] = field(default_factory=dict)


DENSE = Variant(
    "dense",
    {"method": "partition", "neurons": "contiguous", "parts": 8, "active": 8, "router": "zero", "output": "plain"},
    {"trains": "experts"},
)
"""Continued pretraining of the FFNs as they are: a partition of which every expert is always active."""


def mixed(replayed: float, replay: str = REPLAYED, old: tuple[str, ...] = OLD, **settings: Any) -> dict[str, Any]:
    """New text with this share of the samples replayed. Old text is named, with weight 0: nothing trains on it."""
    weights = {NEW: 1 - replayed, replay: replayed} | dict.fromkeys(old, 0.0)
    return {"data": [{"source": name, "weight": weight} for name, weight in weights.items()]} | settings


def recipe_of(variant: Variant, args: argparse.Namespace, seed: int, model: Path, work: Path) -> dict[str, Any]:
    """Plain values of a recipe, the texts' folders in the place of their names, half the steps in that of "half"."""
    common = {
        "model": str(model), "out": str(work / "run"), "data": [NEW], "heldout_data": [NEW], "seq_len": args.seq_len,
        "samples_per_step": 2, "samples_per_micro_batch": 2, "lr": 3e-4,
        "steps": args.steps, "warmup_steps": max(1, args.steps // 10), "seed": seed,
        "save_every_steps": args.steps, "heldout_every_steps": args.steps,
        "heldout_samples": args.tokens // args.seq_len, "tensorboard": False,
        "precision": args.precision, "threads_per_rank": args.threads,
    }  # fmt: skip
    places = {name: str(work / name) for name in (NEW, NEWS, REPLAYED)}
    places |= {GENERATED: str(work / "generated.jsonl"), "half": args.steps // 2}

    def placed(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: placed(v) for key, v in value.items()}
        return [placed(v) for v in value] if isinstance(value, list) else places.get(value, value)

    return placed(common | variant.recipe)


def train(variant: Variant, args: argparse.Namespace, seed: int, model: Path, work: Path) -> None:
    if not train_stage(make_recipe(recipe_of(variant, args, seed, model, work)), 0, StopRequest()):
        sys.exit(f"error: a run of {variant} did not finish")


def healed(args: argparse.Namespace, work: Path) -> Path:
    """The dense model that the variants start from: that of --dense, or made here."""
    if args.dense is not None and args.dense.exists():
        return args.dense
    if not args.heal_steps:
        return embedded_model()
    folder = args.dense or work / "dense"
    recipe = {"trains": "all", "lr": 2e-4, "data": [*OLD, REPLAYED], "steps": args.heal_steps}
    train(Variant("heal", None, recipe), args, 0, embedded_model(), work)
    shutil.move(materialise(work / "run"), folder)
    shutil.rmtree(work / "run")
    return folder


@contextmanager
def converted(variant: Variant, dense: Path, work: Path) -> Iterator[Path]:
    if variant.conversion is None:
        yield dense
        return
    folder = work / "model"
    convert(dense, folder, make_conversion(variant.conversion).options)
    yield folder
    shutil.rmtree(folder)


def run(
    variant: Variant, args: argparse.Namespace, seed: int, dense: Path, work: Path, old: tuple[str, ...]
) -> dict[str, Any]:
    """Train one variant and measure it; its folders are gone afterwards."""
    out = work / "run"
    with converted(variant, dense, work) as model:
        began = time.perf_counter()
        train(variant, args, seed, model, work)
        seconds = time.perf_counter() - began
        metrics = list(RunDir(out).metrics())
        last = metrics[-1]
        row = {
            "wall_s": seconds, "new_start": metrics[0]["heldout_loss"],
            "new_end": last["heldout_loss"], "old_end": old_losses(materialise(out), args, work, old) if old else {},
            "twin_share": mean(last["twin_share"]), "max_vio": mean(last["max_vio"]),
            "tokens_per_s": mean([line["tokens_per_s"] for line in metrics[2:]]),
        }  # fmt: skip
        shutil.rmtree(out)
    return row


def mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


def old_losses(folder: Path, args: argparse.Namespace, work: Path, old: tuple[str, ...]) -> dict[str, float]:
    """Nats per token on each text that no variant trains on."""
    from transformers import AutoTokenizer

    model, tokenizer, found = load(folder, torch.float32), AutoTokenizer.from_pretrained(folder), {}
    for name in old:
        source = str(work / name) if (work / name).exists() else name
        samples = text_samples(source, "heldout", str(folder), args.seq_len, args.tokens)
        with torch.no_grad():
            found[name] = perplexity(model, samples, tokenizer, args.tokens).nats_per_token
    return found


def measure(
    args: argparse.Namespace, runs: list[tuple[dict[str, Any], Variant]], old: tuple[str, ...] = OLD
) -> dict[str, Any]:
    """Run every variant whose row the JSON file does not hold yet, so that hours of work may come in pieces.

    Args:
        runs: what tells a row from the others (its "seed" among it), and the variant.
        old: texts on which the trained model is measured besides.
    """
    alone_without_torchrun()
    settings = {key: getattr(args, key) for key in (*QUICK, "precision")}
    rows = earlier_rows(args.json, settings)

    def is_there(identity: dict[str, Any]) -> bool:
        return any(identity.items() <= row.items() for row in rows)

    if all(is_there(identity) for identity, _ in runs):
        return json.loads(args.json.read_text())
    with tempfile.TemporaryDirectory(prefix="adaptation.", dir=args.work) as folder:
        work = Path(folder)
        for name, texts in ((NEW, c_headers), (NEWS, news), (REPLAYED, readmes)):
            write_documents(texts(), work / name)
        dense = healed(args, work)
        if any(GENERATED in str(variant.recipe) for _, variant in runs):
            written = written_documents(Checkpoint.open(dense), GENERATED_TOKENS)
            (work / "generated.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in written))
        report = {**settings, "old_start": old_losses(dense, args, work, old), "rows": rows}
        for identity, variant in runs:
            if is_there(identity):
                continue
            row = run(variant, args, identity["seed"], dense, work, old)
            rows.append(identity | row | provenance(torch.device("cpu")))
            line = ", ".join(f"{value}" for value in identity.values())
            losses = {"learned": rows[-1]["new_end"]} | rows[-1]["old_end"]
            print(f"{line}: {', '.join(f'{name} {loss:.3f}' for name, loss in losses.items())}", flush=True)
            write_json(args.json, report)
    return report


def options(doc: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--steps", type=positive, default=60, help="default: %(default)s")
    parser.add_argument("--seq-len", type=positive, default=256, help="tokens of a sample; a step has two")
    parser.add_argument("--tokens", type=positive, default=4096, help="held-out tokens of each text")
    parser.add_argument("--quick", action="store_true", help="a few variants, four steps, little text")
    parser.add_argument("--heal-steps", type=int, default=120, help="of training the dense model on old text before")
    parser.add_argument("--dense", type=Path, help="folder of the healed dense model; made there if it is missing")
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default="bfloat16", help="of training")
    parser.add_argument("--threads", type=int, default=0, help="of training; 0: all cores")
    parser.add_argument("--work", type=work_folder, help="folder for models and runs, one at a time (4 GB)")
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
def picture(path: Path, old_start: dict[str, float], titles: list[tuple[str, str]]) -> Iterator[list[Any]]:
    """A plot for each (old text, title), old text across, new text up: down is learned, left is remembered."""
    with figure(path, len(titles)) as plots:
        for plot, (text, title) in zip(plots, titles, strict=True):
            plot.axvline(old_start[text], color="0.7", linewidth=1, label=f"{text} before training")
            plot.set(title=title, xlabel=f"{text}, held out (nats per token)", ylabel=f"{NEW} (nats per token)")
        yield plots
