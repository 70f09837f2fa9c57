"""Folders that appear whole or not at all, and the JSON files in them. Imports no torch."""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from lamella.checkpoint.plan import WritePlan
from lamella.checkpoint.remote import AnyPath
from lamella.errors import UserError
from lamella.jsons import Json

_SPARE_BYTES = 64 << 20  # tokenizer, manifest and the file system's own needs


def write_index(plan: WritePlan, folder: Path) -> None:
    """The index of the safetensors files, if there are several."""
    shards = plan.shards()
    if len(shards) > 1:
        weight_map = {tensor.name: file for file, tensors in shards.items() for tensor in tensors}
        index = {"metadata": {"total_size": plan.total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(folder / "model.safetensors.index.json", index)


def write_json(path: Path, values: Json) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def check_output(out: Path, overwrite: bool, needed_bytes: int = 0, sources: Iterable[AnyPath] = ()) -> None:
    """UserError if `out` cannot take a checkpoint of this size; nothing is touched.

    Only an empty folder or a checkpoint is ever overwritten, and never one that holds a source file.
    """
    if out.exists() or out.is_symlink():
        if not overwrite:
            raise UserError(f"{out} exists; pass --overwrite to replace it, or another --out")
        if out.is_symlink() or not out.is_dir():
            raise UserError(f"{out} is not a folder; give another --out")
        if any(out.iterdir()) and not ((out / "config.json").is_file() or any(out.glob("*.gguf"))):
            raise UserError(f"{out} is not a checkpoint, so it is not overwritten; give another --out")
    if out.resolve() == Path.cwd():
        raise UserError("the working directory itself cannot be replaced; give another --out")
    here = [path for path in sources if isinstance(path, Path)]
    files = [place for path in here for place in (path.parent.resolve() / path.name, path.resolve())]  # links too
    if any(out.resolve() in file.parents for file in files):
        raise UserError(f"{out} holds the model that is to be read; give another --out")
    parent = _existing_parent(out)
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise UserError(f"cannot write into {parent}; give another --out")
    free = shutil.disk_usage(parent).free
    if free < needed_bytes + _SPARE_BYTES:
        raise UserError(
            f"{out} needs {needed_bytes / 1e9:.2f} GB, but only {free / 1e9:.2f} GB are free; give another --out"
        )


def _existing_parent(out: Path) -> Path:
    return next(parent for parent in out.absolute().parents if parent.exists())


@contextmanager
def appearing_folder(out: Path) -> Iterator[Path]:
    """A temporary sibling of `out` that takes its place when the block ends well, and vanishes when it does not."""
    made = [parent for parent in out.absolute().parents if not parent.exists()]
    out.absolute().parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=out.absolute().parent, prefix=f".{out.name}."))
    try:
        temporary.chmod(0o755)  # mkdtemp lets in its owner only
        yield temporary
        _replace(temporary, out.absolute())
        made = []
    except OSError as error:
        # numpy counts what it could not write ("4096 requested and 512 written") and has no number for it
        if error.errno == errno.ENOSPC or (error.errno is None and str(error).endswith("written")):
            raise UserError(f"the disk of {out} became full; nothing was kept") from None
        if error.errno == errno.EFBIG:
            raise UserError(f"the file system of {out}, or a limit set here, takes no files so large") from None
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        for parent in made:
            parent.rmdir()


def _replace(temporary: Path, out: Path) -> None:
    """Rename; an old folder is moved aside first and deleted last."""
    if not out.exists():
        temporary.rename(out)
    else:
        aside = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}.old."))
        out.rename(aside / out.name)
        temporary.rename(out)
        shutil.rmtree(aside)
    directory = os.open(out.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
