"""Progress for people: of training, a live bar on a terminal and plain lines elsewhere; of a demo, its stages."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bar


def duration(seconds: float) -> str:
    """'3:05' or '2:03:05'."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02}:{s:02}" if hours else f"{m}:{s:02}"


class Stages:
    """What a demo does, stage by stage, on its console."""

    console: Console

    @contextmanager
    def stage(self, title: str) -> Iterator[None]:
        """Say what is being done, and how long it took."""
        began = time.perf_counter()
        with self.console.status(title):
            yield
        self.console.print(f"[green]✓[/] {title} [dim]{time.perf_counter() - began:.0f} s[/]")


class TrainingProgress:
    """Shows metric lines. `stream` is where people look, not the log; None shows nothing (ranks other than 0)."""

    def __init__(self, stream: TextIO | None, first_step: int, steps: int):
        self.stream, self.steps = stream, steps
        self.first_step, self.started = first_step, time.monotonic()
        self.heldout_loss: float | None = None
        self.bar: Bar | None = None
        if stream is not None and stream.isatty():
            columns = (TextColumn("train"), BarColumn(), TextColumn("{task.description}"))
            self.bar = Bar(*columns, console=Console(file=stream))
            self.task = self.bar.add_task("", total=steps, completed=first_step)
            self.bar.start()

    def show(self, line: dict[str, Any]) -> None:
        if line["heldout_loss"] is not None:
            self.heldout_loss = line["heldout_loss"]
        if self.bar is not None:
            self.bar.update(self.task, completed=line["step"], description=self.text(line))
        else:
            self.say(self.text(line))

    def text(self, line: dict[str, Any]) -> str:
        """'step 12/60  loss 2.345  held-out 2.401  1,234 tokens/s  twins 48%  ETA 3:05'"""
        parts = [f"step {line['step']}/{self.steps}"]
        if "loss" in line:
            parts.append(f"loss {line['loss']:.3f}")
        if self.heldout_loss is not None:
            parts.append(f"held-out {self.heldout_loss:.3f}")
        if "tokens_per_s" in line:
            parts.append(f"{line['tokens_per_s']:,.0f} tokens/s")
        if line.get("twin_share"):
            parts.append(f"twins {sum(line['twin_share']) / len(line['twin_share']):.0%}")
        done = line["step"] - self.first_step
        if done > 0 and line["step"] < self.steps:
            parts.append(f"ETA {duration((time.monotonic() - self.started) / done * (self.steps - line['step']))}")
        return "  ".join(parts)

    def say(self, text: str) -> None:
        if self.bar is not None:
            self.bar.console.print(text)
        elif self.stream is not None:
            print(text, file=self.stream, flush=True)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.stop()
