"""What imports torch, and what must not: the command line answers at once, whatever extras are installed."""

import resource
import subprocess
import sys

import pytest

HEAVY = (
    "torch", "transformers", "datasets", "torchtitan", "pyarrow", "fastapi", "sqlalchemy", "uvicorn", "plotly",
    "lm_eval", "xllamacpp", "wandb", "mlflow", "trackio", "quack", "peft",
)  # fmt: skip


def typed(*words: str) -> str:
    """Python code that does what a command line does."""
    lines = [f"import sys; sys.argv = {['lamella', *words]!r}", "from lamella.cli import main"]
    return "\n".join([*lines, "try: main()", "except SystemExit: pass"])


# Seconds of CPU that an answer may take; with an idle core it is the time that a person waits.
ANSWERS = {
    ("--help",): 0.5,
    ("convert", "--help"): 1.0,
    ("train", "lrr=1"): 1.0,
    ("plan", "lrr=1"): 1.0,
    ("convert", "method=slice", "slicess=4"): 1.0,
    ("convert", "method=partition", "partz=4"): 1.0,
    ("keys", "train"): 1.0,
}


@pytest.mark.parametrize("code", ["import lamella", "import lamella.cli, lamella.checkpoint.embedded"])
def test_no_torch_before_it_is_needed(code: str) -> None:
    assert heavy_after(code)[0] == "heavy: []"


@pytest.mark.parametrize("words", ANSWERS, ids=" ".join)
def test_the_command_line_answers_at_once(words: tuple[str, ...]) -> None:
    heavy, cpu_s = heavy_after(typed(*words))
    assert heavy == "heavy: []"
    assert cpu_s < ANSWERS[words]


def heavy_after(code: str) -> tuple[str, float]:
    """The heavy packages that are imported in a new process behind this code, and its seconds of CPU."""
    code += f"\nimport sys\nprint('heavy:', [name for name in {HEAVY} if name in sys.modules])"
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return done.stdout.splitlines()[-1], cpu_s
