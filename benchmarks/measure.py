"""What the benchmarks share: interleaved timing, peak memory, the table and the JSON file with its provenance."""

from __future__ import annotations

import argparse
import ctypes
import json
import platform
import statistics
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def wait_for_ranks(device: torch.device) -> None:
    """The device's work is done, on every rank where there are several."""
    synchronise(device)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()


def interleaved_seconds(
    steps: dict[str, Callable[[], None]], repeats: int, device: torch.device
) -> dict[str, list[float]]:
    """Wall seconds of every step, one of each per round, so that a slow moment of the machine hits all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        step()  # warm-up
    for _ in range(repeats):
        for name, step in steps.items():
            wait_for_ranks(device)
            start = time.perf_counter()
            step()
            wait_for_ranks(device)
            seconds[name].append(time.perf_counter() - start)
    return seconds


class _LiveBytes(TorchDispatchMode):
    """Counts the bytes of live tensor storages made inside; what a kernel takes and frees by itself is not seen."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self.live: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self.outside: set[int] = set()
        """Storages that were there before: a view of a weight is nothing new."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in torch.utils._pytree.tree_leaves((args, kwargs)):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self.live:
                self.outside.add(tensor.untyped_storage()._cdata)
        result = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        self.peak = max(self.peak, self._live_bytes())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self.live and key not in self.outside:
            self.live[key] = weakref.ref(storage, lambda _: self.live.pop(key))

    def _live_bytes(self) -> int:
        """Their sizes now: a storage may have been resized, to nothing, too."""
        storages = [reference() for reference in self.live.values()]
        return sum(storage.nbytes() for storage in storages if storage is not None)


def peak_bytes(step: Callable[[], None], device: torch.device) -> int:
    """Most bytes held at once beyond what was there before: activations, gradients, workspaces."""
    if device.type == "cuda":
        synchronise(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        synchronise(device)
        return torch.cuda.max_memory_allocated(device) - before
    with _LiveBytes() as counter:
        step()
    return counter.peak


def peak_resident_bytes(step: Callable[[], None], device: torch.device) -> int:
    """As `peak_bytes`, but on a CPU by the process's resident memory (Linux): it sees FSDP's buffers, too."""
    if device.type == "cuda":
        return peak_bytes(step, device)
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    before = _status_bytes("VmRSS")
    step()
    return _status_bytes("VmHWM") - before


def _status_bytes(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def provenance(device: torch.device) -> dict[str, Any]:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "CPU"
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "commit": commit.stdout.strip() or None,
    }


def median_spread(values: list[float]) -> tuple[float, float]:
    """(median, half of the range over the median)."""
    middle = statistics.median(values)
    return middle, (max(values) - min(values)) / 2 / middle


def print_table(title: str, header: list[str], rows: list[list[str]]) -> None:
    widths = [max(len(line[i]) for line in [header, *rows]) for i in range(len(header))]
    print(f"\n{title}")
    for line in [header, *rows]:
        print(
            "  ".join(
                cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))
            )
        )


def earlier_rows(path: Path | None, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of a JSON file that a benchmark of the same settings wrote; none where there is no file."""
    if path is None or not path.exists() or not path.stat().st_size:
        return []
    report = json.loads(path.read_text())
    if any(report.get(key) != value for key, value in settings.items()):
        sys.exit(f"error: {path} holds runs of other {', '.join(settings)}; give another --json, or remove it")
    return report["rows"]


@contextmanager
def figure(path: Path, num_plots: int) -> Iterator[list[Any]]:
    """Plots, two beside each other, with one scale upwards; legends where there are none, and the file, at the end."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    columns = min(2, num_plots)
    rows = -(-num_plots // columns)
    size: dict[str, Any] = {"figsize": (7 * columns, 5.5 * rows), "layout": "constrained"}
    drawn, grid = plt.subplots(rows, columns, squeeze=False, sharey=True, **size)
    plots = list(grid.flat)[:num_plots]
    for unused in list(grid.flat)[num_plots:]:
        unused.remove()
    yield plots
    for plot in plots:
        if plot.get_legend() is None:
            plot.legend(loc="best")
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn.savefig(path, dpi=130)


def positive(text: str) -> int:
    """A count as argparse reads it."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of at least 1")
    return int(text)


def work_folder(text: str) -> Path:
    """For argparse: a folder, made where it is missing."""
    try:
        Path(text).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{text} cannot be made: {error.strerror}") from None
    return Path(text)


def write_json(path: Path | None, content: Any) -> None:
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=1) + "\n")
