"""Small real things for tests: a byte tokenizer and a Llama of a few thousand parameters, saved as a folder."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import TemplateProcessing
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

BOS, EOS = 256, 257
VOCAB = 258


def save_tokenizer(folder: Path, add_bos: bool = False) -> Path:
    """One token per byte, `<bos>` 256, `<eos>` 257."""
    vocab = {letter: i for i, letter in enumerate(sorted(ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<bos>", "<eos>"])
    if add_bos:
        tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", BOS)])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>").save_pretrained(folder)
    return folder


def save_llama(folder: Path, *, layers: int = 2, ffn_width: int = 64, seed: int = 0, std: float = 0.2) -> Path:
    """A random Llama (width 32, grouped-query attention, tied embeddings) with the byte tokenizer.

    `std` is ten times the usual one, so that its logits are far from uniform.
    """
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=ffn_width, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=True,
        bos_token_id=BOS, eos_token_id=EOS, pad_token_id=EOS, initializer_range=std,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return save_tokenizer(folder)
