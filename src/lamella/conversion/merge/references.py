"""What a config calls a model: `model`, `model@revision`, `model+adapter`, `model@revision+adapter@revision`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import NamedTuple

from lamella.checkpoint.check import read_config
from lamella.checkpoint.source import Checkpoint
from lamella.conversion.merge.lora import with_adapter
from lamella.errors import UserError


class Reference(NamedTuple):
    """A model, and the adapters that are merged into it, one after another."""

    model: str
    revision: str | None = None
    adapters: tuple[tuple[str, str | None], ...] = ()
    """(folder or hub name, revision)"""


def parse_reference(text: str) -> Reference:
    """The parts of a reference; what is a path on this disk is taken as it stands, whatever letters it has."""
    if Path(text).expanduser().exists():
        return Reference(text)
    model, *adapters = text.split("+")
    if not all([model, *adapters]):
        raise UserError(f"{text!r} names a model or an adapter that is empty; write MODEL@REVISION+ADAPTER")
    return Reference(*_with_revision(model), tuple(_with_revision(adapter) for adapter in adapters))


def _with_revision(text: str) -> tuple[str, str | None]:
    if Path(text).expanduser().exists():
        return text, None
    name, at, revision = text.rpartition("@")
    if not at:
        return text, None
    if not name or not revision:
        raise UserError(f"{text!r} names no revision; write MODEL@REVISION")
    return name, revision


def local_config(text: str | None) -> dict | None:
    """The config.json of a reference to a folder of this disk; None for any other, and for a damaged one."""
    if text is None:
        return None
    folder = Path(parse_reference(text).model).expanduser()
    try:
        return read_config(folder) if folder.is_dir() else None
    except UserError:
        return None  # opening it says what is wrong


def open_reference(text: str | None) -> Checkpoint:
    """The model with its adapters merged in where it is read; None: the embedded model.

    Raises:
        UserError: no such model or adapter, or one that does not fit the other.
    """
    if text is None:
        return Checkpoint.open(None)
    reference = parse_reference(text)
    source = Checkpoint.open(reference.model, reference.revision)
    for adapter, revision in reference.adapters:
        source = dataclasses.replace(source, tensors=with_adapter(source, adapter, revision), name=text)
    return source
