"""Which cases of an expensive test run in the quick tier."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def slow_but(cases: Iterable[Any], *quick: object) -> list[Any]:
    """The cases of `pytest.mark.parametrize`: those named run in the quick tier, the others with the slow tests."""
    cases = list(cases)
    assert all(case in cases for case in quick), quick
    return [case if case in quick else pytest.param(case, marks=pytest.mark.slow) for case in cases]
