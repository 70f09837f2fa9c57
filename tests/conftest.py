"""Every test runs on CPUs, here and on a machine with GPUs alike; those marked `gpu` run in a process of their own."""

from __future__ import annotations

import os

import pytest

DEVICES = "CUDA_VISIBLE_DEVICES"
ENVIRONMENT = pytest.StashKey[dict[str, str]]()


def devices(mark_expression: str, chosen: str | None) -> str | None:
    """What CUDA_VISIBLE_DEVICES becomes: `pytest -m gpu` keeps the user's choice, all else sees none."""
    return chosen if mark_expression == "gpu" else ""


def pytest_configure(config: pytest.Config) -> None:
    """Hide the GPUs before torch looks for them; processes that tests start inherit it."""
    config.stash[ENVIRONMENT] = dict(os.environ)
    chosen = devices(config.option.markexpr, os.environ.get(DEVICES))
    if chosen is not None:
        os.environ[DEVICES] = chosen


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip the tests of GPUs among those of CPUs."""
    if config.option.markexpr != "gpu":
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="runs under pytest -m gpu, which test_gpu.py starts"))


@pytest.fixture
def machine_environment(pytestconfig: pytest.Config) -> dict[str, str]:
    """The environment as it was when pytest started, with the GPUs that its user chose."""
    return dict(pytestconfig.stash[ENVIRONMENT])
