"""How many of the active parts are shared: the count that reconstructs a layer best on tokens held out of the sample.

Few shared parts leave more to a router that errs; many leave little to choose from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from lamella.architecture.sizes import Parts
from lamella.calibrate.sample import LayerSample, Partition, RouterInit, choose, router_logits, rows
from lamella.conversion.partition.reconstruct import dense_output, reconstruct, relative_error
from lamella.errors import UserError

PartitionMethod = Callable[[LayerSample, Parts, torch.Generator], Partition]
RouterMethod = Callable[[LayerSample, Partition, int, torch.Generator], RouterInit]
HELDOUT_SHARE = 0.125


def search_shared(
    sample: LayerSample,
    num_parts: int,
    num_active: int,
    partition_method: PartitionMethod,
    router_method: RouterMethod,
    generator: torch.Generator,
    candidates: Iterable[int] | None = None,
) -> tuple[int, dict[int, float]]:
    """The best s, and the relative error of each candidate (None: 0 .. A-1) on the last HELDOUT_SHARE of the tokens.

    The last tokens rather than random ones: neighbours in a text are alike.
    """
    fit, heldout = split_tokens(sample)
    reference_TD = dense_output(heldout)
    state, errors = generator.get_state(), {}
    for num_shared in range(num_active) if candidates is None else candidates:
        generator.set_state(state)  # the same draws for every candidate
        parts = Parts(num_parts, num_shared, num_active)
        partition = partition_method(fit, parts, generator)
        router = router_method(fit, partition, parts.num_chosen, generator)
        ids_TK = choose(router_logits(router, heldout.x_TD), parts.num_chosen)
        errors[num_shared] = relative_error(reference_TD, reconstruct(heldout, partition, ids_TK))
    return min(errors, key=errors.__getitem__), errors


def split_tokens(sample: LayerSample) -> tuple[LayerSample, LayerSample]:
    """The first tokens, to fit on, and the last HELDOUT_SHARE of them, to choose by."""
    count = round(len(sample.x_TD) * (1 - HELDOUT_SHARE))
    if not 0 < count < len(sample.x_TD):
        raise UserError(f"{len(sample.x_TD)} calibration tokens cannot be split; calibrate on at least 2")
    return rows(sample, slice(0, count)), rows(sample, slice(count, None))
