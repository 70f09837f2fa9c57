"""What lamella touches of torch's and torchtitan's private names is still there, and stands in the seams alone."""

from __future__ import annotations

import ast
import inspect
import pkgutil
import re
from importlib import import_module
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader

import lamella
from lamella.checkpoint.seams import FsspecReader, FsspecWriter, metadata_path
from lamella.moe.seams import graph_is_kept
from lamella.titan.seams import HOOKS, FSDPMeshInfo, Hook, HSDPMeshInfo, ShardPlacementResult

SOURCE = Path(lamella.__file__).parent
LIBRARIES = ("torch", "torchtitan")


@pytest.mark.parametrize("hook", HOOKS, ids=lambda hook: f"{hook.where.rpartition('.')[2]}.{hook.method}")
def test_torchtitan_still_has_the_method(hook: Hook) -> None:
    module, _, name = hook.where.rpartition(".")
    cls = getattr(import_module(module), name)
    found = vars(cls).get(hook.method)
    assert found is not None, f"{hook.where} lacks {hook.method}, which lamella replaces: {hook.why}"
    parameters = tuple(inspect.signature(found).parameters)
    assert parameters == hook.parameters, (
        f"{hook.where}.{hook.method} is called otherwise now; it is replaced: {hook.why}"
    )


def test_every_replaced_private_method_is_named() -> None:
    named = {hook.method for hook in HOOKS}
    for info in pkgutil.walk_packages([str(SOURCE)], "lamella."):
        if not info.name.startswith(("lamella.titan", "lamella.train")):
            continue
        for cls in vars(import_module(info.name)).values():
            if not inspect.isclass(cls) or cls.__module__ != info.name:
                continue
            for name in vars(cls):
                if not name.startswith("_") or name.startswith("__"):
                    continue
                owners = [base for base in cls.__mro__[1:] if name in vars(base) and is_library(base.__module__)]
                private_class_attribute = all(not callable(vars(base)[name]) for base in owners)
                assert not owners or private_class_attribute or name in named, (
                    f"{info.name}.{cls.__name__} replaces {owners[0].__module__}.{owners[0].__name__}.{name}; name it "
                    "in lamella.titan.seams, with the reason"
                )


def is_library(module: str) -> bool:
    return module.split(".")[0] in LIBRARIES


def test_no_other_file_touches_private_names() -> None:
    for path in SOURCE.rglob("*.py"):
        if path.name == "seams.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            for name in private_names(node):
                pytest.fail(
                    f"{path.relative_to(SOURCE)}:{node.lineno} touches {name}: move it into the room's seams.py"
                )


def private_names(node: ast.AST) -> list[str]:
    """The private names of the libraries that an import or an attribute such as torch._C names."""
    if isinstance(node, ast.ImportFrom) and node.module and is_library(node.module):
        names = [f"{node.module}.{alias.name}" for alias in node.names]
    elif isinstance(node, ast.Import):
        names = [alias.name for alias in node.names if is_library(alias.name)]
    elif isinstance(node, ast.Attribute):
        names = [text for text in [ast.unparse(node)] if is_library(text) and re.fullmatch(r"[\w.]+", text)]
    else:
        return []
    return [name for name in names if any(part.startswith("_") and part != "__version__" for part in name.split("."))]


def test_the_graph_says_whether_it_is_kept() -> None:
    seen: list[bool] = []

    class Asking(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            seen.append(graph_is_kept())
            return gradient

    y = Asking.apply(torch.ones(1, requires_grad=True)).sum()
    y.backward(retain_graph=True)
    y.backward()
    assert seen == [True, False]


def test_the_readers_of_checkpoints(tmp_path: Path) -> None:
    assert issubclass(FsspecReader, FileSystemReader)
    assert hasattr(FsspecWriter, "write_data")
    assert Path(metadata_path(FileSystemReader(tmp_path), None)) == tmp_path / ".metadata"


def test_torch_still_places_parameters_on_other_ranks() -> None:
    assert set(ShardPlacementResult.__annotations__) == {"placement", "mesh_info"}
    fields = set(HSDPMeshInfo.__dataclass_fields__) & set(FSDPMeshInfo.__dataclass_fields__)
    assert {"mesh", "shard_mesh_dim", "replicate_mesh_dim"} <= fields
