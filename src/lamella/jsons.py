"""The type of JSON documents: configs, manifests, reports, lines of metrics."""

from __future__ import annotations

import json
from typing import Any, TypeAlias

from lamella.errors import UserError

Json: TypeAlias = dict[str, Any]
"""An object of a JSON document, as `json.loads` gives it: what a key holds is checked where it is read."""


def json_object(content: str | bytes, name: str) -> Json:
    """The object that a JSON document called `name` holds.

    Raises:
        UserError: no JSON, no UTF-8, nested too deeply to be read, or something other than an object.
    """
    try:
        values = json.loads(content if isinstance(content, str) else content.decode("utf-8"))
    except RecursionError:
        raise UserError(f"{name} is nested too deeply to be what it should; bring the original back") from None
    except ValueError as error:
        raise UserError(f"{name} is not valid JSON ({error})") from None
    if not isinstance(values, dict):
        raise UserError(f"{name} must hold a JSON object")
    return values
