"""Texts and answers on their way to tokens, beside the tokenizer itself: long ones, spaces, marks, large ids."""

from __future__ import annotations

import gzip
import json
from functools import cache
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from transformers import AutoTokenizer

from lamella.data import texts
from lamella.data.packing import PackedSamples, token_file
from lamella.data.prepare import prepare
from lamella.data.sources import documents
from lamella.data.streaming import StreamedSamples
from lamella.data.tokenizer import DocumentTokenizer
from lamella.errors import UserError
from lamella.recipe.sections import Portion
from lamella.train.data import open_samples
from support.models import EOS, save_tokenizer
from support.tokenizer_kinds import KINDS, gpt2, save

CHAT = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
CODE = """def walk(tree, depth=0):
    for name, entry in tree.items():
        if isinstance(entry, dict):
            print("    " * depth + name)

            walk(entry, depth + 1)
\treturn None   # done
"""


@cache
def code(num_chars: int = 150_000) -> str:
    return "".join(documents("stdlib-code"))[:num_chars].rstrip()


def endings(text: str) -> str:
    """With all three kinds of line ends, characters of several bytes, deserts of spaces, lines without an end."""
    lines = text[:60_000].split("\n")
    marks = ["é", "※", "😀", " " * 900, "x" * 700, "\t \n \n", "中文字" * 100, ""]
    ends = ("\n", "\r\n", "\r")
    return "".join(f"{line}{marks[i % 97 % 8] if i % 7 == 0 else ''}{ends[i % 3]}" for i, line in enumerate(lines))


TEXTS = {"code": code, "endings": lambda: endings(code()), "one line": lambda: code(40_000).replace("\n", " ")}


def whole(tokens) -> np.ndarray:
    return tokens.window(0, len(tokens)).ids


@pytest.mark.slow
@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("kind", [*KINDS, "bytes"])
def test_a_book_in_pieces_has_the_tokens_of_the_whole(tmp_path, monkeypatch, kind, text):
    """In training, prepared and streamed: one document, its end learned once, its two parts those of the whole."""
    monkeypatch.setattr(texts, "PIECE_BYTES", 5000)
    model = tmp_path / "model"
    save_tokenizer(model) if kind == "bytes" else save(KINDS[kind]([code(60_000)]), model)
    book = tmp_path / "book.txt"
    book.write_bytes(TEXTS[text]().encode())
    plain = AutoTokenizer.from_pretrained(model)
    expected = [*plain(book.read_text(), verbose=False).input_ids, plain.eos_token_id]
    all_tokens, train, heldout = (
        token_file(str(book), split, model, cache=tmp_path / "cache") for split in (None, "train", "heldout")
    )
    different = np.flatnonzero(whole(all_tokens)[: len(expected)] != np.asarray(expected)[: len(all_tokens)])
    assert not len(different), (different[:5], len(expected))
    assert len(all_tokens) == len(expected)
    assert [*whole(train), *whole(heldout)] == expected
    assert [t.num_documents for t in (all_tokens, train, heldout)] == [1, 1, 1]
    assert 0.08 < len(heldout) / len(expected) < 0.12
    prepare([str(book)], model, tmp_path / "prepared", unit_bytes=20_000)
    for split, tokens in (("train", train), ("heldout", heldout)):
        prepared = token_file(str(tmp_path / "prepared"), split, model)
        assert (whole(prepared) == whole(tokens)).all()
        assert prepared.num_documents == 1
        stream, packed = StreamedSamples(str(book), split, model, 256), PackedSamples(tokens, 256)
        for i in range(len(packed)):
            assert all((a == b).all() for a, b in zip(stream.sample(i), packed.sample(i), strict=True))
    assert len(token_file(str(tmp_path / "prepared"), "train", model).entries) > 1


@pytest.mark.slow
def test_books_of_a_folder_are_documents_that_stand_on_one_side(tmp_path, monkeypatch):
    monkeypatch.setattr(texts, "PIECE_BYTES", 5000)
    model = save_tokenizer(tmp_path / "model")
    (tmp_path / "books").mkdir()
    written = [f"book {i:02}\n" * 2000 for i in range(30)]
    for i, text in enumerate(written):
        (tmp_path / "books" / f"{i:02}.txt").write_text(text)
    sides: list[list[str]] = []
    for split in (None, "train", "heldout"):
        tokens = token_file(str(tmp_path / "books"), split, model, cache=tmp_path / "cache")
        pieces = np.split(whole(tokens), tokens.document_starts()[1:])
        assert all(piece[-1] == EOS and EOS not in piece[:-1] for piece in pieces)
        sides.append(AutoTokenizer.from_pretrained(model).batch_decode([piece[:-1] for piece in pieces]))
    everything, train, heldout = sides
    assert everything == written
    assert sorted(train + heldout) == written
    assert heldout


def test_what_is_no_utf8_leaves_the_rest_of_a_book_one_document(tmp_path, monkeypatch):
    """Also where nothing of a whole piece can be read, the first too."""
    monkeypatch.setattr(texts, "PIECE_BYTES", 3000)
    model = save_tokenizer(tmp_path / "model")
    book = tmp_path / "book.txt"
    lines = [b"caf\xe9 " * 8 + b"\n" if i < 300 or 500 < i < 900 else b"good line %d\n" % i for i in range(1500)]
    book.write_bytes(b"".join(lines))
    with pytest.raises(UserError, match=r"not UTF-8 text .* at byte 3"):
        token_file(str(book), "train", model, cache=tmp_path / "cache")
    tokens = token_file(str(book), None, model, cache=tmp_path / "cache", on_bad_data="skip")
    good = b"".join(line for line in lines if line.startswith(b"good"))
    assert tokens.num_documents == 1
    assert AutoTokenizer.from_pretrained(model).decode(whole(tokens)[:-1]).encode() == good
    assert "broken records are left out" in tokens.left_out


@pytest.mark.parametrize("form", ["a.txt", "a.txt.gz", "folder", "a.jsonl", "a.parquet", "chat.jsonl"])
def test_a_byte_order_mark_is_not_learned(tmp_path, form):
    model, source = save_tokenizer(tmp_path / "model"), tmp_path / form
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(model)
    marked = "\ufeff" + "text of a document\n" * 30
    if form == "folder":
        source.mkdir()
        for name in ("a.md", "b"):
            (source / name).write_text(marked)
    elif form == "a.parquet":
        pyarrow.parquet.write_table(pyarrow.table({"text": [marked]}), source)
    elif form == "chat.jsonl":
        messages = [{"role": "user", "content": marked}, {"role": "assistant", "content": marked}]
        source.write_text(json.dumps({"messages": messages}))
    else:
        raw = (json.dumps({"text": marked}) if form == "a.jsonl" else marked).encode()
        source.write_bytes(gzip.compress(raw) if form.endswith("gz") else raw)
    text = tokenizer.decode(whole(token_file(str(source), None, model, cache=tmp_path / "cache")))
    assert "\ufeff" not in text
    assert "text of a document" in text


def chat_tokens(tmp_path: Path, model: Path, messages: list[dict[str, str]]):
    """The window of a conversation's tokens, and plain transformers' tokenizer."""
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": messages}))
    tokens = token_file(str(tmp_path / "chat.jsonl"), None, model, cache=tmp_path / "cache")
    return tokens.window(0, len(tokens)), AutoTokenizer.from_pretrained(model)


@pytest.mark.parametrize("rstrip", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_every_token_of_an_answer_is_learned_and_none_of_the_prompt(tmp_path, kind, rstrip):
    """Indentation and empty lines too, whatever the tokenizer says of where its spaces lie, and the end of the turn."""
    model = save(KINDS[kind]([code(60_000)]), tmp_path / "model", CHAT, rstrip)
    messages = [{"role": "user", "content": "Walk a tree, \nplease "}, {"role": "assistant", "content": CODE}]
    messages += [{"role": "user", "content": "  More? "}, {"role": "assistant", "content": "    no"}]
    window, plain = chat_tokens(tmp_path, model, messages)
    text = plain.apply_chat_template(messages, tokenize=False)
    ids = plain(text, add_special_tokens=False).input_ids
    assert window.ids.tolist() == ids
    answer, end = (plain.convert_tokens_to_ids(f"<|{word}|>") for word in ("assistant", "end"))
    expected, inside = [], False
    for token in ids:  # from behind the answer's marker to its end
        expected.append(inside)
        inside = token == answer or (inside and token != end)
    differ = [i for i, learned in enumerate(window.learned) if learned != expected[i]]
    # The template asks with "<|assistant|>\n": the line end behind the marker, where it has tokens of its own.
    assert all(expected[i] and answer in ids[max(0, i - 2) : i] and not plain.decode(ids[i]).strip() for i in differ)
    assert len(differ) <= (0 if rstrip else 4)


def test_offsets_are_not_trimmed_and_ids_do_not_change(tmp_path):
    """Trimmed ones leave a token of spaces no place in the text, and indentation would never be learned."""
    learned = {}
    for trims in (True, False):
        model = save(gpt2([code(60_000)], trims), tmp_path / str(trims), CHAT)
        messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": CODE}]
        window, plain = chat_tokens(tmp_path, model, messages)
        learned[trims] = window.learned.tolist()
        assert plain.decode(window.ids[window.learned]) == CODE + "<|end|>"
    assert learned[True] == learned[False]


def test_ids_far_above_the_number_of_tokens(tmp_path):
    """They are the tokenizer's own; the model's vocabulary decides."""
    folder = save_tokenizer(tmp_path / "model")
    file = folder / "tokenizer.json"
    values = json.loads(file.read_text())
    values["model"]["vocab"]["Ġ"] = 100_000
    file.write_text(json.dumps(values))
    plain = AutoTokenizer.from_pretrained(folder)
    (tmp_path / "a.jsonl").write_text('{"text": "some text"}\n' * 50)
    tokens = token_file(str(tmp_path / "a.jsonl"), None, folder, cache=tmp_path / "cache")
    assert plain("some text").input_ids[4] == tokens.largest_id == 100_000
    assert whole(tokens)[:10].tolist() == [*plain("some text").input_ids, plain.eos_token_id]
    with pytest.raises(UserError, match="has the token id 100000, but the model's vocabulary has 258 ids"):
        open_samples([Portion(source=str(tmp_path / "a.jsonl"))], "train", folder, 8, 0, 4, 258)


@pytest.mark.faults
@pytest.mark.parametrize(
    "damage",
    [
        lambda values: values.pop("model"),
        lambda values: values["model"].update(vocab={"a": -1}),
        lambda values: values["model"].update(vocab=[["a"]]),
        lambda values: values["model"].update(type="Other"),
        lambda values: values.update(added_tokens=[{"id": 1 << 40, "content": "<eos>"}]),
        lambda values: values.update(added_tokens="x"),
        lambda values: values.update(
            pre_tokenizer={"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated"}
        ),
        lambda values: values.update(post_processor={"type": "None"}),
    ],
)
def test_damaged_tokenizer_files_are_one_line(tmp_path, damage):
    file = save_tokenizer(tmp_path / "model") / "tokenizer.json"
    values = json.loads(file.read_text())
    damage(values)
    file.write_text(json.dumps(values))
    with pytest.raises(UserError, match="no tokenizer in"):
        DocumentTokenizer(tmp_path / "model")


@pytest.mark.faults
@pytest.mark.parametrize("text", ["[]", "3", "{", "[" * 100_000, '{"eos_token": 3}', '{"tokenizer_class": ["x"]}'])
def test_damaged_settings_are_one_line(tmp_path, text):
    folder = save_tokenizer(tmp_path / "model")
    (folder / "tokenizer_config.json").write_text(text)
    (tmp_path / "a.jsonl").write_text('{"text": "some text"}\n' * 50)
    with pytest.raises(UserError, match=r"no tokenizer in|is damaged|no end-of-text token"):
        token_file(str(tmp_path / "a.jsonl"), None, folder, cache=tmp_path / "cache")
