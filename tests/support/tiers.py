"""Which cases of an expensive test run in the quick tier."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def slow_but(quick: object, cases: Iterable[Any]) -> list[Any]:
    """The cases of `pytest.mark.parametrize`: one runs in the quick tier, the others with the slow tests."""
    return [case if case == quick else pytest.param(case, marks=pytest.mark.slow) for case in cases]
