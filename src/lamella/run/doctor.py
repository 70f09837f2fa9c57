"""`lamella doctor`: what this machine has of what lamella needs, and what to do about what is missing.

torch is asked in a process of its own, which may fail or hang without harm. Imports no torch.
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Literal, NamedTuple

import psutil

from lamella.architecture.embedded import cache_dir, check_embedded_model
from lamella.errors import UserError
from lamella.installation import unfit_libraries
from lamella.jsons import Json
from lamella.run.gpus import check_seen, driver_version, visible_gpus

State = Literal["ok", "missing", "wrong"]
SPACE = 20 << 30
"""A checkpoint of a 1B model with its moments takes about 12 GB; less room than this is worth a word."""
SHARED_MEMORY = 1 << 30
"""NCCL and data workers pass buffers through /dev/shm; containers often have 64 MB."""
PORT = 7420
TORCH_S = 120
EXTRAS = {
    "service": ("fastapi", "lamella serve"), "serve": ("xllamacpp", "GGUF files checked and served by llama.cpp"),
    "tasks": ("lm_eval", "lamella evaluate --task with tasks of lm-evaluation-harness"),
    "hopper": ("quack", "one more expert path on Hopper GPUs"),
}  # fmt: skip
CLUSTERS = {"sbatch": "Slurm", "kubectl": "Kubernetes", "sky": "SkyPilot"}
_ASK_TORCH = """
import json, torch
nccl = torch.cuda.nccl.version() if torch.cuda.is_available() else None
names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
print(json.dumps([torch.__version__, torch.version.cuda, names, nccl]))
"""


class Finding(NamedTuple):
    """One line of the report."""

    what: str
    state: State
    """ok; missing: something optional is not there; wrong: lamella will not work as it should."""
    said: str
    """What was found, and for missing and wrong what to do."""


def examine(folder: Path) -> Iterator[Finding]:
    """Look at everything, the quick things first.

    Args:
        folder: where models and run directories are to be written.
    """
    yield _python()
    yield _libraries()
    yield _memory()
    yield _space("disk", folder)
    yield _space("cache", cache_dir())
    yield _shared_memory()
    yield _compiler()
    yield _port()
    yield _embedded()
    yield from _torch()
    for extra, (module, use) in EXTRAS.items():
        there = importlib.util.find_spec(module) is not None
        told = f"{module} is installed" if there else f"for {use}, install lamella[{extra}]"
        yield Finding(f"extra {extra}", "ok" if there else "missing", told)
    for program, name in CLUSTERS.items():
        path = shutil.which(program)
        yield Finding(name, "ok" if path else "missing", path or f"{program} is not on the PATH; jobs run here")


def _python() -> Finding:
    return Finding("lamella", "ok", f"{metadata.version('lamella')} on Python {platform.python_version()}")


def _libraries() -> Finding:
    unfit = unfit_libraries()
    if unfit:
        return Finding("libraries", "wrong", "; ".join(unfit) + "; call `uv sync`, or install lamella again")
    return Finding("libraries", "ok", "all as lamella needs them")


def _memory() -> Finding:
    memory, cores = psutil.virtual_memory(), len(os.sched_getaffinity(0))
    return Finding("machine", "ok", f"{cores} cores, {_gib(memory.available)} of {_gib(memory.total)} memory free")


def _space(what: str, folder: Path) -> Finding:
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    if not os.access(there, os.W_OK):
        return Finding(what, "wrong", f"{there} cannot be written; choose another folder")
    if free < SPACE:
        return Finding(what, "wrong", f"{_gib(free)} free in {there}; a small model's checkpoints need {_gib(SPACE)}")
    return Finding(what, "ok", f"{_gib(free)} free in {there}")


def _shared_memory() -> Finding:
    folder = Path("/dev/shm")
    total = shutil.disk_usage(folder).total if folder.is_dir() else 0
    if total < SHARED_MEMORY:
        return Finding("/dev/shm", "wrong", f"{_gib(total)}; give the container more, such as --shm-size=8g")
    return Finding("/dev/shm", "ok", _gib(total))


def _compiler() -> Finding:
    found = shutil.which("gcc") or shutil.which("cc")
    if found is None and visible_gpus():
        return Finding("gcc", "wrong", "none; Triton compiles with it: apt-get install gcc")
    return Finding("gcc", "ok" if found else "missing", found or "none; only GPUs need it")


def _port() -> Finding:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", PORT))
        except OSError:
            return Finding("port", "missing", f"{PORT} is in use, perhaps by `lamella serve`; else pass it --port")
    return Finding("port", "ok", f"{PORT} is free for `lamella serve`")


def _embedded() -> Finding:
    try:
        check_embedded_model()
    except UserError as error:
        return Finding("embedded model", "missing", str(error))
    return Finding("embedded model", "ok", "SmolLM2-135M, for the demo")


def _torch() -> Iterator[Finding]:
    """What torch sees, beside what the machine has."""
    command = [sys.executable, "-c", _ASK_TORCH]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=TORCH_S, check=True)
        values: Json = dict(zip(("torch", "cuda", "gpus", "nccl"), json.loads(answer.stdout), strict=True))
    except (subprocess.SubprocessError, ValueError) as error:
        last = (getattr(error, "stderr", "") or str(error)).strip().splitlines()[-1]
        yield Finding("torch", "wrong", f"cannot be used: {last}; call `uv sync`, or install torch again")
        return
    yield Finding("torch", "ok", f"{values['torch']}, built for CUDA {values['cuda'] or 'none'}")
    try:
        check_seen(len(values["gpus"]), values["torch"], values["cuda"])
    except UserError as error:
        yield Finding("GPUs", "wrong", str(error))
        return
    if not values["gpus"]:
        yield Finding("GPUs", "missing", "none; everything runs on the CPU, slowly")
        return
    nccl = ".".join(map(str, values["nccl"]))
    yield Finding("GPUs", "ok", f"{', '.join(values['gpus'])}; driver {driver_version()}, NCCL {nccl}")


def _gib(count: int) -> str:
    return f"{count / 2**30:.1f} GiB"
