"""A set of questions from text that every Python has: which of four passages continues this one?

The rule: a held-out text is cut at spaces into passages of about 240 characters of context and 60 of continuation. The
true choice is what follows; the three others are what follows elsewhere in the same domain. Everything is drawn from a
fixed seed. The texts are those of the running Python, so figures compare between models, not between versions of it.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator

from lamella.data.sources import EMBEDDED_SOURCES, documents
from lamella.errors import UserError
from lamella.evaluate.choice.questions import Question

CONTEXT_CHARACTERS = 240
CONTINUATION_CHARACTERS = 60
CHOICES = 4
QUESTIONS_PER_DOMAIN = 100
SEED = 0
_SPACE_BETWEEN_WORDS = re.compile(r"(?<=\S) (?=\S)")


def continuations(domains: tuple[str, ...] = EMBEDDED_SOURCES, count: int = QUESTIONS_PER_DOMAIN) -> list[Question]:
    """`count` questions of each domain.

    Args:
        domains: sources of text, see `lamella.data.sources`.

    Raises:
        UserError: no such source, or one that is too short.
    """
    return [question for domain in domains for question in _of_domain(domain, count)]


def _of_domain(domain: str, count: int) -> Iterator[Question]:
    passages = [passage for text in documents(domain, "heldout") for passage in _passages(text)]
    if len({true for _, true in passages}) < CHOICES:
        raise UserError(f"the held-out part of {domain} is too short for questions of {CHOICES} passages; take more")
    generator = random.Random(SEED)
    for context, true in generator.sample(passages, min(count, len(passages))):
        others: list[str] = []
        while len(others) < CHOICES - 1:
            other = generator.choice(passages)[1]
            if other != true and other not in others:
                others.append(other)
        answer = generator.randrange(CHOICES)
        choices = (*others[:answer], true, *others[answer:])
        yield Question(context, choices, answer, domain)


def _passages(text: str) -> Iterator[tuple[str, str]]:
    """(context, continuation) side by side; both end at a space, which stands in neither."""
    at = 0
    while True:
        ends: list[re.Match[str]] = []
        for size in (CONTEXT_CHARACTERS, CONTINUATION_CHARACTERS):
            space = _SPACE_BETWEEN_WORDS.search(text, (ends[-1].end() if ends else at) + size)
            if space is None:
                return
            ends.append(space)
        yield text[at : ends[0].start()], text[ends[0].end() : ends[1].start()]
        at = ends[1].end()
