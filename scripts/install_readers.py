"""Run: uv run --no-sync scripts/install_readers.py [NAME ...]

This script fetches what reads exports beside the project's own transformers, each into a folder of its own in lamella's
cache (or where $LAMELLA_TRANSFORMERS_4 and $LAMELLA_XLLAMACPP say), out of the way of the project's versions:
transformers 4.57 with what it needs in other versions (135 MB), xllamacpp, llama.cpp ready to run (102 MB), and what
transformers' own server needs beside the rest (12 MB). And mergekit (3 MB), the peer of method "merge", which runs on
the project's own torch and transformers.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from lamella.architecture.embedded import cache_dir

# Folder -> the variable that names another, and the packages; none of them brings its dependencies.
READERS = {
    "transformers-4.57": (
        "LAMELLA_TRANSFORMERS_4",
        ["transformers==4.57.6", "huggingface-hub==0.36.2", "tokenizers==0.22.2"],
    ),
    "transformers-serving": ("LAMELLA_TRANSFORMERS_SERVING", ["openai==2.54.0", "jiter==0.19.0"]),
    "mergekit": ("LAMELLA_MERGEKIT", ["mergekit==0.1.5", "immutables==0.21"]),
    "xllamacpp": ("LAMELLA_XLLAMACPP", ["xllamacpp==2026.10.11549"]),
}


def install(target: Path, packages: list[str]) -> None:
    """Into `target`, whole or not at all."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as temporary:
        made = Path(temporary) / "site"
        command = ["uv", "pip", "install", "--quiet", "--no-deps", "--python", sys.executable, "--target", str(made)]
        subprocess.run([*command, *packages], check=True, cwd=temporary)  # where the project's pins do not hold
        shutil.rmtree(target, ignore_errors=True)
        made.rename(target)


def main(names: list[str]) -> None:
    """Fetch what is not there, of all rows or of the named ones."""
    if unknown := set(names) - set(READERS):
        sys.exit(f"error: no reader {', '.join(sorted(unknown))}; there are {', '.join(READERS)}")
    for name, (variable, packages) in READERS.items():
        if names and name not in names:
            continue
        target = Path(os.environ.get(variable) or cache_dir() / name)
        if not target.is_dir():
            install(target, packages)
        print(f"{name}: {target}")


if __name__ == "__main__":
    main(sys.argv[1:])
