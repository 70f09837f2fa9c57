"""Sets of questions by name: those that Dense2MoE reports, from the `datasets` library or from a file of its columns.

A set is a row of SETS: where it lies, and which of its columns are question, choices, answer and domain. The prompts
are those of lm-evaluation-harness where it has the set.
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from lamella.errors import UserError
from lamella.evaluate.choice.questions import Question, checked, jsonl_records
from lamella.jsons import Json


@dataclass(frozen=True)
class QuestionSet:
    """Where a set lies, and what its columns mean."""

    dataset: str
    """Its name for `datasets.load_dataset`."""
    config: str | None
    split: str
    question: str
    """The column with the question."""
    choices: tuple[str, ...]
    """The columns with one choice each, or the one that holds a list of them, or what `parse_choices` reads."""
    answer: str
    """The column with the index of the answer, from 0, or its letter."""
    domain: str | None
    """The column with the domain; None: the configuration is one."""
    prompt: str
    """What the model reads; {question}, and {options} for lettered lines."""
    lettered: bool = False
    """Whether the choices are letters, whose texts stand in the prompt."""
    parse_choices: Callable[[str], list[str]] | None = None


def parse_math_options(text: str) -> list[str]:
    """['38', '27.675'] of 'a ) 38 , b ) 27.675'."""
    return [option.rstrip(" ,") for option in re.split(r"(?:^|(?<= , )|(?<=,))\s*[a-e] \) ", text)[1:]]


_QUESTION = "Question: {question}\nAnswer:"
SETS = {
    "medmcqa": QuestionSet(
        "openlifescienceai/medmcqa", None, "validation", "question", ("opa", "opb", "opc", "opd"), "cop",
        "subject_name", "Question: {question}\nChoices:\n{options}Answer:", lettered=True,
    ),
    "casehold": QuestionSet(
        "coastalcph/lex_glue", "case_hold", "test", "context", ("endings",), "label", None,
        "{question}\nThe holding is:",
    ),
    "mathqa": QuestionSet(
        "regisss/math_qa", None, "test", "Problem", ("options",), "correct", "category", _QUESTION,
        parse_choices=parse_math_options,
    ),
    "codemmlu": QuestionSet(
        "Fsoft-AIC/CodeMMLU", "programming_syntax", "test", "question", ("choices",), "answer", None,
        "{question}\n{options}Answer:", lettered=True,
    ),
    "mmlu": QuestionSet(
        "cais/mmlu", "all", "test", "question", ("choices",), "answer", "subject", "{question}\n{options}Answer:",
        lettered=True,
    ),
}  # fmt: skip


def set_questions(name: str, rows: Iterator[tuple[str, Json]], config: str | None = None) -> list[Question]:
    """The questions of the set `name`, from rows with its columns.

    Args:
        rows: (where it stands, the row).
        config: the configuration, which is the domain of a set that has no column for it.

    Raises:
        UserError: a row without one of the columns, or whose answer is no choice.
    """
    row = SETS[name]
    return [_question(row, config or row.config or name, values, where) for where, values in rows]


def _question(row: QuestionSet, config: str, values: Json, where: str) -> Question:
    for column in (row.question, *row.choices, row.answer):
        if values.get(column) is None:
            raise UserError(f"{where}: there is no column {column!r}; {row.dataset} has it")
    texts = [str(text) for text in _choices(row, values)]
    letters = list(string.ascii_uppercase[: len(texts)])
    options = "".join(f"{letter}. {text}\n" for letter, text in zip(letters, texts, strict=True))
    prompt = row.prompt.format(question=str(values[row.question]).strip(), options=options)
    domain = values.get(row.domain) if row.domain else config
    answer = index_of(values[row.answer], len(texts))
    return checked(prompt, letters if row.lettered else texts, answer, where, str(domain or config))


def _choices(row: QuestionSet, values: Json) -> list[object]:
    if len(row.choices) > 1:
        return [values[column] for column in row.choices]
    (column,) = row.choices
    return list(values[column]) if row.parse_choices is None else [*row.parse_choices(values[column])]


def index_of(answer: object, count: int) -> object:
    """The index that an answer of a set means: 2, '2', 'c' and 'C' are the third; what means none is given back."""
    if isinstance(answer, str):
        word = answer.strip()
        if word.isdigit():
            return int(word)
        if len(word) == 1 and word.upper() in string.ascii_uppercase[:count]:
            return string.ascii_uppercase.index(word.upper())
        return -1
    return answer


def file_rows(file: Path) -> Iterator[tuple[str, Json]]:
    """The rows of a .parquet or .jsonl file; UserError where it is neither or cannot be read."""
    if file.suffix != ".parquet":
        yield from jsonl_records(file)
        return
    import pyarrow
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_table(file).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"cannot read the parquet file {file}: {reason}") from None
    for number, row in enumerate(rows):
        yield f"{file}, row {number}", row


def dataset_rows(name: str, config: str | None) -> Iterator[tuple[str, Json]]:
    """The rows of the set `name` from the `datasets` library; UserError where it cannot be had."""
    import datasets
    import httpx

    row = SETS[name]
    try:
        rows = datasets.load_dataset(row.dataset, config or row.config, split=row.split)
    except (OSError, ValueError, httpx.HTTPError) as error:  # no network, not in the cache; unknown configuration
        reason = str(error).strip().partition("\n")[0]
        raise UserError(
            f"`datasets` cannot load {row.dataset}: {reason}; a file with its columns does as well: "
            f"--task {name}=FILE.parquet"
        ) from error
    for number, values in enumerate(rows):
        yield f"{row.dataset}, row {number}", dict(values)
