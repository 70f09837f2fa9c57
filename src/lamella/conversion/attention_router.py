"""Where the routers of attention experts start, and what calibration says.

Shapes: T calibration tokens, D model width, E experts, A width of all heads.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lamella.config import AttentionMoEConfig
from lamella.conversion.attention_options import RANDOM_STD, AttentionOptions
from lamella.errors import UserError
from lamella.moe.attention import attention_scores, expert_norms
from lamella.moe.balancing import balanced_bias
from lamella.partition.ridge import LinearMap, RidgeProblem

STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0)
HELD_OUT = 0.2
SEQUENCE_LENGTH = 512
# Of the text so many times the tokens needed are tokenised, and the windows drawn from them.
DRAW_FROM = 8


class RouterStartValues(NamedTuple):
    weight_ED: Tensor
    bias_E: Tensor
    """Only selects."""


def start_routers(
    folder: Path, hidden_size: int, config: AttentionMoEConfig, options: AttentionOptions
) -> dict[int, RouterStartValues]:
    """The routers of the converted layers, float32; "ridge" loads the model of `folder` and runs it."""
    shape = (config.num_experts, hidden_size)
    if options.router == "ridge":
        return _ridge_routers(folder, config, options)
    generator = torch.Generator().manual_seed(options.seed)
    std = RANDOM_STD if options.router == "random" else 0.0
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


def _ridge_routers(folder: Path, config: AttentionMoEConfig, options: AttentionOptions) -> dict[int, RouterStartValues]:
    from lamella.models.hf import load

    ids_NL, positions_NL = calibration_windows(folder, options)
    model: Any = load(folder, dtype=torch.float32)
    attention = {layer: model.model.layers[layer].self_attn for layer in config.layers}
    with torch.no_grad(), _listening(attention, config.num_experts) as seen:
        for ids_L, positions_L in zip(ids_NL, positions_NL, strict=True):
            model(ids_L[None], position_ids=positions_L[None], use_cache=False, logits_to_keep=1)
    routers = {}
    for layer in config.layers:
        x_TD, norms_TE = (torch.cat(seen.pop((layer, kind))) for kind in ("x", "norms"))
        start = ridge_router(x_TD, norms_TE, config.num_experts_per_tok)
        routers[layer] = start if options.balance is None else balanced(start, x_TD, config, options.balance)
    return routers


@contextmanager
def _listening(attention: dict[int, Any], num_experts: int) -> Iterator[dict[tuple[int, str], list[Tensor]]]:
    """Inside, every forward adds each layer's input ("x") and the norms of its experts ("norms")."""
    seen: dict[tuple[int, str], list[Tensor]] = {(layer, kind): [] for layer in attention for kind in ("x", "norms")}
    handles = []

    def listen(layer: int, module: Any) -> None:
        def on_x(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            seen[layer, "x"].append(inputs[0].flatten(0, 1))

        def on_heads(o_proj: Any, inputs: tuple[Tensor, ...]) -> None:
            seen[layer, "norms"].append(expert_norms(inputs[0].flatten(0, 1), o_proj.weight, num_experts))

        handles.append(module.q_proj.register_forward_pre_hook(on_x))
        handles.append(module.o_proj.register_forward_pre_hook(on_heads))

    try:
        for layer, module in attention.items():
            listen(layer, module)
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def calibration_windows(folder: Path, options: AttentionOptions) -> tuple[Tensor, Tensor]:
    """(ids, positions), both [N, L], of text that is not held out for evaluation."""
    from lamella.data.packing import PackedSamples, token_file

    if not (folder / "tokenizer_config.json").is_file():
        raise UserError("the router 'ridge' reads text, but the model has no tokenizer; use router 'random'")
    length = min(SEQUENCE_LENGTH, options.calibration_tokens)
    count = -(-options.calibration_tokens // length)
    tokens = token_file("python-docs", "train", folder, max_tokens=DRAW_FROM * count * length + 1)
    samples = PackedSamples(tokens, length, options.seed)
    if len(samples) < count:
        raise UserError(f"{options.calibration_tokens} calibration_tokens are more than the text has; ask for fewer")
    windows = [samples.sample(i) for i in range(count)]
    return torch.stack([w[0] for w in windows]), torch.stack([w[2] for w in windows])
