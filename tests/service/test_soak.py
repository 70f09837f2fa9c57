"""kill -9 of server, supervisors and commands, 20 of the 500 of benchmarks/soak.py."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.faults]
SOAK = Path(__file__).parents[2] / "benchmarks" / "soak.py"


def test_no_run_is_lost_doubled_or_orphaned(tmp_path: Path) -> None:
    out = tmp_path / "soak.json"
    command = [sys.executable, SOAK, "--kills", "20", "--seed", "1", "--out", out]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(out.read_text())
    assert sum(report["kills"].values()) >= 20
    assert "server" in report["kills"]
    assert set(report["kills"]) & {"supervisor", "command", "rank of a training"}  # whichever lived when its turn came
    assert report["attempts"] > sum(report["runs"].values()) > 3
