"""Faults on demand, for tests: LAMELLA_FAULT='kill:rank=1,step=10,attempt=0; slow:rank=0,seconds=0.2'.

Off unless the variable is set. Every fault names its kind, and where it strikes: `rank` (default 0), `step` (a number,
or from-to), `attempt` (default: each). Kinds:

kill            SIGKILL to this rank            signal   `signal` (default TERM) to this rank
kill-agent      SIGKILL to torchrun             signal-agent  the same to torchrun
kill-in-save    SIGKILL after this rank has written its part of a checkpoint, before the commit
disk-full       files of this rank cannot grow past 4 KiB while it saves (EFBIG, as a full disk's ENOSPC)
hang            sleeps for an hour              slow     `seconds` more for each batch
slow-save       `seconds` more for a checkpoint, before the commit
raise           a ValueError                    oom      torch's out-of-memory error
nan-loss        the model's output is NaN       inf-grad its gradient is infinite
damage          flips a bit of a shard in the newest checkpoint (of a local folder)
cut-file        `file` loses its second half
"""

from __future__ import annotations

import os
import resource
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor, nn

from lamella.run.failure import attempt_number
from lamella.run.store import CheckpointStore

VARIABLE = "LAMELLA_FAULT"


@dataclass(frozen=True)
class Planned:
    """One fault that the variable asks for."""

    kind: str
    where: dict[str, str] = field(default_factory=dict)

    def strikes(self, step: int) -> bool:
        """Whether it strikes this rank, in this attempt, at this step."""
        rank, attempt = os.environ.get("RANK", "0"), str(attempt_number())
        first, _, last = self.where.get("step", "0-999999999").partition("-")
        return (
            self.where.get("rank", "0") == rank
            and self.where.get("attempt", attempt) == attempt
            and int(first) <= step <= int(last or first)
        )


def planned(kind: str, step: int) -> Planned | None:
    """The fault of this kind that strikes this rank in this step."""
    for text in os.environ.get(VARIABLE, "").split(";"):
        name, _, settings = text.strip().partition(":")
        if name == kind:
            fault = Planned(kind, dict(word.split("=", 1) for word in settings.split(",") if word))
            if fault.strikes(step):
                return fault
    return None


def before_step(step: int, model: nn.Module, store: CheckpointStore) -> None:
    """Strike at the start of an optimizer step, where a fault is planned; every rank calls it."""
    if VARIABLE not in os.environ:
        return
    if planned("damage", step):
        _damage(Path(store.path(store.steps()[-1])) / "__0_0.distcp")
    for kind, strike in AT_STEP.items():
        if fault := planned(kind, step):
            strike(fault)
    for kind in ("nan-loss", "inf-grad"):
        if planned(kind, step):
            _poison(model, kind)


def before_batch(step: int) -> None:
    """Strike before a batch is fetched, where a fault is planned."""
    if fault := planned("slow", step):
        time.sleep(float(fault.where["seconds"]))


@contextmanager
def during_save(step: int) -> Iterator[None]:
    """Round the writing of this rank's part of a checkpoint."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if planned("disk-full", step):
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    if fault := planned("slow-save", step):
        time.sleep(float(fault.where["seconds"]))
    if planned("kill-in-save", step):
        os.kill(os.getpid(), signal.SIGKILL)


def _poison(model: nn.Module, kind: str) -> None:
    """Damage one forward pass; its backward carries the damage to every trained tensor."""

    def damage(module: nn.Module, inputs: object, output: Tensor) -> Tensor:
        handle.remove()
        if kind == "nan-loss":
            return output * float("nan")
        output.register_hook(lambda gradient: gradient * float("inf"))
        return output

    handle = model.register_forward_hook(damage)


def _damage(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def _raise(fault: Planned) -> None:
    raise ValueError("fault on demand")


def _out_of_memory(fault: Planned) -> None:
    import torch

    raise torch.OutOfMemoryError("fault on demand")


def _signal(fault: Planned) -> signal.Signals:
    return signal.Signals[f"SIG{fault.where.get('signal', 'TERM')}"]


AT_STEP = {
    "kill": lambda fault: os.kill(os.getpid(), signal.SIGKILL),
    "kill-agent": lambda fault: os.kill(os.getppid(), signal.SIGKILL),
    "signal": lambda fault: os.kill(os.getpid(), _signal(fault)),
    "signal-agent": lambda fault: os.kill(os.getppid(), _signal(fault)),
    "hang": lambda fault: time.sleep(3600),
    "raise": _raise,
    "cut-file": lambda fault: os.truncate(fault.where["file"], os.path.getsize(fault.where["file"]) // 2),
    "oom": _out_of_memory,
}
