"""What the layers of a converted model compute: one object per model, which all its layers hold."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch

from lamella.architecture.moe import ExpertPath, Mode, MoEConfig, RoutingKind
from lamella.moe.routing import with_top_k

AttentionPath: TypeAlias = Literal["routed", "masked"]


@dataclass
class Computing:
    """How the layers of one model compute. The model sets it; transformers passes a layer nothing of its own."""

    mode: Mode = "routed"
    path: ExpertPath = "auto"
    attention_path: AttentionPath = "routed"
    """"masked" computes the definition of attention experts: every expert for every token. It keeps no keys."""
    drawn_as: RoutingKind | None = None
    """The kind of routing by which mode "random" draws experts; None: each layer's own."""
    adapter: int | None = None
    """The adapter that every token takes, by its number, or the zero expert behind the last; None: the router says."""
    top_k: int | None = None
    """Experts per token, in flat routing; None: each layer's own."""
    twin_share: float | None = None
    """The most pairs of a token that take the copy, as a share, in twin routing; None: as many as the router says."""
    exact_copies: bool = False
    """Whether each trainable expert computes as its frozen slice, which shows what routing alone does."""

    @property
    def is_plain(self) -> bool:
        """Whether each layer computes as its own config and its router say, on the path that is the fastest."""
        return self.mode == "routed" and self.path == "auto" and self.top_k is None and self.twin_share is None

    def applied(self, config: MoEConfig) -> MoEConfig:
        """A layer's config, as this changes it."""
        if self.drawn_as is not None:
            config = dataclasses.replace(config, routing=self.drawn_as)
        return config if self.top_k is None else with_top_k(config, self.top_k)

    @contextmanager
    def temporarily(self, other: Computing) -> Iterator[None]:
        """Inside, the layers compute as `other` says."""
        before = dict(vars(self))
        vars(self).update(vars(other))
        try:
            yield
        finally:
            vars(self).update(before)


def computes_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies matrices of bfloat16 faster than those of float32: GPUs, and CPUs with AMX or with
    AVX-512's products of bfloat16."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()  # older torch has none
    return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))
