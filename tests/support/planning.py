"""Llama 3 8B's sizes and a small recipe, for tests of plans."""

from __future__ import annotations

from lamella.recipe.training import Recipe, make_recipe

LLAMA3_8B = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32,
    "num_key_value_heads": 8, "num_hidden_layers": 32, "vocab_size": 128256, "max_position_embeddings": 8192,
}  # fmt: skip


def recipe(**settings: object) -> Recipe:
    return make_recipe({"seq_len": 16, "samples_per_step": 8} | settings)
