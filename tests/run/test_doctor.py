"""`lamella doctor` finds what is there, and says what to do about what is not."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from lamella.run import doctor
from lamella.run.doctor import examine

pytestmark = pytest.mark.slow


def test_this_machine_is_examined(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "lamella.cli", "doctor", str(tmp_path), "--json"], capture_output=True, text=True
    )
    found = {line["what"]: line for line in json.loads(done.stdout)}
    assert found["torch"]["state"] == found["libraries"]["state"] == "ok"
    assert "torch" not in done.stderr
    free = shutil.disk_usage(tmp_path).free
    assert (found["disk"]["state"] == "ok") == (free >= doctor.SPACE)
    assert done.returncode == int(any(line["state"] == "wrong" for line in found.values()))


def test_what_is_wrong_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "SPACE", 1 << 60)
    monkeypatch.setattr(doctor, "SHARED_MEMORY", 1 << 60)
    monkeypatch.setattr(doctor, "_ASK_TORCH", "import no_such_library")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        monkeypatch.setattr(doctor, "PORT", taken.getsockname()[1])
        found = {finding.what: finding for finding in examine(tmp_path / "not" / "there")}
    assert found["disk"].state == "wrong"
    assert "--shm-size" in found["/dev/shm"].said
    assert "no_such_library" in found["torch"].said
    assert "uv sync" in found["torch"].said
    assert "--port" in found["port"].said
