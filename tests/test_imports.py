"""What imports torch, and what must not: the command line answers at once, whatever extras are installed."""

import resource
import subprocess
import sys

import pytest

HEAVY = (
    "torch", "transformers", "datasets", "torchtitan", "pyarrow", "fastapi", "sqlalchemy", "uvicorn", "plotly",
    "lm_eval", "xllamacpp", "wandb", "mlflow", "trackio", "quack", "peft",
)  # fmt: skip


HELP = (
    "import sys; sys.argv = ['lamella', '--help']\nfrom lamella.cli import main\ntry: main()\nexcept SystemExit: pass"
)


@pytest.mark.parametrize("code", ["import lamella", "import lamella.cli, lamella.checkpoint.embedded"])
def test_no_torch_before_it_is_needed(code: str) -> None:
    assert heavy_after(code)[0] == "heavy: []"


def test_help_answers_at_once() -> None:
    """In half a second of CPU; with an idle core that is how long a person waits.

    The first of three processes may compile what it imports, and any of them may share its core: the least counts.
    """
    measured = [heavy_after(HELP) for _ in range(3)]
    assert {heavy for heavy, _ in measured} == {"heavy: []"}
    assert min(cpu_s for _, cpu_s in measured) < 0.5


def heavy_after(code: str) -> tuple[str, float]:
    """The heavy packages that are imported in a new process behind this code, and its seconds of CPU."""
    code += f"\nimport sys\nprint('heavy:', [name for name in {HEAVY} if name in sys.modules])"
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return done.stdout.splitlines()[-1], cpu_s
