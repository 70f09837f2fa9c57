"""`lamella verify`, `lamella evaluate` and tests/moe_logit_match.py for people: progress, one table, a JSON report."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer
from transformers.utils import logging as transformers_logging

from lamella.architecture.embedded import EMBEDDED
from lamella.conversion import DEFAULT_OUT, SliceOptions, convert
from lamella.conversion.command import progress_bar
from lamella.data.sources import describe_source, open_source
from lamella.errors import UserError
from lamella.evaluate.checkpoints import check_json_path, model_path, open_checkpoint, write_json
from lamella.evaluate.logit_match import Check, logit_match
from lamella.evaluate.perplexity import Perplexity, evaluate, text_samples
from lamella.evaluate.routing_controls import routing_controls
from lamella.evaluate.served.measure import check_model
from lamella.installation import command

TWIN_RATIO_BOUND = 1.0005
FLAT_RATIO_BOUND = 10.0


def verify(
    dense: str | None,
    moe: str | None,
    *,
    data: str = "python-docs",
    tokens: int = 512,
    bf16_tokens: int = 256,
    seq_len: int = 256,
    ratios: bool = True,
    device: str = "auto",
    json_path: Path | None = None,
) -> bool:
    """The logit match, and with `ratios` the routing controls; prints a table. True if every check passes.

    Args:
        dense, moe: None: the embedded model, and its conversion in artifacts/moe, made if it is missing.
    """
    check_json_path(json_path)
    if min(tokens, bf16_tokens) < seq_len or seq_len < 64:
        raise UserError(
            f"{tokens} and {bf16_tokens} tokens in windows of {seq_len}: take windows of 64 or more, and a whole one"
        )
    dense_name, moe_name = dense or EMBEDDED, _conversion(dense, moe)
    _quiet_transformers()
    counts = {"float32": tokens, "bfloat16": bf16_tokens}
    with Console(stderr=True).status("starting") as status:
        on_step = status.update
        checks = logit_match(
            dense_name, moe_name, data=data, tokens=counts, seq_len=seq_len, device=device, on_step=on_step
        )
        if ratios and any(check.what.startswith("random") for check in checks):
            on_step("routing controls")
            checks += _ratio_checks(moe_name, data, tokens, seq_len, device)
    passed = all(check.passed for check in checks)
    _console().print(_check_table(checks))
    print(f"{moe_name} {'matches' if passed else 'does NOT match'} {dense_name}")
    if json_path is not None:
        report = {"dense": dense_name, "moe": moe_name, "data": data, "tokens": counts, "passed": passed}
        write_json(json_path, report | {"checks": [check.to_dict() for check in checks]})
    return passed


def evaluate_and_print(folder: str, json_path: Path | None, **options: Any) -> None:
    """See `lamella.evaluate.perplexity.evaluate`; prints a table."""
    check_json_path(json_path)
    _quiet_transformers()
    check_model(folder)  # what is wrong with it is the only thing said
    if data := options.get("data"):
        print(describe_source(open_source(data)), file=sys.stderr)
    with Console(stderr=True).status(f"evaluating {folder}"):
        results = evaluate(folder, **options)
    names = {"model": folder, "dense": options.get("dense") or ""}
    _console().print(_perplexity_table({names[key]: result for key, result in results.items()}))
    if json_path is not None:
        write_json(json_path, {"folder": folder} | options | {key: asdict(result) for key, result in results.items()})


def _conversion(dense: str | None, moe: str | None) -> str:
    """The MoE to verify; the default one is made here if nobody has made it yet."""
    if moe is not None:
        return moe
    if not (DEFAULT_OUT / "config.json").exists():
        source = "the embedded model" if dense is None else dense
        print(
            f"{DEFAULT_OUT} is missing; making it from {source}, as `{command('lamella convert')}` does",
            file=sys.stderr,
        )
        with progress_bar("Converting") as display:
            model = None if dense in (None, EMBEDDED) else model_path(dense)
            convert(model, DEFAULT_OUT, SliceOptions(), on_plan=display.on_plan, on_bytes=display.on_bytes)
    return str(DEFAULT_OUT)


def _ratio_checks(moe_name: str, data: str, tokens: int, seq_len: int, device: str) -> list[Check]:
    samples = text_samples(data, "heldout", model_path(moe_name), seq_len, None)
    model = open_checkpoint(moe_name, "float32", device)
    controls = routing_controls(model, samples, AutoTokenizer.from_pretrained(model_path(moe_name)), tokens)
    what, name = "experts by chance, no noise", "perplexity over dense"
    return [
        Check("float32", f"{what}: twin", name, controls.twin_ppl_ratio, TWIN_RATIO_BOUND, reason="every slice once"),
        Check("float32", f"{what}: flat", name, controls.flat_ppl_ratio, reason="slices missing: what twin avoids"),
    ]


def _check_table(checks: list[Check]) -> Table:
    table = Table(title="Logit match: the MoE against the dense model")
    for column in ("dtype", "what", "measure"):
        table.add_column(column)
    for column in ("figure", "bound"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("verdict")
    table.add_column("because")
    for check in checks:
        bound = "" if check.bound is None else f"{'>=' if check.at_least else '<='} {check.bound:.5g}"
        verdict = "" if check.bound is None else "[green]pass" if check.passed else "[bold red]FAIL"
        table.add_row(check.dtype, check.what, check.name, f"{check.figure:.6g}", bound, verdict, check.reason)
    return table


def _perplexity_table(results: dict[str, Perplexity]) -> Table:
    table = Table(title="Perplexity")
    table.add_column("model")
    for column in ("nats per token", "perplexity", "bits per byte", "tokens", "bytes", "s"):
        table.add_column(column, justify="right")
    for name, r in results.items():
        figures = (f"{r.nats_per_token:.5f}", f"{r.perplexity:.4f}", f"{r.bits_per_byte:.5f}")
        table.add_row(name, *figures, f"{r.tokens:,}", f"{r.bytes:,}", f"{r.wall_s:.1f}")
    return table


def _console() -> Console:
    """Wide where the output is no terminal: a log should not be wrapped at 80 columns."""
    console = Console()
    return console if console.is_terminal else Console(width=160)


def _quiet_transformers() -> None:
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
