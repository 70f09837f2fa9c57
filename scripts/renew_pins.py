"""Run: uv run --no-sync scripts/renew_pins.py

This script writes what `uv sync` installs into two files together: the exact versions as `constraint-dependencies`
in pyproject.toml, which uv obeys, and requirements.lock, which adds hashes. A package index that changes can then
change nothing that is installed.

To add a dependency, put its name and lower bound into `dependencies`, an extra or a group of pyproject.toml and run
the script without arguments: packages that have a pin keep it, new ones get one, and what nothing needs any more
loses it. Then run `uv sync`. Where the new package contradicts a pin, uv says which; free that one with
`--upgrade NAME`.

To renew all versions: `uv run --no-sync scripts/renew_pins.py --upgrade --exclude-newer 2027-01-15T00:00:00Z`.
"""

from __future__ import annotations

import argparse
import difflib
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[1]
EXPORT = ["uv", "export", "--quiet", "--format", "requirements.txt", "--frozen", "--all-groups", "--all-extras"]
BARE = ["--no-emit-project", "--no-annotate", "--no-header"]
REQUIREMENT = re.compile(
    r"^(?P<name>[\w.-]+)==(?P<version>[^\s;]+)(?: ; (?P<marker>[^\\\n]+?))?(?: \\)?$", re.MULTILINE
)
PINS = re.compile(r"^constraint-dependencies = \[\n(?:.*\n)*?\]\n", re.MULTILINE)
DATE = re.compile(r'^exclude-newer = "[^"]*"$', re.MULTILINE)
PYTHON = re.compile(r"python_(?:full_)?version [<>=!~]+ '[^']+'")


class PinError(ValueError):
    """What uv, or pyproject.toml, does not allow; the message says why."""


def pins_of(requirements: str) -> list[str]:
    """One constraint for each requirement line of `requirements`, a requirements.txt with exact versions.

    A name with one version is pinned everywhere. Where the version depends on the Python version, the constraint
    keeps that part of the line's marker. `[tool.uv] environments` says the platform once for all.
    """
    lines = [match.groupdict(default="") for match in REQUIREMENT.finditer(requirements)]
    versions = Counter(line["name"] for line in lines)
    pins = []
    for line in lines:
        pin = f"{line['name']}=={line['version']}"
        if versions[line["name"]] > 1:
            marker = " and ".join(PYTHON.findall(line["marker"]))
            if not marker or " or " in line["marker"]:
                raise PinError(f"two versions of {line['name']}, but not by Python version: {line['marker']}")
            pin += f" ; {marker}"
        pins.append(pin)
    return pins


def with_pins(pyproject: str, pins: list[str]) -> str:
    """The text of pyproject.toml with `pins` as all of its constraints; PinError where it has no block for them."""
    block = "".join(f'    "{pin}",\n' for pin in pins)
    text, count = PINS.subn(lambda _: f"constraint-dependencies = [\n{block}]\n", pyproject)
    if count != 1:
        raise PinError("pyproject.toml needs `constraint-dependencies = [` under [tool.uv], with a pin on each line")
    return text


def with_date(pyproject: str, date: str | None) -> str:
    """The text of pyproject.toml with another `exclude-newer`, or, for None, without any."""
    return DATE.sub("" if date is None else f'exclude-newer = "{date}"', pyproject)


def resolve(pyproject: str, *options: str) -> str:
    """The requirements.txt, with hashes and without addresses, that uv makes of a pyproject.toml from nothing else.

    `options` are further options of `uv lock`. Takes a few seconds and asks the package index.

    Raises:
        PinError: with uv's own words, when there is no solution or no index.
    """
    with tempfile.TemporaryDirectory(prefix="renew-pins-") as folder:
        (Path(folder) / "pyproject.toml").write_text(pyproject)
        for command in (["uv", "lock", "--quiet", *options], [*EXPORT, *BARE]):
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
            if done.returncode:
                raise PinError(done.stderr.strip())
    return done.stdout


def renewed(pyproject: str, free: list[str] | None) -> tuple[str, str]:
    """The new pyproject.toml and requirements.lock, both as text.

    Args:
        pyproject: the text of pyproject.toml, dependencies as they shall be, pins as they were.
        free: names whose pins are dropped before uv resolves; None drops all pins.
    """
    pins: list[str] = tomllib.loads(pyproject)["tool"]["uv"]["constraint-dependencies"]
    kept = [pin for pin in pins if free is not None and pin.partition("==")[0] not in free]
    requirements = resolve(with_pins(pyproject, kept))
    pinned = with_pins(pyproject, pins_of(requirements))
    if resolve(pinned) != requirements:
        raise PinError("uv resolves the new pins to something else than they were made of; nothing was written")
    return pinned, requirements


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    help_upgrade = "free these packages from their pins, or all packages if none is named"
    parser.add_argument("--upgrade", nargs="*", metavar="NAME", help=help_upgrade)
    parser.add_argument("--exclude-newer", metavar="DATE", help="write this date into pyproject.toml first")
    arguments = parser.parse_args()
    if shutil.which("uv") is None:
        sys.exit("renew_pins: uv is not on the PATH; `pip install uv`")
    before = (ROOT / "pyproject.toml").read_text()
    text = with_date(before, arguments.exclude_newer) if arguments.exclude_newer else before
    free = [] if arguments.upgrade is None else arguments.upgrade or None
    try:
        text, requirements = renewed(text, free)
    except PinError as error:
        sys.exit(f"renew_pins: {error}")
    changes = difflib.ndiff(before.splitlines(), text.splitlines())
    print(*(line for line in changes if line[0] in "+-"), sep="\n")
    (ROOT / "pyproject.toml").write_text(text)
    (ROOT / "requirements.lock").write_text(requirements)


if __name__ == "__main__":
    main()
