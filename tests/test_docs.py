"""The README and docs/: every command is checked or run, the reference covers the code, the pictures are current."""

from __future__ import annotations

import ast
import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import yaml

from lamella.recipe.adapters_training import AdaptersTraining
from lamella.recipe.check import checked, refuse
from lamella.recipe.conversion import make_conversion
from lamella.recipe.keys import keys
from lamella.recipe.methods import METHODS
from lamella.recipe.training import Recipe, make_recipe
from support.doc_commands import ROOT, SET_UP, blocks, check, commands, pages, run, run_python, to_run
from support.models import save_llama

sys.path.insert(0, str(ROOT / "docs"))

import pictures
import reference

README = ROOT / "README.md"
CHAT_TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
CHAT_TEMPLATE += "{% if add_generation_prompt %}assistant: {% endif %}"


def test_readme_is_short_and_begins_with_set_up_the_main_job_and_the_tests() -> None:
    assert commands(README)[:4] == [*SET_UP, "uv run lamella demo", "uv run pytest"]
    assert len(README.read_text().splitlines()) <= 120


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_command_is_one_that_the_command_line_takes(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for command in commands(page):
        check(command)
    for block in blocks(page, "python") if "extend" not in page.parts else ():
        compile(block, page.name, "exec", ast.PyCF_ONLY_AST)
    for block in blocks(page, "yaml"):
        values = yaml.safe_load(block)
        if "domains" in values:
            refuse(checked(AdaptersTraining, values)[1])
        else:
            (make_conversion if "method" in values else make_recipe)(values)


@pytest.mark.parametrize(
    ("command", "complaint"),
    [
        ("uv run lamella convrt", "no command"),
        ("uv run lamella convert --modle x", "modle"),
        ("uv run lamella convert method=partition activ=4", "activ"),
        ("uv run lamella train launch/recipes/demo.yaml stepz=4", "stepz"),
        ("uv run lamella train launch/recipes/no.yaml", "no.yaml"),
        ("uv run torchrun --nproc-per-node=3 train.py lrr=1", "lrr"),
        ("uv run benchmarks/quality.py --fast", "--fast"),
        ("uv run pytest -m slows", "slows"),
        ("rm -r artifacts", "not run by uv"),
    ],
)
def test_a_wrong_command_is_noticed(command: str, complaint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(BaseException, match=complaint):
        check(command)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that looks like the checkout and holds a tiny dense model that can converse."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("pyproject.toml", "README.md", "convert_by_slicing.py", "train.py", "launch", "tests", "src"):
        (folder / name).symlink_to(ROOT / name)
    save_llama(folder / "dense", layers=5)
    (folder / "dense" / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return folder


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("uv") is None, reason="uv is not on the PATH")
def test_every_command_works(checkout: Path) -> None:
    """In the order of reading, in one folder, as a reader would; the reader's model is a tiny one."""
    for page, language, what in to_run():
        try:
            (run if language == "bash" else run_python)(what, checkout)
        except BaseException as error:
            error.add_note(f"{page.relative_to(ROOT)}: {what}")
            raise
    check_demo(json.loads((checkout / "artifacts/demo/report.json").read_text()))
    assert (checkout / "artifacts/demo/training.png").stat().st_size > 10_000
    assert json.loads((checkout / "artifacts/llama-glm4/config.json").read_text())["model_type"] == "glm4_moe"


def check_demo(report: dict) -> None:
    """The demo's figures, within what the project promises of the real model."""
    assert 10 < report["dense"]["perplexity"] < 25
    assert report["convert"]["peak_rss_over_imports_mib"] < 1.2 * 1024
    assert report["parity"]["checks_passed"]
    assert report["parity"]["max_abs_logit_diff"] <= 1e-3
    assert report["parity"]["greedy_tokens_equal"] == 64
    assert report["routed"]["twin_ppl_ratio"] <= 1.0005
    assert report["routed"]["flat_ppl_ratio"] > 10
    assert report["train"]["ranks"] == 3
    assert report["train"]["frozen_unchanged"]
    assert report["train"]["resume_bit_equal"]
    assert report["train"]["heldout_loss_after"] < report["train"]["heldout_loss_before"]
    assert report["export"]["architecture"] == "Glm4MoeForCausalLM"
    assert report["export"]["max_abs_logit_diff"] <= 1e-3
    assert "Paris" in report["answer"]["answer"]


def test_the_reference_has_every_command_and_option() -> None:
    page = reference.commands_page()
    for words, command in reference.commands():
        assert f"## {words}\n" in page
        for parameter in command.params:
            if words != "tests/moe_logit_match.py" and not parameter.hidden:
                assert f"| `{reference.option_row(parameter).split('`')[1]}` |" in page
                assert parameter.help, f"{words} {parameter.name} has no help"


def test_the_reference_has_every_key_of_every_recipe_and_says_what_it_does() -> None:
    training, conversion = reference.training_page(), reference.conversion_page()
    rows = [(key, training, True) for key in keys("train")]
    rows += [(key, conversion, False) for method in (None, *METHODS) for key in keys("convert", method)]
    assert set(Recipe.model_fields) <= {key.name for key, page, _ in rows if page is training}
    for key, page, mark in rows:
        assert reference.key_row(key, mark) in page
        assert key.text.endswith("."), f"{key.name} has no sentence that says what it does"


NAMED_PATH = re.compile(r"`((?:src|tests|launch|benchmarks|scripts|docs)/[\w./*-]+)`|\]\((?!https?:|#)([\w./-]+)")


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_file_that_a_page_names_is_there(page: Path) -> None:
    for named, linked in NAMED_PATH.findall(page.read_text()):
        if not linked.startswith("../reference/") and not linked.startswith("reference/"):  # made by docs/hooks.py
            assert (ROOT / named if named else page.parent / linked).exists(), named or linked


@pytest.mark.parametrize("page", sorted((ROOT / "docs/extend").glob("*.md")), ids=lambda page: page.stem)
def test_code_that_developers_are_shown_stands_in_the_source(page: Path) -> None:
    source = "".join("".join(path.read_text().split()) for path in (ROOT / "src/lamella").rglob("*.py"))
    for block in blocks(page, "python"):
        assert "".join(block.split()) in source, block


def test_the_pictures_are_those_that_the_script_draws(tmp_path: Path) -> None:
    """If they are not, run docs/pictures.py; a new room gets a line in its table."""
    pictures.draw(tmp_path)
    drawn = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    committed = {path.name: path.read_bytes() for path in pictures.FOLDER.glob("*.svg")}
    assert drawn.keys() == committed.keys()
    assert [name for name in drawn if drawn[name] != committed[name]] == []
