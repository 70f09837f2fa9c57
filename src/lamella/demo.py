"""Run: uv run lamella demo

The whole way on the embedded model: dense, convert, compare, train on 3 ranks (or the GPUs that are there), resume,
export; one table, one JSON report, one picture. Every figure is measured in this run.
"""

from __future__ import annotations

import json
import multiprocessing
import shutil
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from lamella.architecture.embedded import check_embedded_model
from lamella.display import Stages
from lamella.errors import UserError
from lamella.run.folder import RunDir
from lamella.run.gpus import visible_gpus
from lamella.run.launch import check_gpus
from lamella.run.store import LATEST

Report = dict[str, dict[str, Any]]
TEXT = "python-docs"


@dataclass
class Demo(Stages):
    """Folders and settings of one demo, and what has been measured so far."""

    out: Path
    ranks: int = 3
    steps: int = 12
    tokens: int = 2048
    """Tokens of held-out text for each perplexity."""
    report: Report = field(default_factory=dict)
    console: Console = field(default_factory=Console)

    moe = property(lambda self: self.out / "moe")
    run = property(lambda self: self.out / "run")
    resumed = property(lambda self: self.out / "run-resumed")
    exported = property(lambda self: self.out / "glm4-moe")


QUESTION = "What is the capital of France?"
MARK = ".lamella-demo"
"""Made first: names such as `run` may be in a folder of other work, too."""
OWN_NAMES = frozenset({MARK, "moe", "run", "run-resumed", "glm4-moe", "training.png", "report.json", ".report.json"})


RANKS = 3
"""Without a GPU, and at most: the 8 experts of a kind come out uneven then, which shows that they may."""


def default_ranks(gpus: int) -> int:
    """One for each GPU, up to RANKS; on 1, 2 or 3 ranks FSDP cuts the same model over what is there."""
    return min(gpus, RANKS) or RANKS


def check_arguments(out: Path, ranks: int, steps: int) -> None:
    """UserError for a demo that cannot be; a folder is replaced only if all it holds is a demo, broken off or not."""
    if steps < 2:
        raise UserError(f"{steps} training steps cannot be cut in two; ask for at least 2")
    if ranks < 1:
        raise UserError(f"{ranks} training processes cannot train; ask for at least 1")
    check_gpus(ranks)
    if out.exists() and not (out.is_dir() and _is_demo({path.name for path in out.iterdir()})):
        raise UserError(f"{out} holds something else than a demo; give another --out")


def _is_demo(names: set[str]) -> bool:
    """Whether a folder with these names holds nothing, or a demo; finished ones of earlier versions have no mark."""
    return not names or (names <= OWN_NAMES and (MARK in names or {"report.json", "training.png"} <= names))


def begin_in(out: Path, mark: str, own: frozenset[str]) -> None:
    """An empty folder with the mark of a story, in the place of an earlier one of it.

    Raises:
        UserError: no embedded model; a folder that holds more than the story's own names, or has no mark.
    """
    if out.exists():
        names = {path.name for path in out.iterdir()} if out.is_dir() else {""}
        if names and not (names <= own and mark in names):
            raise UserError(f"{out} holds something else than this demo; give another --out")
    check_embedded_model()
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    (out / mark).touch()


def run_demo(out: Path, *, ranks: int | None = None, steps: int = 12) -> Report:
    """Do all of it under `out`, in place of an earlier demo; writes report.json and training.png there.

    Args:
        ranks: None: see `default_ranks`.

    Raises:
        UserError: see `check_arguments`; or a stage refused its input.
    """
    ranks = default_ranks(visible_gpus()) if ranks is None else ranks
    check_arguments(out, ranks, steps)
    check_embedded_model()
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    (out / MARK).touch()
    began = time.perf_counter()
    demo = Demo(out, ranks, steps)
    demo.console.print(
        f"This takes about {expected_minutes(steps)} minutes on two CPU cores. Everything is written to {out}."
    )
    convert(demo)
    with quiet_libraries():
        compare(demo)
        train(demo)
        resume(demo)
        export(demo)
        answer(demo)
    demo.report["demo"] = {"wall_s": time.perf_counter() - began}
    draw(demo.run, out / "training.png")
    temporary = out / ".report.json"
    temporary.write_text(json.dumps(demo.report, indent=1) + "\n")
    temporary.rename(out / "report.json")
    show(demo)
    return demo.report


def expected_minutes(steps: int) -> int:
    """How long the demo takes on two cores, in whole minutes: measured with 12 steps (417 s) and with 20 (649 s)."""
    return max(1, round((69 + 29 * steps) / 60))


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Keep the bars and warnings of transformers, and Python's, out of the demo's own lines."""
    from transformers.utils import logging

    level, had_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        if had_bars:
            logging.enable_progress_bar()


def convert(demo: Demo) -> None:
    from lamella.checkpoint.embedded import embedded_model

    with demo.stage("the embedded model, SmolLM2-135M"):
        embedded_model()
    with demo.stage("convert: 8 frozen slices and 8 noisy copies per layer"), _fresh_process() as pool:
        # In a process of its own, so that the peak memory is the conversion's.
        result = pool.submit(_convert, demo.moe).result()
    demo.report["convert"] = result


def _convert(out: Path) -> dict[str, Any]:
    from lamella.conversion import convert, peak_rss_mib

    before = peak_rss_mib()
    result = convert(out=out)
    return {
        "wall_s": result.wall_s,
        "peak_rss_mib": result.peak_rss_mib,
        "peak_rss_over_imports_mib": result.peak_rss_mib - before,
        "bytes_written": result.bytes_written,
    }


@contextmanager
def _fresh_process() -> Iterator[ProcessPoolExecutor]:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield pool


def compare(demo: Demo) -> None:
    """Logits against the dense model's, and what random routing does to twin and to flat."""
    from transformers import AutoTokenizer

    from lamella.checkpoint.embedded import embedded_model
    from lamella.evaluate.checkpoints import open_checkpoint
    from lamella.evaluate.logit_match import logit_match
    from lamella.evaluate.perplexity import perplexity, text_samples
    from lamella.evaluate.routing_controls import routing_controls

    dense, moe = str(embedded_model()), str(demo.moe)
    with demo.stage("compare: logits and 64 greedy tokens with the dense model"):
        checks = [c for c in logit_match(dense, moe, tokens={"float32": 512}) if c.bound is not None]
    in_modes = [c for c in checks if c.what in ("dense", "routed")]
    demo.report["parity"] = {
        "max_abs_logit_diff": max(c.figure for c in in_modes if c.name == "max |logit difference|"),
        "max_abs_logit_diff_random_routing": max(
            c.figure for c in checks if c.name == "max |logit difference|" and c.what.startswith("random")
        ),
        "greedy_tokens_equal": int(min(c.figure for c in checks if c.name.startswith("greedy"))),
        "checks_passed": all(c.passed for c in checks),
    }
    with demo.stage("compare: perplexity, dense and under random routing"):
        samples, tokenizer = text_samples(TEXT, "heldout", moe, 512, None), AutoTokenizer.from_pretrained(moe)
        measured = perplexity(open_checkpoint(dense), samples, tokenizer, demo.tokens)
        controls = routing_controls(open_checkpoint(moe), samples, tokenizer, demo.tokens, measured.perplexity)
    demo.report["dense"] = {"perplexity": measured.perplexity, "tokens": measured.tokens}
    demo.report["routed"] = {"twin_ppl_ratio": controls.twin_ppl_ratio, "flat_ppl_ratio": controls.flat_ppl_ratio}


def train(demo: Demo) -> None:
    began = time.perf_counter()
    demo.console.print(f"train: {demo.ranks} ranks, {demo.steps} steps")
    _launch(demo, demo.run)
    lines = list(RunDir(demo.run).metrics())
    heldout = [line["heldout_loss"] for line in lines if line["heldout_loss"] is not None]
    with demo.stage("check: the frozen experts, bit for bit"):
        unchanged = frozen_unchanged(demo)
    demo.report["train"] = {
        "ranks": demo.ranks,
        "steps": lines[-1]["step"],
        "heldout_loss_before": heldout[0],
        "heldout_loss_after": heldout[-1],
        "tokens_per_s": lines[-1]["tokens_per_s"],
        "frozen_unchanged": unchanged,
        "wall_s": time.perf_counter() - began,
    }


def _launch(demo: Demo, out: Path) -> None:
    from lamella.run.launch import launch

    half = demo.steps // 2
    words = [f"model={demo.moe}", f"out={out}", f"steps={demo.steps}", f"save_every_steps={half}"]
    words += [f"samples_per_step={demo.ranks}", f"heldout_every_steps={half}", f"warmup_steps={min(3, half)}"]
    if code := launch(words, demo.ranks):
        raise UserError(f"the training ended with exit code {code}; {RunDir(out).log} says why")


def frozen_unchanged(demo: Demo) -> bool:
    """Whether every frozen tensor of the trained model has the hash that the conversion's manifest gives it."""
    from lamella.checkpoint.source import read_folder
    from lamella.export.trained import materialise

    manifest = json.loads((demo.moe / "lamella.json").read_text())["tensors"]
    trained = {name: tensor for name, tensor in read_folder(materialise(demo.run)).items() if ".frozen_" in name}
    assert trained
    return all(tensor.xxh3_128() == manifest[name]["xxh3_128"] for name, tensor in trained.items())


def resume(demo: Demo) -> None:
    """Continue a copy of the run from its middle checkpoint, in new processes; the losses must be the same bits."""
    half = demo.steps // 2
    once_more = f"steps {half + 1} to {demo.steps}" if half + 1 < demo.steps else f"step {demo.steps}"
    demo.console.print(f"resume: {once_more} once more, from the checkpoint, in new processes")
    _copy_as_stopped(demo, half)
    _launch(demo, demo.resumed)
    whole = {line["step"]: line["loss"] for line in RunDir(demo.run).metrics() if line["step"] > half}
    again = {line["step"]: line["loss"] for line in RunDir(demo.resumed).metrics() if line["step"] > half}
    demo.report["train"]["resume_bit_equal"] = whole == again and len(whole) == demo.steps - half
    shutil.rmtree(demo.resumed)


def _copy_as_stopped(demo: Demo, step: int) -> None:
    """The run as it was when it had saved this step, without what came later."""
    shutil.copytree(demo.run, demo.resumed, ignore=shutil.ignore_patterns("hf", f"step-{demo.steps}", "tensorboard"))
    copy = RunDir(demo.resumed)
    copy.write_status("stopped", step, demo.steps)
    copy.metrics_file.unlink()
    (copy.checkpoints / LATEST).write_text(f"{step}\n")


def export(demo: Demo) -> None:
    from lamella.export import export
    from lamella.export.trained import materialise

    with demo.stage("export: stock GLM4-MoE, reloaded in plain transformers"):
        result = export(materialise(demo.run), "glm4-moe", demo.exported)
    demo.report["export"] = {
        "architecture": result.architecture,
        "max_abs_logit_diff": result.max_abs_logit_diff,
        "bytes_written": result.bytes_written,
    }


def answer(demo: Demo) -> None:
    """Ask the exported model, which needs no code of lamella, a question in its chat template."""
    from lamella.generation import Generator
    from lamella.generation.sampling import Sampling

    with demo.stage("generate: the exported model answers a question"):
        generator = Generator.open(str(demo.exported))
        (answered,) = generator.generate([[{"role": "user", "content": QUESTION}]], Sampling(max_tokens=24))
    demo.report["answer"] = {
        "question": QUESTION, "answer": answered.text, "tokens_per_s": generator.counts.tokens_per_s,
    }  # fmt: skip


def draw(run: Path, path: Path) -> None:
    """The loss, and the share of the tokens that the twins get, over the steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    lines = list(RunDir(run).metrics())
    trained = [line for line in lines if line.get("loss") is not None]
    heldout = [line for line in lines if line["heldout_loss"] is not None]
    shared = [line for line in trained if line.get("twin_share")]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    left.plot([x["step"] for x in trained], [x["loss"] for x in trained], label="training")
    left.plot([x["step"] for x in heldout], [x["heldout_loss"] for x in heldout], "o-", label="held out")
    left.set(xlabel="optimizer step", ylabel="loss, nats per token", title="Loss")
    left.legend()
    steps = [x["step"] for x in shared]
    right.fill_between(
        steps, [min(x["twin_share"]) for x in shared], [max(x["twin_share"]) for x in shared], alpha=0.3,
        label="range over the layers",
    )  # fmt: skip
    right.plot(steps, [sum(x["twin_share"]) / len(x["twin_share"]) for x in shared], label="mean")
    right.set(xlabel="optimizer step", ylabel="share of the tokens", title="Twin share", ylim=(0, 1))
    right.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def show(demo: Demo) -> None:
    r = demo.report
    table = Table(title="lamella demo: SmolLM2-135M", title_justify="left")
    table.add_column("what")
    table.add_column("figure", justify="right")
    table.add_column("remark", style="dim")
    rows = [
        ("dense perplexity", f"{r['dense']['perplexity']:.2f}", f"{r['dense']['tokens']} tokens of {TEXT}"),
        ("conversion", f"{r['convert']['wall_s']:.1f} s", f"{r['convert']['bytes_written'] / 1e6:,.0f} MB"),
        ("  peak memory", f"{r['convert']['peak_rss_mib']:.0f} MiB", "of the whole process"),
        ("max |logit difference|", f"{r['parity']['max_abs_logit_diff']:.1e}", "to dense, fp32, as converted"),
        ("greedy tokens equal", f"{r['parity']['greedy_tokens_equal']} of 64", "also under random routing"),
        ("twin, random 50/50", f"{r['routed']['twin_ppl_ratio']:.4f}x", "dense perplexity, no noise"),
        ("flat, random 8 of 16", f"{r['routed']['flat_ppl_ratio']:,.1f}x", "dense perplexity, no noise"),
        ("held-out loss before", f"{r['train']['heldout_loss_before']:.4f}", "nats per token"),
        ("held-out loss after", f"{r['train']['heldout_loss_after']:.4f}",
         f"{r['train']['steps']} steps, {r['train']['ranks']} ranks, {r['train']['tokens_per_s']:.0f} tokens/s"),
        ("frozen experts unchanged", str(r["train"]["frozen_unchanged"]), "bit for bit"),
        ("resumed run equal", str(r["train"]["resume_bit_equal"]), "losses bit for bit"),
        ("exported", r["export"]["architecture"], f"max |logit difference| {r['export']['max_abs_logit_diff']:.1e}"),
    ]  # fmt: skip
    for row in rows:
        table.add_row(*row)
    demo.console.print(table)
    demo.console.print(f"{QUESTION}\n  {r['answer']['answer'].strip()}", markup=False)
    demo.console.print(f"{demo.out / 'report.json'}, {demo.out / 'training.png'}  ({r['demo']['wall_s']:.0f} s)")
