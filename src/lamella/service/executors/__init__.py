"""Where jobs run: a table of executors, each behind the same small interface. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable

from lamella.service.executors.executor import Executor, Place
from lamella.service.executors.kubernetes import Kubernetes
from lamella.service.executors.local import Local
from lamella.service.executors.skypilot import SkyPilot
from lamella.service.executors.slurm import Slurm

EXECUTORS: dict[str, Callable[[Place], Executor]] = {
    "local": Local, "slurm": Slurm, "kubernetes": Kubernetes, "skypilot": SkyPilot,
}  # fmt: skip
