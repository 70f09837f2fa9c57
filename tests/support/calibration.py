"""What the tests of calibration compare with: every spelling of a model, tokens, what a whole model in memory sees."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from lamella.calibrate import CalibrationTokens
from lamella.calibrate.layerwise import document_mask
from lamella.calibrate.sample import FFN, LayerSample
from lamella.checkpoint.source import Checkpoint
from lamella.data.packing import make_sample
from support.models import KIN, LLAMA3_ROPE, tiny_checkpoint

# name -> (family, changes to the tiny config, sharded, dtype)
MODELS: dict[str, tuple[str, dict[str, Any], bool, torch.dtype]] = {
    "llama": ("llama", {}, True, torch.float32),
    "llama tied": ("llama", {"tie_word_embeddings": True}, False, torch.float32),
    "llama bf16, biases, llama3 rope": (
        "llama", {"attention_bias": True, "rope_parameters": LLAMA3_ROPE}, False, torch.bfloat16,
    ),
    "mistral, window": ("mistral", {"sliding_window": 8}, False, torch.float32),
    "qwen2, windows in some layers": (
        "qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}, False, torch.float32,
    ),
    "qwen3": ("qwen3", {}, True, torch.float32),
    "gpt2": ("gpt2", {"tie_word_embeddings": True}, False, torch.float32),
    "gpt2, untied": ("gpt2", {}, False, torch.float32),
    "opt": ("opt", {"tie_word_embeddings": True}, False, torch.float32),
    "opt, gelu": ("opt", {"activation_function": "gelu"}, False, torch.float32),
    "opt, post-norm and a narrow embedding": (  # OPT-350m
        "opt", {"do_layer_norm_before": False, "word_embed_proj_dim": 16}, False, torch.float32,
    ),
    "opt, without a final norm": ("opt", {"_remove_final_layer_norm": True}, False, torch.float32),
    # a norm or a factor between the FFN and the sum, scaled or capped logits, two matrices in one
    **{name: (name, KIN[name], False, torch.float32) for name in ("olmo2", "granite", "cohere", "gemma2", "glm4")},
}  # fmt: skip


def checkpoint(folder: Path, name: str = "llama") -> Checkpoint:
    """A tiny checkpoint by its name in MODELS, saved to `folder` and opened."""
    family, changes, sharded, dtype = MODELS[name]
    return Checkpoint.open(tiny_checkpoint(folder, family, sharded, dtype, **changes))


def random_tokens(windows: int = 5, length: int = 48, seed: int = 0) -> CalibrationTokens:
    """Random tokens with two documents' boundaries in each window but the last, which has none."""
    rng = np.random.default_rng(seed)
    samples = []
    for window in range(windows):
        starts = np.sort(rng.choice(np.arange(3, length - 3), 2, replace=False)) if window < windows - 1 else []
        samples.append(make_sample(rng.integers(3, 128, length + 1), np.asarray(starts, dtype=np.int64)))
    return CalibrationTokens(*(torch.stack(parts) for parts in zip(*samples, strict=True)))


def whole_model(source: Checkpoint) -> PreTrainedModel:
    """The checkpoint in transformers, float32."""
    folder = next(iter(source.tensors.values())).path.parent
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def ffn_modules(model: PreTrainedModel) -> list[tuple[Any, Any]]:
    """(up, down) of each layer."""
    own = {
        "gpt2": ("mlp.c_fc", "mlp.c_proj"), "opt": ("fc1", "fc2"), "glm4": ("mlp.gate_up_proj", "mlp.down_proj"),
    }  # fmt: skip
    up, down = own.get(model.config.model_type, ("mlp.up_proj", "mlp.down_proj"))
    layers = model.get_decoder().h if model.config.model_type == "gpt2" else model.get_decoder().layers
    return [(layer.get_submodule(up), layer.get_submodule(down)) for layer in layers]


def whole_model_samples(model: PreTrainedModel, tokens: CalibrationTokens) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(x [T, D], h [T, F], dh [T, F]) of each layer, by autograd through the model at once."""
    seen: dict[int, list[Tensor]] = {}

    def keep(layer: int) -> Callable[[Any, tuple[Tensor]], None]:
        return lambda module, args: seen.setdefault(layer, []).append(args[0])

    handles = [
        module.register_forward_pre_hook(keep(layer))
        for layer, pair in enumerate(ffn_modules(model))
        for module in pair
    ]
    mask = document_mask(tokens.positions_NL) if model.config.model_type == "opt" else None
    logits_NLV = model(
        tokens.ids_NL, attention_mask=mask, position_ids=tokens.positions_NL, use_cache=False
    ).logits  # fmt: skip
    loss = torch.nn.functional.cross_entropy(
        logits_NLV.flatten(0, 1), tokens.labels_NL.flatten(), ignore_index=-100, reduction="sum"
    )
    gradients = torch.autograd.grad(loss, [seen[layer][1] for layer in sorted(seen)])
    for handle in handles:
        handle.remove()
    return [
        (seen[layer][0].detach().flatten(0, -2), seen[layer][1].detach().flatten(0, -2), gradient.flatten(0, -2))
        for layer, gradient in enumerate(gradients)
    ]


def whole_sample(layer: int, sample: LayerSample) -> dict[str, Tensor]:
    """For `on_layer`: everything that there is to see."""
    result = {"x": sample.x_TD, "h": sample.h_TF, "down": sample.ffn.down_DF, "up": sample.ffn.up_FD}
    return result if sample.dh_TF is None else result | {"dh": sample.dh_TF}


def busiest(layer: int, sample: LayerSample) -> dict[str, Tensor]:
    """For `on_layer`: the half of the neurons that is most active, and x, to be compared."""
    kept = sample.h_TF.abs().mean(0).argsort(descending=True)[: sample.h_TF.shape[1] // 2]
    return {"kept": kept} | whole_sample(layer, sample)


def only_kept(ffn: FFN, result: dict[str, Tensor]) -> Callable[[Tensor], Tensor]:
    """For `replacement`: the FFN of the kept neurons alone."""
    from lamella.calibrate.sample import hidden, output

    kept = result["kept"]
    gate_FD, up_bias_F = (None if part is None else part[kept] for part in (ffn.gate_FD, ffn.up_bias_F))
    small = FFN(gate_FD, ffn.up_FD[kept], ffn.down_DF[:, kept], up_bias_F, ffn.down_bias_D, ffn.activation)
    return lambda x_TD: output(small, hidden(small, x_TD))
