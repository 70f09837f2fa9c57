"""Adapters of tiny models, as the library peft saves them."""

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

MODULES = ["gate_proj", "up_proj", "down_proj"]
VARIANTS = {
    "plain": {"r": 4, "lora_alpha": 8, "target_modules": MODULES},
    "patterns": {
        "r": 4, "lora_alpha": 8, "target_modules": MODULES, "rank_pattern": {"layers.1.mlp.up_proj": 3, "down_proj": 2},
        "alpha_pattern": {"gate_proj": 5},
    },
    "rslora": {
        "r": 9, "lora_alpha": 8, "use_rslora": True, "target_modules": ["down_proj"], "layers_to_transform": [0],
    },
}  # fmt: skip
WITH_ATTENTION = {"r": 4, "lora_alpha": 8, "target_modules": [*MODULES, "q_proj", "k_proj", "v_proj", "o_proj"]}
ATTENTION = {"r": 3, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"]}
IDS = torch.randint(0, 128, (2, 17), generator=torch.Generator().manual_seed(0))


def save_adapter(dense, out, seed=1, **config):
    """As peft saves it, with a B that is not zero."""
    torch.manual_seed(seed)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(dense), LoraConfig(**config))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.3)
    model.save_pretrained(out)
    return out


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(ids, use_cache=False).logits
