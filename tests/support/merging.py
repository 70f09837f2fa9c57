"""Tiny models of one shape, to be merged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from lamella.conversion import ConversionReport, convert
from lamella.recipe.conversion import make_conversion
from support.models import BOS, EOS, VOCAB, save_tokenizer, tiny_checkpoint

IDS = {"vocab_size": VOCAB, "bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": EOS}
# Letters that the domains do not share, so that a tokenizer of bytes tells them apart.
DOMAINS = {
    "low": ["abcd dcba abca", "dcb adc", "bad cab dab", "cabd abcd a", "dad bad", "abab cdcd"],
    "middle": ["mnop ponm mmo", "nop mon", "mop pom nom", "omnp mnop p", "pop mom", "nmnm opop"],
    "high": ["wxyz zyxw wwx", "zyx wxw", "xyz zzx", "wyxz zxyw w", "wxw yzy", "xyxy zwzw"],
}


def save_models(folder: Path, family: str = "llama", count: int = 3, **changes: Any) -> list[Path]:
    """Models with other weights each, and a tokenizer of bytes."""
    return [
        save_tokenizer(tiny_checkpoint(folder / f"{family}-{seed}", family, seed=seed, **IDS | changes))
        for seed in range(count)
    ]


def config(models: list[Path], **changes: Any) -> dict[str, Any]:
    """A config of mergekit-moe, the first model as the base."""
    experts = [
        {"source_model": str(model), "positive_prompts": prompts}
        for model, prompts in zip(models, list(DOMAINS.values()), strict=False)
    ]
    return {"base_model": str(models[0]), "experts": experts} | changes


def merge(values: dict[str, Any], out: Path) -> ConversionReport:
    """What `lamella convert` does with a config."""
    recipe = make_conversion(values)
    return convert(recipe.model, out, recipe.options)


def loaded(folder: Path) -> Any:
    """The model as stock transformers loads it, fp32; no tensor may be missing or left over."""
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model.eval()


@torch.no_grad()
def logits(model: Any, length: int = 40) -> Tensor:
    """[length, V] of fixed random tokens."""
    ids = torch.randint(VOCAB, (1, length), generator=torch.Generator().manual_seed(7))
    return model(ids).logits[0]
