"""Where jobs run: a table of executors, each behind the same small interface. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable

from lamella.service.executors.executor import Executor, Place
from lamella.service.executors.local import Local

EXECUTORS: dict[str, Callable[[Place], Executor]] = {"local": Local}
