"""The tokenizer's files in a model's folder: what tells whether two folders make the same tokens."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import xxhash

from lamella.errors import UserError
from lamella.jsons import Json


def tokenizer_hash(model: Path) -> str:
    """Of the tokenizer's files in a model's folder."""
    digest = xxhash.xxh3_128()
    for file in sorted(model.glob("tokenizer*")):
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


def template_fingerprint(tokenizer: str | Path) -> str:
    """Hash (32 hexadecimal digits) of what renders conversations: the chat template, a file or an entry."""
    folder = Path(tokenizer)
    if not folder.is_dir():
        return xxhash.xxh3_128_hexdigest(str(tokenizer).encode())
    file = folder / "chat_template.jinja"
    template = _parsed(file, str) if file.is_file() else tokenizer_settings(folder).get("chat_template")
    named = {p.name: _parsed(p, str) for p in sorted(folder.glob("additional_chat_templates/*.jinja"))}
    return xxhash.xxh3_128_hexdigest(json.dumps([template, named] if named else template).encode())


def tokenizer_settings(folder: Path) -> Json:
    """What tokenizer_config.json says; empty where there is none; UserError where it is damaged."""
    file = folder / "tokenizer_config.json"
    settings = _parsed(file, json.loads) if file.is_file() else {}
    if not isinstance(settings, dict):
        raise UserError(f"{file} is damaged (it holds no object); restore the tokenizer's files")
    return settings


def _parsed(file: Path, parse: Callable[[str], Any]) -> Any:
    try:
        return parse(file.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is damaged ({error}); restore the tokenizer's files") from None
