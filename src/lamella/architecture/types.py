"""What is said of a model: its family, and its sizes, each in one type that all of this room shares.

Shapes: D model width, F dense FFN width, V vocabulary, N query heads, G key/value heads, H head width, Q = N * H,
K = G * H.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

Shapes = dict[str, tuple[int, ...]]


class Part(NamedTuple):
    """A tensor of a decoder, or of each of its layers ({} is the layer)."""

    hf: str
    titan: str
    """"" in families that torchtitan does not have."""
    shape: str
    """Letters of the legend above, such as "Q D"."""
    only_if: str | None = None
    """The property of `Sizes` that says whether a model has it; None: every model."""


@dataclass(frozen=True)
class FFNNames:
    """Where a layer keeps its FFN. Names are templates: {} is the layer."""

    block: str
    """Prefix of the tensors of the MoE layer that takes the FFN's place."""
    up: str
    down: str
    gate: str | None = None
    """None: two matrices, y = down act(up x + up_bias) + down_bias."""
    up_bias: str | None = None
    down_bias: str | None = None
    transposed: bool = False
    """Matrices are stored [in, out]; else [out, in]."""
    modules: tuple[str, ...] = ("mlp",)
    """Of transformers' layer: what is called in the FFN's place, first the one that is given x."""


@dataclass(frozen=True)
class Modules:
    """Names of the modules of transformers' decoder."""

    layers: str = "layers"
    final_norm: str = "norm"
    masks_documents: bool = True
    """The model itself keeps documents apart by their positions; else it is given a mask."""


@dataclass(frozen=True)
class GGUFNames:
    """GGUF's names of a family's tensors."""

    top: dict[str, str]
    """Stem of the name in the file -> stem of transformers' name."""
    in_layer: dict[str, str]
    """The same within a layer, behind `blk.N.` and `model.layers.N.`."""
    interleaved: bool = False
    """Rows of query and key heads lie interleaved, (i, i + H/2 -> 2i, 2i + 1), for llama.cpp's kind of rope."""


@dataclass(frozen=True)
class Family:
    """What differs between dense decoders."""

    name: str
    """`model_type` of the dense config."""
    architecture: str
    """The transformers class of the dense model."""
    tensors: Callable[[Sizes], Shapes]
    """Names and shapes of the dense model's tensors, but the output head."""
    ffn: FFNNames
    required: tuple[str, ...]
    """Sizes without which config.json says too little; transformers would take those of some published model."""
    layer: tuple[Part, ...] = ()
    """A gated layer's tensors, in both spellings where the family can be trained."""
    width: str = "intermediate_size"
    """The field that names F; null means 4 D."""
    activation: str = "hidden_act"
    """The field that names what the FFN computes."""
    qkv_bias: bool = False
    """Query, key and value always have a bias, the output projection never. Else the field `attention_bias` gives all
    four one, in classes that have it."""
    qk_norm: bool = False
    modules: Modules = Modules()
    gguf: GGUFNames | None = None
    """None: not read from GGUF."""
    trains: bool = False
    """The training home can express it."""
    attention_experts: bool = False
    llama_like: bool = False
    """Its layers are Llama's, but for biases and norms in the attention: norms before attention and FFN, nothing
    scaled, all of each head rotated. What stock mixtures of experts hold."""
    any_head_width: bool = True
    """Its class takes the width of heads from `head_dim`; else it is always D / N."""
    plain_residual: bool = True
    """A layer's output is the residual and the FFN's output, and logits are the head's output; else a norm or a factor
    stands between."""
    prefix: str = ""
    """transformers' names begin so; files saved from the bare decoder lack it."""
    ignored: tuple[str, ...] = ()
    """Ends of the names of tensors that old files hold and transformers computes."""

    def __repr__(self) -> str:
        return f"Family({self.name!r})"

    @property
    def converted_architecture(self) -> str:
        return f"Lamella{self.architecture.replace('LMHeadModel', 'ForCausalLM')}"

    @property
    def converted_config_class(self) -> str:
        return self.converted_architecture.removesuffix("ForCausalLM") + "Config"


@dataclass(frozen=True)
class Sizes:
    """What transformers takes a config.json for, by names that all families share."""

    family: Family
    D: int
    F: int
    num_layers: int
    N: int
    G: int
    H: int
    V: int
    max_positions: int
    tied: bool
    """The config's word for it. A file that holds another head than the embedding is not tied all the same."""
    activation: str
    """transformers' name of what the FFN computes."""
    dtype: str
    """As config.json names it; "float32" where it does not."""
    rope: Mapping[str, Any] | None
    """rope_type, rope_theta and what the type needs, whichever spelling config.json has; None: no rope."""
    windows: tuple[int | None, ...]
    """For each layer the tokens that it attends to, itself included; None: all."""
    values: Mapping[str, Any] = field(repr=False, compare=False)
    """Every field of the family's config class, defaults filled in."""

    @property
    def qkv_bias(self) -> bool:
        """Query, key and value projections have a bias."""
        return self.family.qkv_bias or self.output_bias or bool(self.values.get("use_qkv_bias", False))

    @property
    def output_bias(self) -> bool:
        """The attention's output projection has a bias."""
        return bool(self.values.get("attention_bias", False))

    @property
    def qk_norm(self) -> bool:
        return self.family.qk_norm

    @property
    def mlp_bias(self) -> bool:
        """The gated FFN's three projections have a bias."""
        return bool(self.values.get("mlp_bias", False))

    @property
    def window(self) -> int | None:
        """The shortest window of any layer that a text of `max_positions` tokens can leave; None: there is none."""
        windows = [window for window in self.windows if window is not None and window < self.max_positions]
        return min(windows) if windows else None
