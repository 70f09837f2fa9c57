"""The type of JSON documents: configs, manifests, reports, lines of metrics."""

from __future__ import annotations

from typing import Any, TypeAlias

Json: TypeAlias = dict[str, Any]
"""An object of a JSON document, as `json.loads` gives it: what a key holds is checked where it is read."""
