"""Which files a job may name: those under the service's roots. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from lamella.errors import UserError

HOME = Path("artifacts/service")
"""The service keeps its store and the jobs' logs here, unless something else is said."""
ADDRESS = "address"
"""In the home: where the service listens, for commands to find it."""
REMOTE = re.compile(r"(s3|s3a|gs|gcs|az|abfs|abfss|hf)://[^\x00-\x1f]+")
WRITTEN = ("out", "out_folder", "checkpoint_folder")
"""The last words of keys whose value will be written, even if nothing is there yet."""
MAX_LENGTH = 4096


@dataclass(frozen=True)
class Roots:
    """Folders that jobs may read and write, with everything below them."""

    folders: tuple[Path, ...]
    """Full paths without links."""
    own: Path | None = None
    """The service's own folder, which no job may write."""

    @classmethod
    def of(cls, folders: Iterable[Path], own: Path | None = None) -> Roots:
        """The roots at these places."""
        return cls(tuple(folder.resolve() for folder in folders), None if own is None else own.resolve())

    def check(self, strings: Iterable[tuple[str, str]]) -> None:
        """UserError that lists every text that names, or may name, a file elsewhere.

        A name such as `python-docs` or `org/model` is none as long as nothing of that name lies here.
        """
        found = [f"  {key}: {problem}" for key, text in strings if (problem := self._problem(key, text))]
        if found:
            raise UserError("the job names files that it may not:\n" + "\n".join(dict.fromkeys(found)))

    def _problem(self, key: str, text: str) -> str | None:
        shown = repr(text[:80])
        if re.search(r"[\x00-\x08\x0b-\x1f]", text):
            return f"{shown} has characters that no name has"
        if re.match(r"\s*file:", text, re.IGNORECASE) or "::" in text:
            return f"{shown} is a URL of local files; give a path"
        if "://" in text:
            return None if REMOTE.fullmatch(text) else f"{shown} is no URL of s3, gs, az, abfs or hf"
        if text.startswith("~"):
            return f"{shown} begins with ~; give a full path"
        names = {text, text.rpartition("#")[0], text.partition("#")[0]} if "#" in text else {text}
        return next((problem for name in names if (problem := self._outside(key, name))), None)

    def _outside(self, key: str, name: str) -> str | None:
        shown = repr(name[:80])
        if not self._is_path(key, name):
            return None
        try:
            place = Path(name).resolve()
        except (OSError, RuntimeError):
            return f"{shown} is no path"
        if len(name) > MAX_LENGTH or not self.holds(place):
            return f"{shown} is outside of {', '.join(map(str, self.folders))}"
        if key.rpartition(".")[2] in WRITTEN and self._is_kept(place):
            return f"{shown} is a folder that the service needs as it is; name one of its own"
        return None

    def _is_kept(self, place: Path) -> bool:
        """Whether writing there would replace a root, or the service's own files."""
        own = self.own is not None and (place.is_relative_to(self.own) or self.own.is_relative_to(place))
        return own or place in self.folders

    def _is_path(self, key: str, name: str) -> bool:
        path = Path(name)
        if path.is_absolute() or ".." in path.parts or key.rpartition(".")[2] in WRITTEN:
            return True
        try:
            return (bool(path.parts) and Path(path.parts[0]).is_symlink()) or path.exists()
        except OSError:
            return len(name) > MAX_LENGTH  # prose of a template may be long

    def holds(self, place: Path) -> bool:
        """Whether a resolved path lies in one of the roots."""
        return any(place == root or root in place.parents for root in self.folders)
