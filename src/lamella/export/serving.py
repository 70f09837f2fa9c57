"""Which server can serve a folder, and how it is started: `transformers serve`, llama.cpp's or vLLM's.

Each answers the OpenAI-compatible `/v1/completions` and `/v1/chat/completions` on loopback. What was tried with each is
in docs/how-to/export-and-serve.md.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
import shutil
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from lamella.architecture.converted import is_converted
from lamella.checkpoint.check import read_config
from lamella.errors import UserError, check_choice
from lamella.export.apart import find_apart, path_with
from lamella.export.gguf import server as llama_cpp_server

HOST = "127.0.0.1"
AUTO = "auto"
Kind = Literal["stock", "converted", "gguf"]


@dataclass(frozen=True)
class ServedModel:
    """What is to be served, and how."""

    path: Path
    """The folder, or the GGUF file."""
    kind: Kind
    port: int
    context: int | None = None
    """Tokens of prompt and answer together; None: as the model or the server says."""
    device: str = AUTO
    dtype: str = AUTO

    @property
    def name(self) -> str:
        """What clients call it."""
        return self.path.stem if self.kind == "gguf" else self.path.resolve().name


@dataclass(frozen=True)
class Command:
    """A server that is ready to be started."""

    engine: str
    words: list[str]
    model: str
    """What a request names as its model."""
    port: int
    environment: dict[str, str] = field(default_factory=dict)
    """Variables beside those that are there."""

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.port}/v1"

    def describe(self) -> str:
        """The line that a shell would start it with."""
        return shlex.join([*(f"{key}={value}" for key, value in self.environment.items()), *self.words])


@dataclass(frozen=True)
class Engine:
    """A server that others make."""

    serves: tuple[Kind, ...]
    command: Callable[[ServedModel], Command | None]
    """None where it is not installed."""
    missing: str
    """What to do then."""


def open_served(
    path: Path, port: int, context: int | None = None, device: str = AUTO, dtype: str = AUTO
) -> ServedModel:
    """UserError for what no server could serve."""
    if path.is_file() and path.suffix == ".gguf":
        return ServedModel(path, "gguf", port, context, device, dtype)
    if (path / "config.yaml").is_file() and not (path / "config.json").is_file():
        raise UserError(f"{path} is a run directory; export it first: lamella export {path} --to auto --out DIR")
    files = sorted(path.glob("*.gguf")) if path.is_dir() else []
    if len(files) > 1:
        raise UserError(f"{path} holds {len(files)} GGUF files; give one of them: {', '.join(map(str, files[:4]))}")
    if files:
        return ServedModel(files[0], "gguf", port, context, device, dtype)
    if not (path / "config.json").is_file():
        raise UserError(f"{path} holds no model: no config.json and no GGUF file")
    kind: Kind = "converted" if is_converted(read_config(path)) else "stock"
    if not any(path.glob("*.safetensors")):
        raise UserError(f"{path} holds no weights: no safetensors file")
    return ServedModel(path, kind, port, context, device, dtype)


def command_for(model: ServedModel, engine: str = AUTO) -> Command:
    """The server to start.

    Args:
        engine: a key of ENGINES; "auto" takes llama.cpp for GGUF files, vLLM for other models where it is installed
            and knows them, else transformers.

    Raises:
        UserError: an engine that cannot serve this model, is not installed or has no such option; a port in use.
    """
    check_choice("engine", engine, (AUTO, *ENGINES))
    fitting = {name: row for name, row in ENGINES.items() if model.kind in row.serves}
    if engine not in (AUTO, *fitting):
        hint = ""
        if model.kind == "converted":
            hint = f"; or export it first, for any of them: lamella export {model.path} --to auto --out DIR"
        raise UserError(f"{engine} cannot serve {model.path} ({_KINDS[model.kind]}); {', '.join(fitting)} can{hint}")
    _check_port(model.port)
    chosen = list(fitting) if engine == AUTO else [engine]
    for name in chosen:
        if (command := fitting[name].command(model)) is not None:
            return command
    raise UserError("; ".join(f"{name} is not installed: {fitting[name].missing}" for name in reversed(chosen)))


def run(command: Command) -> None:
    """Become the server, so that signals reach it."""
    os.environ.update(command.environment)
    os.execvp(command.words[0], command.words)


def _check_port(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise UserError(f"port {port} cannot be had ({error.strerror}); pass another --port") from None


def _transformers(model: ServedModel) -> Command | None:
    places = [find_apart(package, SERVING, "transformers-serving") for package in ("openai", "fastapi", "uvicorn")]
    if None in places:
        return None
    if model.context is not None:
        raise UserError("--context has no effect on transformers serve, which takes the model's own; leave it out")
    path = str(model.path)
    words = [sys.executable, "-m", "transformers.cli.transformers", "serve", path, "--host", HOST]
    words += ["--port", str(model.port), "--device", model.device, "--dtype", model.dtype]
    if model.kind == "converted":
        words.append("--trust-remote-code")
    return Command(
        "transformers", words, path, model.port, _offline() | path_with(max(filter(None, places), default=""))
    )


def _llama_cpp(model: ServedModel) -> Command | None:
    if model.dtype != AUTO or model.device != AUTO:
        raise UserError("--dtype and --device have no effect on llama.cpp, which takes the file's; leave them out")
    folder = find_apart("xllamacpp", "LAMELLA_XLLAMACPP", "xllamacpp")
    if folder is not None:
        asked = {"model": str(model.path), "name": model.name, "port": model.port, "context": model.context or 0}
        words = [sys.executable, llama_cpp_server.__file__, json.dumps(asked)]
        return Command("llama.cpp", words, model.name, model.port, path_with(folder))
    if shutil.which("llama-server") is None:
        return None
    words = ["llama-server", "--model", str(model.path), "--alias", model.name, "--host", HOST]
    words += ["--port", str(model.port), "--ctx-size", str(model.context or 0), "--jinja"]
    return Command("llama.cpp", words, model.name, model.port)


def _vllm(model: ServedModel) -> Command | None:
    python = os.environ.get(VLLM_PYTHON) or (sys.executable if importlib.util.find_spec("vllm") else None)
    if python is None:
        return None
    if shutil.which(python) is None:
        raise UserError(f"{python}, which ${VLLM_PYTHON} names, is no program")
    # The command `vllm serve` looks for a distribution of this name, which the builds for CPUs do not have.
    words = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model.path)]
    words += ["--served-model-name", model.name, "--host", HOST, "--port", str(model.port), "--dtype", model.dtype]
    if model.context is not None:
        words += ["--max-model-len", str(model.context)]
    environment = _offline()
    if model.device == "cpu" or not Path("/dev/nvidiactl").exists():
        words.append("--enforce-eager")
        usual = {"VLLM_CPU_KVCACHE_SPACE": "4", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
        environment |= {key: value for key, value in usual.items() if key not in os.environ}
    return Command("vllm", words, model.name, model.port, environment)


def _offline() -> dict[str, str]:
    """The model is on this disk, so nothing is asked of the hub; its cache must exist all the same."""
    from huggingface_hub.constants import HF_HUB_CACHE

    Path(HF_HUB_CACHE).mkdir(parents=True, exist_ok=True)  # transformers serve answers /v1/models by looking there
    return {"HF_HUB_OFFLINE": "1"}


VLLM_PYTHON = "LAMELLA_VLLM_PYTHON"
SERVING = "LAMELLA_TRANSFORMERS_SERVING"
_KINDS: dict[Kind, str] = {
    "stock": "a folder of transformers",
    "converted": "a converted model, which needs the code in its folder",
    "gguf": "a GGUF file",
}
# In the order in which `auto` looks for them.
ENGINES = {
    "llama.cpp": Engine(("gguf",), _llama_cpp, "pip install 'lamella[serve]', or put llama-server on the PATH"),
    "vllm": Engine(
        ("stock",), _vllm, f"pip install vllm, or name the Python of an environment that has it in ${VLLM_PYTHON}"
    ),
    "transformers": Engine(("stock", "converted"), _transformers, "pip install 'transformers[serving]'"),
}
