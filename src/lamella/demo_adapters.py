"""Run: uv run lamella demo adapters

Two domains on the embedded model, prose and the C++ headers that torch brings. One adapter learns both texts for most
of the time, one for each domain goes on from it, both become experts, routers are trained; beside them one adapter of
the same total rank that learned both texts from as many tokens, at the same pace. One table, one JSON report, one
picture; every figure is measured in this run, on text that nothing was trained on.
"""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from lamella.demo import MARK, begin_in, quiet_libraries
from lamella.display import Stages
from lamella.errors import UserError
from lamella.jsons import Json

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lamella.train.adapter_steps import Pace

DOMAINS = {"headers": "headers.jsonl", "docs": "python-docs"}
"""name -> source of text; the first is written by the demo."""
RANK = 16
"""Of each domain's adapter; the one that learns all texts has the sum."""
SAMPLES_PER_STEP, SEQ_LEN = 2, 256
LR, ROUTER_LR, MIXED_SHARE = 2e-3, 3e-3, 0.25
"""Of adapters; of routers; and the share of their rate at which adapters train along with routers."""
OWN_NAMES = frozenset(
    {MARK, *DOMAINS, "headers.jsonl", "common", "all", "mix", "mix-all", "routed", "experts.png", "report.json"}
)
MOST_WORSE = 0.02
"""Nats per token by which the mix may be worse on a domain than that domain's own adapter."""


@dataclass
class AdaptersDemo(Stages):
    """Where one demo writes, how long it trains, and what has been measured so far."""

    out: Path
    steps: int
    """Twice as many for the common beginning, half as many for each domain's adapter, a quarter for routers."""
    tokens: int
    """Held-out tokens of each domain."""
    questions: int
    """Of each domain."""
    seed: int = 0
    lr: float = LR
    """Of all adapters."""
    nats: dict[str, dict[str, float]] = field(default_factory=dict)
    """model -> domain -> nats per token."""
    report: Json = field(default_factory=dict)
    console: Console = field(default_factory=Console)


def run_adapters_demo(
    out: Path, *, steps: int = 60, tokens: int = 4096, questions: int = 12, seed: int = 0, lr: float = LR
) -> Json:
    """Do all of it under `out`, in place of an earlier demo; writes report.json and experts.png there.

    Raises:
        UserError: no embedded model; `out` holds something else; fewer than two steps.
    """
    if steps < 2:
        raise UserError(f"{steps} training steps teach no router; ask for at least 2")
    begin_in(out, MARK, OWN_NAMES)
    began, demo = time.perf_counter(), AdaptersDemo(out, steps, tokens, questions, seed, lr)
    write_headers(out / DOMAINS["headers"])
    with quiet_libraries():
        learn(demo)
        make_experts(demo)
        measure(demo)
        answer(demo)
    judge(demo)
    demo.report |= {
        "nats": demo.nats,
        "steps": steps,
        "tokens": tokens,
        "seed": seed,
        "lr": lr,
        "wall_s": time.perf_counter() - began,
    }
    (out / "report.json").write_text(json.dumps(demo.report, indent=1) + "\n")
    show(demo)
    return demo.report


def write_headers(file: Path) -> None:
    """The C++ headers of torch that people wrote, a record each."""
    package = find_spec("torch")
    assert package is not None
    assert package.origin is not None
    folder = Path(package.origin).parent / "include"
    headers = [header for part in ("c10", "torch") for header in sorted((folder / part).rglob("*.h"))]
    texts = (header.read_text(encoding="utf-8") for header in headers)
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts if text.strip()))


def _sources(demo: AdaptersDemo) -> dict[str, str]:
    """name -> source of text."""
    return DOMAINS | {"headers": str(demo.out / DOMAINS["headers"])}


def learn(demo: AdaptersDemo) -> None:
    """An adapter of each domain, and one of all of them with the mix's total rank and tokens."""
    from lamella.train.adapters import learn_adapter

    sources, many = _sources(demo), len(DOMAINS)
    texts, common = [*sources.values()], demo.out / "common"
    first, own = _common_steps(demo), _own_steps(demo)
    with demo.stage(f"learn the beginning: rank {RANK}, {first} steps of every text"):
        pace = _pace(demo, first, demo.lr, falls=False)
        learn_adapter("embedded", texts, common, rank=RANK, alpha=2 * RANK, pace=pace)
    for name, source in sources.items():
        with demo.stage(f"learn {name} from there: {own} steps on {DOMAINS[name]}"):
            pace = _pace(demo, own, demo.lr, read_steps=first / many)
            learn_adapter("embedded", [source], demo.out / name, rank=RANK, alpha=2 * RANK, pace=pace, start=common)
    steps, rank = first + own * many + _router_steps(demo), RANK * many
    with demo.stage(f"learn all: rank {rank}, {steps} steps of every text"):
        pace = _pace(demo, steps, demo.lr)
        learn_adapter("embedded", texts, demo.out / "all", rank=rank, alpha=2 * rank, pace=pace)


def _common_steps(demo: AdaptersDemo) -> int:
    return 2 * demo.steps


def _own_steps(demo: AdaptersDemo) -> int:
    return demo.steps // 2


def _router_steps(demo: AdaptersDemo) -> int:
    return max(1, demo.steps // 4)


def _pace(demo: AdaptersDemo, steps: int, lr: float, read_steps: float = 0.0, falls: bool = True) -> Pace:
    """The pace of steps whose texts were read before, each by this many steps."""
    from lamella.train.adapter_steps import Pace

    skip = math.ceil(read_steps * SAMPLES_PER_STEP)
    return Pace(steps, lr, SAMPLES_PER_STEP, SEQ_LEN, demo.seed, skip, falls)


def make_experts(demo: AdaptersDemo) -> None:
    """Adapters into experts, whose untrained routers leave the dense model's bits; then the routers are trained."""
    from lamella.checkpoint.embedded import embedded_model
    from lamella.conversion import convert
    from lamella.recipe.methods.adapters import AdaptersOptions
    from lamella.train.adapters import train_routers

    with demo.stage("make experts of the adapters; compare with the dense model, bit for bit"):
        folders = tuple(str(demo.out / name) for name in DOMAINS)
        convert(None, demo.out / "mix", AdaptersOptions(adapters=folders))
        convert(None, demo.out / "mix-all", AdaptersOptions(adapters=(str(demo.out / "all"),)))
        demo.report["zero_expert_is_dense"] = _same_logits(str(embedded_model()), str(demo.out / "mix"))
    steps = _router_steps(demo)
    with demo.stage(f"train routers, and adapters along with them: {steps} steps"):
        pace = _pace(demo, steps, ROUTER_LR, read_steps=_common_steps(demo) / len(DOMAINS) + _own_steps(demo))
        data: dict[str, str | None] = {source: name for name, source in _sources(demo).items()}
        mix, routed = str(demo.out / "mix"), demo.out / "routed"
        train_routers(mix, data, routed, target="router_mlp", pace=pace, adapter_lr=MIXED_SHARE * demo.lr)


def _same_logits(dense: str, mix: str) -> bool:
    import torch

    from lamella.evaluate.checkpoints import open_checkpoint
    from lamella.evaluate.perplexity import text_samples

    ids_L = text_samples(DOMAINS["docs"], "heldout", dense, SEQ_LEN, None).sample(0).input_ids_L
    with torch.inference_mode():
        logits = [open_checkpoint(name)(ids_L[None], use_cache=False).logits for name in (dense, mix)]
    return torch.equal(*logits)


def measure(demo: AdaptersDemo) -> None:
    """Nats per held-out token of every model on every domain."""
    from lamella.evaluate.checkpoints import open_checkpoint
    from lamella.train.adapters import training_dtype

    with demo.stage(f"measure on {demo.tokens} held-out tokens of each domain"):
        dtype = training_dtype("auto", "cpu") or "auto"
        learned = open_checkpoint(demo.out / "mix", dtype)
        for index, name in enumerate([*DOMAINS, "dense"]):  # the zero expert is the last
            demo.nats[name] = _nats(demo, learned, index)
        demo.nats["mix"] = _nats(demo, open_checkpoint(demo.out / "routed", dtype), None)
        demo.nats["all"] = _nats(demo, open_checkpoint(demo.out / "mix-all", dtype), 0)


def _nats(demo: AdaptersDemo, model: PreTrainedModel, adapter: int | None) -> dict[str, float]:
    from transformers import AutoTokenizer

    from lamella.evaluate.perplexity import perplexity, text_samples

    folder, found = str(demo.out / "mix"), {}
    model.computing.adapter = adapter  # type: ignore[union-attr]
    for name, source in _sources(demo).items():
        samples = text_samples(source, "heldout", folder, SEQ_LEN, None)
        result = perplexity(model, samples, AutoTokenizer.from_pretrained(folder), demo.tokens)
        found[name] = result.nats_per_token
    return found


def answer(demo: AdaptersDemo) -> None:
    """Multiple choice on both domains, and which experts they use."""
    from lamella.evaluate.choice.continuations import continuations
    from lamella.evaluate.choice.evaluate import evaluate_task
    from lamella.evaluate.choice.expert_use import draw_expert_use

    mix = str(demo.out / "routed")
    with demo.stage(f"answer {demo.questions} questions of each domain: which passage follows?"):
        names = {source: name for name, source in _sources(demo).items()}
        asked = continuations(tuple(names), demo.questions)
        questions = [question._replace(domain=names[question.domain]) for question in asked]
        results = evaluate_task(mix, questions, beside=[f"{mix}@zero"])
    demo.report["acc"] = {
        model: {domain: figures.acc for domain, figures in results[key].domains.items()}
        for model, key in {"mix": mix, "dense": f"{mix}@zero"}.items()
    }
    draw_expert_use(results[mix].expert_use, demo.out / "experts.png", f"Experts: {', '.join(DOMAINS)}, zero")


def judge(demo: AdaptersDemo) -> None:
    """What was to be reached, and whether it was."""
    nats, domains = demo.nats, list(DOMAINS)
    worse = {domain: nats["mix"][domain] - nats[domain][domain] for domain in domains}
    better = {domain: nats["all"][domain] - nats["mix"][domain] for domain in domains}
    demo.report |= {
        "worse_than_own_adapter": worse,
        "within_bound_of_own_adapter": max(worse.values()) <= MOST_WORSE,
        "better_than_all_by": better,
        "better_than_one_adapter_of_all": min(better.values()) > 0,
    }


def show(demo: AdaptersDemo) -> None:
    """Print the table."""
    table = Table(title="lamella demo adapters: SmolLM2-135M, nats per held-out token", title_justify="left")
    table.add_column("model")
    for name, source in DOMAINS.items():
        table.add_column(f"{name} ({source})", justify="right")
    labels = {
        "dense": "dense, the zero expert", **{name: f"adapter {name}, rank {RANK}" for name in DOMAINS},
        "all": f"one adapter of all, rank {RANK * len(DOMAINS)}", "mix": "both as experts, routed",
    }  # fmt: skip
    for name, label in labels.items():
        table.add_row(label, *(f"{demo.nats[name][domain]:.4f}" for domain in DOMAINS))
    demo.console.print(table)
    report = demo.report
    demo.console.print(f"untrained routers: the dense model's logits, bit for bit: {report['zero_expert_is_dense']}")
    worse = ", ".join(f"{domain} {difference:+.4f}" for domain, difference in report["worse_than_own_adapter"].items())
    demo.console.print(f"mix against each domain's own adapter: {worse} nats (bound {MOST_WORSE})")
    better = ", ".join(f"{domain} {difference:+.4f}" for domain, difference in report["better_than_all_by"].items())
    demo.console.print(f"mix better than one adapter of all: {report['better_than_one_adapter_of_all']}, by {better}")
    demo.console.print(f"questions answered, acc: {report['acc']}")
    demo.console.print(f"{demo.out / 'report.json'}, {demo.out / 'experts.png'}  ({report['wall_s']:.0f} s)")
