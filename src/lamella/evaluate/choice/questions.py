"""Questions, and the JSONL files that hold them: one object per line.

    {"question": "The capital of France is", "choices": ["Rome", "Paris"], "answer": 1, "domain": "geography"}

`answer` is the index of the true choice, counted from 0, or its text. `domain` may be left out, and so may `delimiter`,
what stands between question and choice: a space, as in lm-evaluation-harness.
"""

from __future__ import annotations

import codecs
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from lamella.errors import UserError, did_you_mean
from lamella.jsons import Json, json_object

REQUIRED = ("question", "choices", "answer")
KEYS = (*REQUIRED, "domain", "delimiter")
NO_DOMAIN = "all"


class Question(NamedTuple):
    """A question with at least two choices, one of them true."""

    question: str
    choices: tuple[str, ...]
    answer: int
    """The index of the true choice, from 0."""
    domain: str = NO_DOMAIN
    delimiter: str = " "

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """(context, continuation) of each choice, as a `Scorer` wants them."""
        return [(self.question, self.delimiter + choice) for choice in self.choices]


def read_questions(file: Path) -> list[Question]:
    """The questions of a JSONL file; blank lines are none.

    Raises:
        UserError: no such file, no text, no question in it, or a line that is none; the message names the line.
    """
    questions = [question_of(record, where) for where, record in jsonl_records(file)]
    if not questions:
        raise UserError(f"{file} holds no question; write one JSON object per line, with {', '.join(REQUIRED)}")
    return questions


def jsonl_records(file: Path) -> Iterator[tuple[str, Json]]:
    """(where it stands, the object) of each line that is not blank; UserError for what is no JSON object."""
    try:
        text = file.read_bytes().removeprefix(codecs.BOM_UTF8).decode("utf-8")
    except OSError as error:
        raise UserError(f"cannot read the task file {file}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8 text ({error.reason} at byte {error.start}); convert it") from None
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            where = f"{file}, line {number}"
            yield where, json_object(line, where)


def question_of(record: Json, where: str) -> Question:
    """The question that a record of our format is.

    Args:
        where: file and line, for the message.

    Raises:
        UserError: a missing or unknown key, fewer than two choices, an empty one, an answer that is no choice.
    """
    for key in record:
        if key not in KEYS:
            raise UserError(f"{where}: unknown key {key!r}{did_you_mean(key, KEYS)}; the keys are {', '.join(KEYS)}")
    for key in REQUIRED:
        if record.get(key) is None:
            raise UserError(f"{where}: the question has no {key!r}; every question needs {', '.join(REQUIRED)}")
    choices = record["choices"]
    if not isinstance(choices, list) or not all(isinstance(choice, str) for choice in choices):
        raise UserError(f"{where}: choices must be a list of strings")
    texts = {key: record.get(key, default) for key, default in (("question", ""), ("domain", NO_DOMAIN))}
    texts["delimiter"] = record.get("delimiter", " ")
    for key, value in texts.items():
        if not isinstance(value, str) or (not value and key != "delimiter"):
            raise UserError(f"{where}: {key} must be a string{'' if key == 'delimiter' else ' that is not empty'}")
    return checked(texts["question"], choices, record["answer"], where, texts["domain"], texts["delimiter"])


def checked(
    question: str,
    choices: list[str],
    answer: object,
    where: str,
    domain: str = NO_DOMAIN,
    delimiter: str = " ",
) -> Question:
    """A question whose choices and answer fit each other.

    Args:
        answer: an index from 0, or the text of a choice.

    Raises:
        UserError: fewer than two choices, an empty one, an answer that is none of them or that is two of them.
    """
    if len(choices) < 2:
        raise UserError(f"{where}: the question has {len(choices)} choice; at least 2 are needed")
    if not all(choices):
        raise UserError(f"{where}: a choice is empty; write what stands for it, or leave it out")
    if isinstance(answer, str):
        if choices.count(answer) != 1:
            raise UserError(f"{where}: the answer {answer!r} is {choices.count(answer)} of the choices; it must be one")
        answer = choices.index(answer)
    if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(choices):
        raise UserError(
            f"{where}: the answer {answer!r} is no choice; it must be an index from 0 to {len(choices) - 1}, or the "
            "text of a choice"
        )
    return Question(question, tuple(choices), answer, domain, delimiter)


def domains_of(questions: list[Question]) -> dict[str, int]:
    """How many questions each domain has, in the order of their first ones."""
    return dict(Counter(question.domain for question in questions))


def limited(questions: list[Question], per_domain: int | None) -> list[Question]:
    """The first `per_domain` questions of each domain; None: all of them."""
    if per_domain is None:
        return questions
    seen: Counter[str] = Counter()
    kept = []
    for question in questions:
        seen[question.domain] += 1
        if seen[question.domain] <= per_domain:
            kept.append(question)
    return kept
