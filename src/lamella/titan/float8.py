"""Products with dense weights in float8, by torchtitan's own converter over torchao.

Attention's projections and the FFNs of layers that stay dense; not the output head, the router or the experts. Rows are
scaled one by one, weights stay what they are. GPUs have such products from compute capability 8.9 on.
"""

from __future__ import annotations

import importlib.util
from typing import TypeVar

from torchtitan.components.quantization import Float8LinearConverter
from torchtitan.protocols.module import Module

from lamella.errors import UserError

LEAST_CAPABILITY = (8, 9)
Config = TypeVar("Config", bound=Module.Config)


def check_float8(capability: tuple[int, int] | None) -> None:
    """UserError where the products cannot be computed here.

    Args:
        capability: the GPU's compute capability; None without a GPU.
    """
    off = "set dense_products: precision"
    if capability is None:
        raise UserError(f"dense_products: float8 needs a GPU, and there is none here; {off}")
    if capability < LEAST_CAPABILITY:
        have, need = (".".join(map(str, pair)) for pair in (capability, LEAST_CAPABILITY))
        raise UserError(
            f"dense_products: float8 needs a GPU of compute capability {need} (Ada, Hopper) or later, this one has "
            f"{have}; {off}"
        )
    if importlib.util.find_spec("torchao") is None:
        raise UserError(f"dense_products: float8 needs torchao, which is not installed; install it, or {off}")


def with_float8(config: Config, compiled: bool, emulate: bool = False) -> Config:
    """The model's config, its dense products in float8.

    Args:
        compiled: whether blocks are compiled; eager, the scales cost more than the products save.
        emulate: round as float8 does, and compute in the usual precision: for tests on other devices.
    """
    converter = Float8LinearConverter.Config(
        filter_fqns=["lm_head"], emulate=emulate, model_compile_enabled=compiled
    ).build()
    return converter.convert(config)
