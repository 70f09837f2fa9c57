"""Run: uv run benchmarks/quality.py [--quick] [--json FILE]

Perplexity right after conversion, over the dense model's, for ways to make experts that use fewer neurons per token,
beside what a user could do without experts: `static` (keep the most important neurons) and `flap` (the same, with a
bias for what is dropped; arXiv 2312.11983). All see the same calibration tokens. Each model is judged on held-out text
of every domain of texts.py; the figure to lead with is the geometric mean over the two domains that nothing is
calibrated on. MaxVio is the mean over the layers, on all of that text. With `--heal N` every model but the oracle's is
then trained on N tokens of the calibration's texts, as `heal` in a recipe does, and judged again. Rows that the JSON
file holds are not measured again.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))  # runs where lamella is not installed, too

from measure import earlier_rows, positive, provenance, work_folder, write_json
from quality_report import DEFAULT, DOMAINS, ORACLE, OURS, PRUNED, Row, draw, is_of, show
from texts import SEEN, source_of

from lamella.calibrate import CalibrationOptions, calibrate, calibration_tokens, training_tokens
from lamella.calibrate.layerwise import LayerwiseModel
from lamella.calibrate.sample import FFN, LayerSample, Partition, hidden, output, weights_only
from lamella.calibrate.whole import whole_model
from lamella.checkpoint.embedded import embedded_model
from lamella.checkpoint.source import Checkpoint
from lamella.conversion.partition.calibrated import decide_all
from lamella.conversion.partition.decide import (
    Decision,
    Split,
    converted_ffn,
    finish,
    neuron_counts,
    routed_output,
    split,
)
from lamella.conversion.partition.heal import Start, heal
from lamella.conversion.partition.oracle import largest
from lamella.conversion.partition.reconstruct import reconstruct
from lamella.conversion.partition.refit import refit_down
from lamella.conversion.partition.static import Kept, flap, kept_output, static
from lamella.conversion.plan import Workspace
from lamella.evaluate.perplexity import perplexity, text_samples
from lamella.hf.models import load
from lamella.moe.balancing import expert_counts, max_violation
from lamella.recipe.calibration import GENERATED, CalibrationText
from lamella.recipe.methods.partition import Axes, Heal, PartitionOptions, partition_sizes

PARTS = 32
# name -> the axes in which it differs from the defaults without balance; published methods with unit gates
PARTITIONED: dict[str, dict[str, Any]] = {
    "contiguous": {"neurons": "contiguous", "output": "plain"},
    "random": {"neurons": "random", "output": "plain"},
    "kmeans": {"neurons": "kmeans", "output": "plain"},
    "gradient-sharing": {"neurons": "gradient-sharing", "router": "kmeans", "output": "plain"},
    "no residual split": {"neurons": "gradient-max", "router": "kmeans", "shared": 0, "output": "plain"},
    "residual split": {"neurons": "gradient-max", "router": "kmeans", "output": "plain"},  # LLaMA-MoE-v2's
    "cmoe": {"neurons": "coactivation", "router": "analytic", "output": "plain"},
    OURS: {"output": "plain"},
    f"{OURS}, bias": {"output": "bias"},
    f"{OURS}, refit": {},
    f"{OURS}, bias, balanced": {"output": "bias", "balance": 0.1},
    f"{OURS}, refit, sequential": {"balance": 0.1},
    DEFAULT: {"balance": 0.01, "allocation": None},
}
SEQUENTIAL = (f"{OURS}, refit, sequential", DEFAULT)
"""The conversion itself decides: each layer is calibrated behind the converted ones, so every share needs a calibration
of its own."""
QUICK = ("flap", "flap, refit", DEFAULT)
CALIBRATIONS: dict[str, tuple[tuple[str, float], ...]] = {
    "python-docs": (("python-docs", 1),),
    "mixture": tuple((name, 1) for name in SEEN),
    "generated": ((GENERATED, 1),),
    "mixture and generated": (*((name, 1) for name in SEEN), (GENERATED, len(SEEN))),
}
"""name -> the texts that the layers are shown, and their weights"""


def axes_of(name: str, active: int) -> Axes:
    return Axes(parts=PARTS, active=active, **{"balance": None, "allocation": "even"} | PARTITIONED[name])


IDENTITY = ("method", "active", "calibration", "seed", "healed")
Choices = list[dict[str, Tensor]]
"""One for each layer."""
Wanted = list[tuple[int, str]]
"""(active parts, method)"""


def on_layer(wanted: Wanted, seed: int) -> Callable[[int, LayerSample], dict[str, Tensor]]:
    """Every method's choices about a layer, under '<active>/<method>/<tensor>'. Methods share splits, not draws."""

    def run(layer: int, sample: LayerSample) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        splits: dict[tuple[int, str, str], Split] = {}
        for active, name in wanted:
            values = _pruned(name, active, sample) if name in PRUNED else _routed(name, active, sample, splits, layer)
            found |= {f"{active}/{name}/{key}": value.clone() for key, value in values.items()}
        return found

    def _routed(name: str, active: int, sample: LayerSample, splits: dict, layer: int) -> dict[str, Tensor]:
        axes = axes_of(OURS if name == ORACLE else name, active)
        key = (active, axes.neurons, axes.router)
        if key not in splits:
            splits[key] = split(sample, axes, torch.Generator().manual_seed(seed * 10_000 + layer))
        return finish(sample, axes, splits[key]).to_dict()

    return run


def _pruned(name: str, active: int, sample: LayerSample) -> dict[str, Tensor]:
    count = active * len(sample.ffn.up_FD) // PARTS
    kept = (flap if name.startswith("flap") else static)(sample, count)
    if not name.endswith("refit"):
        return kept._asdict()
    masked = torch.zeros_like(sample.h_TF)
    masked[:, kept.neurons_n] = sample.h_TF[:, kept.neurons_n]
    refit = refit_down(sample, masked)
    return {"neurons_n": kept.neurons_n, "bias_D": refit.bias_D, "down_DF": refit.down_DF}


def replaced(
    name: str, active: int, ffn: FFN, choices: dict[str, Tensor], loads: list[Tensor]
) -> Callable[..., Tensor]:
    """The FFN's forward with these choices; appends the experts' loads."""
    if "down_DF" in choices and name in PRUNED:
        ffn = ffn._replace(down_DF=choices["down_DF"])

    def forward(hidden_states: Tensor) -> Tensor:
        x_TD = hidden_states.flatten(0, -2)
        if name in PRUNED:
            sample = weights_only(ffn)._replace(x_TD=x_TD, h_TF=hidden(ffn, x_TD))
            y_TD = kept_output(sample, Kept(choices["neurons_n"], choices["bias_D"]))
        elif name == ORACLE:
            sample = weights_only(ffn)._replace(x_TD=x_TD, h_TF=hidden(ffn, x_TD))
            partition = Partition(choices["shared_n"], choices["experts_Ef"])
            chosen = active - len(partition.shared_n) // partition.experts_Ef.shape[1]
            y_TD = reconstruct(sample, partition, largest(sample, partition, chosen))
        else:
            decision = Decision(**choices)
            sample = weights_only(ffn)._replace(x_TD=x_TD)
            y_TD, ids_TK = routed_output(sample, decision, axes_of(name, active))
            loads.append(expert_counts(ids_TK, len(decision.experts_Ef)))
        return y_TD.view_as(hidden_states)

    return forward


def own(choices: dict[str, Tensor], active: int, name: str) -> dict[str, Tensor]:
    """A method's own among a layer's choices."""
    prefix = f"{active}/{name}/"
    return {key.removeprefix(prefix): value for key, value in choices.items() if key.startswith(prefix)}


def decided(args: argparse.Namespace, options: CalibrationOptions, active: int, name: str, folder: Path) -> Choices:
    """What the conversion itself decides with a method's axes."""
    axes, source = axes_of(name, active), Checkpoint.open(args.model)
    own_axes = {field.name: getattr(axes, field.name) for field in dataclasses.fields(axes)}
    partition = PartitionOptions(**own_axes, calibration=options, seed=options.seed)
    found = decide_all(source, partition, partition_sizes(partition, source.config).moe_layers, Workspace(folder))
    return [found.whole(layer).to_dict() for layer in sorted(found.decisions)]


def run_seed(
    args: argparse.Namespace, seed: int, wanted: Wanted, model: Any, samples: dict[str, Any], tokenizer: Any
) -> Iterator[Row]:
    texts = tuple(
        CalibrationText(name if name == GENERATED else source_of(name, args.texts), weight)
        for name, weight in CALIBRATIONS[args.calibrate]
    )
    options = CalibrationOptions(texts, args.calibration_tokens, seed=seed)
    together = [(active, name) for active, name in wanted if name not in SEQUENTIAL]
    for group in filter(None, [together, *([pair] for pair in wanted if pair not in together)]):
        with tempfile.TemporaryDirectory(prefix="quality.", dir=args.work) as name_of_folder:
            folder, began = Path(name_of_folder) / "calibration", time.perf_counter()
            choices: dict[tuple[int, str], Choices] = {}
            if group is together:
                source = Checkpoint.open(args.model)
                results = calibrate(
                    source, calibration_tokens(source, options), folder, on_layer(group, seed),
                    method={"benchmark": group}, gradients=True,
                )  # fmt: skip
                for active, name in group:
                    choices[active, name] = [own(results[index], active, name) for index in results]
            else:
                choices = {pair: decided(args, options, *pair, folder) for pair in group}
            print(f"seed {seed}: calibrated in {time.perf_counter() - began:.0f} s", flush=True)
        for (active, name), of_layers in choices.items():
            row = {"method": name, "active": active / PARTS, "calibration": args.calibrate, "seed": seed}
            yield row | {"healed": 0} | score(args, active, name, of_layers, model, samples, tokenizer)
            if args.heal and name != ORACLE:
                forwards = [masked(start) for start in healed(args, options, active, name, of_layers)]
                found = judged(forwards, model, samples, tokenizer, args.tokens)
                healed_row = {"healed": args.heal, "tokens_per_step": Heal.tokens_per_step, "perplexity": found}
                yield row | healed_row | {"max_vio": None, "worst_max_vio": None}


def start_of(active: int, name: str, ffn: FFN, choices: dict[str, Tensor]) -> Start:
    """A layer as healing takes it."""
    if name not in PRUNED:
        decision = Decision(**choices)
        return Start(converted_ffn(ffn, decision), neuron_counts(ffn, decision, axes_of(name, active)))
    kept_F = torch.zeros(len(ffn.up_FD)).index_fill_(0, choices["neurons_n"], 1.0)
    down_DF = choices.get("down_DF", ffn.down_DF)
    return Start(ffn._replace(down_DF=down_DF, down_bias_D=choices["bias_D"]), lambda x_TD: kept_F)


def healed(
    args: argparse.Namespace, options: CalibrationOptions, active: int, name: str, of_layers: Choices
) -> list[Start]:
    """The layers after healing: the same tokens, steps and rate for every method."""
    source, began = Checkpoint.open(args.model), time.perf_counter()
    layers = LayerwiseModel(source)
    starts = {i: start_of(active, name, layers.ffn(i), choices) for i, choices in enumerate(of_layers)}
    ids_NL = training_tokens(source, options, args.heal).ids_NL
    found = heal(whole_model(source), starts, ids_NL, Heal(tokens=args.heal))
    print(f"  {active}/{PARTS} {name} healed in {time.perf_counter() - began:.0f} s", flush=True)
    return [Start(found[i], starts[i].counts) for i in found]


def masked(start: Start) -> Callable[[Tensor], Tensor]:
    def forward(hidden_states: Tensor) -> Tensor:
        x_TD = hidden_states.flatten(0, -2)
        return output(start.ffn, hidden(start.ffn, x_TD) * start.counts(x_TD)).view_as(hidden_states)

    return forward


def score(
    args: argparse.Namespace, active: int, name: str, choices: Choices, model: Any, samples: dict[str, Any],
    tokenizer: Any,
) -> dict[str, Any]:  # fmt: skip
    """Perplexities by domain, and balance, of the model with these choices about its layers."""
    loads: list[list[Tensor]] = [[] for _ in choices]
    forwards = []
    for layer, of_layer, its_loads in zip(model.model.layers, choices, loads, strict=True):
        weights = FFN(layer.mlp.gate_proj.weight, layer.mlp.up_proj.weight, layer.mlp.down_proj.weight)
        forwards.append(replaced(name, active, weights, of_layer, its_loads))
    found = judged(forwards, model, samples, tokenizer, args.tokens)
    violations = [max_violation(sum(layer)).item() for layer in loads if layer]
    row = {
        "perplexity": found, "max_vio": statistics.mean(violations) if violations else None,
        "worst_max_vio": max(violations, default=None),
    }  # fmt: skip
    shown = "  ".join(f"{domain} {value:.2f}" for domain, value in found.items())
    print(f"  {active}/{PARTS} {name:<28} {shown}  MaxVio {row['max_vio']}", flush=True)
    return row


def judged(
    forwards: list[Callable[..., Tensor]], model: Any, samples: dict[str, Any], tokenizer: Any, tokens: int
) -> dict[str, float]:
    """Perplexities by domain of the model whose FFNs compute so."""
    ffns = [layer.mlp for layer in model.model.layers]
    for ffn, forward in zip(ffns, forwards, strict=True):
        ffn.forward = forward
    found = perplexities(model, samples, tokenizer, tokens)
    for ffn in ffns:
        del ffn.forward
    return found


def perplexities(model: Any, samples: dict[str, Any], tokenizer: Any, tokens: int) -> dict[str, float]:
    """By domain."""
    return {domain: perplexity(model, its, tokenizer, tokens).perplexity for domain, its in samples.items()}


def measure(args: argparse.Namespace) -> dict[str, Any]:
    from transformers import AutoTokenizer

    folder = str(args.model or embedded_model())
    model, tokenizer = load(folder, torch.float32), AutoTokenizer.from_pretrained(folder)
    model.requires_grad_(False)
    samples = {
        domain: text_samples(source_of(domain, args.texts), "heldout", folder, 512, args.tokens) for domain in DOMAINS
    }
    dense = perplexities(model, samples, tokenizer, args.tokens)
    settings = {"calibration_tokens": args.calibration_tokens, "tokens": args.tokens, "parts": PARTS}
    rows = earlier_rows(args.json, settings)
    report = {**provenance(torch.device("cpu")), **settings, "dense_perplexity": dense, "rows": rows}
    for seed in args.seeds:
        of_seed = [row for row in rows if is_of(row, args.calibrate, args.heal) and row["seed"] == seed]
        there = {(row["active"], row["method"]) for row in of_seed}
        wanted = [(a, name) for a in args.active for name in args.methods if (a / PARTS, name) not in there]
        for row in run_seed(args, seed, wanted, model, samples, tokenizer):
            same = [row[key] for key in IDENTITY]
            rows[:] = [other for other in rows if [other[key] for key in IDENTITY] != same]
            rows.append(row | {"ratio": {domain: value / dense[domain] for domain, value in row["perplexity"].items()}})
            write_json(args.json, report)  # after each row: a run of hours may be cut short
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = [*PRUNED, *PARTITIONED, ORACLE]
    parser.add_argument("--model", type=Path, help="a dense Llama-like folder (default: the embedded SmolLM2)")
    parser.add_argument("--methods", nargs="+", choices=known, default=known)
    parser.add_argument(
        "--active",
        nargs="+",
        type=int,
        metavar="N",
        choices=range(1, PARTS + 1),
        default=[24, 16, 8],
        help="active parts",
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of the calibration text and the draws")
    parser.add_argument("--calibrate", choices=CALIBRATIONS, default="mixture", help="on these texts")
    parser.add_argument("--calibration-tokens", type=positive, default=65536)
    parser.add_argument("--tokens", type=positive, default=3072, help="held-out tokens of each domain")
    parser.add_argument("--heal", type=positive, default=0, metavar="N", help="then train on N tokens, and judge again")
    parser.add_argument("--quick", action="store_true", help="one seed, three methods, half the neurons, little text")
    parser.add_argument("--texts", type=work_folder, default=Path("artifacts/texts"), help="folder of the domains")
    parser.add_argument("--work", type=work_folder, help="folder for the calibration's streams")
    parser.add_argument("--json", type=Path, help="rows that it holds are not measured again")
    parser.add_argument("--picture", type=Path)
    args = parser.parse_args()
    if args.quick:
        quick = {"methods": [*QUICK], "active": [16], "seeds": [0], "calibration_tokens": 4096, "tokens": 1024}
        args = argparse.Namespace(**(vars(args) | quick))
    report = measure(args)
    show(report, args.calibrate)
    if args.heal:
        show(report, args.calibrate, args.heal)
    if args.picture:
        draw(report, args.calibrate, args.picture)


if __name__ == "__main__":
    main()
