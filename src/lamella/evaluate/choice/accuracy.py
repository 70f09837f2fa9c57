"""Accuracy of multiple choice, defined as lm-evaluation-harness defines it.

`acc`: the choice with the largest log-likelihood is the true one. `acc_norm`: the largest per character of the choice.
`acc_bytes`: per UTF-8 byte of it. The delimiter before the choice is not counted; of equal ones the first is taken.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lamella.evaluate.choice.questions import Question
from lamella.evaluate.choice.scoring import Scorer

MEASURES: dict[str, Callable[[str], float]] = {
    "acc": lambda choice: 1.0,
    "acc_norm": lambda choice: float(len(choice)),
    "acc_bytes": lambda choice: float(len(choice.encode("utf-8"))),
}


@dataclass(frozen=True)
class Accuracy:
    """Of some questions: each measure's mean and its standard error (NaN of a single question)."""

    questions: int
    acc: float
    acc_stderr: float
    acc_norm: float
    acc_norm_stderr: float
    acc_bytes: float
    acc_bytes_stderr: float


@dataclass(frozen=True)
class Answer:
    """What a model thinks of one question."""

    domain: str
    true: int
    log_likelihoods: tuple[float, ...]
    """Of each choice, in nats."""
    chosen: dict[str, int]
    """The index of the choice that each of MEASURES takes."""


def answer_questions(scorer: Scorer, questions: Sequence[Question]) -> list[Answer]:
    """What the scorer makes of each question; all choices of all questions are scored in one call."""
    likelihoods = iter(scorer.log_likelihoods([pair for question in questions for pair in question.pairs]))
    answers = []
    for question in questions:
        nats = tuple(next(likelihoods).nats for _ in question.choices)
        chosen = {}
        for name, length in MEASURES.items():
            values = [value / length(choice) for value, choice in zip(nats, question.choices, strict=True)]
            chosen[name] = max(range(len(values)), key=values.__getitem__)
        answers.append(Answer(question.domain, question.answer, nats, chosen))
    return answers


def accuracy(answers: Sequence[Answer]) -> Accuracy:
    """Over all of the answers, of which there must be one at least."""
    figures: dict[str, float] = {}
    for name in MEASURES:
        right = [1.0 if answer.chosen[name] == answer.true else 0.0 for answer in answers]
        figures[name] = mean = sum(right) / len(right)
        squares = sum([(value - mean) ** 2 for value in right])
        deviation = math.sqrt(squares / (len(right) - 1)) if len(right) > 1 else math.nan
        figures[f"{name}_stderr"] = deviation / math.sqrt(len(right))
    return Accuracy(len(answers), **figures)


def accuracy_by_domain(answers: Sequence[Answer]) -> dict[str, Accuracy]:
    """Of each domain, in the order of their first questions."""
    domains = dict.fromkeys(answer.domain for answer in answers)
    return {domain: accuracy([a for a in answers if a.domain == domain]) for domain in domains}
