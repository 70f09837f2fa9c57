"""`lamella data prepare` and `lamella data show` for people."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from lamella.data.prepare import UNIT_BYTES, Done, prepare, renderer
from lamella.data.prepared import read_manifest
from lamella.data.readers import BadRecords, Policy
from lamella.data.sources import describe_source, open_source, records
from lamella.data.tokenizer import DocumentTokenizer
from lamella.errors import UserError

LINE_EVERY_S = 10.0
BEGIN, END = "\u27e6", "\u27e7"  # white square brackets, which texts hardly have
SHOWN_CHARS = 4000


def run_prepare(
    sources: list[str],
    model: str,
    out: Path,
    *,
    workers: int | None = None,
    shard_mb: int | None = None,
    on_bad_data: Policy = "fail",
    overwrite: bool = False,
) -> None:
    """Prepare, and say what was made and how to train on it."""
    opened = [open_source(source) for source in sources]
    for source in opened:
        print(describe_source(source), flush=True)
    num_bytes = sum(source.num_bytes for source in opened)
    unit_bytes = UNIT_BYTES if shard_mb is None else shard_mb << 20
    workers = workers or len(os.sched_getaffinity(0))
    with PrepareProgress(num_bytes) as progress:
        prepare(
            sources, model, out, workers=workers, unit_bytes=unit_bytes, on_bad_data=on_bad_data, overwrite=overwrite,
            report=progress.show,
        )  # fmt: skip
    print(summary(out))


def run_show(source: str, model: str, *, count: int = 1) -> None:
    """Print the first records as they are learned: what lies between the marks is, all else is context."""
    opened = open_source(source)
    print(describe_source(opened))
    tokenizer = DocumentTokenizer(model)
    render, shown = renderer(tokenizer, model), 0
    for record in records(opened, BadRecords()):
        if record.is_blank:
            continue
        text = render(record, "all")
        (tokens,) = tokenizer.encoder([text])
        learned = len(tokens.ids) if tokens.learned is None else int(tokens.learned.sum())
        print(f"\n{record.where}: {len(tokens.ids):,} tokens, {learned:,} of them learned (between {BEGIN} and {END})")
        print(marked(tokenizer.encoder.marked(text)))
        shown += 1
        if shown == count:
            return
    if not shown:
        raise UserError(f"{source} holds no text; use another source")


def marked(parts: list[tuple[str, bool]]) -> str:
    """The text with marks around what is learned; long stretches lose their middle."""
    return "".join(f"{BEGIN}{shortened(part)}{END}" if learned else shortened(part) for part, learned in parts)


def shortened(text: str) -> str:
    cut = len(text) - SHOWN_CHARS
    half = SHOWN_CHARS // 2
    return text if cut <= 0 else f"{text[:half]}[... {cut:,} characters ...]{text[-half:]}"


def summary(out: Path) -> str:
    manifest = read_manifest(out)
    lines = [f"{out}: {manifest.num_tokens():,} tokens in {len(manifest.shards(None))} shards"]
    for split in ("train", "heldout"):
        shards = manifest.shards(split)  # type: ignore[arg-type]
        documents = sum(entry.num_documents for entry in shards)
        lines.append(f"  {split}: {sum(e.num_tokens for e in shards):,} tokens of {documents:,} documents")
    lines += [f"  {manifest.left_out}"] if manifest.left_out else []
    return "\n".join([*lines, f"Train on it with data=[{out}]"])


class PrepareProgress:
    """A live bar on a terminal, a line now and then elsewhere: tokens, tokens/s, the time left where it is known."""

    def __init__(self, num_bytes: int):
        self.num_bytes = num_bytes
        self.started = self.last_line = time.monotonic()
        self.before = 0
        """Bytes read past, because an earlier call tokenised them."""
        console = Console(stderr=True)
        columns = (TextColumn("prepare"), BarColumn(), TextColumn("{task.description}"))
        self.bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self.task = self.bar.add_task("", total=num_bytes or None)

    def __enter__(self) -> PrepareProgress:
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def show(self, done: Done) -> None:
        if done.num_tokens == 0:  # the clock starts behind what an earlier call did
            self.started, self.before = time.monotonic(), done.num_bytes
        if not self.bar.disable:
            self.bar.update(self.task, completed=done.num_bytes, description=self.text(done))
        elif time.monotonic() - self.last_line >= LINE_EVERY_S:
            self.last_line = time.monotonic()
            print(self.text(done), file=sys.stderr, flush=True)

    def text(self, done: Done) -> str:
        """'shard 3  48,200,000 tokens  412,000 tokens/s  ETA 3:05'"""
        from lamella.display import duration

        seconds = time.monotonic() - self.started
        parts = [f"shard {done.unit}", f"{done.num_tokens:,} tokens"]
        if seconds > 0 and done.num_tokens:
            parts.append(f"{done.num_tokens / seconds:,.0f} tokens/s")
        progressed = done.num_bytes - self.before
        if self.num_bytes > done.num_bytes and progressed > 0:
            parts.append(f"ETA {duration(seconds / progressed * (self.num_bytes - done.num_bytes))}")
        return "  ".join(parts)
