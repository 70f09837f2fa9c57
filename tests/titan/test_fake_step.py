"""A training step of Llama 3 8B on a GPU's path, without a GPU: it asks for no value, and takes the planned memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_a_step_waits_for_no_host_and_takes_the_memory_that_is_planned(tmp_path):
    words = ["--ranks", "3", "8", "--layers", "3", "--json", str(tmp_path / "rows.json")]
    script = ROOT / "benchmarks" / "fake_8b.py"
    done = subprocess.run([sys.executable, str(script), *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]  # a value that is asked for raises
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert [row["ranks"] for row in rows] == [3, 8]
    assert all(0.9 < row["over"] < 1.1 for row in rows), rows
