"""Method "adapters": what a recipe may say about it, and the sizes that come of it. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from lamella.architecture.adapters import MODULES, RANK_MULTIPLE, AdaptersConfig
from lamella.architecture.model import Sizes, sizes_of
from lamella.architecture.peft import PeftAdapter, read_peft
from lamella.architecture.rows import Family, names_of
from lamella.errors import UserError
from lamella.recipe.methods.common import DtypeName, MethodOptions


def takes_adapters(family: Family) -> bool:
    """Whether models of the family can have adapters as experts."""
    return family.llama_like


@dataclass(frozen=True)
class AdaptersOptions(MethodOptions):
    """Make experts of adapters (LoRA): one for each domain, and a zero expert that is the dense model."""

    method: ClassVar[str] = "adapters"
    entry: ClassVar[str] = "adapters"

    adapters: tuple[str, ...] = ()
    """These folders, as the library peft saves them, are the experts; `lamella adapters learn` makes such a folder."""
    top_k: int = 1
    """Each token is computed by this many experts, the zero expert among them."""
    dtype: DtypeName | None = None
    """The weights are stored as float32, bfloat16 or float16; null keeps each tensor's own."""

    def describe(self, entry: dict[str, Any]) -> str:
        """Lines of the model card, given the entry of the new config."""
        return f"""\
- Recipe: method `adapters`: {", ".join(entry["names"])}, and a zero expert that is the dense layer.
- The routers choose the zero expert for every token until they are trained: the logits are the dense model's."""


def read_adapters(options: AdaptersOptions, sizes: Sizes) -> dict[str, PeftAdapter]:
    """The checked adapters by name: their folders' names, or their paths where two folders are called alike.

    Raises:
        UserError: none is given, or one does not fit the model.
    """
    if not options.adapters:
        raise UserError("method adapters needs adapters: a list of folders that the library peft has saved")
    if len(set(options.adapters)) < len(options.adapters):
        raise UserError("an adapter is listed twice; each needs to be there once")
    short = [Path(folder).expanduser().resolve().name for folder in options.adapters]
    names = short if len(set(short)) == len(short) else list(options.adapters)
    return {name: read_peft(folder, sizes) for name, folder in zip(names, options.adapters, strict=True)}


def adapters_sizes(options: AdaptersOptions, config: dict[str, Any]) -> AdaptersConfig:
    """The `adapters` entry that a dense config.json gets.

    Raises:
        UserError: a family that cannot take adapters; see `read_adapters`; top_k above the number of experts.
    """
    sizes = sizes_of(config)
    if not takes_adapters(sizes.family):
        known = ", ".join(names_of(takes_adapters))
        raise UserError(f"{sizes.family.name} cannot take adapters as experts; {known} can")
    if sizes.activation != "silu":
        raise UserError(f"adapters as experts compute silu, and this model's FFNs {sizes.activation}")
    found = read_adapters(options, sizes)
    places = [place for adapter in found.values() for place in adapter.ranks]
    largest = max(rank for adapter in found.values() for rank in adapter.ranks.values())
    rank = -(-largest // RANK_MULTIPLE) * RANK_MULTIPLE
    layers = tuple(sorted({place.layer for place in places}))
    blocks = tuple(block for block in MODULES if any(place.block == block for place in places))
    return AdaptersConfig(tuple(found), layers, rank, options.top_k, blocks=blocks)
