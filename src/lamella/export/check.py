"""Reload an export as its users will, and hold it against its source."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from lamella.architecture.converted import ffn_config, stored_ffn_config
from lamella.architecture.moe import Mode
from lamella.checkpoint.dtypes import DTYPES
from lamella.checkpoint.source import read_config, read_folder
from lamella.errors import UserError
from lamella.export.model import EMBEDDING
from lamella.export.spans import Spans, spans_to_check
from lamella.hf.blocks import MoELayer
from lamella.hf.models import ConvertedForCausalLM, load
from lamella.moe.experts import router_scores
from lamella.moe.matrices import RoundedDtype, dequantised, rounded
from lamella.moe.routing import choice_margins

# fp32: both sum the same products, in another order. Logits are sums over depth x width terms of size about 10; their
# rounding errors of 1e-6 of that grow to about 1e-4 in 30 layers. A lost expert or bias moves them by 0.1 and more.
MAX_LOGIT_DIFFERENCE = 1e-3
# Logits are compared at this many places of a sequence, its first and last among them: all of a long one, over a
# vocabulary of 128,000, would be larger than the model.
MAX_COMPARED = 256
# Of a text with gaps, the share of places that must agree within MAX_LOGIT_DIFFERENCE. 1.5e-3 was seen at one of 64,
# in SmolLM2 with a random softmax router as Mixtral. It is rounding: with router rows of std 0.02 the export differs
# there by 5.9e-4 at most and 1.3e-4 at the median, the source in float32 from itself in float64 by 5.6e-4 and 1.3e-4;
# both in float64 (their routers' scores stay float32) by 1.2e-4 and 3e-5. Sharper routers round more.
MOST_PLACES = 0.9
# In biased scores. Where a router is so near to another choice of experts, rounding decides, and right computations may
# differ there and behind it: SmolLM2 with twins, trained for 12 steps, differed by 0.042 at the place whose margin was
# 0, and by less than 1e-3 at 127 others, of which the nearest had 6e-6.
TIE = 5e-6
# What a tipped choice may move; a lost expert or bias moves more.
MAX_TIPPED = 0.1

# Nats. Rounded weights move a model by tenths at most; a file that is wrong is off by whole ones.
MAX_DIVERGENCE = 1.0
# Nats. Kernels for int8 and int4 round inputs and outputs to bfloat16, which may tip a router; a lost expert is 0.1.
MAX_KERNEL_DIVERGENCE = 0.05


@dataclass(frozen=True)
class Quality:
    """How near the distributions of the next token are to the source's."""

    top_1: float
    """Share of the places where both expect the same token."""
    divergence: float
    """Mean KL divergence from the source, nats."""
    largest_divergence: float

    @classmethod
    def of(cls, found: Tensor, expected: Tensor) -> Quality:
        """From logits, or log-probabilities, [places, V] each."""
        found, expected = found.double().log_softmax(-1), expected.double().log_softmax(-1)
        divergences = (expected.exp() * (expected - found)).nan_to_num(nan=torch.inf).sum(-1)
        top_1 = (found.argmax(-1) == expected.argmax(-1)).double().mean().item()
        return cls(top_1, divergences.mean().item(), divergences.max().item())

    def describe(self) -> str:
        return f"top-1 {self.top_1:.0%}, KL divergence {self.divergence:.1e} (largest {self.largest_divergence:.1e})"


@dataclass(frozen=True)
class Checked:
    """What a comparison found, and how far it reached."""

    max_abs_logit_diff: float
    """To the source with its weights rounded like the export's, where these are stored in another dtype."""
    spans: Spans
    reader: str = "transformers"
    quality: Quality | None = None
    """Against the source with its weights as they are, where the export's are rounded."""
    tipped: int = 0
    """So many places are left out of the difference: rounding decided between experts there, or before."""

    def describe(self) -> str:
        """For people, one line."""
        found = f"max |logit difference| {self.max_abs_logit_diff:.1e} in {self.reader} (fp32){self.left_out()}"
        if self.quality is not None:
            found += f" to the source with weights rounded alike; to the source as it is {self.quality.describe()}"
        return f"{found}, {self.spans.describe()}"

    def left_out(self) -> str:
        """For the lines above: what the difference does not speak of."""
        if not self.tipped:
            return ""
        places = "place" if self.tipped == 1 else "places"
        return f", but for {self.tipped} {places} where rounding decides between experts"


class Difference(NamedTuple):
    """How far two computations of a text are apart."""

    largest: float
    """Of all places but the tipped ones."""
    tipped: int = 0
    """Places that differ by more than rounding, and at or before which rounding decides between experts."""


@dataclass(frozen=True)
class Reference:
    """Token sequences, and the source's logits for them."""

    ids_1L: Tensor
    positions_1L: Tensor | None
    """Where the tokens stand; None: one after another."""
    kept: Tensor
    """Places in the sequence whose logits are compared."""
    logits: Tensor
    """[kept, V] fp32"""
    first_tie: int
    """The first of the kept places at or before which rounding decides between experts; their number: nowhere."""


def check_reloaded(source: Path, exported: Path, mode: Mode = "routed", tokens: int | None = None) -> Checked:
    """Largest |logit difference| between the source in `mode` and the reloaded export, fp32, on real text.

    Args:
        tokens: length of the text; None takes one past every window and scaling threshold, within bounds.

    Raises:
        UserError: tensors missing or left over, or a difference over MAX_LOGIT_DIFFERENCE.
    """
    dtype = _rounded_to(source, exported)
    # Low-rank deltas are rounded with the experts that they are merged into, which the source cannot repeat.
    repeated = None if _has_deltas(source) else dtype
    references, spans = source_logits(source, mode, tokens, rounded_to=repeated)
    model = load(exported, dtype=torch.float32)
    found = [_difference(model, reference) for reference in references]
    difference, tipped = max(f.largest for f in found), sum(f.tipped for f in found)
    if repeated is dtype:
        refuse_difference(difference, source)
    if dtype is None:
        return Checked(difference, spans, tipped=tipped)
    text = source_logits(source, mode, tokens, gaps=False)[0][0]
    quality = Quality.of(_logits(model, text.ids_1L, text.positions_1L, text.kept), text.logits)
    refuse_divergence(quality, source)
    return Checked(difference, spans, quality=quality, tipped=tipped)


def check_rounded(source: Path, exported: Path, mode: Mode = "routed", tokens: int | None = None) -> Checked:
    """The export with rounded frozen experts against the source with its own rounded alike, and as it is.

    Args:
        tokens: as of `check_reloaded`.

    Raises:
        UserError: tensors missing or left over, or another model than the source with rounded experts.
    """
    moe = stored_ffn_config(read_config(exported))
    assert moe is not None
    assert moe.frozen_dtype != "model"
    alike = partial(_round_frozen, dtype=moe.frozen_dtype)
    (reference, *_), spans = source_logits(source, mode, tokens, gaps=False, change=alike)
    found = _logits(load(exported, dtype=torch.float32), reference.ids_1L, None, reference.kept)
    near = Quality.of(found, reference.logits)
    if not near.divergence <= MAX_KERNEL_DIVERGENCE:
        raise UserError(
            f"the reloaded export is {near.divergence:.2g} nats from {source} with its frozen experts rounded alike "
            f"(allowed: {MAX_KERNEL_DIVERGENCE}); nothing was kept"
        )
    quality = Quality.of(found, source_logits(source, mode, tokens, gaps=False)[0][0].logits)
    refuse_divergence(quality, source)
    return Checked((found - reference.logits).abs().max().item(), spans, "lamella", quality)


@torch.no_grad()
def _round_frozen(model: ConvertedForCausalLM, dtype: RoundedDtype) -> None:
    for layer in model.moe_layers:
        for parameter in layer.experts.frozen_parameters():
            numbers, scales = rounded(parameter.data, dtype)
            parameter.data = dequantised(numbers, scales, parameter.shape[-1])


def _has_deltas(source: Path) -> bool:
    moe = ffn_config(read_config(source))
    return moe is not None and moe.lora_rank > 0


def _rounded_to(source: Path, exported: Path) -> torch.dtype | None:
    """The dtype that the export's weights were rounded to; None where they are the source's."""
    before, after = read_folder(source), read_folder(exported)
    # the embedding, which every export keeps; of families with names of their own, another matrix that both have
    matrices = (name for name, tensor in before.items() if len(tensor.shape) == 2 and name in after)
    name = EMBEDDING if EMBEDDING in before else next(matrices)
    own, stored = DTYPES[before[name].dtype], DTYPES[after[name].dtype]
    return None if stored in (own, torch.float32) else stored


def refuse_difference(difference: float, source: Path) -> None:
    """UserError where a reloaded export computes something else than its source."""
    if not difference <= MAX_LOGIT_DIFFERENCE:
        raise UserError(
            f"the reloaded export differs from {source} by {difference:.3g} in its logits "
            f"(allowed: {MAX_LOGIT_DIFFERENCE}); nothing was kept"
        )


def refuse_divergence(quality: Quality, source: Path) -> None:
    """UserError where rounded weights give another model."""
    if not quality.divergence <= MAX_DIVERGENCE:
        raise UserError(
            f"the export is {quality.divergence:.2g} nats from {source} (allowed: {MAX_DIVERGENCE}); take a wider "
            "dtype; nothing was kept"
        )


def source_logits(
    source: Path,
    mode: Mode,
    tokens: int | None = None,
    gaps: bool = True,
    rounded_to: torch.dtype | None = None,
    change: Callable[[ConvertedForCausalLM], None] = lambda _: None,
) -> tuple[list[Reference], Spans]:
    """What the source computes in fp32, on text as long as its windows and scaling demand.

    Args:
        gaps: as in Spans.
        rounded_to: every weight but the routers' is rounded to this dtype first.
        change: done to the model before.
    """
    model = load(source, dtype=torch.float32)
    assert isinstance(model, ConvertedForCausalLM)
    if rounded_to is not None:
        _round(model, rounded_to)
    change(model)
    model.set_mode(mode)
    spans = spans_to_check(model.config, sum(parameter.numel() for parameter in model.parameters()), tokens, gaps)
    ids_1L = _token_ids(source, model.config, spans.tokens)
    sequences: list[tuple[Tensor, Tensor | None]] = [(ids_1L, None)]
    if spans.last_position >= spans.tokens:
        # A few tokens far apart reach any rope threshold at the cost of a short text.
        short_1L = ids_1L[:, : spans.scattered]
        places = torch.linspace(0, spans.last_position, short_1L.shape[1], dtype=torch.float64).round().long()
        sequences.append((short_1L, places[None]))
    return [_reference(model, ids, places) for ids, places in sequences], spans


@torch.no_grad()
def _round(model: ConvertedForCausalLM, dtype: torch.dtype) -> None:
    for name, parameter in model.named_parameters():
        if ".router." not in name:
            parameter.data = parameter.data.to(dtype).float()


def _reference(model: PreTrainedModel, ids_1L: Tensor, positions_1L: Tensor | None) -> Reference:
    L = ids_1L.shape[1]
    kept = torch.linspace(0, L - 1, min(L, MAX_COMPARED)).round().long().unique()
    with _watched_ties(model) as ties:
        logits = _logits(model, ids_1L, positions_1L, kept)
    first_tie = int((kept < min(ties)).sum()) if ties else len(kept)
    return Reference(ids_1L, positions_1L, kept, logits, first_tie)


@contextmanager
def _watched_ties(model: PreTrainedModel) -> Iterator[list[int]]:
    """A list that fills with the places, in any order, at which a layer's router is near to another choice."""
    assert isinstance(model, ConvertedForCausalLM)
    ties: list[int] = []

    def watch(layer: MoELayer, args: tuple[Tensor, ...]) -> None:
        if layer.computing.mode == "routed":
            weights, x_TD = layer.weights, args[0].flatten(0, -2)
            scores_TE = router_scores(x_TD, weights, layer.config)
            near_T = choice_margins(scores_TE, weights.selection_bias_R, layer.config) < TIE
            ties.extend(near_T.nonzero().flatten().tolist())

    hooks = [layer.register_forward_pre_hook(watch) for layer in model.moe_layers]
    try:
        yield ties
    finally:
        for hook in hooks:
            hook.remove()


def _difference(model: PreTrainedModel, reference: Reference) -> Difference:
    found = _logits(model, reference.ids_1L, reference.positions_1L, reference.kept)
    if found.shape != reference.logits.shape:
        return Difference(float("inf"))
    by_place = (found - reference.logits).abs().amax(dim=-1)
    if reference.positions_1L is not None:
        # With gaps a text means nothing, and rounding may tip a router at a place; a lost scaling shows at nearly all.
        return Difference(by_place.quantile(MOST_PLACES).item())
    return untipped(by_place, reference.first_tie)


def untipped(by_place: Tensor, first_tie: int) -> Difference:
    """The difference of two computations, less what choices of experts explain that rounding has tipped.

    Args:
        by_place: the largest |difference| of each place of a text.
        first_tie: the first place that may differ for that; it may by MAX_TIPPED, and few places may.
    """
    may_be = torch.arange(len(by_place)) >= first_tie
    tipped = may_be & (by_place > MAX_LOGIT_DIFFERENCE) & (by_place <= MAX_TIPPED)
    if by_place.quantile(MOST_PLACES) > MAX_LOGIT_DIFFERENCE:
        tipped[:] = False
    return Difference(by_place[~tipped].max().item(), int(tipped.sum()))


@torch.no_grad()
def _logits(model: PreTrainedModel, ids_1L: Tensor, positions_1L: Tensor | None, kept: Tensor) -> Tensor:
    """[kept, V]"""
    places: dict[str, Tensor] = {}
    if positions_1L is not None:
        # With a mask transformers does not take the gaps for the bounds of packed texts.
        places = {"position_ids": positions_1L, "attention_mask": torch.ones_like(ids_1L)}
    return model(ids_1L, logits_to_keep=kept, use_cache=False, **places).logits[0].float()


def _token_ids(folder: Path, config: PreTrainedConfig, tokens: int) -> Tensor:
    """[1, tokens] of real text, or of any kind for a folder without tokenizer."""
    if not (folder / "tokenizer_config.json").is_file():
        return torch.randint(config.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(0))
    from transformers import AutoTokenizer

    from lamella.data.sources import documents

    tokenizer, ids = AutoTokenizer.from_pretrained(folder), []
    for document in documents("python-docs", "heldout"):
        if len(document) > 1024:
            ids += tokenizer(document[: 16 * tokens]).input_ids
        if len(ids) >= tokens:
            break
    return torch.tensor([ids[:tokens]])
