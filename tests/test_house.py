"""The house: arrows between rooms, what imports no torch, and sizes of files and functions.

The contracts of `lint-imports` are in pyproject.toml; here they are run, and what it cannot say is said.
"""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import grimp
import pytest

from lamella.recipe.methods import METHODS

ROOT = Path(__file__).parents[1]
SOURCE = sorted((ROOT / "src").rglob("*.py"))
FILES = [*SOURCE, *sorted((ROOT / "tests").rglob("*.py")), *sorted((ROOT / "benchmarks").rglob("*.py"))]
MAX_FILE_LINES, MAX_FUNCTION_LINES, MIN_DOCUMENTED = 400, 60, 0.8
# Named exceptions: to be mended, then removed here; a test says when one is no longer needed.
LONG_FILES: set[str] = set()
LONG_FUNCTIONS: set[str] = set()
LATE_IMPORTS = {
    ("lamella", "lamella.api"),  # `lamella.convert` is looked up when somebody asks for it
    ("lamella", "lamella.service.client"),  # as `lamella.Client` is
}
# What a library or Python calls and documents, so that a sentence of ours would repeat theirs.
CALLED_BY_LIBRARIES = {
    "forward", "backward", "build", "state_dict", "load_state_dict", "extra_repr", "from_config", "to_dict", "step",
    "zero_grad", "setup_context", "reset_parameters", "init_states", "init_weights", "update", "parallelize", "train",
    "get_mask_sizes", "reorder_cache", "crop", "lazy_initialization", "get_seq_length", "write", "flush", "close",
}  # fmt: skip


@pytest.fixture(scope="module")
def graph() -> grimp.ImportGraph:
    """Every import, in functions too, and what the table of methods names to be imported when it is asked for."""
    found = grimp.build_graph("lamella", exclude_type_checking_imports=True)
    for method in METHODS.values():
        found.add_import(importer="lamella.conversion", imported=method.plan.partition(":")[0])
    return found


def functions(path: Path) -> Iterator[tuple[str, int]]:
    """(file::name, lines) of every function, nested ones too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield f"{path.relative_to(ROOT)}::{node.name}", (node.end_lineno or 0) - node.lineno + 1


def public(path: Path) -> Iterator[tuple[str, bool]]:
    """(file::name, has a docstring) of the functions, classes and methods that others may call."""

    def walk(body: list[ast.stmt]) -> Iterator[tuple[str, bool]]:
        for node in body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_"):
                if node.name not in CALLED_BY_LIBRARIES:
                    yield f"{path.relative_to(ROOT)}::{node.name}", ast.get_docstring(node) is not None
                if isinstance(node, ast.ClassDef):
                    yield from walk(node.body)

    yield from walk(ast.parse(path.read_text()).body)


def test_arrows_point_one_way() -> None:
    command = [Path(sys.executable).with_name("lint-imports"), "--no-logo"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout
    assert "4 kept, 0 broken" in done.stdout


def test_no_circle_of_modules(graph: grimp.ImportGraph) -> None:
    """Imports inside of functions count too, LATE_IMPORTS apart."""
    for importer, imported in LATE_IMPORTS:
        graph.remove_import(importer=importer, imported=imported)
    graphlib.TopologicalSorter({m: graph.find_modules_directly_imported_by(m) for m in graph.modules}).prepare()


@pytest.mark.parametrize(
    ("command", "maths"),
    [
        ("lamella.cli", "lamella.conversion.slice"),
        ("lamella.cli", "lamella.conversion.upcycle"),
        ("lamella.cli", "lamella.evaluate.differences"),
        ("lamella.cli_plan", "lamella.plan.memory"),
        ("lamella.cli", "lamella.export.glm4_moe"),
        ("lamella.worker", "lamella.train.trainer"),
    ],
)
def test_three_hops_from_the_command_to_the_maths(command: str, maths: str, graph: grimp.ImportGraph) -> None:
    chain = graph.find_shortest_chain(command, maths)
    assert chain is not None
    assert len(chain) - 1 <= 3, chain


ROOMS = ("architecture", "recipe", "run", "plan", "service")
IMPORT_ALL = """
import importlib, pkgutil, sys
package = importlib.import_module("lamella.{room}")
for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
    importlib.import_module(module.name)
print([name for name in ("torch", "torchtitan", "transformers", "safetensors", "datasets") if name in sys.modules])
"""


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_without_torch(room: str) -> None:
    """Every module of the room in a fresh interpreter."""
    done = subprocess.run([sys.executable, "-c", IMPORT_ALL.format(room=room)], capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stdout + done.stderr


def test_no_file_is_too_long() -> None:
    found = {str(path.relative_to(ROOT)) for path in FILES if len(path.read_text().splitlines()) > MAX_FILE_LINES}
    assert found == LONG_FILES


def test_no_function_is_too_long() -> None:
    found = {name for path in FILES for name, lines in functions(path) if lines > MAX_FUNCTION_LINES}
    assert found == LONG_FUNCTIONS


def test_what_is_public_is_documented() -> None:
    found = dict(pair for path in SOURCE for pair in public(path))
    missing = [name for name, documented in found.items() if not documented]
    assert len(missing) <= (1 - MIN_DOCUMENTED) * len(found), f"{len(missing)} of {len(found)}: {missing}"


def test_no_test_imports_from_another() -> None:
    """What two files need is in tests/support/."""
    for path in (ROOT / "tests").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert not any(part.startswith("test_") for name in names for part in name.split(".")), path
