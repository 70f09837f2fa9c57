"""Processes of a training run: signals that ask to stop, and that none outlives its parent (Linux). No torch."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import TypeAlias

import psutil

PR_SET_PDEATHSIG = 1  # prctl.h
# In the environment of everything that one attempt starts.
LAUNCH_ID = "LAMELLA_LAUNCH_ID"


class StopRequest:
    """SIGTERM or SIGUSR1. They end a process that has nothing to save yet; a trainer looks after each step."""

    def __init__(self) -> None:
        self.asked = False

    def exit(self) -> None:
        """Make a signal an exception from here on: half-written folders are removed."""
        if self.asked:
            sys.exit(128 + signal.SIGTERM)
        _handle(lambda number, _: sys.exit(128 + number))

    def die(self) -> None:
        """Make a signal end the process from here on: nothing is to be removed, and it may wait where Python's handlers
        do not run."""
        _handle(signal.SIG_DFL)

    def listen(self) -> None:
        """Only remember a signal from here on."""
        _handle(self._ask)

    def _ask(self, *_: object) -> None:
        self.asked = True


Handler: TypeAlias = Callable[[int, FrameType | None], object] | signal.Handlers


def _handle(handler: Handler) -> None:
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, handler)


def die_with_parent(parent: int | None = None) -> None:
    """Have the kernel kill this process when its parent ends, however that ends.

    Args:
        parent: its expected id; this process ends at once if it is gone already. None: whoever it is now, which in
            a container may be process 1.
    """
    expected = os.getppid() if parent is None else parent
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is None:
        return
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != expected:
        os.kill(os.getpid(), signal.SIGKILL)


def kill_launch(launch_id: str, variable: str = LAUNCH_ID) -> int:
    """SIGKILL what still runs of an attempt, whoever its parent is by now; returns how many there were.

    Args:
        variable: of the environment, by which its processes are known.
    """
    left = [p for p in psutil.process_iter() if p.pid != os.getpid() and _launch_id(p, variable) == launch_id]
    for process in left:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(left, timeout=10)
    return len(left)


def _launch_id(process: psutil.Process, variable: str) -> str | None:
    try:
        return process.environ().get(variable)
    except psutil.Error:  # ended meanwhile, or another user's
        return None
