"""A tokenizer that llama.cpp has a name for."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.pre_tokenizers import ByteLevel, Digits
from transformers import PreTrainedTokenizerFast

VOCAB = 320
TEXT = "import os\n\ndef area(width, height):\n    return width * height  # 12 x 345\n" * 20


def save_bpe(folder: Path, digits: bool = False) -> Path:
    """A byte-level BPE with merges, 10 tokens fewer than the model has."""
    tokenizer = Tokenizer(models.BPE())
    words = ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([Digits(individual_digits=True), words]) if digits else words
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB - 10, special_tokens=["<bos>", "<eos>"], initial_alphabet=ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>")
    fast.chat_template = "{{ messages[0].content }}"
    fast.save_pretrained(folder)
    return folder
