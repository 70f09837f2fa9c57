"""Servers that others make, started by `lamella serve-model`."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def served(path: Path, *words: str, wait_s: float = 240) -> Iterator[str]:
    """The server's URL while it runs."""
    port = free_port()
    command = [sys.executable, "-c", "from lamella.cli import main; main()", "serve-model", str(path)]
    process = subprocess.Popen([*command, "--port", str(port), *words], stderr=subprocess.PIPE, text=True)
    try:
        end = time.monotonic() + wait_s
        while True:
            assert process.poll() is None, process.stderr and process.stderr.read()[-2000:]
            assert time.monotonic() < end, "it does not answer"
            try:
                if httpx.get(f"http://127.0.0.1:{port}/health", timeout=5).status_code == 200:
                    break
            except httpx.TransportError:
                pass
            time.sleep(0.3)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
