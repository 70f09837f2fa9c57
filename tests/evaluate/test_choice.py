"""Multiple choice: files and sets, log-likelihoods with shared prefixes, accuracy, the command."""

import dataclasses
import json
import math
import subprocess
import sys

import pyarrow
import pyarrow.parquet
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lamella import cli
from lamella.errors import UserError
from lamella.evaluate.choice.accuracy import Answer, accuracy, accuracy_by_domain, answer_questions
from lamella.evaluate.choice.continuations import CHOICES, continuations
from lamella.evaluate.choice.evaluate import evaluate_task, is_harness_task, load_task
from lamella.evaluate.choice.expert_use import ExpertUse
from lamella.evaluate.choice.questions import Question, read_questions
from lamella.evaluate.choice.scoring import Likelihood, ModelScorer, token_pairs
from lamella.evaluate.choice.sets import parse_math_options
from lamella.evaluate.choice.shared_prefixes import TokenPair, _batches, _rows_by_context, log_likelihoods_of_tokens
from support.models import HEADS, save_llama, save_tokenizer, tiny_model, tiny_moe

GOOD = {"question": "The capital of France is", "choices": ["Rome", "Paris"], "answer": 1, "domain": "geography"}
VOCAB = 128


def ids(seed: int, length: int) -> tuple[int, ...]:
    return tuple(torch.randint(0, VOCAB, (length,), generator=torch.Generator().manual_seed(seed)).tolist())


def pairs_of_every_kind() -> list[TokenPair]:
    """Contexts of many lengths with several choices, some of one token; few-shot ones; one that is too long."""
    contexts = [ids(i, length) for i, length in enumerate([1, 2, 9, 10, 10, 40, 41, 43, 90])]
    pairs = [
        TokenPair(context, ids(100 + 7 * i + j, 1 + j * 3)) for i, context in enumerate(contexts) for j in range(3)
    ]
    letters = [TokenPair(ids(5, 40), (token,)) for token in (3, 4, 5, 6)]
    shots = ids(50, 80)
    few_shot = [TokenPair(shots + ids(60 + i, 5 + i), ids(70 + j, 2)) for i in range(4) for j in range(2)]
    return [*pairs, *letters, *few_shot, TokenPair(ids(80, 300), ids(81, 9)), TokenPair(ids(80, 300), ids(82, 4))]


def one_by_one(model, pair: TokenPair) -> tuple[float, bool]:
    """By transformers alone: the whole sequence, no cache."""
    tokens = torch.tensor([(pair.context + pair.continuation)[-257:]])  # the model has 256 positions
    with torch.no_grad():
        log_p = model(tokens[:, :-1], use_cache=False).logits[0, -len(pair.continuation) :].double().log_softmax(-1)
    wanted = torch.tensor(pair.continuation)
    return log_p.gather(-1, wanted[:, None]).sum().item(), bool((log_p.argmax(-1) == wanted).all())


@pytest.mark.parametrize("kind", ["llama", "mistral", "gpt2", "opt", "olmo2", "ministral", "moe", "heads"])
def test_shared_prefixes_change_nothing(kind, tmp_path):
    if kind in ("moe", "heads"):
        heads = HEADS if kind == "heads" else None
        model = tiny_moe("llama", tmp_path, heads=heads, rope_parameters={"rope_type": "default", "rope_theta": 1e4})
    else:
        changes = {"sliding_window": 7} if kind == "mistral" else {}
        model = tiny_model(kind, **changes)
    pairs = pairs_of_every_kind()
    found = log_likelihoods_of_tokens(model, pairs)
    for pair, (nats, is_greedy) in zip(pairs, found, strict=True):
        wanted, greedy = one_by_one(model, pair)
        assert nats == pytest.approx(wanted, rel=2e-6, abs=1e-5)  # fp32, sums of other shapes
        assert is_greedy == greedy


def test_every_token_is_computed_about_once():
    computed = []
    model, shots = tiny_model("llama"), ids(1, 90)
    pairs = [TokenPair(shots + ids(i, 10), ids(9 * i + j, 3)) for i in range(8) for j in range(4)]
    log_likelihoods_of_tokens(model, pairs, lambda numbers, lengths: computed.append(lengths))
    # the examples once, eight contexts but for their last token, then that and two of three tokens a choice
    assert computed == [[90], [9] * 8, [3] * 32]
    computed.clear()
    log_likelihoods_of_tokens(
        model, [TokenPair(ids(i, 10), (j,)) for i in range(8) for j in range(4)], lambda _, n: computed.append(n)
    )
    assert computed == [[10] * 8]  # choices of one token need the context alone


def test_a_pass_is_bounded_and_nothing_is_lost():
    pairs = [TokenPair(ids(i, 20 + i % 20), ids(i + j, 8)) for i in range(1000) for j in range(4)]
    rows = _rows_by_context(pairs, 256)
    batches = list(_batches(rows, vocab_size=49152))
    assert sum(len(batch.contexts) for batch in batches) == len(rows)
    most = max(len(b.rows) * (max(len(row.ids) for row in b.rows) - b.cut) for b in batches)
    assert 450 < most * 4 * 49152 / 2**20 <= 512  # MiB of logits
    assert sorted(number for b in batches for row in b.rows for number, _ in row.asked) == list(range(4000))


def test_tokens_of_context_and_continuation(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(save_tokenizer(tmp_path, add_bos=True))
    bos = tokenizer.bos_token_id
    a, b, c, spaces = token_pairs(tokenizer, [("ab", " c"), ("ab  ", "c"), ("", "c"), (" ", "c")])
    assert a.context[0] == bos
    assert tokenizer.decode(a.context[1:]) == tokenizer.decode(b.context[1:]) == "ab"
    assert tokenizer.decode(b.continuation) == "  c"  # spaces at the end of a context belong to what follows
    assert c == TokenPair((bos,), tuple(tokenizer.encode("c", add_special_tokens=False)))
    assert len(spaces.context) == 2
    assert token_pairs(tokenizer, [("<bos>ab", "c")])[0].context == a.context  # no second one
    with pytest.raises(UserError, match="has no token of its own"):
        token_pairs(tokenizer, [("ab", "")])
    bare = AutoTokenizer.from_pretrained(save_tokenizer(tmp_path / "bare", has_bos=False))
    assert token_pairs(bare, [("", "c")])[0].context == (bare.eos_token_id,)


class Table:
    """A scorer that is no model: likelihoods from a table."""

    def __init__(self, nats):
        self.nats = nats

    def log_likelihoods(self, pairs):
        return [Likelihood(self.nats[continuation.strip()], False) for _, continuation in pairs]


def test_accuracy_by_any_scorer():
    questions = [
        Question("q", ("a", "bbbb"), 0, "x"),  # -2 and -3: by character -2 and -0.75
        Question("q", ("ää", "ccc"), 1, "y"),  # -4 and -4.5; by character -2 and -1.5, by byte -1 and -1.5
        Question("q", ("a", "a "), 0, "y"),  # a tie: the first
    ]
    answers = answer_questions(Table({"a": -2.0, "bbbb": -3.0, "ää": -4.0, "ccc": -4.5}), questions)
    assert [a.chosen for a in answers] == [
        {"acc": 0, "acc_norm": 1, "acc_bytes": 1},
        {"acc": 0, "acc_norm": 1, "acc_bytes": 0},
        {"acc": 0, "acc_norm": 1, "acc_bytes": 1},
    ]
    overall = accuracy(answers)
    assert (overall.questions, overall.acc, overall.acc_norm, overall.acc_bytes) == (3, 2 / 3, 1 / 3, 0)
    assert overall.acc_stderr == pytest.approx(1 / 3)  # sqrt(3 * (2/9) / (3 * 2)) = 1/3
    domains = accuracy_by_domain(answers)
    assert {name: (a.questions, a.acc) for name, a in domains.items()} == {"x": (1, 1.0), "y": (2, 0.5)}
    assert math.isnan(domains["x"].acc_stderr)
    assert dataclasses.asdict(accuracy([Answer("x", 0, (0.0,), dict.fromkeys(answers[0].chosen, 0))]))["acc"] == 1


BAD = {
    "no_answer": (GOOD | {"answer": None}, "line 2: the question has no 'answer'"),
    "one_choice": (GOOD | {"choices": ["Paris"], "answer": 0}, "line 2: the question has 1 choice"),
    "no_choice": (GOOD | {"answer": 2}, "line 2: the answer 2 is no choice; it must be an index from 0 to 1"),
    "other_text": (GOOD | {"answer": "Berlin"}, "line 2: the answer 'Berlin' is 0 of the choices"),
    "two_alike": (GOOD | {"choices": ["a", "a"], "answer": "a"}, "the answer 'a' is 2 of the choices"),
    "negative": (GOOD | {"answer": -1}, "the answer -1 is no choice"),
    "true": (GOOD | {"answer": True}, "the answer True is no choice"),
    "empty_choice": (GOOD | {"choices": ["a", ""]}, "a choice is empty"),
    "choices": (GOOD | {"choices": "ab"}, "choices must be a list of strings"),
    "question": (GOOD | {"question": ""}, "question must be a string that is not empty"),
    "unknown": (GOOD | {"anwser": 1}, r"unknown key 'anwser' \(did you mean 'answer'\?\)"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_questions(case, tmp_path):
    record, message = BAD[case]
    file = tmp_path / "task.jsonl"
    file.write_text(json.dumps(GOOD) + "\n" + json.dumps(record))
    with pytest.raises(UserError, match=message):
        read_questions(file)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "holds no question"), (b"\n \n", "holds no question"), (b"no json", "line 1 is not valid JSON"),
     (b"[1]", "line 1 must hold a JSON object"), (b"\xff\xfe", "is not UTF-8 text")],
)  # fmt: skip
def test_bad_files(content, message, tmp_path):
    file = tmp_path / "task.jsonl"
    file.write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_task(str(file))


def test_bad_tasks(tmp_path):
    with pytest.raises(UserError, match=r"cannot read the task file .*no\.jsonl"):
        load_task("no.jsonl")
    with pytest.raises(UserError, match=r"no such set of questions: medmca \(did you mean 'medmcqa'\?\)"):
        load_task("medmca=x")
    with pytest.raises(UserError, match="a limit of 0"):
        load_task("continuations", 0)
    (tmp_path / "rows.parquet").write_bytes(b"no parquet")
    with pytest.raises(UserError, match="cannot read the parquet file"):
        load_task(f"mmlu={tmp_path / 'rows.parquet'}")
    pyarrow.parquet.write_table(pyarrow.table({"question": ["q"]}), tmp_path / "rows.parquet")
    with pytest.raises(UserError, match=r"row 0: there is no column 'choices'; cais/mmlu has it"):
        load_task(f"mmlu={tmp_path / 'rows.parquet'}")
    assert is_harness_task("arc_easy")
    assert is_harness_task("harness:mmlu")
    assert is_harness_task("task.yaml")
    assert not any(map(is_harness_task, ("mmlu", "mmlu=x", "continuations", "a.jsonl", "folder/file", "codemmlu:api")))


LETTERS = ("A", "B", "C", "D")
# Rows as the sets on the hub have them, and the questions that they are.
ROWS = {
    "medmcqa": (
        {"question": "Which vitamin?", "opa": "a", "opb": "b", "opc": "c", "opd": "d", "cop": 2, "subject_name": "Bio"},
        Question("Question: Which vitamin?\nChoices:\nA. a\nB. b\nC. c\nD. d\nAnswer:", LETTERS, 2, "Bio"),
    ),
    "casehold": (
        {"context": "It held (<HOLDING>)", "endings": ["one", "two"], "label": 1},
        Question("It held (<HOLDING>)\nThe holding is:", ("one", "two"), 1, "case_hold"),
    ),
    "mathqa": (
        {"Problem": "1 + 1 ?", "options": "a ) rs . 400 , b ) 2 , c ) 1,000 , d ) 4 , e ) none of these",
         "correct": "c", "category": "general"},
        Question("Question: 1 + 1 ?\nAnswer:", ("rs . 400", "2", "1,000", "4", "none of these"), 2, "general"),
    ),
    "codemmlu": (
        {"task_id": "k1", "question": "What is x?", "choices": ["1", "2", "3"], "answer": "B"},
        Question("What is x?\nA. 1\nB. 2\nC. 3\nAnswer:", LETTERS[:3], 1, "programming_syntax"),
    ),
    "mmlu": (
        {"question": " Why? ", "subject": "law", "choices": ["w", "x", "y", "z"], "answer": 3},
        Question("Why?\nA. w\nB. x\nC. y\nD. z\nAnswer:", LETTERS, 3, "law"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("form", ["parquet", "jsonl"])
def test_sets_by_their_columns(name, form, tmp_path):
    row, question = ROWS[name]
    file = tmp_path / f"rows.{form}"
    if form == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), file)
    else:
        file.write_text(json.dumps(row))
    assert load_task(f"{name}={file}") == [question]


def test_options_of_mathqa():
    """What other readers take too, such as an answer with a comma; nothing is lost where spaces are."""
    assert parse_math_options("a ) 38 , b ) 27.675 , c ) 30 , d ) data inadequate , e ) none of these") == [
        "38", "27.675", "30", "data inadequate", "none of these",
    ]  # fmt: skip
    assert parse_math_options("a ) 3 b , b ) a ) ") == ["3 b", "a )"]


def test_continuations_are_those_of_the_text():
    questions = continuations(("python-docs",), 20)
    assert questions == continuations(("python-docs",), 20)
    assert [len(set(q.choices)) for q in questions] == [CHOICES] * 20
    assert {q.answer for q in questions} == {0, 1, 2, 3}
    from lamella.data.sources import documents

    texts = list(documents("python-docs", "heldout"))
    for q in questions:
        assert any(f"{q.question} {q.choices[q.answer]} " in text for text in texts)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(save_llama(tmp_path_factory.mktemp("dense") / "model"))


@pytest.fixture
def task(tmp_path):
    records = [
        {"question": f"{word} {i} is", "choices": [word, "no", f"{i}"], "answer": word, "domain": word}
        for i, word in enumerate(["red", "green", "blue"] * 4)
    ]
    path = tmp_path / "task.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def test_from_python(folder, task):
    results = evaluate_task(folder, task, beside=[folder], limit=2)
    assert list(results) == [folder]  # one model, however often it is named
    result = results[folder]
    assert result.overall.questions == 6
    assert {name: figures.questions for name, figures in result.domains.items()} == {"red": 2, "green": 2, "blue": 2}
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    again = answer_questions(ModelScorer(model, tokenizer), load_task(task, 2))
    assert result.answers == again
    with pytest.raises(UserError, match="is a dense model, so it has no mode"):
        evaluate_task(folder, task, mode="dense")


def test_expert_use_counts_what_is_computed(tmp_path):
    model = tiny_moe("llama", tmp_path, vocab_size=258)
    tokenizer = AutoTokenizer.from_pretrained(save_tokenizer(tmp_path))
    questions = [Question("ab" * (3 + i), ("c", "de"), 0, domain) for i, domain in enumerate("xyx")]
    use = ExpertUse(model, questions)
    ModelScorer(model, tokenizer, use).log_likelihoods([pair for q in questions for pair in q.pairs])
    assert len(use.layers) == 2
    tokens = {"x": 6 + 10, "y": 8}  # of the contexts; choices add the rest
    for domain, counts in use.counts.items():
        assert torch.equal(counts.sum(1), counts.sum(1)[:1].expand(2))
        assert counts.sum(1)[0] % 4 == 0  # four experts a token
        assert tokens[domain] <= counts.sum(1)[0] / 4 <= tokens[domain] + 2 * 2 * (2 if domain == "x" else 1)
        assert torch.allclose(use.shares()[domain].sum(1), torch.ones(2))


@pytest.mark.slow
def test_the_command(folder, task, tmp_path, capsys):
    moe = tmp_path / "moe"
    tiny_moe("llama", moe, vocab_size=258)
    save_tokenizer(moe)
    report, picture = tmp_path / "report.json", tmp_path / "experts.png"
    command = [sys.executable, "-m", "lamella.cli", "evaluate"]

    def run(*words: str) -> subprocess.CompletedProcess:
        return subprocess.run([*command, *words], capture_output=True, text=True, timeout=300)

    files = ["--json", str(report), "--picture", str(picture)]
    done = run(str(moe), "--task", task, "--dense", folder, "--limit", "3", *files)
    assert done.returncode == 0, done.stderr
    assert "acc_norm" in done.stdout
    assert picture.stat().st_size > 10_000
    values = json.loads(report.read_text())["models"]
    assert values[folder]["overall"]["questions"] == values[str(moe)]["overall"]["questions"] == 9
    assert set(values[str(moe)]["expert_use"]) == {"red", "green", "blue"}
    done = run(folder, "--task", "no.jsonl")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert done.stderr.startswith("error: cannot read the task file no.jsonl")
    cli.evaluate(folder, task="continuations", limit=1)
    assert "stdlib-code" in capsys.readouterr().out
    for options, message in (
        ({"task": task, "tokens": 4}, "--tokens has no effect with --task"),
        ({"limit": 4}, "--limit has no effect without --task"),
        ({"task": task, "picture": picture}, "has no experts in its FFNs"),
        ({"task": "continuatoins"}, r"no such task: 'continuatoins' .*did you mean 'continuations'"),
        ({"task": task, "beside": [f"{moe}@docs"]}, r"has no adapter 'docs'; it has none at all"),
    ):
        with pytest.raises(UserError, match=message):
            cli.evaluate(folder, **options)
