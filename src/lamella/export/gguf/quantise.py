"""K-quants by llama.cpp's own `llama-quantize`, which no Python package can compute.

It keeps routers and their biases in F32 by itself, and takes a wider type where rows are no whole number of blocks.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from lamella.errors import UserError

TOOL = "llama-quantize"
VARIABLE = "LAMELLA_LLAMA_QUANTIZE"
K_QUANTS = (
    "Q2_K", "Q3_K_S", "Q3_K_M", "Q3_K_L", "Q4_K_S", "Q4_K_M", "Q5_K_S", "Q5_K_M", "Q6_K", "IQ4_NL", "IQ4_XS",
)  # fmt: skip
TIMEOUT_S = 24 * 3600


def find_tool() -> str | None:
    """Where $LAMELLA_LLAMA_QUANTIZE, the PATH or lamella's cache has the tool; None where it is not installed."""
    from lamella.architecture.embedded import cache_dir

    cached = cache_dir() / "llama-quantize/bin" / TOOL
    return os.environ.get(VARIABLE) or shutil.which(TOOL) or (str(cached) if cached.is_file() else None)


def require_tool(dtype: str) -> str:
    """The tool; UserError that says what is missing."""
    tool = find_tool()
    if tool is None or shutil.which(tool) is None:
        missing = f"{tool}, which ${VARIABLE} names, is no program" if tool else f"{TOOL} is not on the PATH"
        raise UserError(
            f"{dtype} is made by llama.cpp's {TOOL}, and {missing}; install llama.cpp or say where the tool is in "
            f"${VARIABLE}, or take Q8_0 or Q4_0"
        )
    return tool


def run_tool(tool: str, source: Path, target: Path, dtype: str) -> None:
    """Make `target` of `source`; UserError with the tool's own words where it fails."""
    words = [tool, str(source), str(target), dtype, os.environ.get("OMP_NUM_THREADS") or str(os.cpu_count() or 1)]
    done = subprocess.run(words, capture_output=True, text=True, errors="replace", timeout=TIMEOUT_S)
    if done.returncode or not target.is_file():
        said = [line.strip() for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        errors = [line for line in said if "error" in line.lower() or "fail" in line.lower()] or said[-1:]
        raise UserError(f"{tool} made no {dtype} of the model: {errors[0] if errors else 'it ended without a word'}")
