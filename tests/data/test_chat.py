"""Conversations: what is learned, by marks of the template and without, in samples that begin at their beginning."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from lamella.architecture.tokenizer_files import template_fingerprint
from lamella.data.chat import ChatRenderer
from lamella.data.packing import IGNORE_INDEX, PackedConversations, samples_of, token_file, whole_documents
from lamella.data.prepare import prepare
from lamella.data.records import Conversation
from lamella.data.sources import documents
from lamella.data.tokenizer import DocumentTokenizer, Text, learned_tokens
from lamella.errors import UserError
from lamella.recipe.sections import Portion
from lamella.train.data import MixedSamples, open_samples
from support.models import EOS, save_tokenizer

# As SmolLM2's: a system prompt comes by itself, every turn ends in a marker and a line end.
PLAIN = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}{{ '[system]help[end]\n' }}{% endif %}"
    "{{ '[' + m['role'] + ']' + m['content'] + '[end]\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
)
MARKED = (
    "{% for m in messages %}{{ '[' + m['role'] + ']' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + '[end]' }}{% endgeneration %}{% else %}{{ m['content'] + '[end]' }}{% endif %}"
    "{{ '\n' }}{% endfor %}"
)
# Shows an answer's reasoning only while nothing follows it.
FORGETFUL = (
    "{% for m in messages %}{{ '[' + m['role'] + ']' }}"
    "{% if loop.last and m['role'] == 'assistant' %}<think>{% endif %}{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
)


def conversation(*contents: str) -> list[dict]:
    return [{"role": ("user", "assistant")[i % 2], "content": c} for i, c in enumerate(contents)]


TWO_TURNS = conversation("hé?", "ha 😀", "and?", "no")


@pytest.fixture
def folder(tmp_path):
    def make(template=PLAIN):
        save_tokenizer(tmp_path / "tokenizer")
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
        tokenizer.chat_template = template
        tokenizer.save_pretrained(tmp_path / "tokenizer")
        return tmp_path / "tokenizer"

    return make


def write(path, conversations) -> str:
    path.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in conversations))
    return str(path)


def render(folder, messages) -> Text:
    return ChatRenderer(DocumentTokenizer(folder).tokenizer, str(folder))(Conversation(messages), "here")


@pytest.mark.parametrize("template", [PLAIN, MARKED])
def test_answers_and_their_end_are_learned(folder, template):
    text, spans, _ = render(folder(template), TWO_TURNS)
    assert [text[a:b] for a, b in spans] == ["ha 😀[end]", "no[end]"]
    assert text.startswith("[system]help[end]\n[user]hé?[end]\n" if template == PLAIN else "[user]hé?[end]\n")


def test_tokens_follow_the_spans_of_characters(folder):
    encoder = DocumentTokenizer(folder()).encoder
    text = render(folder(), TWO_TURNS)
    (tokens,) = encoder([text])
    decode = DocumentTokenizer(folder()).tokenizer.decode
    assert decode(tokens.ids) == text.text  # no BOS, no EOS beside the template's
    assert decode(tokens.ids[tokens.learned]) == "ha 😀[end]no[end]"  # the emoji's four bytes included
    assert tokens.ids.dtype == np.uint16


def test_a_token_across_the_border_is_the_prompts():
    offsets = [(0, 0), (0, 3), (3, 6), (6, 8), (8, 9), (9, 12)]
    assert learned_tokens(offsets, ((4, 9), (9, 11))).tolist() == [False, False, False, True, True, False]
    assert learned_tokens(offsets, ()).tolist() == [False] * 6


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([{"role": "user", "content": "hello"}], "no message of the role 'assistant'"),
        ([], "no message of the role 'assistant'"),
        (conversation("a", "b")[1:], "starts with 'assistant'"),
        (["hello"], 'must be a list of {"role"'),
        ([{"role": "user"}], r"message 0 \(user\) has no content"),
        (conversation("a", "b", "c", "d"), "in another way when others follow.*generation"),
    ],
)
def test_what_cannot_be_rendered_is_refused(folder, messages, message):
    with pytest.raises(UserError, match=f"here: .*{message}"):
        render(folder(FORGETFUL), messages)


def test_a_tokenizer_without_a_template_is_refused(tmp_path):
    source = write(tmp_path / "chat.jsonl", [TWO_TURNS])
    with pytest.raises(UserError, match="has no chat template"):
        token_file(source, None, save_tokenizer(tmp_path / "plain"), cache=tmp_path)


def test_damaged_settings_of_a_tokenizer_are_one_line(folder):
    damaged = folder()
    settings = damaged / "tokenizer_config.json"
    settings.write_text(settings.read_text()[:40])
    (damaged / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match=r"tokenizer_config\.json is damaged"):
        template_fingerprint(damaged)


def test_samples_hold_whole_conversations(folder, tmp_path):
    chats = [conversation("q" * (i % 5), f"answer {i}", "more", "yes") for i in range(40)]
    chats[7] = conversation("long", "x" * 500)
    tokens = token_file(write(tmp_path / "chat.jsonl", chats), None, folder(), cache=tmp_path)
    samples = samples_of(tokens, 256)
    assert isinstance(samples, PackedConversations)
    assert samples.num_cut == 1
    said = MixedSamples([samples], names=["chats"]).describe(2 * len(samples))
    assert said == "chats 100.0% of the samples, 2.00 epochs, 1 conversations longer than a sample are cut"
    decode = AutoTokenizer.from_pretrained(folder()).decode
    begun, learned = 0, ""
    for sample in map(samples.sample, range(len(samples))):
        assert {len(t) for t in sample} == {256}
        assert sample.positions_L[0] == 0
        begins = sample.positions_L == 0
        begun += int((begins & (sample.input_ids_L != EOS)).sum())
        assert decode(sample.input_ids_L[:8]) == "[system]"
        learned += decode(sample.labels_L[sample.labels_L != IGNORE_INDEX])
        is_padding = sample.input_ids_L == EOS
        assert (sample.labels_L[is_padding] == IGNORE_INDEX).all()
    assert begun == 40
    expected = "".join(f"answer {i}[end]yes[end]" if i != 7 else "" for i in range(40))
    assert learned.replace("x", "") == expected
    assert 0 < learned.count("x") < 500


@pytest.mark.faults
def test_another_template_is_another_text(folder, tmp_path):
    """The tokenizer's ids are the same; prepared conversations are refused, and plain text is not."""
    source = write(tmp_path / "chat.jsonl", [TWO_TURNS] * 30)
    (tmp_path / "plain.txt").write_text("words\n" * 3000)
    model = folder(PLAIN)
    tokens = token_file(source, "train", model, cache=tmp_path)
    for name, data in (("chats", source), ("plain", str(tmp_path / "plain.txt"))):
        prepare([data], model, tmp_path / name)
    folder(PLAIN.replace("[end]", "[END]"))
    assert token_file(source, "train", model, cache=tmp_path).hash != tokens.hash
    assert len(token_file(str(tmp_path / "plain"), "train", model))
    with pytest.raises(UserError, match="rendered by another chat template"):
        token_file(str(tmp_path / "chats"), "train", model)
    with pytest.raises(UserError, match="made with other chat template"):
        prepare([source], model, tmp_path / "chats")


def test_half_a_character_is_named(folder, tmp_path):
    source = write(tmp_path / "chat.jsonl", [TWO_TURNS, conversation("cut \ud83d", "emoji")])
    with pytest.raises(UserError, match=r"chat\.jsonl, line 2 .*not valid Unicode .*mend or remove the record"):
        token_file(source, None, folder(), cache=tmp_path)
    assert token_file(source, None, folder(), cache=tmp_path, on_bad_data="skip").num_documents == 1


def test_spans_of_whole_documents():
    bounds = np.array([0, 3, 5, 9, 30, 31, 40])
    assert whole_documents(bounds, 9).tolist() == [[0, 9], [9, 18], [30, 31], [31, 40]]
    assert whole_documents(bounds, 10).tolist() == [[0, 9], [9, 19], [30, 40]]
    assert whole_documents(bounds, 100).tolist() == [[0, 40]]


def test_conversations_mix_with_text(folder, tmp_path):
    chat = write(tmp_path / "chat.jsonl", [conversation(f"q{i}", f"a{i}") for i in range(60)])
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": f"plain text {i}"}) + "\n" for i in range(60)))
    portions = [Portion(source=chat, weight=0.5), Portion(source=str(text), weight=0.5)]
    samples = open_samples(portions, "train", folder(), 64, 1, 20, 258)
    sources = [samples.locate(i)[0] for i in range(20)]
    assert sources.count(0) == 10
    for i, source in enumerate(sources):
        share = (samples.sample(i).labels_L != IGNORE_INDEX).float().mean()
        assert share > 0.8 if source else 0 < share < 0.5
    assert torch.equal(samples.sample(3).labels_L, samples.sample(3).labels_L)
    with pytest.raises(UserError, match="a conversation where a text is wanted"):
        list(documents(chat))
    (tmp_path / "other.jsonl").write_text('{"body": 1}\n')
    with pytest.raises(UserError, match="no text in the field 'text' or 'messages'"):
        list(documents(str(tmp_path / "other.jsonl")))
