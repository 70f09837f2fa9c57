"""Let torchtitan run where there is no accelerator. The package `lamella.titan` calls `install` when it is imported.

`torchtitan.tools.utils` asks torch once, when imported, which accelerator there is, and takes "cuda" for none. Here it
is answered "cpu" during that import and given `torch.cpu` with the few calls it lacks.
"""

from __future__ import annotations

import resource
import types
from collections.abc import Callable

import psutil
import torch

from lamella.titan.seams import accelerator_answer


def _cpu_memory_stats(device: object = None) -> dict[str, int]:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts KiB
    return {"active_bytes.all.peak": peak, "reserved_bytes.all.peak": peak, "num_alloc_retries": 0, "num_ooms": 0}


def cpu_device_module() -> types.ModuleType:
    """`torch.cpu` plus what torchtitan calls on a device module. Memory is the process's resident set, in bytes."""
    module = types.ModuleType("lamella_cpu_device")
    vars(module).update({name: getattr(torch.cpu, name) for name in dir(torch.cpu) if not name.startswith("__")})
    properties = types.SimpleNamespace(name="CPU", total_memory=psutil.virtual_memory().total)
    calls: dict[str, Callable[..., object]] = {
        "current_device": lambda: 0,  # torch.cpu answers "cpu"; torchtitan wants an index
        "get_device_name": lambda device=None: properties.name,
        "get_device_properties": lambda device=None: properties,
        "memory_stats": _cpu_memory_stats,
        "reset_peak_memory_stats": lambda device=None: None,
        "empty_cache": lambda: None,
    }
    vars(module).update(calls)
    return module


def install() -> None:
    """Import `torchtitan.tools.utils` with the answer "cpu", unless there is an accelerator."""
    if torch.accelerator.is_available():
        return
    with accelerator_answer("cpu", cpu_device_module()):
        import torchtitan.tools.utils  # noqa: F401
