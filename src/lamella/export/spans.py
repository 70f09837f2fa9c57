"""How long a text must be to see all of a model: past its attention windows and where its rope scaling sets in."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from transformers import PreTrainedConfig

from lamella.jsons import Json

MIN_TOKENS = 128
SCATTERED_TOKENS = 64
# Tokens beyond a threshold, so that it is felt.
_BEYOND = 32
# Parameters times tokens of one text; a minute or two on a core.
MAX_COST = 1e12


@dataclass(frozen=True)
class Spans:
    """What a check covers."""

    tokens: int
    """Of one text, without gaps."""
    last_position: int
    """Reached by a few tokens with gaps between them, where it lies beyond the text."""
    uncovered: str | None = None
    """What a text of this length does not show."""

    @property
    def scattered(self) -> int:
        return min(SCATTERED_TOKENS, self.tokens)

    def describe(self) -> str:
        """For people, one line."""
        reach = f"{self.tokens} tokens"
        if self.last_position >= self.tokens:
            reach += f", and {self.scattered} tokens spread up to position {self.last_position}"
        return reach + (f"; not covered: {self.uncovered}" if self.uncovered else "")


def spans_to_check(
    config: PreTrainedConfig, num_parameters: int, tokens: int | None = None, gaps: bool = True
) -> Spans:
    """Long enough for every window and threshold of the config, unless that costs more than MAX_COST.

    Args:
        tokens: a length that is wanted instead, whatever it costs.
        gaps: a rope threshold is reached by a few tokens far apart; else by the text itself.
    """
    window, threshold, limit = longest_window(config), rope_threshold(config), _max_positions(config)
    thresholds = {f"the attention window of {window} tokens": window}
    if not gaps:
        thresholds[f"the rope's threshold of {threshold} tokens"] = threshold
    needed = max(MIN_TOKENS, *(at + _BEYOND for at in thresholds.values() if at), 0)
    affordable = max(MIN_TOKENS, int(MAX_COST / num_parameters))
    room = limit if gaps else limit - 1  # llama.cpp computes the token after the text as well
    length = min(tokens or min(needed, affordable), room if limit else needed)
    missed = ", ".join(what for what, at in thresholds.items() if at and at >= length) or None
    return Spans(length, max(threshold + _BEYOND, limit - 1) if gaps and has_rope(config) else 0, missed)


def has_rope(config: PreTrainedConfig) -> bool:
    return bool(getattr(config, "rope_parameters", None))


def longest_window(config: PreTrainedConfig) -> int:
    """The longest attention window that cuts anything off within the model's context; 0: none does."""
    windows = [window for window in layer_windows(config) if window and window < _max_positions(config)]
    return max(windows, default=0)


def layer_windows(config: PreTrainedConfig) -> list[int | None]:
    """Each layer's attention window as transformers' class of this config applies it: a key of config.json that the
    class does not know is none."""
    layers = config.num_hidden_layers
    if "sliding_window" not in {field.name for field in dataclasses.fields(type(config))}:
        return [None] * layers
    window: int | None = getattr(config, "sliding_window", None)
    kinds: list[str] = getattr(config, "layer_types", None) or ["sliding_attention"] * layers
    return [window if kind == "sliding_attention" else None for kind in kinds]


def rope_threshold(config: PreTrainedConfig) -> int:
    """The position from which the rope is another one; 0 without scaling."""
    rope: Json = getattr(config, "rope_parameters", None) or {}
    kinds = [rope] if "rope_type" in rope else [kind for kind in rope.values() if isinstance(kind, dict)]
    scaled = [kind for kind in kinds if kind.get("rope_type", "default") not in ("default", "linear")]
    return max((kind.get("original_max_position_embeddings") or _max_positions(config) for kind in scaled), default=0)


def _max_positions(config: PreTrainedConfig) -> int:
    return getattr(config, "max_position_embeddings", 0) or 0
