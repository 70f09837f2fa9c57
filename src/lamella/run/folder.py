"""The folder of a training run: the truth about it, read by everything that shows or continues it. Imports no torch.

config.yaml         the resolved recipe
model/              config.json and tokenizer of the model, and fingerprint.json
status.json         state, step, and of a failure its reason, class and whether it is worth a retry; replaced whole
metrics.jsonl       one line per logged step
events.jsonl        one line per start, restart, save, fault, ...
tensorboard/  log/  torchtitan's log, one file per rank
checkpoints/step-N/ see `lamella.run.store`
hf/step-N/          a checkpoint as a transformers folder, made on demand
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import xxhash

from lamella.architecture.tokenizer_files import template_fingerprint, tokenizer_hash
from lamella.errors import UserError
from lamella.jsons import Json, json_object
from lamella.recipe.adapters_training import METHOD, make_adapters_training
from lamella.recipe.files import parse_yaml, read_recipe_text
from lamella.recipe.result import CONFIG, MODEL, result_folder, result_of
from lamella.recipe.training import HARMLESS, Recipe, differences, make_recipe
from lamella.run.store import CheckpointStore, absolute

State = Literal["starting", "running", "stopped", "preempted", "finished", "failed"]
# Made before config.yaml: a folder with nothing else in it is a run that did not start.
OWN_NAMES = frozenset({"log", "checkpoints", "tensorboard", "model"})
MODEL_FILES = (
    "*.json", "*.jinja", "additional_chat_templates/*.jinja", "*.model", "*.txt", "*.py", "LICENSE*", "NOTICE",
    "USE_POLICY.md",
)  # fmt: skip
WEIGHT_FILES = (".safetensors", ".safetensors.index.json", ".bin", ".gguf")


def write_atomic(path: Path, text: str) -> None:
    """Replace the file whole: a reader sees the old text or the new."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text)
    temporary.replace(path)


@dataclass(frozen=True)
class RunDir:
    """Names and small files of a run directory."""

    path: Path

    config = property(lambda self: self.path / CONFIG)
    status_file = property(lambda self: self.path / "status.json")
    metrics_file = property(lambda self: self.path / "metrics.jsonl")
    events_file = property(lambda self: self.path / "events.jsonl")
    model = property(lambda self: self.path / MODEL)
    checkpoints = property(lambda self: self.path / "checkpoints")
    tensorboard = property(lambda self: self.path / "tensorboard")
    log = property(lambda self: self.path / "log")

    def log_file(self, rank: int) -> Path:
        """The file that holds what a rank prints."""
        return self.log / f"rank-{rank}.log"

    def hf(self, step: int) -> Path:
        """The folder of a step's checkpoint in the format of transformers."""
        return result_folder(self.path, step)

    def checkpoint(self, step: int) -> Path:
        """The folder of a step's checkpoint, where checkpoints lie inside the run directory."""
        return self.checkpoints / f"step-{step}"

    def exists(self) -> bool:
        """Whether a run was begun here."""
        return self.config.is_file()

    def recipe(self) -> Recipe:
        """The recipe with which the run was begun; UserError for a training of adapters."""
        values = self._values()
        if values.get("method") == METHOD:
            raise UserError(
                f"{self.path} holds a training of adapters, whose result is {values.get('out')}; "
                f"`lamella train {self.config}` goes on with it"
            )
        return make_recipe(values)

    def keys(self) -> Json:
        """What the recipe says beside its defaults, of a training of adapters, too."""
        values = self._values()
        recipe = make_adapters_training(values) if values.get("method") == METHOD else make_recipe(values)
        keys = recipe.model_dump(mode="json", exclude_defaults=True)
        return {"method": METHOD} | keys if values.get("method") == METHOD else keys

    def _values(self) -> Json:
        if not self.exists():
            raise UserError(f"{self.path} is no run directory: it holds no config.yaml")
        return parse_yaml(read_recipe_text(self.config), str(self.config))

    def store(self) -> CheckpointStore:
        """The store of this run's checkpoints."""
        own = not self.exists() or self._values().get("method") == METHOD
        elsewhere = None if own else self.recipe().checkpoint_folder
        return CheckpointStore(absolute(elsewhere or str(self.checkpoints)))

    def steps(self) -> list[int]:
        """Steps of the committed checkpoints, ascending."""
        return self.store().steps()

    def status(self) -> Json:
        """{"state", "step", "steps", "reason", "failure", "retryable", "time"}; state "none" before the first.

        failure: None, or the class of it, see `lamella.run.failure`.
        """
        if not self.status_file.is_file():
            return {"state": "none", "step": 0}
        return json_object(self.status_file.read_bytes(), str(self.status_file))

    def write_status(
        self,
        state: State,
        step: int,
        steps: int,
        reason: str = "",
        failure: str | None = None,
        retryable: bool = False,
    ) -> None:
        """Replace the run's status in one piece."""
        values = {"state": state, "step": step, "steps": steps, "reason": reason, "failure": failure}
        write_atomic(self.status_file, json.dumps(values | {"retryable": retryable, "time": time.time()}) + "\n")

    def event(self, event: str, **values: object) -> None:
        """Append a line; a short line is written in one piece, so several processes may."""
        line = json.dumps({"time": time.time(), "event": event} | values) + "\n"
        with self.events_file.open("a") as file:
            file.write(line)

    def events(self, *kinds: str) -> list[Json]:
        """All events, or those of some kinds."""
        return [line for line in _json_lines(self.events_file) if not kinds or line.get("event") in kinds]

    def metrics(self) -> Iterator[Json]:
        """The logged lines; where a resumed run logged a step again, only the later line."""
        lines = {line["step"]: line for line in self.all_metrics() if isinstance(line.get("step"), int)}
        yield from (lines[step] for step in sorted(lines))

    def all_metrics(self) -> list[Json]:
        """The logged lines as they were written, of steps that were computed twice both."""
        return list(_json_lines(self.metrics_file))

    def fingerprint(self) -> str:
        """The hash of the model that the run began with."""
        return json.loads((self.model / "fingerprint.json").read_text())["fingerprint"]

    def model_folder(self) -> Path:
        """The folder of the model that the run began with, where the weights that do not train still are.

        Raises:
            UserError: it is gone, or holds other weights.
        """
        known = json.loads((self.model / "fingerprint.json").read_text())
        places = dict.fromkeys([Path(self.recipe().model), Path(known.get("path", self.recipe().model))])
        for place in places:
            if (place / "config.json").is_file() and model_fingerprint(place) == known["fingerprint"]:
                return place
        there = " or ".join(map(str, places))
        raise UserError(
            f"{self.path} keeps only what it trained; the other weights are in its model, which is not in {there} "
            "any more: put it back there"
        )

    def identity(self) -> dict[str, str]:
        """What a checkpoint must share with a run to continue it, as hashes: recipe, model, tokenizer."""
        values = self.recipe().model_dump(exclude_defaults=True)  # a key that a later version adds changes nothing
        recipe = json.dumps({key: values[key] for key in sorted(values.keys() - HARMLESS - {"model"})}, sort_keys=True)
        digest = xxhash.xxh3_128_hexdigest(recipe.encode())
        return {"recipe": digest, "model": self.fingerprint(), "tokenizer": tokenizer_hash(self.model)}

    def create(self, recipe: Recipe, model: Path) -> None:
        """Make the folder of a fresh run; config.yaml, which marks it as one, comes last."""
        for folder in (self.log, self.checkpoints, self.tensorboard):
            folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(self.model, ignore_errors=True)
        self.model.mkdir()
        for pattern in MODEL_FILES:
            for source in model.glob(pattern):
                if not source.name.endswith(WEIGHT_FILES) and source.name != "lamella.json":
                    copy = self.model / source.relative_to(model)
                    copy.parent.mkdir(exist_ok=True)
                    shutil.copyfile(source, copy)
        write_atomic(
            self.model / "fingerprint.json",
            json.dumps({"fingerprint": model_fingerprint(model), "path": str(model.resolve())}),
        )
        write_atomic(self.config, recipe.to_yaml())

    def check_same_run(self, recipe: Recipe, model: Path) -> None:
        """UserError that lists the differences, where this folder holds another run than the recipe's."""
        other = differences(self.recipe(), recipe) + model_differences(self.model, model)
        if not other and self.fingerprint() != model_fingerprint(model):
            other = [f"the weights of {model}"]
        if other:
            raise UserError(
                f"{self.path} holds another run; set out= to another folder, or undo:\n"
                + "\n".join(f"  {d}" for d in other)
            )


def run_of_result(folder: Path) -> tuple[RunDir, int] | None:
    """(run, step) where the folder is named as the result of a run, `run/hf/step-N`; it need not exist yet."""
    result = result_of(folder)
    return None if result is None else (RunDir(result.out), result.step)


def _json_lines(file: Path) -> Iterator[Json]:
    """The whole lines of a file that may not exist; a full disk can leave half of one."""
    for text in file.read_bytes().splitlines() if file.is_file() else ():
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            continue
        if isinstance(line, dict):
            yield line


def model_differences(old: Path, new: Path) -> list[str]:
    """'key: old -> new' for each entry of two models' config.json, and a word on tokenizer and chat template."""
    a, b = (flatten(json.loads((folder / "config.json").read_text())) for folder in (old, new))
    keys = [key for key in sorted(a.keys() | b.keys()) if a.get(key) != b.get(key)]
    other = [f"the model's {key}: {a.get(key)!r} -> {b.get(key)!r}" for key in keys]
    if tokenizer_hash(old) != tokenizer_hash(new):
        other.append("the model's tokenizer")
    if template_fingerprint(old) != template_fingerprint(new):
        other.append("the model's chat template")
    return other


def flatten(values: Json, prefix: str = "") -> Json:
    """Nested mappings as one, with keys such as 'moe.num_experts_per_tok'."""
    flat: Json = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def model_fingerprint(model: Path) -> str:
    """Changes with the model's config and weights: its manifest's hashes, or names, sizes, times of the files."""
    digest = hashlib.sha256((model / "config.json").read_bytes())
    manifest = model / "lamella.json"
    if manifest.is_file():
        digest.update(json.dumps(json.loads(manifest.read_text())["tensors"], sort_keys=True).encode())
    else:
        for file in sorted(model.glob("*.safetensors")):
            digest.update(f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}".encode())
    return digest.hexdigest()[:32]
