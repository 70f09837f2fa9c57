"""What is read and checked of any checkpoint, whatever holds its weights: config.json against the tensors' headers."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from lamella.architecture.families import Shapes, dense_tensors, may_be_stored
from lamella.architecture.types import Family
from lamella.checkpoint.remote import AnyPath
from lamella.checkpoint.tensors import ITEM_BYTES, SourceTensor
from lamella.errors import UserError
from lamella.jsons import Json, json_object


def read_config(folder: AnyPath) -> Json:
    path = folder / "config.json"
    return read_json(path, f"{folder} has no config.json; give the folder of a Hugging Face checkpoint")


def read_json(path: AnyPath, if_missing: str) -> Json:
    if not path.is_file():
        raise UserError(if_missing)
    return json_object(path.read_bytes(), str(path))


def check_dense(tensors: dict[str, SourceTensor], config: Json, family: Family, where: str) -> None:
    """UserError unless the tensors are exactly those of the config, all in one line."""
    check_tensors(tensors, dense_tensors(config, family), where, lambda name: may_be_stored(name, config))


def check_tensors(
    tensors: dict[str, SourceTensor], expected: Shapes, where: str, allowed: Callable[[str], bool]
) -> None:
    """UserError unless names, shapes and dtypes are as expected; `allowed` names may be there as well."""
    problems = []
    if missing := [name for name in expected if name not in tensors]:
        problems.append(f"missing: {listed(missing)}")
    if extra := [name for name in tensors if name not in expected and not allowed(name)]:
        problems.append(f"not of this architecture: {listed(extra)}")
    for name, shape in expected.items():
        if name in tensors and tensors[name].shape != shape:
            problems.append(f"{name} is {list(tensors[name].shape)} instead of {list(shape)}")
    if odd := sorted({t.dtype for t in tensors.values()} - set(ITEM_BYTES)):
        problems.append(f"dtype {', '.join(odd)}, only {', '.join(ITEM_BYTES)} can be converted")
    if problems:
        more = f" (and {len(problems) - 5} more)" if len(problems) > 5 else ""
        raise UserError(f"the tensors of {where} do not match its config.json: {'; '.join(problems[:5])}{more}")


def listed(names: Iterable[str], limit: int = 4) -> str:
    """The first names, and how many more there are."""
    names = list(names)
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
