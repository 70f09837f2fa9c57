"""A checkpoint as a plan sees it: config, the tensors' headers, the files beside them. No weight is read here."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lamella.architecture.embedded import EMBEDDED
from lamella.architecture.families import Family, dense_tensors, family_of
from lamella.architecture.two_matrix import full_names
from lamella.checkpoint.check import check_dense, listed, read_config, read_json
from lamella.checkpoint.embedded import embedded_model
from lamella.checkpoint.remote import AnyPath, RemotePath, is_remote
from lamella.checkpoint.tensors import SourceTensor, read_header
from lamella.checkpoint.tying import as_stored, say_once, stray_files
from lamella.errors import UserError
from lamella.jsons import Json

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
# Copied byte for byte from the source folder: tokenizer, chat template, generation defaults, licence.
LICENCE_FILES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE", "USE_POLICY.md")
SIDECARS = (
    "generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "tekken.json", "vocab.json",
    "merges.txt", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "chat_template.json",
    *LICENCE_FILES,
)  # fmt: skip
SIDECAR_FOLDERS = ("additional_chat_templates",)  # named templates beside the default one


@dataclass(frozen=True)
class Checkpoint:
    """A dense model that can be converted: everything is checked, nothing is read."""

    name: str
    """As a person would call it: NAME@COMMIT of the hub, the path that was given, or the embedded model's name."""
    family: Family
    config: Json
    tensors: dict[str, SourceTensor]
    licence: str | None
    copy_sidecars: Callable[[Path], None]
    """Writes tokenizer, generation config and the like into a folder."""

    @classmethod
    def open(cls, model: str | Path | None = None, revision: str | None = None) -> Checkpoint:
        """Find and check a model.

        Args:
            model: a folder with config.json and safetensors, its URL (s3://bucket/model), a .gguf file, a hub name, or
                "embedded" or None for the embedded model.
            revision: branch, tag or commit of a hub name; None: the newest.

        Raises:
            UserError: no such model, an architecture that cannot be converted, or tensors that do not match the config.
        """
        if model is None or str(model) == EMBEDDED:
            return cls._from_folder(embedded_model(), "SmolLM2-135M-Instruct (embedded)", "apache-2.0")
        if is_remote(model):
            remote = RemotePath.open(str(model))
            if not remote.is_dir():
                raise UserError(f"no such model: there is no folder {model}")
            return cls._from_folder(remote, str(model))
        path = Path(model).expanduser()
        if revision is not None and path.exists():
            raise UserError(f"{model} is on this disk, where it has no revision {revision!r}; leave @{revision} out")
        if path.suffix == ".gguf":
            from lamella.checkpoint.gguf import open_gguf  # imports torch

            return cls(path.name, *open_gguf(path))
        if path.is_file():
            raise UserError(
                f"{model} is a file; give the folder that holds config.json and the safetensors, or a .gguf file"
            )
        if path.is_dir():
            return cls._from_folder(path, str(model))
        folder = download(str(model), revision)
        return cls._from_folder(folder, f"{model}@{folder.name}")

    @classmethod
    def _from_folder(cls, folder: AnyPath, name: str, licence: str | None = None) -> Checkpoint:
        config = read_config(folder)
        family = family_of(config)
        found = full_names(read_folder(folder), dense_tensors(config, family), family)
        tensors = {name: dataclasses.replace(tensor, name=name) for name, tensor in found.items()}
        config = as_stored(config, tensors, name)
        check_dense(tensors, config, family, name)
        return cls(
            name, family, config, tensors, licence or card_licence(folder), lambda out: copy_sidecars(folder, out)
        )


def read_stored_config(folder: Path) -> Json:
    """config.json of a dense or converted folder that is trained or exported, with what its weights say of the head.

    Raises:
        UserError: another safetensors file of the folder holds a tensor of the model, too; torch's reader would take
            either.
    """
    config = read_config(folder)
    if not any(folder.glob("*.safetensors")):
        return config
    tensors = read_folder(folder)
    for file in stray_files(folder, tensors):
        if twice := [name for name in read_header(folder / file) if name in tensors]:
            raise UserError(f"{folder / file} holds {listed(twice)} a second time; move what is not wanted away")
    return as_stored(config, tensors, str(folder))


def read_folder(folder: AnyPath) -> dict[str, SourceTensor]:
    """All tensors of a folder's safetensors, from the headers alone; an index and its files must agree.

    Where there are both a single file and an index of others, transformers loads the single file, and so do we.
    """
    if (folder / SINGLE_FILE).is_file():
        tensors = read_header(folder / SINGLE_FILE)
        if stray := stray_files(folder, tensors):
            say_once(f"{folder}: {SINGLE_FILE} is read, as transformers does; {listed(stray)} beside it is passed over")
        return tensors
    if (folder / INDEX_FILE).is_file():
        return _read_sharded(folder)
    if any(folder.glob("*.bin")) or any(folder.glob("*.pth")):
        raise UserError(f"{folder} holds pickled weights, which can run code; save the model as safetensors first")
    raise UserError(f"{folder} holds no weights: neither {SINGLE_FILE} nor {INDEX_FILE}")


def _read_sharded(folder: AnyPath) -> dict[str, SourceTensor]:
    weight_map = read_json(folder / INDEX_FILE, "").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{folder / INDEX_FILE} has no weight_map; download it again")
    files = sorted({str(file) for file in weight_map.values()})
    if outside := [file for file in files if Path(file).name != file]:
        raise UserError(f"{INDEX_FILE} names {outside[0]}, which is not a file beside it")
    present = {path.name for path in folder.iterdir() if path.is_file()}
    if missing := [file for file in files if file not in present]:
        raise UserError(f"{INDEX_FILE} names {', '.join(missing)}, not in {folder}; download what is missing")
    headers = {file: read_header(folder / file) for file in files}
    if lost := [name for name, file in weight_map.items() if name not in headers[file]]:
        raise UserError(f"{INDEX_FILE} says that {weight_map[lost[0]]} holds {listed(lost)}, but it does not")
    if stray := [name for file in files for name in headers[file] if weight_map.get(name) != file]:
        raise UserError(f"the files beside {INDEX_FILE} hold {listed(stray)}, which it does not name there")
    return {name: tensor for header in headers.values() for name, tensor in header.items()}


def copy_sidecars(folder: AnyPath, out: Path, names: tuple[str, ...] = SIDECARS) -> None:
    """Tokenizer, generation config, chat templates and licence files, byte for byte."""
    for name in names:
        if (folder / name).is_file():
            (out / name).write_bytes((folder / name).read_bytes())
    for name in SIDECAR_FOLDERS if names == SIDECARS else ():
        for file in (folder / name).iterdir() if (folder / name).is_dir() else ():
            (out / name).mkdir(exist_ok=True)
            (out / name / file.name).write_bytes(file.read_bytes())


def card_licence(folder: AnyPath) -> str | None:
    """The `license:` of a model card's front matter, if there is one."""
    card = folder / "README.md"
    if not card.is_file():
        return None
    text = card.read_text(encoding="utf-8", errors="replace")
    front = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
    found = re.search(r"^license:\s*([\w.\-]+)", front[1], re.MULTILINE) if front else None
    return found[1] if found else None


def download(name: str, revision: str | None = None) -> Path:
    """A hub model's config, safetensors and tokenizer, in the hub's own cache; UserError if there are none.

    The folder's name is the commit, the newest where no `revision` (branch, tag or commit) is asked for.
    """
    if not re.fullmatch(r"[\w\-.]+(/[\w\-.]+)?", name) or name.startswith("."):
        raise UserError(f"no such model: {name} is no folder here, and cannot be a hub name")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    wanted = ["*.safetensors", INDEX_FILE, "README.md", *SIDECARS, *(f"{name}/*" for name in SIDECAR_FOLDERS)]
    # Some repositories hold the weights a second time, in another format, in a subfolder or as "consolidated".
    unwanted = ["*/*.safetensors", "consolidated*"]
    try:
        small = snapshot_download(name, revision=revision, allow_patterns=["config.json"])
        family_of(read_config(Path(small)))  # before the large files
        files = ["config.json", *wanted]
        return Path(snapshot_download(name, revision=revision, allow_patterns=files, ignore_patterns=unwanted))
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"no such model: {name} is no folder here, and the hub did not give it ({reason})") from None
