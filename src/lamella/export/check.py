"""Reload an export as its users will, and hold it against its source."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lamella.architecture.moe import Mode
from lamella.errors import UserError
from lamella.hf.models import load

CHECK_TOKENS = 128
# fp32: both sum the same products, in another order. Logits are sums over depth x width terms of size about 10; their
# rounding errors of 1e-6 of that grow to about 1e-4 in 30 layers. A lost expert or bias moves them by 0.1 and more.
MAX_LOGIT_DIFFERENCE = 1e-3


def check_reloaded(source: Path, exported: Path, mode: Mode = "routed") -> float:
    """Largest |logit difference| between the source in `mode` and the reloaded export, fp32, on real text.

    Raises:
        UserError: tensors missing or left over, or a difference over MAX_LOGIT_DIFFERENCE.
    """
    ids_1L = _token_ids(source)
    model: Any = load(source, dtype=torch.float32)
    model.set_mode(mode)
    expected = _logits(model, ids_1L)
    del model
    difference = (_logits(load(exported, dtype=torch.float32), ids_1L) - expected).abs().max().item()
    if not difference <= MAX_LOGIT_DIFFERENCE:
        raise UserError(
            f"the reloaded export differs from {source} by {difference:.3g} in its logits "
            f"(allowed: {MAX_LOGIT_DIFFERENCE}); nothing was kept"
        )
    return difference


@torch.no_grad()
def _logits(model: PreTrainedModel, ids_1L: Tensor) -> Tensor:
    return model(ids_1L).logits


def _token_ids(folder: Path) -> Tensor:
    """Tokens of real text, or of any kind for a folder without tokenizer."""
    from transformers import AutoConfig, AutoTokenizer

    if not (folder / "tokenizer_config.json").is_file():
        vocabulary = AutoConfig.from_pretrained(folder).vocab_size
        return torch.randint(vocabulary, (1, CHECK_TOKENS), generator=torch.Generator().manual_seed(0))
    from lamella.data.sources import documents

    text = next(document for document in documents("python-docs", "heldout") if len(document) > 8 * CHECK_TOKENS)
    ids = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt").input_ids
    return ids[:, :CHECK_TOKENS]
