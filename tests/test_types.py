"""Types that say something, and no object that is changed behind its back."""

from __future__ import annotations

import re
from pathlib import Path

import lamella

SOURCE = Path(lamella.__file__).parent
MOST_ANY_PER_1000_LINES = 10


def lines_of_source() -> list[str]:
    return [line for file in sorted(SOURCE.rglob("*.py")) for line in file.read_text().splitlines()]


def test_any_is_rare():
    """Where the type is `Any`, mypy checks nothing: a Protocol, a TypedDict, `object` or `Json` says more."""
    lines = lines_of_source()
    with_any = [line for line in lines if re.search(r"\bAny\b", line)]
    assert len(lines) > 10_000
    assert 1000 * len(with_any) / len(lines) <= MOST_ANY_PER_1000_LINES


def test_no_type_stands_in_a_comment():
    assert [line for line in lines_of_source() if re.search(r":\s*Any\b.*#", line)] == []


def test_nothing_is_patched():
    """What a module computes is told by arguments: no method of another object is replaced, no parameter taken away."""
    patched = re.compile(r"\.(forward|step|train|eval) = |^\s*delattr\(|ignore\[method-assign\]|cast\(Any")
    assert [line for line in lines_of_source() if patched.search(line)] == []
