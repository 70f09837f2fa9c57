"""The parameters of a model, from its config.json alone, by the names that training gives them.

Shapes: V vocabulary, D model width, F FFN width, N heads, G key/value heads, H head width.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from lamella.architecture.converted import attention_experts_config, ffn_config, model_tensors
from lamella.architecture.model import trainable_sizes
from lamella.architecture.moe import AttentionMoEConfig, MoEConfig
from lamella.architecture.moe_tensors import is_float32
from lamella.architecture.names import titan_name
from lamella.architecture.types import Sizes
from lamella.errors import UserError
from lamella.jsons import Json
from lamella.recipe.methods import sizes_of as method_sizes
from lamella.recipe.methods.common import MethodOptions

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Weight:
    """One parameter as it is before the ranks share it out."""

    name: str
    """torchtitan's, as in `lamella.architecture.names`."""
    shape: tuple[int, ...]

    @cached_property
    def numel(self) -> int:
        """Its numbers."""
        return math.prod(self.shape)

    @cached_property
    def layer(self) -> int | None:
        """None: embedding, head and last norm."""
        return int(self.name.split(".")[1]) if self.name.startswith("layers.") else None

    @property
    def is_embedding(self) -> bool:
        """The head's too where they are tied."""
        return self.name == "tok_embeddings.weight"

    @property
    def is_expert(self) -> bool:
        """Whether it belongs to an expert that tokens are routed to."""
        return ".moe.experts." in self.name


@dataclass(frozen=True)
class Model(Sizes):
    """What config.json says about the sizes of a model, and its experts."""

    moe: MoEConfig | None
    attention_moe: AttentionMoEConfig | None

    def moe_of(self, layer: int) -> MoEConfig | None:
        """The experts of a layer; None where its FFN is dense."""
        return self.moe.for_layer(layer) if self.moe is not None and layer in self.moe.moe_layers else None

    def heads_of(self, layer: int) -> AttentionMoEConfig | None:
        """The attention experts of a layer; None where it attends with all heads."""
        return self.attention_moe if self.attention_moe is not None and layer in self.attention_moe.layers else None

    def weights(self) -> list[Weight]:
        """All parameters; the selection biases, which are buffers, not."""
        return self._weights

    @cached_property
    def _weights(self) -> list[Weight]:
        shapes = model_tensors(self, self.moe, self.attention_moe)
        return [Weight(titan_name(name), shape) for name, shape in shapes.items() if not is_float32(name)]


def read_model(path: str | Path, options: MethodOptions | None = None) -> Model:
    """The model of a folder, or of a config.json.

    Args:
        options: of a conversion: the model that it would make of this one.

    Raises:
        UserError: no config.json; a family that cannot be trained; a conversion of a model that has experts already.
    """
    file = Path(path) if Path(path).suffix == ".json" else Path(path) / "config.json"
    if not file.is_file():
        raise UserError(
            f"there is no {file}; convert the model first, or give its dense config: --dense FOLDER --slices 8"
        )
    return make_model(json.loads(file.read_text()), str(file), options)


def make_model(values: Json, name: str, options: MethodOptions | None = None) -> Model:
    """The model of what a config.json holds, called `name` in errors; else as `read_model`."""
    if options is not None:
        values = _converted(values, name, options)
    sizes = trainable_sizes(values)
    return Model(**vars(sizes), moe=ffn_config(values), attention_moe=attention_experts_config(values))


def _converted(values: Json, name: str, options: MethodOptions) -> Json:
    """The config.json with the entry that a conversion adds."""
    if values.get(options.entry) is not None:
        raise UserError(f"{name} is a converted model already; leave --dense out, and name it as model=FOLDER")
    return values | {options.entry: method_sizes(options, values).to_dict()}
