"""The names of served models: MODEL.gguf or its folder, and http://HOST:PORT/v1, with #NAME behind it where that is one
of several models."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from lamella.errors import UserError
from lamella.evaluate.checkpoints import model_path
from lamella.export.gguf.llama_cpp import find

MAGIC = b"GGUF"


class Address(NamedTuple):
    """Of an endpoint."""

    root: str
    """Without /v1."""
    model: str | None
    """The name that a request gives; None: the only one that it serves."""


def is_url(name: str | Path) -> bool:
    """Whether it is the address of an endpoint."""
    return str(name).startswith(("http://", "https://"))


def is_served(name: str | Path) -> bool:
    """Whether it is an endpoint, a GGUF file, or a folder with GGUF files and no other model."""
    folder = Path(name).expanduser()
    alone = not (folder / "config.json").exists() and any(folder.glob("*.gguf"))
    return is_url(name) or folder.suffix == ".gguf" or alone


def address_of(name: str) -> Address:
    """The parts of an endpoint's name."""
    url, _, model = name.partition("#")
    return Address(url.rstrip("/").removesuffix("/v1"), model or None)


def gguf_file(name: str) -> Path:
    """The file; UserError where there is none, it is another, or llama.cpp is not installed."""
    file = Path(name).expanduser()
    if file.is_dir():
        files = sorted(file.glob("*.gguf"))
        if len(files) > 1:
            raise UserError(f"{name} holds {len(files)} GGUF files; give one of them: {', '.join(map(str, files[:4]))}")
        (file,) = files
    if not file.is_file():
        raise UserError(f"no such model: {name}; pass a GGUF file that is there, or the folder of a model")
    with file.open("rb") as opened:
        if opened.read(len(MAGIC)) != MAGIC:
            raise UserError(f"{name} is not a GGUF file; export one with `lamella export DIR --to gguf --out OUT`")
    if find() is None:
        raise UserError("a GGUF file is computed by llama.cpp, which is not installed: pip install 'lamella[serve]'")
    return file


def tokenizer_folder(name: str, tokenizer: str | None) -> str:
    """The folder or hub name of a served model's tokenizer: `tokenizer`, or else what lies beside its file.

    Raises:
        UserError: there is none.
    """
    if tokenizer is not None:
        return model_path(tokenizer)
    if not is_url(name) and ((beside := gguf_file(name).parent) / "tokenizer.json").is_file():
        return str(beside)
    raise UserError(
        f"{name} needs --tokenizer DIR: the folder of the model that it was made of, which tells the tokens"
    )


def load_tokenizer(folder: str) -> PreTrainedTokenizerBase:
    """UserError where there is none."""
    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"cannot load the tokenizer of {folder}: {reason}") from error
