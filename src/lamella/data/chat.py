"""Conversations -> text with the spans that a model learns: the assistant's answers.

The tokenizer's chat template renders a conversation whole, as `apply_chat_template` of transformers does, so that
training sees what chatting will send. The answers' spans come from the template's `{% generation %}` marks where it has
them. Else they are found by rendering: an answer is what a message adds to the conversation before it, with the words
that ask for an answer, the marker that ends the turn included (the model must learn to stop), the whitespace behind it
not. A message with `weight: 0` is context and not learned.

Templates differ in what they take: some print a list of parts as Python writes it, or a call's arguments as a string
within a string, and some drop tools without a word. So a conversation is tried in the spellings that mean the same,
and refused where no rendering holds what it says.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from lamella.data.records import Conversation, Message, check_unicode
from lamella.data.tokenizer import Text
from lamella.errors import UserError

_GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
_TEMPLATES_RAISE = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)
_REASONING = ("reasoning_content", "reasoning", "thinking")
FIRST_ROLES = ("user", "system", "developer")


class ChatRenderer:
    """Renders conversations by one tokenizer's chat template, the one for tools where it has such and there are any."""

    def __init__(self, tokenizer: Any, name: str):
        """`tokenizer`: of transformers; `name`: as errors call it."""
        if tokenizer.chat_template is None:
            raise UserError(f"the tokenizer of {name} has no chat template; add chat_template.jinja, or train on text")
        self.tokenizer, self.name = tokenizer, name

    def __call__(self, conversation: Conversation, where: str) -> Text:
        """The conversation's text and the spans of its answers; `where` it stands, for errors (UserError)."""
        check_messages(conversation.messages, where)
        try:
            spelled = self._spelled(conversation, where)
        except RecursionError:
            raise UserError(f"{where}: the messages are nested too deeply; mend or remove the record") from None
        if _GENERATION_MARK.search(self._template(spelled)):
            text, spans = self._render(spelled, where, marks=True)
        else:
            text, spans = self._by_prefixes(spelled, where)
        if not spans:
            raise UserError(f"{where}: the chat template renders no answer; is the assistant's role 'assistant'?")
        spans = _of_weight(spelled.messages, spans, where)
        check_unicode(text, where)
        return Text(text, tuple(spans))

    def _spelled(self, conversation: Conversation, where: str) -> Conversation:
        """The conversation in the first spelling of which the template renders everything that must be learned."""
        keys = {key for message in conversation.messages for key in message}
        has_parts = any(isinstance(message.get("content"), list) for message in conversation.messages)
        if not (conversation.tools or has_parts or keys.intersection(("tool_calls", *_REASONING))):
            return conversation
        reasons: list[UserError] = []
        for spelling in spellings(conversation):
            try:
                text, _ = self._render(spelling, where)
                check_rendered(text, spelling, where)
            except UserError as error:
                reasons.append(error)
            else:
                return spelling
        raise reasons[0]

    def _by_prefixes(self, conversation: Conversation, where: str) -> tuple[str, list[tuple[int, int]]]:
        messages = conversation.messages
        whole, _ = self._render(conversation, where)
        spans = []
        for i, message in enumerate(messages):
            if message["role"] == "assistant":
                asked, _ = self._render(conversation._replace(messages=messages[:i]), where, asks=True)
                answered, _ = self._render(conversation._replace(messages=messages[: i + 1]), where)
                if not (answered.startswith(asked) and whole.startswith(answered.rstrip())):
                    raise UserError(
                        f"{where}: the chat template renders message {i} in another way when others follow, so the "
                        "answer cannot be told from the prompt; mark answers with {% generation %} in the template"
                    )
                spans.append((len(asked), max(len(asked), len(answered.rstrip()))))
        return whole, spans

    def _template(self, conversation: Conversation) -> str:
        try:
            return self.tokenizer.get_chat_template(None, conversation.tools)
        except ValueError as error:
            raise UserError(f"the tokenizer of {self.name} has no chat template to take ({error})") from error

    def _render(
        self, conversation: Conversation, where: str, marks: bool = False, asks: bool = False
    ) -> tuple[str, list[tuple[int, int]]]:
        from jinja2 import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        options = {**self.tokenizer.special_tokens_map, **(conversation.options or {})}
        options |= {"chat_template": self._template(conversation), "tools": conversation.tools}
        options |= {"add_generation_prompt": asks, "return_assistant_tokens_mask": marks}
        try:
            rendered: Any = render_jinja_template([list(conversation.messages)], **options)
        except (TemplateError, *_TEMPLATES_RAISE) as error:
            raise UserError(f"{where}: the chat template refuses the conversation ({error})") from error
        texts, spans = rendered
        return texts[0], [(begin, end) for begin, end in spans[0]] if marks else []


def check_messages(messages: Sequence[Any], where: str) -> None:
    """UserError unless it is a conversation with an answer in it."""
    fits = all(isinstance(m, dict) and isinstance(m.get("role"), str) for m in messages)
    if not fits:
        raise UserError(f'{where}: messages must be a list of {{"role": ..., "content": ...}}')
    for i, message in enumerate(messages):
        check_message(message, f"{where}: message {i} ({message['role']})")
    roles = [m["role"] for m in messages]
    if "assistant" not in roles:
        raise UserError(f"{where}: the conversation has no message of the role 'assistant', so nothing to learn")
    if roles[0] not in FIRST_ROLES:
        raise UserError(f"{where}: the conversation starts with {roles[0]!r}; it must start with 'user' or 'system'")


def check_message(message: Message, what: str) -> None:
    """UserError unless it says something, in text."""
    content, calls = message.get("content"), message.get("tool_calls")
    if not (calls is None or (isinstance(calls, list) and all(isinstance(_function(call), dict) for call in calls))):
        raise UserError(f'{what}: tool_calls must be a list of {{"function": {{"name": ..., "arguments": ...}}}}')
    if message.get("function_call"):
        raise UserError(f"{what}: 'function_call' is an old form; write it as 'tool_calls'")
    if content is None and not calls:
        raise UserError(f"{what} has no content, or null, and no tool_calls; write its text, or remove the record")
    for part in content if isinstance(content, list) else []:
        kind = part.get("type", "text") if isinstance(part, dict) else part
        if kind != "text" or not isinstance(part.get("text"), str):
            raise UserError(f"{what} has a part of the type {kind!r}; only parts of text can be learned")
    if not (content is None or isinstance(content, str | list)):
        raise UserError(f"{what}: the content must be a text or a list of parts of text, not {content!r:.40}")
    if message.get("weight") not in (None, 0, 1):
        raise UserError(f"{what}: the weight is {message['weight']!r}; it must be 0 (context alone) or 1")


def _function(call: Any) -> Any:
    """Of a call or tool: the object with its name, which may be wrapped in {"type": "function", "function": ...}."""
    return call.get("function", call) if isinstance(call, dict) else None


def spellings(conversation: Conversation) -> Iterator[Conversation]:
    """The conversation in all spellings that mean the same: arguments of calls as objects (as transformers asks) or as
    strings, contents in parts or as one text."""
    seen: list[list[Message]] = []
    for arguments in (_as_objects, _as_strings):
        for content in (lambda message: message, _as_text):
            messages = [content(_with_arguments(message, arguments)) for message in conversation.messages]
            if messages not in seen:
                seen.append(messages)
                yield conversation._replace(messages=messages)


def _as_text(message: Message) -> Message:
    content = message.get("content")
    return message | {"content": "".join(p["text"] for p in content)} if isinstance(content, list) else message


def _with_arguments(message: Message, spell: Callable[[Any], Any]) -> Message:
    if not message.get("tool_calls"):
        return message
    calls = []
    for call in message["tool_calls"]:
        function = _function(call)
        if "arguments" in function:
            function = function | {"arguments": spell(function["arguments"])}
        calls.append(call | {"function": function} if "function" in call else function)
    return message | {"tool_calls": calls}


def _as_objects(arguments: Any) -> Any:
    try:
        parsed = json.loads(arguments) if isinstance(arguments, str) else arguments
    except (ValueError, RecursionError):
        return arguments
    return parsed if isinstance(parsed, dict) else arguments


def _as_strings(arguments: Any) -> Any:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def check_rendered(text: str, conversation: Conversation, where: str) -> None:
    """UserError where the text lacks what the conversation says, or holds it as Python or JSON writes it."""
    for tool in conversation.tools or []:
        _must_hold(text, (_function(tool) or {}).get("name"), f"{where}: the chat template does not render the tool")
    messages = conversation.messages
    for i, message in enumerate(messages):
        what = f"{where}: the chat template does not render, in message {i} ({message['role']}),"
        if isinstance(content := message.get("content"), list):
            for part in content:
                _must_hold(text, part["text"].strip(), f"{what} the part")
                _must_not_hold(text, repr(part), f"{what} the parts as text")
        for function in map(_function, message.get("tool_calls") or []):
            _must_hold(text, function.get("name"), f"{what} the call of")
            written = function.get("arguments")
            if isinstance(written, str) and written:
                _must_not_hold(text, json.dumps(written), f"{what} the call's arguments but as a string in a string")
            elif isinstance(written, dict) and repr(written) != json.dumps(written):
                _must_not_hold(text, repr(written), f"{what} the call's arguments as JSON")
    last = max(i for i, message in enumerate(messages) if message["role"] == "assistant")
    for name in _REASONING:
        if isinstance(reasoning := messages[last].get(name), str):
            _must_hold(
                text, reasoning.strip(), f"{where}: the chat template does not render, in message {last}, {name}:"
            )


def _must_hold(text: str, part: Any, what: str) -> None:
    if isinstance(part, str) and part not in text:
        raise UserError(f"{what} {part!r:.60}; use a model whose template does, or leave it out of the record")


def _must_not_hold(text: str, part: str, what: str) -> None:
    if part in text:
        raise UserError(f"{what} ({part[:40]}); use a model whose template does")


def _of_weight(messages: Sequence[Message], spans: list[tuple[int, int]], where: str) -> list[tuple[int, int]]:
    """Without those of messages whose weight is 0."""
    weights = [message.get("weight", 1) for message in messages if message["role"] == "assistant"]
    if all(weights):
        return spans
    if len(weights) != len(spans):
        raise UserError(
            f"{where}: a message has weight 0, but the template marks {len(spans)} answers of {len(weights)}"
        )
    return [span for span, weight in zip(spans, weights, strict=True) if weight]
