"""Answers of libraries that take long to import, kept on the disk: the same question then costs a file's reading.

What is asked, and which versions of the libraries are here, are the file's name; so an answer never outlives either.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import xxhash

from lamella.architecture.embedded import cache_dir

LIBRARIES = ("transformers", "tokenizers", "huggingface_hub")


class Kept:
    """The answers to one kind of question."""

    def __init__(self, kind: str, module: str, most: int):
        """`module`: the file whose code asks and answers; with other code an answer may mean something else.
        `most`: as many answers are kept."""
        self._folder, self._module, self._most = cache_dir() / kind, module, most

    def get(self, question: Iterable[bytes]) -> Any | None:
        """The answer, or None where there is none that can be read."""
        try:
            return json.loads(self._file(question).read_bytes())
        except (OSError, ValueError, RecursionError):
            return None

    def put(self, question: Iterable[bytes], answer: Any) -> None:
        """Keep an answer; without effect where the disk does not take it. The oldest make way."""
        with contextlib.suppress(OSError):
            self._folder.mkdir(parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(dir=self._folder)
            try:
                with open(handle, "w", encoding="utf-8") as file:
                    json.dump(answer, file)
                os.replace(temporary, self._file(question))
            except BaseException:
                os.unlink(temporary)
                raise
            files = sorted(self._folder.iterdir(), key=lambda path: path.stat().st_mtime)
            for path in files[: -self._most]:
                path.unlink(missing_ok=True)

    def _file(self, question: Iterable[bytes]) -> Path:
        digest = xxhash.xxh3_128()
        for part in (*map(_installed, LIBRARIES), Path(self._module).read_bytes(), *question):
            digest.update(len(part).to_bytes(8, "little") + part)
        return self._folder / f"{digest.hexdigest()}.json"


def _installed(library: str) -> bytes:
    """What tells an installation from others, without importing it: where its first file is, and of what time."""
    spec = importlib.util.find_spec(library)
    if spec is None or spec.origin is None:
        return b""
    stat = os.stat(spec.origin)
    return f"{spec.origin} {stat.st_size} {stat.st_mtime_ns}".encode()
