"""Calibration text that needs no data: documents that the dense model itself samples at temperature 1.

Each document begins with a token drawn uniformly from the vocabulary, special tokens left out, and ends with the
model's end-of-text token or after 256 tokens; products are in bfloat16 where the device has units for them. What the
model writes follows its own distribution over text, and so covers what it was trained on (data-free calibration as in
LLM-QAT, arXiv 2305.17888). Documents are kept in the cache by what decides them.

Shapes: B documents at a time.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import xxhash
from torch import Tensor
from transformers import AutoTokenizer, GenerationConfig

from lamella.architecture.embedded import cache_dir
from lamella.calibrate.layerwise import config_of, model_fingerprint
from lamella.calibrate.whole import whole_model
from lamella.checkpoint.source import Checkpoint
from lamella.errors import UserError
from lamella.hf.computing import computes_bfloat16

DOCUMENTS_AT_A_TIME = 128
LENGTH = 256
"""Of a document, at most: many short ones begin in more places than few long ones."""
FORMAT = 2  # raise it when other documents come of the same settings


class Written(NamedTuple):
    """A token stream and where its documents begin; int64."""

    ids: np.ndarray
    starts: np.ndarray


def generated_text(
    source: Checkpoint, tokenizer: str | Path, num_tokens: int, seed: int, cache: Path | None = None
) -> Written:
    """At least `num_tokens` tokens of documents that the model writes.

    Args:
        tokenizer: folder of the model's tokenizer, which knows the special tokens.
        cache: folder in place of `lamella.architecture.embedded.cache_dir()`.

    Raises:
        UserError: a checkpoint that no transformers class generates with, or a vocabulary of special tokens alone.
    """
    file = (cache or cache_dir()) / "generated" / f"{_key(source, num_tokens, seed)}.npz"
    if file.is_file():
        with np.load(file) as found:
            return Written(found["ids"], found["starts"])
    model, first = whole_model(source), _first_tokens(tokenizer, config_of(source).vocab_size)
    if computes_bfloat16(model.device):
        model = model.bfloat16()
    documents = _write_documents(model, first, num_tokens, seed)
    written = Written(np.concatenate(documents), np.cumsum([0, *map(len, documents[:-1])]))
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_name(f"{file.stem}.{os.getpid()}.unfinished.npz")
    np.savez(unfinished, ids=written.ids, starts=written.starts)
    unfinished.replace(file)
    return written


def _key(source: Checkpoint, num_tokens: int, seed: int) -> str:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    decides = [FORMAT, model_fingerprint(source), num_tokens, seed, device.type, computes_bfloat16(device)]
    return xxhash.xxh3_128_hexdigest(json.dumps(decides, sort_keys=True).encode())


def _first_tokens(tokenizer: str | Path, vocab_size: int) -> Tensor:
    special = AutoTokenizer.from_pretrained(tokenizer)
    known = torch.arange(min(vocab_size, len(special)))
    plain = known[~torch.isin(known, torch.tensor(sorted(special.all_special_ids), dtype=torch.int64))]
    if not len(plain):
        raise UserError(f"all tokens of {tokenizer} are special; name a calibration text instead")
    return plain


@torch.inference_mode()
def _write_documents(model: Any, first: Tensor, num_tokens: int, seed: int) -> list[np.ndarray]:
    ends, length = _ends(model), min(LENGTH, model.config.max_position_embeddings)
    settings = GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=length - 1,
        eos_token_id=ends or None, pad_token_id=ends[0] if ends else 0,
    )  # fmt: skip
    documents: list[np.ndarray] = []
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        while (left := num_tokens - sum(map(len, documents))) > 0:
            B = min(DOCUMENTS_AT_A_TIME, -(-left // length))
            begin = first[torch.randint(len(first), (B, 1))].to(model.device)
            mask = torch.ones_like(begin)
            rows = model.generate(begin, attention_mask=mask, generation_config=settings).cpu().numpy()
            documents += [_until_end(row, ends) for row in rows]
    return documents


def _ends(model: Any) -> list[int]:
    """The tokens that end a text; a config names one, several or none."""
    named = [config.eos_token_id for config in (model.config, model.generation_config)]
    ids = [id_ for name in named for id_ in (name if isinstance(name, list) else [name])]
    return sorted({id_ for id_ in ids if id_ is not None})


def _until_end(row: np.ndarray, ends: list[int]) -> np.ndarray:
    """The document with its end token, without the padding behind it; the first token may be any."""
    found = np.flatnonzero(np.isin(row[1:], ends))
    return row[: found[0] + 2] if len(found) else row
