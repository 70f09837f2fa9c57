"""Whether Weights & Biases, MLflow and Trackio hold what metrics.jsonl holds, offline, after the demo was trained.

Run: uv run --extra track scripts/check_trackers.py [FOLDER]

It is trained in two parts, as a run that is stopped and goes on; then each tracker's own store is read: MLflow through
its client, Trackio through its storage, Weights & Biases from the records of its offline file. Exit code: 77 where one
of them is not installed. FOLDER keeps the run; else it goes.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from lamella.installation import shipped
from lamella.run.folder import RunDir

MISSING = 77
NAMES = ("wandb", "mlflow", "trackio")
STEPS, STOP = 4, 2
SMALL = {
    "steps": STEPS, "seq_len": 64, "samples_per_step": 2, "samples_per_micro_batch": 2, "heldout_samples": 2,
    "heldout_every_steps": 2, "save_every_steps": 2, "warmup_steps": 1, "tensorboard": "false",
    "track": f"[{', '.join(NAMES)}]",
}  # fmt: skip
Kept = dict[int, dict[str, float]]
"""Step -> name -> value."""


def records(raw: bytes) -> Iterator[bytes]:
    """Of a .wandb file: LevelDB's log format (blocks of 32 KiB; checksum, length, kind) behind 7 bytes of its own."""
    at, parts = 7, b""
    while at + 7 <= len(raw):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        length, kind = int.from_bytes(raw[at + 4 : at + 6], "little"), raw[at + 6]
        parts += raw[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b""


def in_wandb(run: RunDir) -> tuple[set[str], Kept]:
    """(the ids of the runs in its files below the run directory, what they hold)."""
    from wandb.proto.wandb_internal_pb2 import Record

    ids, kept = set(), Kept()
    for file in sorted((run.path / "wandb").glob("offline-run-*/*.wandb")):
        for data in records(file.read_bytes()):
            record = Record.FromString(data)
            if record.WhichOneof("record_type") == "run":
                ids.add(record.run.run_id)
            if record.WhichOneof("record_type") == "history":
                items = {"/".join(item.nested_key) or item.key: item.value_json for item in record.history.item}
                values = {name: json.loads(value) for name, value in items.items() if not name.startswith("_")}
                kept[int(items["_step"])] = values
    return ids, kept


def in_mlflow(run: RunDir) -> tuple[set[str], Kept]:
    """(the ids of the runs in its database in the run directory, what they hold)."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{run.path.absolute() / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("lamella")
    found, kept = client.search_runs([experiment.experiment_id]), Kept()
    for each in found:
        for name in each.data.metrics:
            for metric in client.get_metric_history(each.info.run_id, name):
                kept.setdefault(metric.step, {})[name] = metric.value
    return {each.info.run_id for each in found}, kept


def in_trackio(run: RunDir) -> tuple[set[str], Kept]:
    """(the names of the runs in its database in the run directory, what they hold)."""
    os.environ["TRACKIO_DIR"] = str(run.path.absolute() / "trackio")
    from trackio.sqlite_storage import SQLiteStorage

    names, kept = set(SQLiteStorage.get_runs("lamella")), Kept()
    for name in names:
        for line in SQLiteStorage.get_logs("lamella", name):
            step = int(line.pop("step"))
            kept[step] = {key: value for key, value in line.items() if key != "timestamp"}
    return names, kept


READERS: dict[str, Callable[[RunDir], tuple[set[str], Kept]]] = {
    "wandb": in_wandb, "mlflow": in_mlflow, "trackio": in_trackio,
}  # fmt: skip


def expected(run: RunDir) -> Kept:
    """What metrics.jsonl holds, by the names that TensorBoard and the trackers have."""
    from lamella.train.metrics import scalars

    return {line["step"]: scalars(line) for line in run.metrics()}


def differences(name: str, ids: set[str], kept: Kept, wanted: Kept) -> list[str]:
    """A line for everything in which a tracker's store differs from metrics.jsonl."""
    found = [] if len(ids) == 1 else [f"{name}: {len(ids)} runs, and should be one: {ids}"]
    if kept.keys() != wanted.keys():
        found.append(f"{name}: steps {sorted(kept)}, and should be {sorted(wanted)}")
    for step in kept.keys() & wanted.keys():
        wrong = {key for key in kept[step].keys() | wanted[step].keys() if kept[step].get(key) != wanted[step].get(key)}
        found += [f"{name}: step {step}: {k}: {kept[step].get(k)} and {wanted[step].get(k)}" for k in sorted(wrong)]
    return found


def train(folder: Path, *words: str) -> None:
    """Run the demo's recipe in a folder, as a user would."""
    (recipe,) = shipped("recipes/demo.yaml")
    settings = [f"{name}={value}" for name, value in SMALL.items()]
    command = [sys.executable, "-m", "lamella.cli", "train", recipe, "--nproc", "1", *settings, *words]
    hidden = ("WANDB_API_KEY", "MLFLOW_TRACKING_URI", "TRACKIO_DIR")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    subprocess.run(command, cwd=folder, env=environment, check=True)


def main(folder: Path) -> int:
    """0: all of them hold the same."""
    train(folder, f"stop_at_step={STOP}")
    train(folder)
    run = RunDir(folder / "artifacts/run")
    wanted = expected(run)
    wrong = [line for name, read in READERS.items() for line in differences(name, *read(run), wanted)]
    figures = sum(len(values) for values in wanted.values())
    print("\n".join(wrong) or f"{', '.join(NAMES)} hold the {figures} figures of {len(wanted)} steps, each in one run")
    return 1 if wrong else 0


if __name__ == "__main__":
    missing = [name for name in NAMES if importlib.util.find_spec(name) is None]
    if missing:
        print(f"not installed: {', '.join(missing)}", file=sys.stderr)
        sys.exit(MISSING)
    if len(sys.argv) > 1:
        sys.exit(main(Path(sys.argv[1]).absolute()))
    with tempfile.TemporaryDirectory(prefix="trackers.") as place:
        sys.exit(main(Path(place)))
