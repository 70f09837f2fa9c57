"""What a method may use besides the model and its options."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple


def _ignore(_: Any) -> None: ...


class Work(NamedTuple):
    """Where a conversion may keep what it finds, and whom it tells."""

    folder: Path | None
    """For a calibration that can be resumed; None: nothing may be written, the plan is wanted for its sizes only."""
    on_progress: Callable[[Any], None] = _ignore
    """Told of each finished step: a `lamella.calibrate.CalibrationStep`."""
    on_verdict: Callable[[Any], None] = _ignore
    """Told of each layer that a guard tested: a `lamella.calibrate.guard.Verdict`."""
