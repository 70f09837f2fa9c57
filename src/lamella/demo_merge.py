"""Run: uv run lamella demo merge

Three fine-tunes of the embedded model, one for Python code, one for prose and one for C++ headers, are made and merged
into one stock Mixtral, with mergekit's gates and with better ones. On passages that nothing was fitted to: how many
tokens each router sends to the right expert, and the loss of every model. One table, one JSON report, one picture.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
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
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DOMAINS = ("code", "prose", "headers")
"""Python's standard library, Python's documentation, the C++ headers that torch brings."""
MODES = ("cheap_embed", "hidden", "ridge")
LR = 2e-4
WINDOW = 256
"""Tokens of a training window; two are a step."""
PASSAGE_CHARACTERS = 280
_TEXTS = {"code": "stdlib-code", "prose": "python-docs"}
OWN_NAMES = frozenset({MARK, "prompts", "models", *MODES, "routing.png", "report.json"})


@dataclass
class MergeDemo(Stages):
    """Where one demo writes, how much it does, and what has been measured so far."""

    out: Path
    steps: int
    """Of each fine-tune."""
    prompts: int
    """Of each domain, for the routers; a quarter as many held-out passages are measured on."""
    report: Json = field(default_factory=dict)
    console: Console = field(default_factory=Console)


def run_merge_demo(out: Path, *, steps: int = 12, prompts: int = 40) -> Json:
    """Do all of it under `out`, in place of an earlier demo; writes report.json and routing.png there.

    Raises:
        UserError: no embedded model; `out` holds something else; no step.
    """
    if steps < 1:
        raise UserError(f"{steps} training steps make no fine-tunes; ask for at least 1")
    begin_in(out, MARK, OWN_NAMES | {f"{mode}.calibration" for mode in MODES})
    began, demo = time.perf_counter(), MergeDemo(out, steps, prompts)
    demo.console.print(f"This takes about five minutes on two CPU cores. Everything is written to {out}.")
    with quiet_libraries():
        fine_tune(demo)
        merge(demo)
        measure(demo)
    demo.report["wall_s"] = time.perf_counter() - began
    draw(demo.report, out / "routing.png")
    (out / "report.json").write_text(json.dumps(demo.report, indent=1) + "\n")
    show(demo)
    return demo.report


def passages(domain: str, held_out: bool, count: int) -> list[str]:
    """Pieces of documents, of whole lines: one from the middle of each, then others where that is too few."""
    found: list[str] = []
    documents = list(_documents(domain, held_out))
    for place in (0.5, 0.25, 0.75, 0.1, 0.9):
        for text in documents:
            begin = text.find("\n", int(len(text) * place)) + 1
            piece = text[begin : begin + PASSAGE_CHARACTERS]
            if begin and len(piece.strip()) > PASSAGE_CHARACTERS * 3 // 4 and piece not in found:
                found.append(piece)
            if len(found) == count:
                return found
    raise UserError(f"the text of {domain} has {len(found)} passages of the {count} asked for; ask for fewer")


def _documents(domain: str, held_out: bool) -> Iterator[str]:
    if domain in _TEXTS:
        from lamella.data.sources import documents

        yield from documents(_TEXTS[domain], "heldout" if held_out else "train")
        return
    package = find_spec("torch")
    assert package is not None
    assert package.origin is not None
    folder = Path(package.origin).parent / "include" / "c10"
    for index, file in enumerate(sorted(folder.rglob("*.h"))):
        if (index % 4 == 3) == held_out:
            yield file.read_text(encoding="utf-8")


def fine_tune(demo: MergeDemo) -> None:
    """One model per domain: the FFNs learn, the rest stays the embedded model's."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from lamella.checkpoint.embedded import embedded_model

    tokenizer = AutoTokenizer.from_pretrained(embedded_model())
    for domain in DOMAINS:
        with demo.stage(f"fine-tune on {domain}: {demo.steps} steps of {2 * WINDOW} tokens"):
            model = AutoModelForCausalLM.from_pretrained(embedded_model(), dtype=torch.float32)
            losses = _train(model, _windows(domain, tokenizer, demo.steps), demo.steps)
            model.bfloat16().save_pretrained(demo.out / "models" / domain)
            tokenizer.save_pretrained(demo.out / "models" / domain)
        demo.report.setdefault("fine_tune", {})[domain] = {"first_loss": losses[0], "last_loss": losses[-1]}


def _windows(domain: str, tokenizer: PreTrainedTokenizerBase, steps: int) -> Tensor:
    """[2 * steps, WINDOW] of training documents, each beginning at its start."""
    import torch

    rows = []
    for text in _documents(domain, held_out=False):
        ids = tokenizer(text[: WINDOW * 8]).input_ids
        if len(ids) >= WINDOW:
            rows.append(ids[:WINDOW])
        if len(rows) == 2 * steps:
            return torch.tensor(rows)
    return torch.tensor((rows * (2 * steps))[: 2 * steps])


def _train(model: PreTrainedModel, ids_NL: Tensor, steps: int) -> list[float]:
    import torch

    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".mlp." in name)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LR, weight_decay=0.0)
    losses = []
    for step in range(steps):
        batch_BL = ids_NL[2 * step : 2 * step + 2]
        loss = model(batch_BL, labels=batch_BL, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def merge(demo: MergeDemo) -> None:
    """The same three models behind each kind of gates."""
    from lamella.checkpoint.embedded import embedded_model
    from lamella.conversion import convert
    from lamella.recipe.conversion import make_conversion

    folder = demo.out / "prompts"
    folder.mkdir()
    for domain in DOMAINS:
        lines = [json.dumps({"prompt": text}) for text in passages(domain, held_out=False, count=demo.prompts)]
        (folder / f"{domain}.jsonl").write_text("\n".join(lines) + "\n")
    experts = [
        {"source_model": str(demo.out / "models" / domain), "prompts_from": str(folder / f"{domain}.jsonl")}
        for domain in DOMAINS
    ]
    for mode in MODES:
        with demo.stage(f"merge into a Mixtral, gates {mode}"):
            values = {"method": "merge", "model": str(embedded_model()), "experts": experts, "gate_mode": mode}
            recipe = make_conversion(values | {"dtype": "bfloat16", "experts_per_token": 1})
            report = convert(recipe.model, demo.out / mode, recipe.options)
        demo.report.setdefault("merge", {})[mode] = {"wall_s": report.wall_s, "bytes": report.bytes_written}


def measure(demo: MergeDemo) -> None:
    """Routing and loss on held-out passages."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from lamella.checkpoint.embedded import embedded_model

    tokenizer = AutoTokenizer.from_pretrained(embedded_model())
    texts = {domain: passages(domain, held_out=True, count=max(4, demo.prompts // 4)) for domain in DOMAINS}
    places = {"base": embedded_model()} | {f"tuned on {domain}": demo.out / "models" / domain for domain in DOMAINS}
    places |= {mode: demo.out / mode for mode in MODES}
    with demo.stage(f"measure on {len(texts['code'])} held-out passages of each domain"):
        for name, folder in places.items():
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
            by_domain = [_passages_through(model, tokenizer, texts[domain], e) for e, domain in enumerate(DOMAINS)]
            nats = {domain: found[0] for domain, found in zip(DOMAINS, by_domain, strict=True)}
            demo.report.setdefault("nats", {})[name] = nats
            if name in MODES:
                layers = torch.stack([found[1] for found in by_domain]).mean(0)
                demo.report["merge"][name] |= {"accuracy": layers.mean().item(), "layers": layers.tolist()}


def _passages_through(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: list[str], expert: int
) -> tuple[float, Tensor]:
    """(nats per token, share of the tokens whose best expert is `expert` in each layer, [layers])"""
    import torch

    total, count = 0.0, 0
    right = []
    for text in texts:
        ids_1L = tokenizer((tokenizer.bos_token or "") + text, return_tensors="pt", add_special_tokens=False).input_ids
        routed = {"output_router_logits": True} if hasattr(model.config, "num_local_experts") else {}
        with torch.no_grad():
            out = model(ids_1L, use_cache=False, **routed)
        log_p = out.logits[0, :-1].log_softmax(-1).gather(1, ids_1L[0, 1:, None])
        total, count = total - log_p.sum().item(), count + len(log_p)
        if routed:
            right.append(torch.stack([logits[1:].argmax(-1) == expert for logits in out.router_logits]).float())
    return total / count, torch.cat(right, dim=1).mean(1) if right else torch.empty(0)


def draw(report: Json, path: Path) -> None:
    """Left, the routers' accuracy in each layer; right, the loss of every model on each domain."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.2), layout="constrained")
    for mode in MODES:
        left.plot(report["merge"][mode]["layers"], label=f"{mode} ({report['merge'][mode]['accuracy']:.0%})")
    left.axhline(1 / len(DOMAINS), color="grey", linestyle=":", label="chance")
    left.set(xlabel="layer", ylabel="tokens with the right expert first", ylim=(0, 1), title="Routing, held out")
    left.legend()
    names = list(report["nats"])
    for i, name in enumerate(names):
        places = [x + (i - len(names) / 2) * 0.11 for x in range(len(DOMAINS))]
        right.bar(places, [report["nats"][name][domain] for domain in DOMAINS], 0.11, label=name)
    right.set_xticks(range(len(DOMAINS)), DOMAINS)
    highest = max(nats for of_model in report["nats"].values() for nats in of_model.values())
    right.set(ylabel="nats per token", title="Loss, held out", ylim=(0, 1.35 * highest))  # room for the legend
    right.legend(fontsize=7, ncols=2)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def show(demo: MergeDemo) -> None:
    """The table."""
    report, table = demo.report, Table(title="lamella demo merge: three fine-tunes of SmolLM2-135M in one Mixtral")
    table.add_column("model")
    for domain in DOMAINS:
        table.add_column(f"{domain}, nats", justify="right")
    table.add_column("routed right", justify="right")
    for name, nats in report["nats"].items():
        accuracy = f"{report['merge'][name]['accuracy']:.1%}" if name in MODES else ""
        title = f"merged, gates {name}" + (" (mergekit's)" if name != "ridge" else "") if name in MODES else name
        table.add_row(title, *(f"{nats[domain]:.3f}" for domain in DOMAINS), accuracy)
    demo.console.print(table)
    gain = report["merge"]["ridge"]["accuracy"] - report["merge"]["hidden"]["accuracy"]
    demo.console.print(f"ridge routes {100 * gain:.1f} points more of the tokens right than mergekit's hidden.")
    demo.console.print(f"{demo.out / 'report.json'}, {demo.out / 'routing.png'}  ({report['wall_s']:.0f} s)")
