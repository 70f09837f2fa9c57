"""What `uv sync` installs is what is committed, whatever the package index offers."""

from __future__ import annotations

import re
import shutil
import tomllib
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

from support.scripts import script_module

ROOT = Path(__file__).parents[1]
PYPROJECT = (ROOT / "pyproject.toml").read_text()
COMMITTED = (ROOT / "requirements.lock").read_text()
HASH = re.compile(r"--hash=(sha256:[0-9a-f]{64})")
needs_uv = pytest.mark.skipif(shutil.which("uv") is None, reason="uv is not on the PATH")


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """scripts/renew_pins.py as a module; it is no part of the package."""
    return script_module("renew_pins")


def resolve_or_skip(script: ModuleType, pyproject: str, *options: str) -> str:
    """What uv makes of a pyproject.toml; the test is skipped where no index can be reached at all."""
    try:
        return script.resolve(pyproject, *options)
    except script.PinError as error:
        if "error sending request" in str(error):
            pytest.skip("no package index can be reached")
        raise


def packages(requirements: str) -> dict[str, set[str]]:
    """For each `name==version ; marker` of a requirements.txt, its hashes."""
    entries = re.split(r"\n(?=\S)", requirements.strip())
    return {entry.partition(" \\")[0]: set(HASH.findall(entry)) for entry in entries}


def test_every_committed_version_is_pinned(script: ModuleType) -> None:
    pins = tomllib.loads(PYPROJECT)["tool"]["uv"]["constraint-dependencies"]
    assert pins == script.pins_of(COMMITTED)
    assert len(packages(COMMITTED)) > 100
    assert all(packages(COMMITTED).values()), "a package without a hash"


def test_the_lock_holds_no_address() -> None:
    assert "://" not in COMMITTED


@pytest.mark.slow
@needs_uv
@pytest.mark.parametrize("dated", [True, False], ids=["exclude-newer", "no date"])
def test_uv_resolves_what_is_committed(script: ModuleType, dated: bool) -> None:
    """From pyproject.toml alone, as on a fresh machine. An index may add files to a release, but not replace one."""
    pyproject = PYPROJECT if dated else script.with_date(PYPROJECT, None)
    assert ("exclude-newer" in tomllib.loads(pyproject)["tool"]["uv"]) == dated
    resolved, committed = packages(resolve_or_skip(script, pyproject)), packages(COMMITTED)
    assert resolved.keys() == committed.keys()
    for package, hashes in committed.items():
        assert hashes <= resolved[package], package


def empty_wheel(folder: Path, name: str, version: str) -> None:
    """A wheel without any module, as an index would offer a new release."""
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")


@pytest.mark.slow
@needs_uv
def test_a_new_release_changes_nothing(script: ModuleType, tmp_path: Path) -> None:
    """certifi is needed by a dependency of a dependency; its new release here is taken only without the pin."""
    empty_wheel(tmp_path, "certifi", "9999.1")
    offered = ("--find-links", str(tmp_path))
    assert packages(resolve_or_skip(script, PYPROJECT, *offered)).keys() == packages(COMMITTED).keys()
    pins = [pin for pin in script.pins_of(COMMITTED) if not pin.startswith("certifi==")]
    unpinned = script.resolve(script.with_pins(PYPROJECT, pins), *offered)
    assert any(package.startswith("certifi==9999.1") for package in packages(unpinned))


@pytest.mark.slow
@needs_uv
def test_renewing_adds_what_is_missing_and_drops_what_is_not_needed(script: ModuleType) -> None:
    """From a project whose pins lack a package and have one too many, back to the committed files."""
    pins = [pin for pin in script.pins_of(COMMITTED) if not pin.startswith("pytest==")]
    stale = script.with_pins(PYPROJECT, [*pins, "flask==3.1.0"])
    resolve_or_skip(script, PYPROJECT)
    pyproject, requirements = script.renewed(stale, free=[])
    names = [re.split("==", pin)[0] for pin in script.pins_of(requirements)]
    assert names == [re.split("==", pin)[0] for pin in script.pins_of(COMMITTED)]
    others = [package for package in packages(requirements) if not package.startswith("pytest==")]
    assert others == [package for package in packages(COMMITTED) if not package.startswith("pytest==")]
    assert pyproject == script.with_pins(PYPROJECT, script.pins_of(requirements))


def test_a_version_for_each_python_keeps_its_marker(script: ModuleType) -> None:
    lock = """numpy==2.4.6 ; python_full_version < '3.12' and sys_platform == 'linux' \\
    --hash=sha256:00
numpy==2.5.4 ; python_full_version >= '3.12' and sys_platform == 'linux' \\
    --hash=sha256:11
torch==2.14.1 ; sys_platform == 'linux' \\
    --hash=sha256:22
"""
    assert script.pins_of(lock) == [
        "numpy==2.4.6 ; python_full_version < '3.12'",
        "numpy==2.5.4 ; python_full_version >= '3.12'",
        "torch==2.14.1",
    ]
    with pytest.raises(script.PinError, match="two versions of a, but not by Python version"):
        script.pins_of("a==1 ; sys_platform == 'linux'\na==2 ; sys_platform == 'darwin'\n")


@pytest.mark.slow
@needs_uv
def test_a_contradiction_is_told_in_the_words_of_uv(script: ModuleType) -> None:
    resolve_or_skip(script, PYPROJECT)
    with pytest.raises(script.PinError, match="certifi"):
        script.renewed(PYPROJECT.replace('"httpx>=0.27"', '"httpx>=0.27", "certifi<2026"'), free=[])
