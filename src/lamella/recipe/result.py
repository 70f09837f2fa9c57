"""The place where a training run leaves its result: a transformers folder that later stages, plans and exports start
from."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

CONFIG = "config.yaml"
"""The resolved recipe, in the folder of a run."""
MODEL = "model"
"""The folder of config.json and tokenizer, in the folder of a run."""


class Result(NamedTuple):
    """What the weights of a run were after a step."""

    out: Path
    """The folder of the run."""
    step: int


def result_folder(out: Path, step: int) -> Path:
    """The transformers folder of a run's checkpoint."""
    return out / "hf" / f"step-{step}"


def result_of(folder: Path) -> Result | None:
    """The run and step that a folder is named after; None where it is no run's result. It need not exist yet."""
    match = re.fullmatch(r"step-(\d+)", folder.name)
    return Result(folder.parents[1], int(match[1])) if match and folder.parent.name == "hf" else None
