"""`lamella push` as far as it can be tried without the hub: what would be sent, and what it says where it cannot be."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lamella.cli import app
from lamella.errors import UserError
from lamella.export.push import files_of
from support.trained_model import save_trained


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_trained(tmp_path_factory.mktemp("push") / "moe")
    (folder / ".cache/huggingface").mkdir(parents=True)
    (folder / ".cache/huggingface/state").write_text("of an earlier upload")
    return folder


class Refusing(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(401)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def refusing() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Refusing)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def push(model: Path, **environment: str) -> str:
    """The one line that the command ends with, exit code 2, in an environment without any token but a given one."""
    words = [sys.executable, "-m", "lamella", "push", str(model), "me/my-model"]
    if not Path(sys.modules["lamella"].__file__ or "").with_name("__main__.py").is_file():
        words[1:3] = ["-c", "from lamella.cli import main; main()"]
    import os

    kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
    kept |= {"HF_HOME": str(model.parent / "hf"), "NO_PROXY": "127.0.0.1"} | environment
    done = subprocess.run(words, env=kept, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    return done.stderr.strip().splitlines()[-1]


def test_a_dry_run_lists_files_and_sizes(model: Path) -> None:
    result = CliRunner().invoke(app, ["push", str(model), "me/my-model", "--dry-run"])
    assert result.exit_code == 0, result.output
    weights = (model / "model.safetensors").stat().st_size
    assert f"{weights / 1e6:.3f} MB  model.safetensors" in result.output
    assert ".cache" not in result.output
    assert result.output.splitlines()[-1].endswith(f"in {len(files_of(model))} files would go to me/my-model")


@pytest.mark.faults
@pytest.mark.slow
def test_one_line_where_nothing_can_be_sent(model: Path, refusing: str) -> None:
    assert push(model).startswith("error: no token for the hub; log in with `hf auth login`, or set HF_TOKEN")
    nobody = push(model, HF_TOKEN="hf_x", HF_ENDPOINT="http://127.0.0.1:9")
    assert nobody.startswith("error: http://127.0.0.1:9 cannot be reached")
    assert push(model, HF_TOKEN="hf_x", HF_HUB_OFFLINE="1").startswith("error: HF_HUB_OFFLINE is set")
    assert "the token is not valid" in push(model, HF_TOKEN="hf_x", HF_ENDPOINT=refusing)


@pytest.mark.faults
def test_what_is_no_model_or_no_name_is_refused(model: Path, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("")
    for folder, repo, words in (
        (tmp_path, "me/x", "a run directory: export it first"),
        (tmp_path / "none", "me/x", "is no folder"),
        (model, "me/my model", "is no name of a repository"),
    ):
        result = CliRunner().invoke(app, ["push", str(folder), repo, "--dry-run"])
        assert isinstance(result.exception, UserError)
        assert words in str(result.exception)
