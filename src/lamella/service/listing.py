"""The queries behind lists of runs: which, in what order, from where on, and what they have used. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from sqlalchemy import ColumnElement, RowMapping, Select, and_, case, func, or_, select

from lamella.service.schema import attempts, runs

Sort = Literal["submitted", "name", "kind", "state", "user", "updated"]
COLUMNS: dict[Sort, str] = {name: "seq" if name == "submitted" else name for name in get_args(Sort)}
"""What runs may be sorted by -> the column."""


@dataclass(frozen=True)
class Wanted:
    """Which runs, and in what order; among equals the newest come first."""

    states: Sequence[str] = ()
    kind: str | None = None
    user: str | None = None
    text: str | None = None
    """Only runs whose name has it."""
    sort: Sort = "submitted"
    ascending: bool = False

    def page(self, limit: int, last: RowMapping | None = None) -> Select[Any]:
        """Runs that come after the row `last`, or the first ones."""
        column = runs.c[COLUMNS[self.sort]]
        query = select(runs).where(*self._conditions())
        query = query.order_by(column if self.ascending else column.desc(), runs.c.seq.desc()).limit(limit)
        if last is None:
            return query
        value = last[column.name]
        beyond = column > value if self.ascending else column < value
        return query.where(or_(beyond, and_(column == value, runs.c.seq < last["seq"])))

    def count(self) -> Select[Any]:
        """How many there are on all pages."""
        return select(func.count()).select_from(runs).where(*self._conditions())

    def _conditions(self) -> list[ColumnElement[bool]]:
        found: list[ColumnElement[bool]] = [runs.c.state.in_(self.states)] if self.states else []
        found += [] if self.kind is None else [runs.c.kind == self.kind]
        found += [] if self.user is None else [runs.c.user == self.user]
        return [*found, runs.c.name.contains(self.text, autoescape=True)] if self.text else found


def used(run_ids: Sequence[str]) -> Select[Any]:
    """(run, seconds that its attempts took, since when one is at work) of the runs that were started."""
    took = func.sum(attempts.c.ended - attempts.c.started)  # null, and so not counted, while one is at work
    since = func.max(case((attempts.c.ended.is_(None), attempts.c.started)))
    return select(attempts.c.run, took, since).where(attempts.c.run.in_(run_ids)).group_by(attempts.c.run)
