"""The two homes of the MoE layer: `hf` (transformers: evaluate, generate, export) and `titan` (torchtitan: train)."""
