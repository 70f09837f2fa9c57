"""What each FFN of a dense model sees on real text: one streaming pass, a layer at a time, whatever the model's size.

In memory: one decoder layer in float32 (or the output head), that layer's sample, and a few windows' activations. The
residual stream of all calibration tokens is on disk; with gradients, every layer's input.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from lamella.calibrate.layerwise import LayerwiseModel
from lamella.calibrate.order import Calibration, CalibrationStep, OnLayer, Replacement
from lamella.calibrate.store import LOCK, STREAMS, LayerResults, ResultFolder, fingerprint
from lamella.calibrate.stream import StreamFolder
from lamella.calibrate.text import CalibrationTokens, calibration_tokens, training_tokens
from lamella.checkpoint.source import Checkpoint
from lamella.errors import UserError
from lamella.jsons import Json
from lamella.recipe.calibration import CalibrationOptions

__all__ = [
    "CalibrationOptions",
    "CalibrationStep",
    "CalibrationTokens",
    "calibrate",
    "calibration_tokens",
    "training_tokens",
]


def calibrate(
    source: Checkpoint,
    tokens: CalibrationTokens,
    folder: Path,
    on_layer: OnLayer,
    *,
    method: Json,
    gradients: bool = False,
    replacement: Replacement | None = None,
    layers: Iterable[int] | None = None,
    overwrite: bool = False,
    result_bytes: int = 0,
    on_progress: Callable[[CalibrationStep], None] = lambda _: None,
) -> LayerResults:
    """Hand every layer's sample to `on_layer` and keep what it returns; resume where an earlier call was interrupted.

    Args:
        folder: results, and the streams while the calibration runs.
        on_layer: (layer, sample) -> a few small tensors. It must not change the sample. Called once per layer: first
            to last without gradients, else last to first.
        method: name and settings of `on_layer` and `replacement`: with them, a folder is known to be of this
            calibration.
        gradients: give samples their dh, the gradient of the dense model's next-token loss, summed over all tokens.
        replacement: (the dense FFN, `on_layer`'s result) -> the FFN that takes its place, x [t, D] -> y [t, D], token
            by token: then later layers' samples are what they see behind the replaced ones (sequential calibration).
            Not beside `gradients`: they are the dense model's.
        layers: those wanted; None: all.
        overwrite: replace another calibration in `folder`.
        result_bytes: about as much as `on_layer` returns for a layer: there must be room for it on the disk.
        on_progress: told of each finished step.

    Returns:
        layer -> result, ascending; a mapping that reads a layer's file when it is asked for.

    Raises:
        UserError: unknown family, layers that are not there, a folder of something else or in use, a full disk.
    """
    assert replacement is None or not gradients, "the gradients are the dense model's: calibrate twice"
    model = LayerwiseModel(source)
    chosen = _checked_layers(layers, model.num_layers)
    settings = {"gradients": gradients, "sequential": replacement is not None, "layers": list(chosen)}
    wanted, results = fingerprint(source, tokens, method | settings), ResultFolder(folder)
    stream = StreamFolder(folder / STREAMS, (*tokens.ids_NL.shape, model.width))
    calibration = Calibration(model, tokens, stream, results, chosen, on_layer, gradients, replacement, on_progress)
    results.check(wanted, overwrite)
    left = sum(not (results.is_of(wanted) and results.has(layer)) for layer in chosen)
    stream.check_space(calibration.num_streams, result_bytes * left)
    with locked(folder):
        results.claim(wanted)
        if not all(results.has(layer) for layer in chosen):
            calibration.all()
        stream.remove()
    return LayerResults(results, chosen)


def _checked_layers(layers: Iterable[int] | None, count: int) -> tuple[int, ...]:
    chosen = tuple(range(count)) if layers is None else tuple(sorted(set(layers)))
    if not chosen or not 0 <= chosen[0] <= chosen[-1] < count:
        raise UserError(f"layers {list(chosen)} cannot be calibrated; the model has 0 to {count - 1}")
    return chosen


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a calibration's folder, which is made; UserError where another process does."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise UserError(f"another process calibrates in {folder}; wait for it or give another folder") from None
    try:
        yield
    finally:
        lock.release()
