"""The NVIDIA GPUs of this machine as its files show them: known before torch is imported, and where torch sees none."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path

from lamella.errors import UserError

# CUDA's major version -> the oldest series of drivers that runs it (NVIDIA's CUDA compatibility table).
OLDEST_DRIVER = {"11": 450, "12": 525, "13": 580}
DEVICES = Path("/dev")
DRIVER = Path("/proc/driver/nvidia/version")


def visible_gpus(devices: Path = DEVICES, environment: Mapping[str, str] = os.environ) -> int:
    """The number of GPUs that this process may use: the machine's, or what CUDA_VISIBLE_DEVICES leaves of them."""
    present = sum(1 for device in devices.glob("nvidia*") if device.name.removeprefix("nvidia").isdigit())
    chosen = environment.get("CUDA_VISIBLE_DEVICES")
    if not present or chosen is None:
        return present
    count = 0
    for name in (part.strip() for part in chosen.split(",")):
        if not name or name.startswith("-"):  # CUDA ignores everything from the first such entry on
            break
        count += 1
    return count


def rank_environment(
    devices: Path = DEVICES, environment: Mapping[str, str] = os.environ, local: Path | None = None
) -> dict[str, str]:
    """What is added to a rank's environment before it imports torch; what is set already stays.

    Segments that can grow keep memory from being cut up by layers that are gathered and freed. Compiled kernels lie on
    the node's own disk: home folders are shared, and slow for many small files.

    Args:
        local: a folder of this node; None: the system's for temporary files.
    """
    folder = (local or Path(tempfile.gettempdir())) / f"lamella-{os.getuid()}"
    added = {"TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"), "TRITON_CACHE_DIR": str(folder / "triton")}
    if visible_gpus(devices, environment) and "PYTORCH_CUDA_ALLOC_CONF" not in environment:  # its older name
        added["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
    return {name: value for name, value in added.items() if name not in environment}


def driver_version(file: Path = DRIVER) -> str | None:
    """The version of the installed NVIDIA driver, such as "550.54.15"; None where none is loaded."""
    try:
        match = re.search(r"Kernel Module.*?\s(\d+\.\d+(?:\.\d+)?)\s", file.read_text(errors="replace"))
    except OSError:
        return None
    return match[1] if match else None


def check_seen(
    seen: int, torch_version: str, cuda: str | None, devices: Path = DEVICES, driver_file: Path = DRIVER
) -> None:
    """Refuse to go on without GPUs where there are some.

    Args:
        seen: GPUs that torch sees.
        cuda: the CUDA version that torch was built for, such as "13.0"; None for a build without CUDA.

    Raises:
        UserError: the machine has GPUs, none is hidden on purpose, and torch sees none.
    """
    count = visible_gpus(devices)
    if seen or not count:
        return
    if cuda is None:
        reason = f"torch {torch_version} is a build without CUDA; install the CUDA build"
    else:
        driver, oldest = driver_version(driver_file) or "unknown", OLDEST_DRIVER.get(cuda.split(".")[0])
        needed = f"a driver of series {oldest} or newer" if oldest else "a newer driver"
        reason = f"torch {torch_version} is built for CUDA {cuda} and needs {needed}; the driver here is {driver}"
    raise UserError(
        f"this machine has {count} NVIDIA GPUs, but torch sees none of them: {reason}. To train on the CPU all the "
        "same, set CUDA_VISIBLE_DEVICES to nothing"
    )
