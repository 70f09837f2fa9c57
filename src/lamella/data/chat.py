"""Conversations -> text with the spans that a model learns: the assistant's answers.

A record's conversation is its `messages`: a list of {"role": ..., "content": ...}. The tokenizer's chat template
renders it whole, so that training sees what chatting will send. The answers' spans come from the template's
`{% generation %}` marks where it has them. Else they are found by rendering: an answer is what a message adds to the
conversation before it, with the words that ask for an answer, the marker that ends the turn included (the model must
learn to stop), the whitespace behind it not.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from lamella.data.readers import check_unicode
from lamella.data.tokenizer import Text
from lamella.errors import UserError

Message = dict[str, Any]
_GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")


class ChatRenderer:
    """Renders conversations by one tokenizer's chat template."""

    def __init__(self, tokenizer: Any, name: str):
        """`tokenizer`: of transformers; `name`: as errors call it."""
        template = tokenizer.chat_template
        if isinstance(template, dict):  # several by name
            template = template.get("default")
        if template is None:
            raise UserError(f"the tokenizer of {name} has no chat template; add chat_template.jinja, or train on text")
        self.template = template
        self.special = {key: value for key, value in tokenizer.special_tokens_map.items() if isinstance(value, str)}
        self.has_marks = bool(_GENERATION_MARK.search(template))

    def __call__(self, messages: Any, where: str) -> Text:
        """The conversation's text and the spans of its answers; `where` it stands, for errors (UserError)."""
        check_messages(messages, where)
        if self.has_marks:
            text, spans = self._render(messages, where, marks=True)
        else:
            text, spans = self._by_prefixes(messages, where)
        if not spans:
            raise UserError(f"{where}: the chat template renders no answer; is the assistant's role 'assistant'?")
        check_unicode(text, where)
        return Text(text, tuple(spans))

    def _by_prefixes(self, messages: Sequence[Message], where: str) -> tuple[str, list[tuple[int, int]]]:
        whole, _ = self._render(messages, where)
        spans = []
        for i, message in enumerate(messages):
            if message["role"] == "assistant":
                asked, _ = self._render(messages[:i], where, add_generation_prompt=True)
                answered, _ = self._render(messages[: i + 1], where)
                if not (answered.startswith(asked) and whole.startswith(answered.rstrip())):
                    raise UserError(
                        f"{where}: the chat template renders message {i} in another way when others follow, so the "
                        "answer cannot be told from the prompt; mark answers with {% generation %} in the template"
                    )
                spans.append((len(asked), len(answered.rstrip())))
        return whole, spans

    def _render(
        self, messages: Sequence[Message], where: str, marks: bool = False, add_generation_prompt: bool = False
    ) -> tuple[str, list[tuple[int, int]]]:
        from jinja2 import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        options: dict[str, Any] = {"chat_template": self.template, "add_generation_prompt": add_generation_prompt}
        options |= {"return_assistant_tokens_mask": marks} | self.special
        try:
            rendered: Any = render_jinja_template([list(messages)], **options)
        except (TemplateError, TypeError, ValueError) as error:
            raise UserError(f"{where}: the chat template refuses the conversation ({error})") from error
        texts, spans = rendered
        return texts[0], [(begin, end) for begin, end in spans[0]] if marks else []


def check_messages(messages: Any, where: str) -> None:
    """UserError unless it is a conversation with an answer in it."""
    fields_fit = isinstance(messages, list) and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and ("content" in m or "tool_calls" in m)
        for m in messages
    )
    if not fields_fit:
        raise UserError(f'{where}: messages must be a list of {{"role": ..., "content": ...}}')
    roles = [m["role"] for m in messages]
    if "assistant" not in roles:
        raise UserError(f"{where}: the conversation has no message of the role 'assistant', so nothing to learn")
    if not {"user", "system"}.intersection(roles[:1]):
        raise UserError(f"{where}: the conversation starts with {roles[0]!r}; it must start with 'user' or 'system'")
