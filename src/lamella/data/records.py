"""Records -> texts and conversations: what of a record is its content, and what is refused.

A null says that the key is not there: Arrow gives every record of a file the keys of all the others, and what was
written from it to JSON has them too. So keys with a null are dropped, in messages, tools and the arguments of calls.
"""

from __future__ import annotations

import json
from typing import Any, NamedTuple

from lamella.errors import UserError

Message = dict[str, Any]
BYTE_ORDER_MARK = "\ufeff"
CHAT_FIELDS = ("tools", "chat_template_kwargs")
"""Beside a record's messages, what its rendering depends on; as in `apply_chat_template` and in TRL's data."""
OLD_FIELDS = ("functions", "function_call")


class Conversation(NamedTuple):
    """Messages {"role", "content", ...} and what the chat template gets beside them."""

    messages: list[Message]
    tools: list[dict[str, Any]] | None = None
    """JSON schemas of the functions that the assistant may call."""
    options: dict[str, Any] | None = None
    """More variables of the template, such as {"enable_thinking": False}."""


class Edge(NamedTuple):
    """Where two pieces of a document meet: the text on either side of it, the same for both of them."""

    before: str = ""
    after: str = ""


class Piece(NamedTuple):
    """A stretch of a document that is read bit by bit, with what stands around it."""

    begin: Edge
    text: str
    end: Edge
    is_first: bool = False
    """Whether the document begins with it."""
    is_last: bool = False
    opens_side: bool = False
    """Whether the document's part of its split begins with it."""

    def begins(self, split: str) -> bool:
        """Whether a document begins with it in the stream of this split; "all": of everything."""
        return self.is_first or (self.opens_side and split != "all")


def record_content(record: Any, field: str | None, where: str) -> str | Conversation:
    """The text or conversation of a record: in `field`, or without one in "text" or else "messages".

    Raises:
        UserError: it has neither, or a null; it is no object, no valid Unicode, no conversation.
    """
    if not isinstance(record, dict):
        raise UserError(f"{where}: it is {_kind(record)}, not an object with a text in the field {_wanted(field)}")
    names = ("text", "messages") if field is None else (field,)
    there = [name for name in names if name in record]
    if not there:
        has = ", ".join(map(repr, record)) or "no field"
        raise UserError(f"{where}: no text in the field {_wanted(field)} (it has {has}); name another as SOURCE#FIELD")
    name = next((name for name in there if record[name] is not None), there[0])
    value = record[name]
    if value is None:
        raise UserError(f"{where}: the field {name!r} is null; remove the record, or leave out broken ones (skip)")
    if isinstance(value, str) and (name == "messages" or _looks_like_messages(value)):
        value = _from_json(value, f"{where}: the field {name!r}")
    if isinstance(value, str):
        check_unicode(value, where)
        return value.removeprefix(BYTE_ORDER_MARK)
    if not isinstance(value, list):
        shown = json.dumps(value, default=str)[:40]
        raise UserError(f"{where}: the field {name!r} is {_kind(value)} ({shown}), neither a text nor messages")
    return _conversation(value, record, where)


def _wanted(field: str | None) -> str:
    return "'text' or 'messages'" if field is None else repr(field)


def _kind(value: Any) -> str:
    kinds = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return kinds.get(type(value), "a number" if isinstance(value, int | float) else f"a {type(value).__name__}")


def _looks_like_messages(text: str) -> bool:
    """Whether it is the JSON of messages and not a text for people: cheap for texts, which seldom begin like this."""
    if not text.lstrip().startswith("[") or '"role"' not in text:
        return False
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        return False
    return bool(values) and all(isinstance(value, dict) and "role" in value for value in values)


def _from_json(text: str, what: str) -> Any:
    try:
        return json.loads(text)
    except RecursionError:
        raise UserError(f"{what} is JSON that is nested too deeply; mend or remove the record") from None
    except ValueError as error:
        raise UserError(f"{what} is a string but no JSON ({error}); mend or remove the record") from None


def _conversation(messages: list[Any], record: dict[str, Any], where: str) -> Conversation:
    for name in OLD_FIELDS:
        if record.get(name):
            raise UserError(f"{where}: {name!r} beside the messages is an old form; write the functions as 'tools'")
    try:  # a list may hold its messages as strings
        messages = [json.loads(m) if isinstance(m, str) and m.startswith("{") else m for m in messages]
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: a message is a string but no JSON ({error}); mend or remove the record") from None
    tools, options = (_beside(record, name, where) for name in CHAT_FIELDS)
    if not (tools is None or (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools))):
        raise UserError(f"{where}: 'tools' must be a list of JSON schemas, as an array or as a string that holds one")
    if not (options is None or isinstance(options, dict)):
        raise UserError(f"{where}: 'chat_template_kwargs' must be an object")
    try:
        return Conversation(without_nulls(messages), without_nulls(tools) or None, without_nulls(options) or None)
    except RecursionError:
        raise UserError(f"{where}: the messages are nested too deeply; mend or remove the record") from None


def _beside(record: dict[str, Any], name: str, where: str) -> Any:
    """The field's value, which may be written as a string of JSON: Arrow has no type for schemas that differ."""
    value = record.get(name)
    if isinstance(value, str):
        return _from_json(value, f"{where}: the field {name!r}") if value.strip() else None
    return value


def without_nulls(value: Any) -> Any:
    """The same without the keys whose value is null, at any depth; texts without a byte order mark in front."""
    if isinstance(value, dict):
        return {key: without_nulls(entry) for key, entry in value.items() if entry is not None}
    if isinstance(value, list):
        return [without_nulls(entry) for entry in value]
    return value.removeprefix(BYTE_ORDER_MARK) if isinstance(value, str) else value


def check_unicode(text: str, where: str) -> None:
    """UserError for half of a surrogate pair, which JSON may hold (a cut emoji) and no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: not valid Unicode ({error.reason}); mend or remove the record") from None
