"""The rows that routers of attention experts start from, drawn or fitted to calibration text.

Shapes: T calibration tokens, D model width, E experts, A width of all heads.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lamella.architecture.model import sizes_of
from lamella.architecture.moe import AttentionMoEConfig
from lamella.calibrate import CalibrationStep, calibration_tokens
from lamella.calibrate.layerwise import LayerwiseModel
from lamella.calibrate.passes import batches, embed_pass
from lamella.checkpoint.source import Checkpoint
from lamella.conversion.partition.ridge import LinearMap, RidgeProblem
from lamella.moe.attention.heads import attention_scores, expert_norms
from lamella.moe.balancing import balanced_bias
from lamella.recipe.methods.attention import RANDOM_STD, AttentionOptions

STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0)
HELD_OUT = 0.2


class RouterStartValues(NamedTuple):
    weight_ED: Tensor
    bias_E: Tensor
    """Only selects."""


def start_routers(
    source: Checkpoint, config: AttentionMoEConfig, options: AttentionOptions, on_progress: Callable[[Any], None]
) -> dict[int, RouterStartValues]:
    """The routers of the converted layers, float32; "ridge" runs the source on calibration text, a layer at a time."""
    start = options.router_start(config.num_experts, config.num_experts_per_tok)
    if start == "ridge":
        return _ridge_routers(source, config, options, on_progress)
    generator, shape = torch.Generator().manual_seed(options.seed), (config.num_experts, sizes_of(source.config).D)
    std = RANDOM_STD if start == "random" else 0.0
    return {
        layer: RouterStartValues(torch.randn(shape, generator=generator) * std, torch.zeros(config.num_experts))
        for layer in config.layers
    }


def ridge_router(x_TD: Tensor, norms_TE: Tensor, num_chosen: int) -> RouterStartValues:
    """Predict each expert's norm, linearly: what is largest is chosen.

    The strength of the regularisation is the one whose choice takes most of the norm on held-out tokens.
    """
    fitted = max(1, int(len(x_TD) * (1 - HELD_OUT)))
    trial = RidgeProblem(x_TD[:fitted])

    def taken(strength: float) -> float:
        scores_TE = trial.fit(norms_TE[:fitted], strength)(x_TD[fitted:])
        return norms_TE[fitted:].gather(1, scores_TE.topk(num_chosen, dim=1).indices).sum().item()

    found: LinearMap = RidgeProblem(x_TD).fit(norms_TE, max(STRENGTHS, key=taken))
    return RouterStartValues(*found)


def balanced(start: RouterStartValues, x_TD: Tensor, config: AttentionMoEConfig, target: float) -> RouterStartValues:
    """The same router, its biases moved until MaxVio on these tokens is at most `target`."""
    scores_TE = attention_scores(x_TD, start.weight_ED, config)
    return start._replace(bias_E=balanced_bias(scores_TE, start.bias_E, config.num_experts_per_tok, target))


@torch.no_grad()
def _ridge_routers(
    source: Checkpoint, config: AttentionMoEConfig, options: AttentionOptions, on_progress: Callable[[Any], None]
) -> dict[int, RouterStartValues]:
    tokens, model = calibration_tokens(source, options.calibration), LayerwiseModel(source)
    hidden_NLD, routers = torch.empty(*tokens.ids_NL.shape, model.width), {}
    embed_pass(model, tokens.ids_NL, tokens.positions_NL, hidden_NLD)
    for index in range(config.layers[-1] + 1):
        begun = time.perf_counter()
        seen = _pass(model, index, tokens.positions_NL, hidden_NLD, config.num_experts if index in config.layers else 0)
        if seen:
            start = ridge_router(seen["x"], seen["norms"], config.num_experts_per_tok)
            routers[index] = balanced(start, seen["x"], config, options.balance) if options.balance else start
        wall_s = time.perf_counter() - begun
        on_progress(CalibrationStep("forward", index, model.num_layers, tokens.num_tokens / wall_s, wall_s))
    return routers


def _pass(
    model: LayerwiseModel, index: int, positions_NL: Tensor, hidden_NLD: Tensor, num_experts: int
) -> dict[str, Tensor]:
    """Replace a layer's input by its output; what its attention saw, if it is to have experts, see `_listen`."""
    layer = model.layer(index)
    seen = _listen(layer.self_attn, num_experts) if num_experts else {}
    for part in batches(hidden_NLD.shape):
        args, kwargs = model.call(index, positions_NL[part])
        hidden_NLD[part] = layer(hidden_NLD[part], *args, **kwargs)
    return {name: torch.cat(parts) for name, parts in seen.items()}


def _listen(attention: Any, num_experts: int) -> dict[str, list[Tensor]]:
    """Every forward adds the attention's input ("x") and the norms of its experts ("norms")."""
    seen: dict[str, list[Tensor]] = {"x": [], "norms": []}
    attention.q_proj.register_forward_pre_hook(lambda _, inputs: seen["x"].append(inputs[0].flatten(0, 1)))
    attention.o_proj.register_forward_pre_hook(
        lambda o_proj, inputs: seen["norms"].append(expert_norms(inputs[0].flatten(0, 1), o_proj.weight, num_experts))
    )
    return seen
