"""Sizes as people write them."""

from __future__ import annotations

import re

_UNITS = {"": 1, "K": 1000, "M": 1000**2, "G": 1000**3, "KI": 1 << 10, "MI": 1 << 20, "GI": 1 << 30}


def bytes_of(text: str) -> int | None:
    """'2GiB', '800 mb', '1.5G' or '7' in bytes; None for what is no size."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]?I?)B?\s*", text.upper())
    return None if found is None or found[2] not in _UNITS else int(float(found[1]) * _UNITS[found[2]])
