"""Damage to a file: to its bytes, or to what they say in JSON, YAML or the header of safetensors."""

from __future__ import annotations

import copy
import json
from random import Random
from typing import Any

import yaml

DEEP = 5_000
VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 3, 2**31, 2**63, 10**400, 0.5, -0.0, float("nan"), float("inf"), 1e308, "", " ", "x",
    "0", "llama", "../x", "/", "\0", "\ud800", "é" * 300, "2020-13-40", [], [[]], [None], [0], [-1, 2**40], ["x", 1],
    {}, {"": None}, {"x": {}}, [{}], "{{", "{% for", "torch.load",
]  # fmt: skip


def damaged(content: bytes, name: str, rng: Random) -> bytes:
    """Other content, as like the old as a wrong value or as little as a few random bytes."""
    if rng.random() < 0.6:
        if name.endswith((".json", ".yaml", ".jsonl", ".txt")):
            return _said_otherwise(content, name, rng)
        if name.endswith(".safetensors"):
            return _header_otherwise(content, rng)
    for _ in range(rng.choice((1, 1, 2, 5))):
        content = _bytes_otherwise(content, rng)
    return content


def _bytes_otherwise(content: bytes, rng: Random) -> bytes:
    at = rng.randrange(len(content) + 1)
    if rng.random() < 0.5:  # headers are where files say how long they are
        at = min(at, rng.randrange(128))
    end = min(len(content), at + rng.choice((1, 2, 8, 100)))
    flipped = bytes(byte ^ 1 << rng.randrange(8) for byte in content[at:end])
    random = rng.randbytes(rng.choice((1, 4, 8, 64)))
    number = rng.choice((0, 1, 2**31, 2**32 - 1, 2**63 - 1, 2**64 - 1)).to_bytes(8, "little")
    opened = rng.choice((b"[", b'{"a":', b"- ", b"(", b'"', b"&a [*a,")) * rng.choice((1, 200, DEEP))
    return rng.choice(
        [
            content[:at],
            content[:at] + content[end:],
            content[:at] + flipped + content[end:],
            content[:at] + random + content[at:],
            content[:at] + number + content[at + 8 :],
            content[:at] + content[at:end] * rng.choice((2, 50)) + content[end:],
            content[:at] + opened + content[at:],
            content[:at] + b"\0" * rng.choice((1, 16)) + content[end:],
            b"\xef\xbb\xbf" + content,
            opened,
            b"",
        ]
    )


def _said_otherwise(content: bytes, name: str, rng: Random) -> bytes:
    """One value of a document, or of a line of several, replaced, removed, doubled or nested."""
    if name.endswith(".yaml"):
        return yaml.safe_dump(_changed(yaml.safe_load(content), rng), allow_unicode=True).encode(errors="surrogatepass")
    if name.endswith(".jsonl"):
        lines = content.splitlines()
        index = rng.randrange(len(lines))
        lines[index] = _dumped(_changed(json.loads(lines[index]), rng), rng)
        return b"\n".join(lines) + b"\n"
    if name.endswith(".txt"):
        words = content.decode().splitlines()
        words[rng.randrange(len(words))] = f"{rng.choice(words).partition('=')[0]}={rng.choice(VALUES)}"
        return "\n".join(words).encode(errors="surrogatepass")
    return _dumped(_changed(json.loads(content), rng), rng)


def _header_otherwise(content: bytes, rng: Random) -> bytes:
    length = int.from_bytes(content[:8], "little")
    header = _dumped(_changed(json.loads(content[8 : 8 + length]), rng), rng)
    return len(header).to_bytes(8, "little") + header + content[8 + length :]


def _dumped(value: Any, rng: Random) -> bytes:
    text = json.dumps(value, ensure_ascii=rng.random() < 0.7)
    if rng.random() < 0.05:
        text = text.replace("null", "[" * DEEP + "]" * DEEP, 1)
    return text.encode(errors="surrogatepass")


def _places(value: Any) -> list[tuple[Any, Any]]:
    """(container, key or index) of every value inside."""
    found, waiting = [], [value]
    while waiting:
        at = waiting.pop()
        keys = list(at) if isinstance(at, dict) else range(len(at)) if isinstance(at, list) else ()
        found += [(at, key) for key in keys]
        waiting += [at[key] for key in keys]
    return found


def _changed(value: Any, rng: Random) -> Any:
    value = copy.deepcopy(value)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        places = _places(value)
        if not places or rng.random() < 0.02:
            value = rng.choice(VALUES)
            continue
        container, key = rng.choice(places)
        old, kind = container[key], rng.randrange(8)
        if kind == 0:
            del container[key]
        elif kind == 1 and isinstance(container, dict):
            container[rng.choice(("x", "", "é", str(key) + "s"))] = old
        elif kind == 2:
            container[key] = [old]
        elif kind == 3:
            container[key] = {"x": old}
        elif kind == 4 and isinstance(old, int | float) and not isinstance(old, bool) and abs(old) < 2**900:
            container[key] = rng.choice((-old, old + 1, old * 1000, old * 2**40, str(old), old + 0.5))
        else:
            container[key] = copy.deepcopy(rng.choice(VALUES))
    return value
