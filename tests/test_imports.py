"""What imports torch, and what must not: the command line answers at once."""

import subprocess
import sys

import pytest

HEAVY = ("torch", "transformers", "datasets", "torchtitan", "pyarrow")
HELP = (
    "import sys; sys.argv = ['lamella', '--help']\nfrom lamella.cli import main\ntry: main()\nexcept SystemExit: pass"
)


@pytest.mark.parametrize(
    "code", ["import lamella", "import lamella.cli, lamella.architecture, lamella.checkpoint.embedded", HELP]
)
def test_no_torch_before_it_is_needed(code):
    code += f"\nimport sys\nprint('heavy:', [name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "heavy: []"


def test_help_takes_little_import_time():
    """Under half a second where nothing else runs; the bound here leaves room for a busy machine."""
    done = subprocess.run([sys.executable, "-X", "importtime", "-c", HELP], capture_output=True, text=True, timeout=60)
    # rows: "import time: self [us] | cumulative | name"
    rows = [
        line.split("|") for line in done.stderr.splitlines() if line.startswith("import time:") and "[us]" not in line
    ]
    total_s = sum(int(row[0].removeprefix("import time:")) for row in rows) / 1e6
    assert len(rows) > 50
    assert total_s < 2
