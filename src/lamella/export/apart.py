"""Packages that may lie apart from the environment, out of the way of its versions, and yet be used."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path


def find_apart(package: str, variable: str, folder: str) -> str | None:
    """The folder to put on PYTHONPATH for a package: "" where Python finds it by itself, None where it is nowhere.

    Args:
        variable: an environment variable that may name the folder.
        folder: its name in lamella's cache, where `scripts/install_readers.py` puts it.
    """
    if importlib.util.find_spec(package) is not None:
        return ""
    from lamella.architecture.embedded import cache_dir

    place = Path(os.environ.get(variable) or cache_dir() / folder)
    return str(place) if (place / package / "__init__.py").is_file() else None


def path_with(folder: str) -> dict[str, str]:
    """The environment variables that make Python find packages in `folder`, too; none for ""."""
    before = os.environ.get("PYTHONPATH")
    return {"PYTHONPATH": os.pathsep.join([folder, *([before] if before else [])])} if folder else {}
