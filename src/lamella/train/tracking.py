"""The trackers that people use beside TensorBoard: Weights & Biases, MLflow, Trackio. All work without a network.

The names of the metrics are those of TensorBoard. A run that is resumed goes on under the id that its directory keeps.
A tracker that fails is left out from then on, with a warning: it never stops a run. Only rank 0 tracks.
"""

from __future__ import annotations

import importlib.util
import json
import os
import uuid
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Literal, NamedTuple, Protocol

from torchtitan.tools.logging import logger

from lamella.errors import UserError
from lamella.jsons import Json
from lamella.run.folder import RunDir

Tracker = Literal["wandb", "mlflow", "trackio"]
PROJECT = "lamella"
IDS = "tracking.json"


class Tracking(Protocol):
    """A run in a tracker."""

    def log(self, values: dict[str, float], step: int) -> None:
        """Keep the values of a step."""
        ...

    def finish(self) -> None:
        """Write what is left; the run may go on later."""
        ...


class Start(NamedTuple):
    """What a tracker is told of a run."""

    run: RunDir
    id: str
    """The id of this run in the tracker, or, for one that makes its own, what it made before; else empty."""
    config: Json


class Wandb:
    """Weights & Biases: below the run directory until `wandb sync` sends it, or to WANDB_MODE's place."""

    def __init__(self, start: Start):
        import wandb

        mode: Any = os.environ.get("WANDB_MODE") or ("online" if os.environ.get("WANDB_API_KEY") else "offline")
        self.id = start.id or uuid.uuid4().hex[:12]
        settings = wandb.Settings(silent=True, console="off")
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT), name=start.run.path.name, id=self.id, resume="allow",
            dir=str(start.run.path), mode=mode, config=start.config, settings=settings,
        )  # fmt: skip

    def log(self, values: dict[str, float], step: int) -> None:
        """See `Tracking`."""
        self._run.log(values, step=step)

    def finish(self) -> None:
        """See `Tracking`."""
        self._run.finish()


class Mlflow:
    """MLflow: in a SQLite file of the run directory, or where MLFLOW_TRACKING_URI says."""

    def __init__(self, start: Start):
        import mlflow

        self._flow = mlflow
        own = f"sqlite:///{start.run.path.absolute() / 'mlflow.db'}"
        mlflow.set_tracking_uri(os.environ.get("MLFLOW_TRACKING_URI") or own)
        mlflow.set_experiment(PROJECT)
        active = mlflow.start_run(run_id=start.id or None, run_name=None if start.id else start.run.path.name)
        self.id = active.info.run_id
        if not start.id:
            mlflow.log_params({name: json.dumps(value)[:500] for name, value in start.config.items()})

    def log(self, values: dict[str, float], step: int) -> None:
        """See `Tracking`; MLflow takes no name with a colon or the like."""
        allowed = {"".join(c if c.isalnum() or c in "_-. /" else "-" for c in name): v for name, v in values.items()}
        self._flow.log_metrics(allowed, step=step)

    def finish(self) -> None:
        """See `Tracking`."""
        self._flow.end_run()


class Trackio:
    """Trackio: in the run directory, or where TRACKIO_DIR says."""

    def __init__(self, start: Start):
        os.environ.setdefault("TRACKIO_DIR", str(start.run.path.absolute() / "trackio"))
        import trackio

        self.id = start.id or f"{start.run.path.name}-{uuid.uuid4().hex[:8]}"
        self._run = trackio.init(project=PROJECT, name=self.id, resume="allow", config=start.config, embed=False)

    def log(self, values: dict[str, float], step: int) -> None:
        """See `Tracking`."""
        self._run.log(values, step=step)

    def finish(self) -> None:
        """See `Tracking`."""
        self._run.finish()


TRACKERS: dict[Tracker, Callable[[Start], Any]] = {"wandb": Wandb, "mlflow": Mlflow, "trackio": Trackio}


def check_trackers(names: Iterable[Tracker]) -> None:
    """UserError for a tracker that is not installed."""
    if missing := [name for name in names if importlib.util.find_spec(name) is None]:
        raise UserError(
            f"track names {', '.join(missing)}, which is not installed; install lamella[track], or leave it out"
        )


class Trackers:
    """All trackers of a run together."""

    def __init__(self, names: Iterable[Tracker], run: RunDir, config: Json):
        file = run.path / IDS
        ids: dict[str, str] = json.loads(file.read_text()) if file.is_file() else {}
        self._open: dict[str, Tracking] = {}
        for name in names:
            tracker = self._guarded(name, partial(TRACKERS[name], Start(run, ids.get(name, ""), config)))
            if tracker is not None:
                self._open[name] = tracker
                ids[name] = tracker.id
        if ids:
            file.write_text(json.dumps(ids, indent=1) + "\n")

    def log(self, values: dict[str, float], step: int) -> None:
        """Give every tracker the values of a step."""
        for name, tracker in list(self._open.items()):
            self._guarded(name, partial(tracker.log, values, step))

    def finish(self) -> None:
        """End every tracker's part of the run."""
        for name, tracker in list(self._open.items()):
            self._guarded(name, tracker.finish)
        self._open.clear()

    def _guarded(self, name: str, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except Exception as error:  # whatever a tracker raises: days of training do not end for it
            logger.warning(f"{name} is left out from now on: {type(error).__name__}: {error}")
            self._open.pop(name, None)
            return None
