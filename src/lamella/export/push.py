"""`lamella push`: a folder to the hub, through huggingface_hub.

Interrupted and started again, it skips what the hub has: whole files by their hash, and parts of large ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import httpx

from lamella.errors import UserError

# Of a folder's files, those that no reader of the model needs.
_NOT_SENT = (".git", ".cache", "__pycache__")


@dataclass(frozen=True)
class File:
    """A file that would be sent."""

    name: str
    """Inside of the folder, with slashes."""
    bytes: int


def files_of(folder: Path) -> list[File]:
    """What would be sent, largest first; UserError for what is no folder of a model."""
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder; give one that `lamella export` or `lamella convert` wrote")
    if not (folder / "config.json").is_file() and not any(folder.glob("*.gguf")):
        run = " (a run directory: export it first)" if (folder / "config.yaml").is_file() else ""
        raise UserError(f"{folder} holds no model: no config.json and no GGUF file{run}")
    paths = [path for path in folder.rglob("*") if path.is_file()]
    names = [path.relative_to(folder) for path in paths]
    found = [
        File(name.as_posix(), path.stat().st_size)
        for name, path in zip(names, paths, strict=True)
        if not set(name.parts) & set(_NOT_SENT)
    ]
    return sorted(found, key=lambda file: (-file.bytes, file.name))


def check_repo(repo: str) -> None:
    """UserError for what is no name of a repository."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UserError(f"{repo!r} is no name of a repository, such as me/my-model: {_first_line(error)}") from None


def push(folder: Path, repo: str, *, private: bool = False, revision: str | None = None) -> str:
    """Send a folder, made if the hub has none of this name; the URL of the commit.

    Raises:
        UserError: no model there, no such name, no token or one that may not write there, no network.
    """
    files_of(folder)
    check_repo(repo)
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    if get_token() is None:
        raise UserError("no token for the hub; log in with `hf auth login`, or set HF_TOKEN")
    api = HfApi()
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        sent = api.upload_folder(
            repo_id=repo,
            folder_path=folder,
            revision=revision,
            commit_message=f"Upload {folder.resolve().name}",
            ignore_patterns=[pattern for name in _NOT_SENT for pattern in (f"{name}/**", f"**/{name}/**")],
        )
    except OfflineModeIsEnabled:
        raise UserError("HF_HUB_OFFLINE is set, so nothing can be sent; unset it, or pass --dry-run") from None
    except HfHubHTTPError as error:
        code = getattr(error.response, "status_code", None)
        meaning = _MEANINGS.get(code or 0, "try again; what was sent is not sent once more")
        raise UserError(f"{api.endpoint} refused {repo} ({_first_line(error)}); {meaning}") from None
    except (httpx.TransportError, ConnectionError) as error:
        raise UserError(
            f"{api.endpoint} cannot be reached ({_first_line(error)}); started again, it goes on where it was"
        ) from None
    return str(sent.commit_url)


_MEANINGS = {
    401: "the token is not valid; log in with `hf auth login`, or set HF_TOKEN",
    403: "the token may not write there; take one with write access, or another name",
    404: "the account has no such repository or revision",
}


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
