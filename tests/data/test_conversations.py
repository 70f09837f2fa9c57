"""Chat records in every spelling that people have, beside `apply_chat_template` of plain transformers, from JSONL,
parquet and `datasets`: rendered alike, or refused with a line that names the record."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from datasets import load_dataset
from transformers import AutoTokenizer
from typer.testing import CliRunner

from lamella.cli import app
from lamella.data.chat import ChatRenderer
from lamella.data.packing import token_file
from lamella.data.readers import BadRecords
from lamella.data.records import Conversation
from lamella.data.sources import Source, open_source, records, records_of
from lamella.data.tokenizer import DocumentTokenizer
from lamella.errors import UserError
from support.models import save_tokenizer

# As Qwen 2.5's: tools in front, calls behind the content, arguments by tojson.
TOOLS = (
    "{% if tools %}{{ '<tools>' }}{% for tool in tools %}{{ tool | tojson }}{% endfor %}{{ '</tools>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' }}{% if m.content %}{{ m.content }}{% endif %}"
    "{% for call in m.tool_calls or [] %}{% set f = call.function if call.function else call %}"
    "{{ '<call>{\"name\": \"' + f.name + '\", \"arguments\": ' }}{{ f.arguments | tojson }}{{ '}</call>' }}{% endfor %}"
    "{{ '<|end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
# As DeepSeek's: arguments are printed as they are.
RAW_ARGUMENTS = TOOLS.replace("{{ f.arguments | tojson }}", "{{ f.arguments }}")
# As those of models for images: contents are texts or lists of parts.
PARTS = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' }}{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for part in m['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{{ '<|end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
SIMPLE = (
    "{% for m in messages %}{{ '<|' }}{{ m['role'] }}{{ '|>' }}{{ m['content'] }}{{ '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
THINKING = SIMPLE.replace("{{ m['content'] }}", "{% if enable_thinking %}{{ '<think>' }}{% endif %}{{ m['content'] }}")
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
OTHER = {"type": "function", "function": {"name": "time", "parameters": {"type": "object", "required": ["zone"]}}}


def call(arguments: Any, name: str = "weather") -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def text_part(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


USER = {"role": "user", "content": "Rain in Paris?"}
CALLS = {"role": "assistant", "content": None, "tool_calls": [call({"city": "Paris"})]}
RESULT = {"role": "tool", "name": "weather", "content": "sun"}
ANSWER = {"role": "assistant", "content": "No rain."}


@pytest.fixture
def model(tmp_path):
    def make(template: str | dict[str, str]) -> Path:
        folder = save_tokenizer(tmp_path / "model")
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.chat_template = template
        tokenizer.save_pretrained(folder)
        return folder

    return make


def write(folder: Path, rows: list[dict[str, Any]], form: str) -> str:
    """The rows as a file of this form. Parquet by `datasets` has JSON where records differ, by Arrow the keys of all
    of them, with nulls."""
    lines = folder / "chats.jsonl"
    lines.write_text("".join(json.dumps(row) + "\n" for row in rows))
    if form == "parquet":
        load_dataset("json", data_files=str(lines), split="train").to_parquet(str(folder / "chats.parquet"))
    if form == "arrow":
        try:
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "chats.parquet")
        except (pyarrow.ArrowException, TypeError):
            pytest.skip("Arrow has no type for a field that differs so")
    return str(folder / f"chats.{'jsonl' if form in ('jsonl', 'datasets') else 'parquet'}")


def rendered(source: str, model: Path, form: str) -> list[tuple[str, list[str]]]:
    """(text, learned parts) of each record."""
    if form == "datasets":
        stream = load_dataset("json", data_files=source, split="train", streaming=True)
        found = list(records_of(stream, Source("owner/set", "dataset"), BadRecords()))
    else:
        found = list(records(open_source(source), BadRecords()))
    render = ChatRenderer(DocumentTokenizer(model).tokenizer, "model")
    texts = [render(record.content, record.where) for record in found]
    return [(t.text, [t.text[a:b] for a, b in t.learned or ()]) for t in texts]


FORMS = ("jsonl", "parquet", "arrow", "datasets")
AS_THEY_ARE = {
    "plain": (SIMPLE, {"messages": [USER, ANSWER]}, ["No rain.<|end|>"]),
    "tools": (
        TOOLS, {"messages": [USER, CALLS, RESULT, ANSWER], "tools": [TOOL]},
        ['<call>{"name": "weather", "arguments": {"city": "Paris"}}</call><|end|>', "No rain.<|end|>"],
    ),
    "several tools": (TOOLS, {"messages": [USER, ANSWER], "tools": [TOOL, OTHER]}, ["No rain.<|end|>"]),
    "no tools": (TOOLS, {"messages": [USER, ANSWER], "tools": []}, ["No rain.<|end|>"]),
    "parts that the template knows": (
        PARTS, {"messages": [USER, {"role": "assistant", "content": [text_part("No "), text_part("rain.")]}]},
        ["No rain.<|end|>"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", AS_THEY_ARE)
def test_what_transformers_renders_rightly_is_rendered_so(tmp_path, model, case, form):
    template, row, learned = AS_THEY_ARE[case]
    folder = model(template)
    source = write(tmp_path, [row], form)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    expected = tokenizer.apply_chat_template(row["messages"], tools=row.get("tools") or None, tokenize=False)
    assert rendered(source, folder, form) == [(expected, learned)]


# (template, the record as written, the record as transformers wants it)
SPELLINGS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "messages as JSON": (SIMPLE, {"messages": json.dumps([USER, ANSWER])}, {"messages": [USER, ANSWER]}),
    "text as JSON of messages": (SIMPLE, {"text": json.dumps([USER, ANSWER])}, {"messages": [USER, ANSWER]}),
    "tools as JSON": (
        TOOLS, {"messages": [USER, ANSWER], "tools": json.dumps([TOOL])}, {"messages": [USER, ANSWER], "tools": [TOOL]},
    ),
    "all of it as JSON": (
        TOOLS, {"messages": json.dumps([USER, CALLS, RESULT, ANSWER]), "tools": json.dumps([TOOL])},
        {"messages": [USER, CALLS, RESULT, ANSWER], "tools": [TOOL]},
    ),
    "one part where the template knows none": (
        SIMPLE, {"messages": [{"role": "user", "content": [{"type": "text", "text": "Rain in Paris?"}]}, ANSWER]},
        {"messages": [USER, ANSWER]},
    ),
    "arguments as JSON": (
        TOOLS, {"messages": [USER, CALLS | {"tool_calls": [call('{"city": "Paris"}')]}, RESULT, ANSWER]},
        {"messages": [USER, CALLS, RESULT, ANSWER]},
    ),
    "arguments as objects for a template that prints them": (
        RAW_ARGUMENTS, {"messages": [USER, CALLS, RESULT, ANSWER]},
        {"messages": [USER, CALLS | {"tool_calls": [call('{"city": "Paris"}')]}, RESULT, ANSWER]},
    ),
    "a byte order mark": (
        SIMPLE, {"messages": [USER, ANSWER | {"content": "\ufeffNo rain."}]}, {"messages": [USER, ANSWER]},
    ),
    "null beside": (
        TOOLS, {"messages": [USER | {"tool_calls": None, "name": None}, ANSWER | {"tool_calls": None}], "tools": None},
        {"messages": [USER, ANSWER]},
    ),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", SPELLINGS)
def test_other_spellings_are_rendered_like_the_one_that_transformers_wants(tmp_path, model, case, form):
    template, row, wanted = SPELLINGS[case]
    folder = model(template)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    expected = tokenizer.apply_chat_template(wanted["messages"], tools=wanted.get("tools"), tokenize=False)
    ((text, learned),) = rendered(write(tmp_path, [row], form), folder, form)
    assert text == expected
    assert learned[-1] == "No rain.<|end|>"
    assert "None" not in text


@pytest.mark.parametrize("form", FORMS)
def test_nulls_that_arrow_adds_are_not_there(tmp_path, model, form):
    """Records whose calls have other arguments, tools other schemas: each is rendered as if it stood alone."""
    rows = [
        {"messages": [USER, CALLS, RESULT, ANSWER], "tools": [TOOL]},
        {
            "messages": [USER, CALLS | {"tool_calls": [call({"zone": "CET", "unit": {"name": "h"}}, "time")]}, ANSWER],
            "tools": [OTHER],
        },
        {"messages": [USER, ANSWER], "tools": []},
    ]
    folder = model(TOOLS)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    expected = [
        tokenizer.apply_chat_template(row["messages"], tools=row["tools"] or None, tokenize=False) for row in rows
    ]
    assert "null" not in "".join(expected)
    source = write(tmp_path, rows, form)
    assert [text for text, _ in rendered(source, folder, form)] == expected


def test_the_template_for_tools_is_taken_where_there_are_any(tmp_path, model):
    folder = model({"default": SIMPLE, "tool_use": TOOLS})
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = [{"messages": [USER, ANSWER], "tools": [TOOL]}, {"messages": [USER, ANSWER]}]
    texts = [text for text, _ in rendered(write(tmp_path, rows, "jsonl"), folder, "jsonl")]
    assert texts == [tokenizer.apply_chat_template([USER, ANSWER], tools=t, tokenize=False) for t in ([TOOL], None)]
    assert "<tools>" in texts[0]
    assert "<tools>" not in texts[1]


def test_variables_of_the_template_stand_beside_the_messages(tmp_path, model):
    folder = model(THINKING)
    rows = [{"messages": [USER, ANSWER], "chat_template_kwargs": {"enable_thinking": on}} for on in (True, False)]
    texts = [text for text, _ in rendered(write(tmp_path, rows, "jsonl"), folder, "jsonl")]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    plain = [tokenizer.apply_chat_template([USER, ANSWER], tokenize=False, enable_thinking=on) for on in (True, False)]
    assert texts == plain
    assert texts[0] != texts[1]


def test_a_message_of_weight_0_is_context(tmp_path, model):
    first = {"role": "assistant", "content": "Rain.", "weight": 0}
    rows = [{"messages": [USER, first, USER, ANSWER | {"weight": 1}]}]
    ((text, learned),) = rendered(write(tmp_path, rows, "jsonl"), model(SIMPLE), "jsonl")
    assert "Rain.<|end|>" in text
    assert learned == ["No rain.<|end|>"]


PART = [{"type": "image_url", "image_url": {"url": "x"}}]
# ruff: noqa: E501  one case a line
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "null content": (SIMPLE, {"messages": [USER, {"role": "assistant", "content": None}]}, r"message 1 \(assistant\) has no content, or null"),
    "null question": (SIMPLE, {"messages": [{"role": "user", "content": None}, ANSWER]}, r"message 0 \(user\) has no content"),
    "no text in a part": (SIMPLE, {"messages": [USER | {"content": PART}, ANSWER]}, "a part of the type 'image_url'"),
    "parts of strings": (SIMPLE, {"messages": [USER | {"content": ["a", "b"]}, ANSWER]}, "a part of the type 'a'"),
    "content as an object": (SIMPLE, {"messages": [USER | {"content": {"text": "a"}}, ANSWER]}, "must be a text or a list of parts"),
    "messages as text": (SIMPLE, {"messages": "User: hi"}, "'messages' is a string but no JSON"),
    "messages as an object": (SIMPLE, {"messages": {"role": "user"}}, "is an object"),
    "another form of messages": (SIMPLE, {"messages": [{"from": "human", "value": "x"}]}, 'messages must be a list of {"role"'),
    "tools that the template drops": (SIMPLE, {"messages": [USER, ANSWER], "tools": [TOOL]}, "does not render the tool 'weather'"),
    "calls that the template drops": (PARTS, {"messages": [USER, CALLS | {"content": "I look."}, RESULT, ANSWER]}, "message 1 .*the call of 'weather'"),
    "reasoning that the template drops": (SIMPLE, {"messages": [USER, ANSWER | {"reasoning_content": "sun"}]}, "does not render, in message 1, reasoning_content: 'sun'"),
    "functions of old": (SIMPLE, {"messages": [USER, ANSWER], "functions": [TOOL["function"]]}, "'functions' beside the messages is an old form"),
    "a call of old": (SIMPLE, {"messages": [USER, ANSWER | {"function_call": {"name": "f"}}]}, "'function_call' is an old form"),
    "tools as text": (TOOLS, {"messages": [USER, ANSWER], "tools": "weather"}, "'tools' is a string but no JSON"),
    "tools as names": (TOOLS, {"messages": [USER, ANSWER], "tools": ["weather"]}, "'tools' must be a list of JSON schemas"),
    "calls as text": (TOOLS, {"messages": [USER, ANSWER | {"tool_calls": ["weather"]}]}, "tool_calls must be a list"),
    "half a weight": (SIMPLE, {"messages": [USER, ANSWER | {"weight": 0.5}]}, "the weight is 0.5"),
    "null messages": (SIMPLE, {"messages": None}, "the field 'messages' is null"),
}  # fmt: skip


@pytest.mark.faults
@pytest.mark.parametrize("form", ["jsonl", "parquet", "arrow"])
@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_rendered_rightly_is_refused_with_its_row(tmp_path, model, case, form):
    template, row, message = REFUSED[case]
    folder = model(template)
    where = r"chats\.jsonl, line 1 \(byte 0\): " if form == "jsonl" else r"chats\.parquet, row 0: "
    source = write(tmp_path, [row], form)
    with pytest.raises(UserError, match=f"{where}.*{message}"):
        token_file(source, None, folder, cache=tmp_path / "cache")


@pytest.mark.faults
def test_deep_records_are_one_line(tmp_path, model):
    deep: Any = "x"
    for _ in range(5000):
        deep = {"a": deep}
    render = ChatRenderer(DocumentTokenizer(model(TOOLS)).tokenizer, "model")
    with pytest.raises(UserError, match="here: the messages are nested too deeply"):
        render(Conversation([USER, CALLS | {"tool_calls": [call(deep)]}, ANSWER], [TOOL]), "here")
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": "[" * 100_000 + "]" * 100_000}))
    with pytest.raises(UserError, match=r"line 1 .*nested too deeply"):
        list(records(open_source(str(tmp_path / "a.jsonl")), BadRecords()))


def test_show_marks_what_is_learned(tmp_path, model):
    folder = model(SIMPLE)
    source = write(tmp_path, [{"messages": [USER, ANSWER]}, {"messages": [USER, ANSWER | {"weight": 0}]}], "jsonl")
    done = CliRunner().invoke(app, ["data", "show", source, "--model", str(folder), "--count", "2"])
    assert done.exit_code == 0, done.output
    shown = "<|user|>Rain in Paris?<|end|><|assistant|>⟦No rain.<|end|>⟧\n"
    assert shown in done.output
    assert shown.replace("⟦", "").replace("⟧", "") in done.output
    assert f"{source}: 1 file (1 .jsonl)" in done.output
    assert "line 1 (byte 0): 57 tokens, 15 of them learned" in done.output
    (tmp_path / "text.md").write_text("all of it\n" * 1000)
    done = CliRunner().invoke(app, ["data", "show", str(tmp_path / "text.md"), "--model", str(folder)])
    assert "⟦all of it\n" in done.output
    assert "characters ...]" in done.output
    (tmp_path / "blank.md").write_text(" \n")
    done = CliRunner().invoke(app, ["data", "show", str(tmp_path / "blank.md"), "--model", str(folder)])
    assert isinstance(done.exception, UserError)
