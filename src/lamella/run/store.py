"""The folder of a run's checkpoints, local or remote, and which of them may be trusted. Imports no torch.

step-N.tmp/         being written (local folders only)
step-N/             the files of torch's distributed checkpoint, and
step-N/manifest.json  size and xxh3_128 of each of them; written last: a folder without it is no checkpoint
latest              the number of the newest committed step

A folder on a disk appears whole by renaming it. Object stores cannot rename, so there the manifest alone is the mark.
torch itself notices neither a flipped bit nor another dtype in a shard, and its `.metadata` is a pickle, which may run
anything: nothing is opened before `problems` has found its hash right. xxh3 finds damage, not forgery: whoever may
write into the folder is trusted.
"""

from __future__ import annotations

import json
import os
import posixpath
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property

import xxhash
from fsspec import AbstractFileSystem
from fsspec.core import url_to_fs

from lamella.errors import UserError
from lamella.jsons import Json

MANIFEST = "manifest.json"
LATEST = "latest"
BLOCK_BYTES = 8 << 20


def is_remote(folder: str) -> bool:
    """Say whether a folder's name is a URL, which fsspec opens, and not a path on a disk of this machine."""
    return "://" in folder


def absolute(folder: str) -> str:
    """Return the folder's full path; a URL is returned as it is."""
    return folder if is_remote(folder) else os.path.abspath(folder)


def seal(values: Json) -> str:
    """Return the values as JSON text with one more entry, "seal": the xxh3_128 of the others, so that damage shows."""
    digest = xxhash.xxh3_128_hexdigest(json.dumps(values, sort_keys=True).encode())
    return json.dumps(values | {"seal": digest}, indent=1) + "\n"


def unseal(text: str) -> Json:
    """Return the values that `seal` was given; ValueError where the text does not have the hash that it names."""
    try:
        values = json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not isinstance(values, dict) or seal({k: v for k, v in values.items() if k != "seal"}) != text:
        raise ValueError("damaged")
    return values


@dataclass(frozen=True)
class CheckpointStore:
    """The checkpoints of one run; see the module's docstring for what lies in their folder."""

    folder: str
    """A path, or a URL that fsspec knows (s3://bucket/run, file:///data/run)."""

    @cached_property
    def _place(self) -> tuple[AbstractFileSystem, str]:
        try:
            return url_to_fs(self.folder, use_listings_cache=False)  # other ranks write there, too
        except (ImportError, ValueError) as error:
            raise UserError(f"checkpoint_folder {self.folder} cannot be opened: {error}") from None

    @property
    def files(self) -> AbstractFileSystem:
        """The fsspec file system that holds the folder."""
        return self._place[0]

    def inside(self, *names: str) -> str:
        """Join names to the folder's own path, as the methods of `files` take it."""
        return posixpath.join(self._place[1], *names)

    def path(self, step: int) -> str:
        """Return the path or URL of a committed checkpoint, as torch's readers take it."""
        return posixpath.join(self.folder, f"step-{step}")

    def unfinished(self, step: int) -> str:
        """Return the path or URL under which a checkpoint is written before it is committed."""
        return self.path(step) if is_remote(self.folder) else f"{self.path(step)}.tmp"

    def is_inside(self, folder: str | os.PathLike[str]) -> bool:
        """Say whether the checkpoints lie on a disk, somewhere under `folder`."""
        return not is_remote(self.folder) and self.folder.startswith(os.path.join(os.path.abspath(folder), ""))

    def check_reachable(self) -> None:
        """UserError where the folder cannot even be listed: no driver, no access, no such bucket."""
        try:
            self.names()
        except OSError as error:
            raise UserError(f"checkpoint_folder {self.folder} cannot be reached: {error}") from None

    def names(self) -> list[str]:
        """Return the names of all entries of the folder; none where it does not exist."""
        if not self.files.exists(self.inside()):
            return []
        return [posixpath.basename(path.rstrip("/")) for path in self.files.ls(self.inside(), detail=False)]

    def found(self) -> list[int]:
        """Return the steps of all checkpoints, whole or damaged, in ascending order.

        In a remote folder, a step without a manifest is a half-written save and is not counted, unless `latest` names
        it: then it was committed once, and is damaged. A later save of the same step overwrites a half-written one.
        """
        steps = self._named()
        if not is_remote(self.folder):
            return steps
        committed = {*self.steps(), self.latest()}
        return [step for step in steps if step in committed]

    def half_written(self) -> list[str]:
        """Names of the checkpoints that are not `found`."""
        found = self.found()
        return [f"step-{step}" for step in self._named() if step not in found]

    def steps(self) -> list[int]:
        """Steps of the committed checkpoints, ascending."""
        return [step for step in self._named() if self.files.exists(self.inside(f"step-{step}", MANIFEST))]

    def _named(self) -> list[int]:
        matches = (re.fullmatch(r"step-(\d+)", name) for name in self.names())
        return sorted(int(m.group(1)) for m in matches if m)

    def latest(self) -> int | None:
        """What was committed last, whether or not it is still there."""
        try:
            return int(self.files.cat_file(self.inside(LATEST)))
        except (FileNotFoundError, ValueError):
            return None

    def manifest(self, step: int) -> Json:
        """ValueError or OSError where there is none, or a damaged one."""
        return unseal(self.files.cat_file(self.inside(f"step-{step}", MANIFEST)).decode())

    def problems(self, step: int, part: int = 0, parts: int = 1) -> Iterator[str]:
        """What is wrong with a checkpoint, file by file; nothing if it is as it was written.

        Args:
            part: of the files only every `parts`-th, from this one on: ranks share the reading.
        """
        try:
            files = self.manifest(step)["files"]
        except FileNotFoundError:
            yield f"{MANIFEST} is missing"
            return
        except (OSError, ValueError, KeyError) as error:
            yield f"{MANIFEST} cannot be trusted ({error})"
            return
        for name in sorted(files)[part::parts]:
            if problem := self._problem(f"step-{step}", name, files[name]):
                yield f"{name} {problem}"

    def _problem(self, folder: str, name: str, expected: Json) -> str | None:
        path = self.inside(folder, name)
        try:
            num_bytes = self.files.info(path)["size"]
            if num_bytes != expected["bytes"]:
                return f"has {num_bytes} bytes instead of {expected['bytes']}"
            if self._digest(path) != expected["xxh3_128"]:
                return "has other bytes than were written"
        except FileNotFoundError:
            return "is missing"
        except OSError as error:
            return f"cannot be read ({error})"
        return None

    def _digest(self, path: str) -> str:
        digest = xxhash.xxh3_128()
        with self.files.open(path, "rb", block_size=BLOCK_BYTES) as file:
            while block := file.read(BLOCK_BYTES):
                digest.update(block)
        return digest.hexdigest()

    def commit(self, step: int, manifest: Json) -> None:
        """Called by one process when all files are written: from here on the checkpoint counts."""
        if is_remote(self.folder):
            self._write(self.inside(f"step-{step}", MANIFEST), seal(manifest))
        else:
            self._write(self.inside(f"step-{step}.tmp", MANIFEST), seal(manifest))
            self._rename(step)
        self._write(self.inside(LATEST), f"{step}\n")

    def _rename(self, step: int) -> None:
        """A damaged checkpoint of the same step makes way, and goes when the new one stands."""
        unfinished, final = self.unfinished(step), self.path(step)
        aside = f"{final}.old.tmp"
        self._remove(aside)
        if os.path.exists(final):
            os.rename(final, aside)
        _sync_folder(unfinished)
        os.rename(unfinished, final)
        _sync_folder(self.folder)
        self._remove(aside)

    def _write(self, path: str, text: str) -> None:
        if is_remote(self.folder):
            self.files.pipe_file(path, text.encode())  # object stores make an object visible whole
            return
        temporary = f"{path}.tmp"
        with open(temporary, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)

    def discard_unfinished(self) -> list[str]:
        """Remove what interrupted writes left; only while nobody writes. In a remote folder it stays: see `found`."""
        left = [name for name in self.names() if name.endswith(".tmp")]
        for name in left:
            self._remove(self.inside(name))
        return left

    def revoke(self, step: int) -> None:
        """Make the checkpoint count no more; its other files may then be deleted at leisure."""
        self._remove(self.inside(f"step-{step}", MANIFEST))

    def _remove(self, path: str) -> None:
        with suppress(FileNotFoundError):
            self.files.rm(path, recursive=True)


def _sync_folder(folder: str) -> None:
    """Names in a folder are on the disk only after this."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
