"""The one error that users see as a single line; every command turns it into exit code 2."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Bad input. The message says what is wrong and what to do about it."""


class BadData(UserError):
    """Data that are not what was written: the message names file and offset."""


def check_choice(name: str, value: object, choices: Iterable[str | None]) -> None:
    """UserError that lists the choices, unless `value` is one of them; None among them: it may be left out."""
    choices = list(choices)
    if value not in choices:
        known = [choice for choice in choices if choice is not None]
        raise UserError(f"{name} is {value!r}; it must be one of {', '.join(known)}{did_you_mean(str(value), known)}")


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """' (did you mean X?)' for the choice nearest to `word`, or '' if none is near."""
    near = difflib.get_close_matches(word, list(choices), n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""
