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
    up: str | None
    down: str
    gate: str | None = None
    """None, and no `gate_up`: two matrices, y = down act(up x + up_bias) + down_bias."""
    up_bias: str | None = None
    down_bias: str | None = None
    transposed: bool = False
    """Matrices are stored [in, out]; else [out, in]."""
    modules: tuple[str, ...] = ("mlp",)
    """Of transformers' layer: what is called in the FFN's place, first the one that is given x."""
    gate_up: str | None = None
    """[2F, D] in the place of `gate` and `up`: the gate's rows, then the up projection's."""

    @property
    def gated(self) -> bool:
        """y = down (act(gate x) * (up x))."""
        return self.gate is not None or self.gate_up is not None


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
class LayerKind:
    """What the training home has to know of a decoder that is not Llama's."""

    norms_behind: bool = False
    """Attention and FFN have a norm behind them and none before; transformers' name of the first is that of Llama's
    norm before the FFN."""
    wide_qk_norm: bool = False
    """One norm over all query heads, and one over all key heads."""
    norm_offset: float = 0.0
    """It is added to the weights of norms."""
    embedding_by_width: bool = False
    """Embeddings are multiplied by the root of D."""
    fused: bool = False
    """Query, key and value projection are one matrix, gate and up another."""
    rotates_part: bool = False
    """`partial_rotary_factor` of each head is rotated; other classes ignore that field."""


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
    """Query, key and value always have a bias, the output projection never. Else fields of the config say so."""
    output_bias: str | None = "attention_bias"
    """The field that gives the attention's output projection a bias, in classes that have it; None: it never has."""
    qk_norm: bool = False
    modules: Modules = Modules()
    gguf: GGUFNames | None = None
    """None: not read from GGUF."""
    trains: bool = False
    """The training home can express it."""
    not_trained: str = ""
    """What it lacks for that, as the end of "cannot be trained: "."""
    kind: LayerKind = LayerKind()
    attention_experts: bool = False
    llama_like: bool = False
    """Its layers are Llama's, but for biases and norms in the attention: norms before attention and FFN, nothing
    scaled, all of each head rotated. What stock mixtures of experts hold."""
    merged_in: tuple[str, ...] = ()
    """Stock mixtures of experts, by the names that a merge has for them, which can hold several of its models."""
    any_head_width: bool = True
    """Its class takes the width of heads from `head_dim`; else it is always D / N."""
    kv_multiple: int = 1
    """Its number of key and value heads is a multiple of this."""
    scales_part: bool = False
    """Its class scales the rope of a part of each head, too."""
    ropes_by_kind: bool = False
    """Layers with a sliding window have a rope of their own."""
    plain_residual: bool = True
    """A layer's output is the residual + the FFN's output; else a norm or a factor stands between."""
    prefix: str = ""
    """transformers' names begin so; files saved from the bare decoder lack it."""
    ignored: tuple[str, ...] = ()
    """Ends of the names of tensors that old files hold and transformers computes."""
    also_called: str = ""
    """What config.json files call the class where it is another family's under its own name."""

    def __repr__(self) -> str:
        return f"Family({self.name!r})"

    @property
    def architectures(self) -> tuple[str, ...]:
        """What config.json may call the class."""
        return (self.architecture, self.also_called) if self.also_called else (self.architecture,)

    @property
    def converted_architecture(self) -> str:
        return f"Lamella{(self.also_called or self.architecture).replace('LMHeadModel', 'ForCausalLM')}"

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
    """rope_type, rope_theta and what the type needs, whichever spelling config.json has; None: no rope. Where kinds of
    layers have ropes of their own, kind -> these."""
    windows: tuple[int | None, ...]
    """For each layer the tokens that it attends to, itself included; None: all."""
    values: Mapping[str, Any] = field(repr=False, compare=False)
    """Every field of the family's config class, defaults filled in."""

    @property
    def qkv_bias(self) -> bool:
        """Query, key and value projections have a bias."""
        fields = ("attention_bias", "use_bias", "use_qkv_bias")
        return self.family.qkv_bias or any(self.values.get(field, False) for field in fields)

    @property
    def output_bias(self) -> bool:
        """The attention's output projection has a bias."""
        field = self.family.output_bias
        return field is not None and bool(self.values.get(field, False))

    @property
    def qk_norm(self) -> bool:
        return self.family.qk_norm

    @property
    def mlp_bias(self) -> bool:
        """The gated FFN's three projections have a bias."""
        return any(self.values.get(field, False) for field in ("mlp_bias", "use_bias"))

    @property
    def rotates(self) -> tuple[bool, ...]:
        """For each layer whether its queries and keys are rotated."""
        layers = self.values.get("no_rope_layers")  # despite its name 1 where they are
        return tuple(map(bool, layers)) if layers is not None else (True,) * self.num_layers

    @property
    def embedding_scale(self) -> float:
        """Factor on the embeddings."""
        return self.D**0.5 if self.family.kind.embedding_by_width else self.values.get("embedding_multiplier", 1.0)

    @property
    def residual_scale(self) -> float:
        """Factor on what attention and FFN add."""
        return self.values.get("residual_multiplier", 1.0)

    @property
    def attention_scale(self) -> float:
        """Factor on the products of queries and keys."""
        return self.values.get("attention_multiplier", self.H**-0.5)

    @property
    def logit_scale(self) -> float:
        """Factor on the head's output."""
        return 1 / self.values.get("logits_scaling", 1.0)

    @property
    def window(self) -> int | None:
        """The shortest window of any layer that a text of `max_positions` tokens can leave; None: there is none."""
        windows = [window for window in self.windows if window is not None and window < self.max_positions]
        return min(windows) if windows else None
