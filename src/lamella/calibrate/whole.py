"""A dense checkpoint as the one transformers model that it is, for what needs all layers at once: sampling, healing."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import init_empty_weights
from transformers import AutoModelForCausalLM

from lamella.calibrate.anatomy import read_whole
from lamella.calibrate.layerwise import config_of
from lamella.checkpoint.source import Checkpoint
from lamella.errors import UserError


def whole_model(source: Checkpoint) -> Any:
    """The model with all its weights, on the GPU where there is one, in the file's precision there; without gradients.

    Raises:
        UserError: a checkpoint whose tensors are not those of the transformers class.
    """
    config: Any = config_of(source)
    on_gpu = torch.cuda.is_available()
    dtype = config.dtype if on_gpu and isinstance(config.dtype, torch.dtype) else torch.float32
    with init_empty_weights(include_buffers=False):  # buffers are computed from the config, and seldom stored
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)
    device = torch.device("cuda" if on_gpu else "cpu")
    named = dict(model.named_parameters(remove_duplicate=False))
    values = {
        name: read_whole(source.tensors[name]).view(parameter.shape).to(device, dtype)
        for name, parameter in named.items()
        if name in source.tensors
    }
    model.load_state_dict(values, strict=False, assign=True)
    model.tie_weights()
    left = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if left:
        raise UserError(f"{source.name} cannot be held as a whole here: it has no tensor for {left[0]}")
    return model.to(device).eval().requires_grad_(False)
