"""How tests share the machine.

Every test runs on CPUs, here and on a machine with GPUs alike; those marked `gpu` run in a process of their own.
The suite is divided among processes, file by file, so that a file's fixtures are made once. What a test measures is
therefore CPU time or the memory of a process, never the time of a clock.
"""

from __future__ import annotations

import os

import pytest

DEVICES = "CUDA_VISIBLE_DEVICES"
NO_BYTECODE = "PYTHONDONTWRITEBYTECODE"
"""Some images set it. Each process that a test starts would then compile again what it imports."""
ENVIRONMENT = pytest.StashKey[dict[str, str]]()
MAX_PROCESSES = 4
"""Tests of the real model take up to 3 GB each, and some start four ranks."""
LONGEST = ("test_docs.py", "test_wheel.py", "test_supervise.py", "test_run.py", "test_launch.py", "test_parallel.py")
"""Files that take minutes; they begin first, so that no process is left with one of them at the end."""


def devices(mark_expression: str, chosen: str | None) -> str | None:
    """What CUDA_VISIBLE_DEVICES becomes: `pytest -m gpu` keeps the user's choice, all else sees none."""
    return chosen if mark_expression == "gpu" else ""


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """As many processes as cores where the whole suite or a tier of it is run; none for files that are named."""
    whole = config.args_source is pytest.Config.ArgsSource.TESTPATHS
    if not whole or config.option.collectonly or config.option.markexpr == "gpu":
        return 0
    cores = len(os.sched_getaffinity(0))
    return min(MAX_PROCESSES, cores) if cores > 1 else 0


def pytest_configure(config: pytest.Config) -> None:
    """Hide the GPUs before torch looks for them, and let bytecode be kept; processes that tests start inherit both."""
    given: dict[str, str] | None = getattr(config, "workerinput", {}).get("environment")
    config.stash[ENVIRONMENT] = dict(os.environ) if given is None else given
    if given is not None:
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # the cores are divided already
    os.environ.pop(NO_BYTECODE, None)
    chosen = devices(config.option.markexpr, config.stash[ENVIRONMENT].get(DEVICES))
    if chosen is not None:
        os.environ[DEVICES] = chosen


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node) -> None:
    """Tell a process of tests what environment the user gave."""
    node.workerinput["environment"] = node.config.stash[ENVIRONMENT]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Files that take long begin first; the tests of GPUs are skipped among those of CPUs."""
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))
    if config.option.markexpr != "gpu":
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="runs under pytest -m gpu, which test_gpu.py starts"))


@pytest.fixture
def machine_environment(pytestconfig: pytest.Config) -> dict[str, str]:
    """The environment as it was when pytest started, with the GPUs that its user chose."""
    return dict(pytestconfig.stash[ENVIRONMENT])
