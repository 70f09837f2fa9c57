"""Perplexity on a text: contiguous windows of the token stream, each token scored once.

Windows do not overlap, so the first tokens of each are scored with little context: figures are a little higher than
with a sliding window, alike for every model. Attention is plain causal over the window, across the documents in it;
only the label that leads from one document into the next is left out.

Shapes: B windows, L tokens per window, V vocabulary.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lamella.architecture.moe import Mode
from lamella.data.packing import IGNORE_INDEX, PackedSamples, Sample, token_file
from lamella.data.sources import Split
from lamella.data.tokenizer import check_vocabulary
from lamella.errors import UserError
from lamella.evaluate.checkpoints import (
    adapter_of,
    check_length,
    check_same_text_interface,
    free_device_memory,
    is_converted,
    lower,
    open_checkpoint,
    parse_device,
    parse_dtype,
    without_weights,
)
from lamella.evaluate.served.measure import Served, tokenizer_of
from lamella.evaluate.served.names import is_served, load_tokenizer


@dataclass(frozen=True)
class Perplexity:
    nats_per_token: float
    perplexity: float
    bits_per_byte: float
    """Over the UTF-8 bytes of the scored text: comparable between tokenizers."""
    tokens: int
    """Scored tokens."""
    bytes: int
    wall_s: float


@torch.inference_mode()
def perplexity(
    model: PreTrainedModel, samples: PackedSamples, tokenizer: PreTrainedTokenizerBase, max_tokens: int | None = None
) -> Perplexity:
    """Token-weighted over the first windows of `samples`, at most `max_tokens` tokens of text (at least one window).

    Args:
        samples: in file order (no seed).
        tokenizer: decodes the scored tokens, to count their bytes.
    """
    start, nats = time.perf_counter(), 0.0
    windows = first_windows(samples, max_tokens)
    for ids_L, labels_L, _ in windows:
        logits_LV = model(ids_L[None].to(model.device), use_cache=False).logits[0]
        nats += summed_nats(logits_LV, labels_L.to(model.device))
    return per_token(nats, windows, tokenizer, time.perf_counter() - start)


def first_windows(samples: PackedSamples, max_tokens: int | None) -> list[Sample]:
    """Those within `max_tokens` tokens of text, at least one; UserError where nothing in them is to be predicted."""
    windows = [samples.sample(i) for i in range(num_windows(samples, max_tokens))]
    if not any((window.labels_L != IGNORE_INDEX).any() for window in windows):
        raise UserError(f"the {len(windows)} windows hold nothing to predict, as answers are; score more or other text")
    return windows


def per_token(nats: float, windows: list[Sample], tokenizer: PreTrainedTokenizerBase, wall_s: float) -> Perplexity:
    """The measures of windows whose labels have a cross entropy of `nats` in all."""
    ids = torch.cat([window.labels_L[window.labels_L != IGNORE_INDEX] for window in windows])
    text = tokenizer.decode(ids.tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    num_bytes, mean = len(text.encode()), nats / len(ids)
    bits_per_byte = nats / math.log(2) / max(num_bytes, 1)
    return Perplexity(mean, math.exp(mean), bits_per_byte, len(ids), num_bytes, wall_s)


def summed_nats(logits_LV: Tensor, labels_L: Tensor) -> float:
    """Cross entropy, summed; float32 whatever the model's dtype."""
    return F.cross_entropy(logits_LV.float(), labels_L, ignore_index=IGNORE_INDEX, reduction="sum").item()


def num_windows(samples: PackedSamples, max_tokens: int | None) -> int:
    """Windows within `max_tokens` tokens of text, at least one."""
    return len(samples) if max_tokens is None else min(len(samples), max(1, max_tokens // samples.seq_len))


def text_samples(data: str, split: Split | None, tokenizer: str, seq_len: int, max_tokens: int | None) -> PackedSamples:
    """The windows of `data` in file order; of a streamed source, as much as `max_tokens` need."""
    from lamella.data.sources import open_source

    limit = None
    if open_source(data).is_streamed:
        if max_tokens is None:
            raise UserError(f"{data} is streamed; say how many tokens to score")
        limit = max_tokens + 1
    return PackedSamples(token_file(data, split, tokenizer, max_tokens=limit), seq_len)


def check_ids(data: str, samples: PackedSamples, tokenizer: str, *models: PreTrainedModel) -> None:
    """UserError for text with a token id that one of the models does not have."""
    for model in models:
        embedding = model.get_input_embeddings()
        assert isinstance(embedding, torch.nn.Embedding)
        check_vocabulary(data, samples.tokens.largest_id, embedding.num_embeddings, tokenizer)


def evaluate(
    folder: str,
    data: str = "python-docs",
    dense: str | None = None,
    *,
    split: Split | None = "heldout",
    max_tokens: int | None = 8192,
    seq_len: int = 1024,
    mode: Mode | None = None,
    top_k: int | None = None,
    twins: float | None = None,
    dtype: str = "auto",
    device: str = "auto",
    tokenizer: str | None = None,
) -> dict[str, Perplexity]:
    """The perplexity of a model, and of a dense one on the same tokens: {"model": ..., "dense": ...}.

    One model is on the device at a time.

    Args:
        folder, dense: see `lamella.evaluate.checkpoints.model_path`; `folder` may be a GGUF file or an endpoint, too,
            see `lamella.evaluate.served.names`.
        mode: what the MoE layers compute; None: as the model stands ("routed").
        top_k, twins: see `lamella.evaluate.checkpoints.lower`.
        tokenizer: of a served model: the folder of the model that it was made of.

    Raises:
        UserError: no such model or data, text shorter than a window, a mode for a model without experts, a server that
            does not answer or cannot tell what is measured.
    """
    if max_tokens is not None and max_tokens < 2:
        raise UserError(f"{max_tokens} tokens cannot be scored; ask for at least 2")
    parse_dtype(dtype), parse_device(device)
    seq_len = min(seq_len, max_tokens or seq_len)
    of_a_folder = {"--mode": mode, "--top-k": top_k, "--twins": twins, "--dtype": dtype, "--device": device}
    path = tokenizer_of(folder, tokenizer, of_a_folder)
    samples = text_samples(data, split, path, seq_len, max_tokens)
    _check(folder, dense, data, samples, mode, top_k, twins)
    encoder, results = load_tokenizer(path), {}
    for key, name in (("model", folder), ("dense", dense)):
        if name is None:
            continue
        if is_served(name):
            results[key] = _of_served(Served(name, encoder), samples, max_tokens)
            continue
        model = open_checkpoint(name, dtype, device)
        if key == "model":
            _set(model, mode, top_k, twins)
        results[key] = perplexity(model, samples, encoder, max_tokens)
        del model
        free_device_memory()
    return results


def _check(
    folder: str,
    dense: str | None,
    data: str,
    samples: PackedSamples,
    mode: Mode | None,
    top_k: int | None,
    twins: float | None,
) -> None:
    """UserError, before weights are read, where a model in a folder cannot be measured so."""
    shapes = [without_weights(name) for name in (folder, dense) if name is not None and not is_served(name)]
    for shape in shapes:
        check_length(samples.seq_len, shape)
        check_ids(data, samples, folder, shape)
    if is_served(folder):
        return
    adapter_of(shapes[0], folder)
    if mode is not None and not is_converted(shapes[0]):
        raise UserError(f"{folder} is a dense model, so it has no mode; leave --mode out")
    lower(shapes[0], top_k, twins)
    if dense is not None:
        check_same_text_interface(shapes[1], shapes[0])


def _of_served(served: Served, samples: PackedSamples, max_tokens: int | None) -> Perplexity:
    start, windows = time.perf_counter(), first_windows(samples, max_tokens)
    nats = sum(served.nats(windows))
    return per_token(nats, windows, served.tokenizer, time.perf_counter() - start)


def _set(model: PreTrainedModel, mode: Mode | None, top_k: int | None, twins: float | None) -> None:
    if mode is not None:
        assert is_converted(model)
        model.set_mode(mode)
    lower(model, top_k, twins)
