"""Does a conversion give the dense model's logits? Figures, each with a bound that has a reason.

fp32. Slicing changes nothing but the order in which the F terms of each FFN output are added. A sum of F rounded terms
is off by about u sqrt(F) of its size (u = 2^-24, roundings as a random walk), the errors of N layers add up like
another random walk, and the output head keeps the relative error: |difference| <= u sqrt(F N) max|logit|. For
SmolLM2 that is 5.5e-4; an error in the conversion shows as more than 1e-1. Never more than 1e-3 is let through.
Models that cap their logits (Gemma 2), or norm what an FFN adds, have more rounding than their logits show: where twice
the floor, measured as for bf16, is more, that is the bound.
Attention experts add up an attention's output in another order, too: F is then F + A + L, A the width of all heads and
L the tokens that are attended to.

bf16. u is 2^-9, and one rounding can flip a later one, so no formula of this kind is tight. The floor is measured
instead, on the same tokens: the dense model against itself with its FFNs summed over as many groups of neurons as the
MoE has slices, the neurons drawn at random. The MoE may lie FLOOR_FACTOR times as far from the dense model.

Greedy tokens must be the same. In bf16 two tokens can be tied within the rounding: a departure passes there if the
dense logits of the two tokens lie within four standard deviations of what the floor does to the gap of two logits
(a logit's deviation is sqrt(pi/2) times its mean |difference|, that of a gap sqrt(2) times more), and what writing the
two logits down in bf16 does: half a unit in the last place for each logit of each model. The units of the likeliest
tokens are the coarsest of all, so the mean over all logits does not show them.

One model is on the device at a time; the dense model's logits wait in main memory. Llama 3.1 8B sliced, in float32, has
13.67e9 weights: 54.7 GB of a GPU's 80, where the dense model beside it (32.1 GB more) would not fit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict, dataclass

import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

from lamella.architecture.moe import AttentionMoEConfig, MoEConfig
from lamella.errors import UserError
from lamella.evaluate.checkpoints import (
    DTYPES,
    check_length,
    check_same_text_interface,
    ffn_width,
    free_device_memory,
    has_moe_layers,
    is_converted,
    model_path,
    open_checkpoint,
    parse_device,
    without_weights,
)
from lamella.evaluate.differences import Difference, compare, compare_reordered, greedy, logits_of
from lamella.evaluate.perplexity import check_ids, text_samples
from lamella.evaluate.routing_controls import copies_without_noise, mode
from lamella.hf.models import ConvertedForCausalLM, quiet_loading
from lamella.installation import command
from lamella.jsons import Json

GREEDY_TOKENS = 64
PROMPT_TOKENS = 64
FLOOR_SEEDS = (0, 1)
# The maximum is over millions of logits and the floor over two draws: two runs of one model differ by up to 1.5.
FLOOR_FACTOR = 2.0
FP32_LIMIT = 1e-3
MODES = ("dense", "routed", "random, no noise")


@dataclass(frozen=True)
class Check:
    """One row: `figure` must be at most `bound` (or at least, if `at_least`)."""

    dtype: str
    what: str
    """Which two models: a mode of the MoE against the dense model, or the floor."""
    name: str
    figure: float
    bound: float | None = None
    """None: for information."""
    at_least: bool = False
    reason: str = ""

    @property
    def passed(self) -> bool:
        if self.bound is None:
            return True
        # A NaN passes neither way.
        return self.figure >= self.bound if self.at_least else self.figure <= self.bound

    def to_dict(self) -> Json:
        return asdict(self) | {"passed": self.passed}


@dataclass(frozen=True)
class Bounds:
    max_abs: float
    mean_abs: float
    kl: float
    top1: float
    tie: float
    """Greedy tokens whose dense logits are this close may be swapped."""
    reason: str
    resolution: float = 0.0
    """Of one logit, relative to its size; two of it are added to `tie`."""


def fp32_bounds(terms: int, layers: int, floor: Difference) -> Bounds:
    """See the module's docstring. KL of small differences d is about d^2 / 2; a flipped top-1 needs a tie."""
    u = torch.finfo(torch.float32).eps / 2
    formula, measured = u * math.sqrt(terms * layers) * floor.max_logit, FLOOR_FACTOR * floor.max_abs
    reason = "2^-24 sqrt(F N) max|logit|" if formula >= measured else f"{FLOOR_FACTOR:g}x the floor"
    max_abs = min(FP32_LIMIT, max(formula, measured))
    return Bounds(max_abs, max_abs, max(max_abs**2, 1e-9), 0.999, 0.0, reason)


def floor_bounds(floors: list[Difference]) -> Bounds:
    """FLOOR_FACTOR times the largest floor; KL grows with the square of the difference."""
    top1 = min(f.top1_agreement for f in floors)
    # Flipped tokens are counted, so their number has the spread of a Poisson count: three standard deviations more.
    flips = FLOOR_FACTOR * (1 - top1) * floors[0].tokens
    allowed = (flips + 3 * math.sqrt(max(flips, 1))) / floors[0].tokens
    return Bounds(
        FLOOR_FACTOR * max(f.max_abs for f in floors),
        FLOOR_FACTOR * max(f.mean_abs for f in floors),
        FLOOR_FACTOR**2 * max(f.kl for f in floors),
        1 - allowed,
        4 * math.sqrt(math.pi) * max(f.mean_abs for f in floors),
        f"{FLOOR_FACTOR:g}x the floor",
        torch.finfo(torch.bfloat16).eps,
    )


def logit_match(
    dense_name: str,
    moe_name: str,
    *,
    data: str = "python-docs",
    tokens: dict[str, int] | None = None,
    seq_len: int = 256,
    device: str = "auto",
    on_step: Callable[[str], None] = lambda _: None,
) -> list[Check]:
    """Every check, for each dtype in `tokens` ({"float32": 512, "bfloat16": 256}: tokens of held-out text).

    Args:
        dense_name, moe_name: see `lamella.evaluate.checkpoints.model_path`.
        on_step: told what is being measured.

    Raises:
        UserError: an unknown device; no such model or data; `moe_name` is no conversion, or one of another model.
    """
    parse_device(device)
    tokens = {"float32": 512, "bfloat16": 256} if tokens is None else tokens
    windows, texts = {}, []
    for dtype, count in tokens.items():
        samples = text_samples(data, "heldout", model_path(moe_name), seq_len, None)
        texts.append(samples)
        windows[dtype] = [samples.sample(i).input_ids_L for i in range(min(len(samples), max(1, count // seq_len)))]
    dense, moe = without_weights(dense_name), _must_be_the_dense_model(without_weights(moe_name), moe_name)
    check_length(seq_len, dense, moe)
    for samples in texts:
        check_ids(data, samples, model_path(moe_name), dense, moe)
    check_same_text_interface(dense, moe)
    checks: list[Check] = []
    for dtype, ids in windows.items():
        checks += _dtype_checks(dense_name, moe_name, moe, dtype, ids, device, on_step)
    return checks


def _must_be_the_dense_model(moe: PreTrainedModel, name: str) -> ConvertedForCausalLM:
    """The model; UserError where its logits need not match in any mode."""
    if is_converted(moe):
        if not checked_modes(moe, routes=True):
            raise UserError(
                f"{name} has neither frozen slices nor all experts active with unit gates: its logits need not be the "
                f"dense model's; compare the two by `lamella evaluate {name} --dense DIR`"
            )
        return moe
    raise UserError(f"{name} is a dense model; pass a converted one; `{command('lamella convert')}` makes it")


def _plain_logits(name: str, dtype: str, device: str, windows: list[Tensor]) -> tuple[str, list[Tensor]]:
    """(class, logits) of the architecture's own class in transformers."""
    path = model_path(name)
    (architecture,) = AutoConfig.from_pretrained(path).architectures or ["no architecture"]
    cls = getattr(transformers, architecture)
    with quiet_loading():
        plain = cls.from_pretrained(path, dtype=DTYPES[dtype]).to(parse_device(device)).eval()
    return cls.__name__, logits_of(plain, windows)


@dataclass(frozen=True)
class Reference:
    """What there is to know of the dense model when it is gone again."""

    logits: list[Tensor]
    """[L, V] of each window, in main memory."""
    greedy: tuple[list[int], Tensor]
    floors: list[Difference]
    sanity: Check


def _reference(
    name: str, moe: ConvertedForCausalLM, dtype: str, windows: list[Tensor], device: str, on_step: Callable[[str], None]
) -> Reference:
    """The dense model's side of the comparison, with the floor. The model itself is freed on return.

    Args:
        moe: says which layers are summed in how many parts; without weights.
    """
    on_step(f"{dtype}: the dense model in transformers")
    cls, plain = _plain_logits(name, dtype, device, windows[:1])
    free_device_memory()
    on_step(f"{dtype}: loading the dense model")
    dense = open_checkpoint(name, dtype, device)
    on_step(f"{dtype}: logits of the dense model")
    logits = logits_of(dense, windows)
    figure = compare(plain, dense, windows[:1]).max_abs
    sanity = Check(dtype, f"dense, {cls}", "max |logit difference|", figure, 0.0, reason="the same computation")
    layers, parts = _summed_in_parts(moe, ffn_width(dense))
    floors = []
    for seed in FLOOR_SEEDS:
        on_step(f"{dtype}: floor {seed + 1} of {len(FLOOR_SEEDS)}")
        floors.append(compare_reordered(logits, dense, parts, layers, windows, seed))
    on_step(f"{dtype}: greedy tokens of the dense model")
    return Reference(logits, greedy(dense, windows[0][:PROMPT_TOKENS], GREEDY_TOKENS), floors, sanity)


def _dtype_checks(
    dense_name: str,
    moe_name: str,
    shape: ConvertedForCausalLM,
    dtype: str,
    windows: list[Tensor],
    device: str,
    on_step: Callable[[str], None],
) -> Iterator[Check]:
    """The rows of one dtype. `shape` is the converted model without its weights."""
    reference = _reference(dense_name, shape, dtype, windows, device, on_step)
    free_device_memory()
    yield reference.sanity
    floor = max(reference.floors, key=lambda f: f.max_abs)
    yield from _rows(dtype, "floor: dense, sums in another order", floor, None)
    bounds = floor_bounds(reference.floors)
    if dtype == "float32":
        terms = ffn_width(shape) + _attention_terms(shape, len(windows[0]))
        bounds = fp32_bounds(terms, len(_summed_in_parts(shape, ffn_width(shape))[0]), floor)
    on_step(f"{dtype}: loading the converted model")
    moe = open_checkpoint(moe_name, dtype, device)
    assert is_converted(moe)
    prompt = windows[0][:PROMPT_TOKENS]
    for what in checked_modes(moe, routes=_routes_as_converted(moe)):
        on_step(f"{dtype}: {what}")
        with _as(moe, what):
            yield from _rows(dtype, what, compare(reference.logits, moe, windows), bounds)
            yield greedy_check(dtype, what, reference.greedy, greedy(moe, prompt, GREEDY_TOKENS)[0], bounds)


def _routes_as_converted(moe: ConvertedForCausalLM) -> bool:
    """Whether no router has been trained: its rows are zero, as conversion writes them."""
    return not any(layer.router.weight.any() for layer in moe.moe_layers)


def checked_modes(moe: ConvertedForCausalLM, routes: bool) -> list[str]:
    """The modes in which this model must be the dense one; its weights are not looked at.

    With slices "routed" only before training (`routes`: rows of the router are zero), "random" only where every slice
    is drawn once (twin). Without them "routed", where all experts are chosen with unit gates.
    """
    heads = all(_all_chosen(attention.config) for attention in moe.attention_experts)
    if not has_moe_layers(moe) or not moe.moe_layers[0].config.num_frozen_experts:
        return ["routed"] if heads and all(_all_chosen(layer.config) for layer in moe.moe_layers) else []
    modes = ["dense"]
    if heads and routes:
        modes.append("routed")
    if heads and moe.moe_layers[0].config.routing == "twin":
        modes.append("random, no noise")
    return modes


def _all_chosen(config: MoEConfig | AttentionMoEConfig) -> bool:
    return config.num_experts_per_tok == config.num_experts and config.gate == "unit"


def _attention_terms(moe: ConvertedForCausalLM, num_tokens: int) -> int:
    return num_tokens + moe.attention_experts[0].o_proj.weight.shape[1] if moe.attention_experts else 0


def _summed_in_parts(moe: ConvertedForCausalLM, ffn_width: int) -> tuple[list[int], int]:
    """(layers, parts of each whose outputs are added); of attention alone the number of its experts."""
    if not has_moe_layers(moe):
        heads = moe.attention_experts[0].config
        return list(heads.layers), heads.num_experts
    config = moe.moe_layers[0].config
    return list(config.moe_layers), config.num_frozen_experts or ffn_width // config.moe_intermediate_size


def _as(moe: ConvertedForCausalLM, what: str) -> AbstractContextManager:
    stack = ExitStack()
    stack.enter_context(mode(moe, what.partition(",")[0]))  # type: ignore[arg-type]
    if what == "random, no noise":
        stack.enter_context(copies_without_noise(moe))
        stack.enter_context(torch.random.fork_rng())
        torch.manual_seed(0)
    return stack


def _rows(dtype: str, what: str, difference: Difference, bounds: Bounds | None) -> Iterator[Check]:
    figures = {
        "max |logit difference|": ("max_abs", difference.max_abs),
        "mean |logit difference|": ("mean_abs", difference.mean_abs),
        "KL, nats per token": ("kl", difference.kl),
        "top-1 agreement": ("top1", difference.top1_agreement),
    }
    for name, (field, figure) in figures.items():
        bound = None if bounds is None else getattr(bounds, field)
        yield Check(dtype, what, name, figure, bound, field == "top1", bounds.reason if bounds else "")


def greedy_check(dtype: str, what: str, expected: tuple[list[int], Tensor], tokens: list[int], bounds: Bounds) -> Check:
    """Whether greedy decoding gives the dense model's tokens, or departs from them where two of them were tied.

    Args:
        expected: the dense model's tokens, and its logits of each of them, [length, V].
        tokens: the other model's.
    """
    wanted, logits_LV = expected
    same = next((i for i, (a, b) in enumerate(zip(wanted, tokens, strict=True)) if a != b), len(wanted))
    needed, reason = len(wanted), "the same text"
    if same < len(wanted):
        apart = (logits_LV[same, wanted[same]] - logits_LV[same, tokens[same]]).item()
        reach = bounds.tie + 2 * bounds.resolution * logits_LV[same, wanted[same]].abs().item()
        if apart < reach:
            needed, reason = same, f"then a tie: {apart:.2g} apart, the rounding's reach is {reach:.2g}"
        else:
            reason = f"then no tie: {apart:.2g} apart, the rounding's reach is {reach:.2g}"
    return Check(dtype, what, f"greedy tokens equal, of {len(wanted)}", same, needed, True, reason)
