"""benchmarks/gpu_day.py without a GPU: every part that needs none works, and the others say what they need."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from support.scripts import script_module

ROOT = Path(__file__).parents[2]
LEFT_OUT = {"kernel tests", "memory", "offload"}
PARTS = ("machine", "expert paths", "step, 1 layer", "step, 8 layers", "resume", "verify", "peers", *LEFT_OUT)


def gpu_day(*words: str, timeout: int = 300) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "benchmarks/gpu_day.py"), "--device", "cpu", "--tiny", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)


@pytest.mark.slow
def test_every_part_works_or_says_what_it_needs(tmp_path: Path) -> None:
    out = tmp_path / "day.json"
    parts = [name for name in PARTS if name != "step, 8 layers"]  # the program of one layer, and seconds more
    done = gpu_day("--only", *parts, "--json", str(out))
    assert done.returncode == 0, done.stdout + done.stderr
    found = {part["name"]: part for part in json.loads(out.read_text())["parts"]}
    assert {name for name, part in found.items() if part["state"] == "left out"} == LEFT_OUT
    assert all("needs a GPU" in found[name]["reason"] for name in LEFT_OUT)
    assert all(part["rows"] for name, part in found.items() if name not in LEFT_OUT)
    assert ["losses after the checkpoint", "equal bit for bit"] in found["resume"]["rows"]
    peers = {row[0]: row[1] for row in found["peers"]["rows"]}
    assert "x dense" in peers["torchtitan MoE"]
    assert "GPU" in peers["SonicMoE"]


def test_without_time_nothing_begins_and_all_is_named(tmp_path: Path) -> None:
    out = tmp_path / "day.json"
    done = gpu_day("--minutes", "0", "--json", str(out), timeout=60)
    assert done.returncode == 0, done.stderr
    assert {part["state"] for part in json.loads(out.read_text())["parts"]} == {"left out"}
    assert "no time left" in done.stdout


@pytest.fixture(scope="module")
def module() -> ModuleType:
    return script_module("gpu_day", "benchmarks")


@pytest.mark.parametrize(
    ("code", "state", "reason"),
    [
        ("import nowhere", "failed", "ModuleNotFoundError: No module named 'nowhere'"),
        ("print('bad figures'); raise SystemExit(3)", "failed", "bad figures"),
        ("import time; time.sleep(60)", "failed", "not done after 0 s"),
        ("pass", "failed", "it wrote no figures"),
        ("import sys; open(sys.argv[1], 'w').write('[[\"a\", \"1 s\"]]')", "passed", ""),
    ],
)
def test_what_becomes_of_a_part(code, state, reason, module, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(module, "LEAST_SECONDS", 0)
    part = module.Part("part", 60, lambda settings, out: ["-c", code, str(out)], lambda report: report)
    result = module.run(part, module.Settings("cpu", True, tmp_path), 0.4)
    assert (result.state, result.rows) == (state, [["a", "1 s"]] if state == "passed" else [])
    assert result.reason.startswith(reason)


def test_a_part_that_lacks_a_package_is_left_out(module, tmp_path) -> None:
    part = module.Part("part", 60, lambda *_: ["-c", "1"], lambda report: report, ("no_such_package",))
    result = module.run(part, module.Settings("cpu", True, tmp_path), 60)
    assert (result.state, result.reason) == ("left out", "needs no_such_package, which is not installed")
