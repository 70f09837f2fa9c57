"""Tests of CPUs see no GPU, on any machine; tests of GPUs run beside them in a process that does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lamella.run.gpus import visible_gpus

TESTS = Path(__file__).parent


def test_no_gpu_is_seen_here_or_in_processes_of_a_test() -> None:
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""
    assert not torch.cuda.is_available()
    code = "import os; print(repr(os.environ['CUDA_VISIBLE_DEVICES']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "''\n"


@pytest.mark.gpu
def test_gpus_are_seen_where_they_are_asked_for() -> None:
    assert torch.cuda.is_available()


@pytest.mark.parametrize(("mark", "expected"), [("gpu", "0,2"), ("not slow", ""), ("", ""), ("gpu or slow", "")])
def test_the_users_choice_of_gpus_reaches_the_gpu_tests_alone(
    mark: str, expected: str, machine_environment: dict[str, str], tmp_path: Path
) -> None:
    """A machine with GPUs is not needed: what a test's process is told is looked at."""
    (tmp_path / "conftest.py").symlink_to(TESTS / "conftest.py")
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n    gpu\n    slow\n")
    code = "import os, pytest\n@pytest.mark.gpu\ndef test_a(): show('gpu')\ndef test_b(): show('cpu')\n"
    code += "def show(name): print(f'{name} sees {os.environ[\"CUDA_VISIBLE_DEVICES\"]!r}')\n"
    (tmp_path / "test_devices.py").write_text(code)
    command = [sys.executable, "-m", "pytest", "-q", "-s", "-p", "no:cacheprovider", "-m", mark]
    environment = machine_environment | {"CUDA_VISIBLE_DEVICES": "0,2", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert ("gpu sees" in done.stdout) == (mark == "gpu"), done.stdout
    assert ("cpu sees" in done.stdout) == (mark in ("", "not slow")), done.stdout
    if "sees" in done.stdout:
        assert f"sees {expected!r}" in done.stdout


@pytest.mark.slow
def test_the_gpu_tests_pass(machine_environment: dict[str, str]) -> None:
    """On a machine with GPUs, in a process that sees them."""
    if visible_gpus(environment=machine_environment) == 0:
        pytest.skip("needs a GPU")
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", str(TESTS)]
    done = subprocess.run(command, cwd=TESTS.parent, env=machine_environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
