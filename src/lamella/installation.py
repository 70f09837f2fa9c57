"""What this installation of lamella is: the files it ships, how its command is called, and whether its libraries fit.

A checkout and an installed wheel hold the same `launch/` folder inside the package. Imports no torch.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path, PurePosixPath

from lamella.errors import UserError

LAUNCH = Path(__file__).parent / "launch"
"""Recipes of conversions and trainings, and the script for Slurm; in a checkout `launch` at the top is a link to it."""


def shipped(pattern: str) -> list[str]:
    """The names, `launch/FOLDER/NAME`, of the shipped files that match a pattern such as `recipes/*.yaml`; sorted."""
    return sorted(f"launch/{path.relative_to(LAUNCH).as_posix()}" for path in LAUNCH.glob(pattern))


def find_file(name: str | Path) -> Path:
    """The file `name`, or, where there is none, the file that lamella ships under that name (`launch/...`).

    A name that is neither is given back as it is; the caller says what is missing.
    """
    path = Path(name)
    try:
        exists = path.exists()
    except OSError as error:  # longer than a name of a file can be
        raise UserError(f"{str(name)[:80]} is not the name of a file: {error.strerror}") from None
    if exists or path.parts[:1] != ("launch",) or ".." in path.parts:
        return path
    own = LAUNCH.joinpath(*PurePosixPath(path).parts[1:])
    return own if own.is_file() else path


def command(words: str) -> str:
    """`words` as a person types them here: with `uv run` in front where lamella itself was started so."""
    return f"uv run {words}" if "UV_RUN_RECURSION_DEPTH" in os.environ else words


def unfit_libraries() -> list[str]:
    """What lamella requires and this environment lacks or has in another version, one line each.

    Extras are left out; they say themselves what is missing. Empty, too, where lamella runs uninstalled.
    """
    from packaging.requirements import Requirement

    try:
        requirements = [Requirement(line) for line in metadata.requires("lamella") or []]
    except metadata.PackageNotFoundError:
        return []
    lines = []
    for requirement in requirements:
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            lines.append(f"{requirement.name} is missing; lamella needs {requirement}")
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            lines.append(f"{requirement.name} {version} is installed; lamella needs {requirement}")
    return lines


@contextmanager
def unfit_libraries_told() -> Iterator[None]:
    """Turn an error inside that a missing library or another version of it explains into one UserError.

    Another version of torch or torchtitan mostly shows as one of these errors; all others pass as they are.
    """
    try:
        yield
    except (ImportError, AttributeError, TypeError) as error:
        if unfit := unfit_libraries():
            remedy = "install lamella again with pip, or call `uv sync` in a checkout"
            raise UserError(f"{'; '.join(unfit)}; {remedy} ({type(error).__name__}: {error})") from error
        raise
