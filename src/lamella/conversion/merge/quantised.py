"""The hidden gates from a base model in 4 or 8 bits, which bitsandbytes computes, as mergekit offers it.

A whole quantised model is in memory then. Without it one layer is (lamella.conversion.merge.router_inputs).

Shapes: P prompts, D model width, E experts.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from lamella.calibrate.anatomy import anatomy_of
from lamella.conversion.merge.fit import Seen, mergekit_rows
from lamella.conversion.merge.parts import Merge
from lamella.conversion.merge.prompts import Tokens
from lamella.errors import UserError


def check_bitsandbytes() -> None:
    """UserError where the library is missing."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(
            "load_in_4bit and load_in_8bit need the library bitsandbytes, which is not installed; install it, or leave "
            "the key out: the base model is then read a layer at a time, in the memory of one layer"
        )


def hidden_rows(merge: Merge, prompts: list[Tokens]) -> np.ndarray:
    """[layers, E, D]"""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    options = merge.options
    quantised = BitsAndBytesConfig(load_in_4bit=options.load_in_4bit, load_in_8bit=options.load_in_8bit)
    path = next(iter(merge.base.tensors.values())).path
    if not isinstance(path, Path):
        raise UserError("a quantised base model is read from this disk; leave load_in_4bit and load_in_8bit out")
    folder = path.parent
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, quantization_config=quantised)
    layers = list(getattr(model.get_decoder(), anatomy_of(merge.base.config).modules.layers))
    seen: dict[int, Tensor] = {}
    for index, layer in enumerate(layers):
        layer.register_forward_pre_hook(_keep(seen, index))
    vectors = torch.empty(len(layers), len(prompts), merge.layout.hidden_size)
    with torch.no_grad():
        for place, prompt in enumerate(prompts):
            try:
                model(torch.tensor([prompt.ids], device=model.device), use_cache=False, logits_to_keep=1)
            except (AssertionError, RuntimeError) as error:  # its CPU kernels take some widths only
                raise UserError(
                    f"bitsandbytes cannot compute this base model in {4 if options.load_in_4bit else 8} bits here "
                    f"({error}); leave the key out: the base model is then read a layer at a time"
                ) from error
            for index, hidden_LD in seen.items():
                chosen = hidden_LD.mean(0) if options.gate_mode == "hidden_avg" else hidden_LD[-1]
                vectors[index, place] = chosen.cpu()
    expert_P = torch.tensor([prompt.expert for prompt in prompts])
    positive_P = torch.tensor([prompt.positive for prompt in prompts])
    nothing = torch.empty(0, dtype=torch.int64)
    return mergekit_rows(vectors, Seen(nothing, nothing, expert_P, positive_P)).numpy()


def _keep(seen: dict[int, Tensor], index: int):
    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen[index] = args[0][0].float()

    return hook
