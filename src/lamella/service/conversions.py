"""What a conversion made, and what has checked it: from the folder's manifest, and from the jobs that measured it.

Imports no torch.
"""

from __future__ import annotations

import math
from pathlib import Path

from lamella.architecture.names import layer_number
from lamella.jsons import Json
from lamella.service.executors.executor import Place, submission_of
from lamella.service.jobs import EvaluateJob, VerifyJob
from lamella.service.listing import Wanted
from lamella.service.store import Run, Store
from lamella.service.streams import finite

MANIFEST = "lamella.json"
ITEM_BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "BF16": 2, "F16": 2, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
MOST_CHECKS = 200
"""So many of the newest verifications and evaluations are looked at."""


def read_json(file: Path) -> Json:
    """A JSON object from a file, NaN as null; {} where there is none."""
    try:
        return finite(file.read_bytes()) or {}
    except OSError:
        return {}


def bytes_of(folder: Path) -> int | None:
    """Bytes of the weights in a folder; None where it has none."""
    sizes = [file.stat().st_size for kind in ("*.safetensors", "*.gguf") for file in folder.glob(kind)]
    return sum(sizes) or None


def conversion_of(folder: Path) -> Json:
    """What the manifest of a converted model says; {} where the folder has none.

    Returns:
        {"source", "recipe", "bytes", "parameters", "tensors", "layers": [{"layer", "parameters": {part: number},
        "bytes"}], "notes": {what calibration, healing or merging found}}
    """
    manifest = read_json(folder / MANIFEST)
    tensors = manifest.get("tensors")
    if not isinstance(tensors, dict):
        return {}
    layers: dict[int, Json] = {}
    sums = {"parameters": 0, "bytes": 0}
    for name, tensor in tensors.items():
        count = math.prod(tensor["shape"])
        size = count * ITEM_BYTES.get(tensor["dtype"], 0)
        sums["parameters"] += count
        sums["bytes"] += size
        layer = layer_number(name)
        if layer is not None:
            of_layer = layers.setdefault(layer, {"layer": layer, "parameters": {}, "bytes": 0})
            part = part_of(name)
            of_layer["parameters"][part] = of_layer["parameters"].get(part, 0) + count
            of_layer["bytes"] += size
    known = ("lamella_version", "source", "recipe", "tensors")
    notes = {key: value for key, value in manifest.items() if key not in known}
    return {
        "source": manifest.get("source", {}), "recipe": manifest.get("recipe", {}), "notes": notes,
        "tensors": len(tensors), "layers": [layers[layer] for layer in sorted(layers)], **sums,
    }  # fmt: skip


def part_of(name: str) -> str:
    """The part of a layer that a tensor belongs to."""
    for word, part in (("frozen", "frozen experts"), ("trainable", "trainable experts"), ("shared", "shared expert")):
        if f".{word}_" in name:
            return part
    if "router" in name or ".gate." in name:
        return "router"
    return "experts" if ".experts." in name else "attention" if "attn" in name else "rest"


def checks_of(store: Store, place: Place, folder: Path | None = None) -> list[Json]:
    """The jobs that have verified or evaluated models, the newest first.

    Args:
        folder: only those of this model.

    Returns:
        [{"run", "kind", "state", "ended", "folder", "summary"}], see `summary_of`.
    """
    runs = [run for kind in ("verify", "evaluate") for run in store.runs(limit=MOST_CHECKS, wanted=Wanted(kind=kind))]
    found = []
    for run in sorted(runs, key=lambda run: -run.seq):
        job = submission_of(run).job
        assert isinstance(job, VerifyJob | EvaluateJob)
        measured = place.cwd / (job.moe if isinstance(job, VerifyJob) else job.folder)
        if folder is None or measured.resolve() == folder.resolve():
            found.append(
                {
                    "run": run.id, "kind": run.kind, "state": run.state, "ended": run.ended,
                    "folder": str(measured.resolve()), "summary": summary_of(run, place),
                }
            )  # fmt: skip
    return found


def summary_of(run: Run, place: Place) -> Json:
    """The figures that say how a check ended; {} before it has."""
    result = read_json(place.folder(run.id) / "result.json")
    if run.kind == "verify":
        checks = [check for check in result.get("checks", []) if isinstance(check, dict)]
        worst = max(
            (check for check in checks if check.get("bound") and "max |logit" in check.get("name", "")),
            key=lambda check: (check.get("figure") or math.inf) / check["bound"], default=None,
        )  # fmt: skip
        bounded = [check for check in checks if check.get("bound") is not None]
        return {} if not checks else {
            "passed": result.get("passed"), "checks": len(bounded),
            "failed": sum(not check.get("passed") for check in bounded), "worst": worst,
        }  # fmt: skip
    figures = {name: result[name] for name in ("model", "dense") if isinstance(result.get(name), dict)}
    return figures
