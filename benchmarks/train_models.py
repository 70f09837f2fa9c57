"""The models of train_step.py, of the same widths: what trains, and one optimizer step as that home's trainer takes it.

The torchtitan home steps as `torchtitan.trainer.Trainer.train_step` does, with its own FSDP2, loss, clipping and
optimizer. The transformers home, for machines without torchtitan, has FSDP2 per layer and torch's own AdamW.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lamella.architecture.moe import MoEConfig

SLICES = 8
LR = 1e-4
Mark = Callable[[str], None]
"""Called with the name of the phase that has just ended."""


class Shape(NamedTuple):
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    vocab_size: int
    tied: bool


class Batch(NamedTuple):
    """What one rank gets: [B, L] each; every sample is one document."""

    input_ids: Tensor
    labels: Tensor
    positions: Tensor


@dataclass
class Contestant:
    model: nn.Module
    optimizer: Any
    step: Callable[[Batch, Mark], None]
    flops_per_token: int = 0

    def state_bytes(self) -> int:
        """Weights and optimizer state of this rank, after a step."""
        tensors = [*self.model.parameters(), *self.model.buffers()]
        for optimizer in getattr(self.optimizer, "optimizers", [self.optimizer]):
            tensors += [t for state in optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]
        return sum(local(t).nbytes for t in tensors)

    def num_trained(self) -> int:
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad)


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def moe_config(shape: Shape) -> MoEConfig:
    width = shape.intermediate_size // SLICES
    return MoEConfig(SLICES, SLICES, width, SLICES, tuple(range(shape.layers)), route_scale=float(SLICES))


def hf_values(shape: Shape, seq_len: int) -> dict[str, Any]:
    return {
        "vocab_size": shape.vocab_size, "hidden_size": shape.hidden_size, "num_hidden_layers": shape.layers,
        "intermediate_size": shape.intermediate_size, "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads, "max_position_embeddings": seq_len, "tie_word_embeddings": shape.tied,
    }  # fmt: skip


@torch.no_grad()
def draw_weights(model: nn.Module) -> None:
    """Matrices of std 0.02, norms 1, selection biases 0: about half of the tokens choose each copy."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        weight = local(parameter)
        weight.normal_(std=0.02) if parameter.dim() > 1 else weight.fill_(1.0)
    for name, buffer in model.named_buffers():
        if name.endswith("selection_bias"):
            buffer.zero_()


# the torchtitan home


def write_model_folder(shape: Shape, seq_len: int, folder: Path, sliced: bool) -> Path:
    """A folder with the config.json that recipes are checked against; the weights are drawn, not read."""
    folder.mkdir(parents=True, exist_ok=True)
    dtype = "bfloat16" if torch.cuda.is_available() else "float32"
    values = hf_values(shape, seq_len) | {"model_type": "llama", "dtype": dtype}
    if sliced:
        values |= {"model_type": "lamella_llama", "moe": moe_config(shape).to_dict()}
    (folder / "config.json").write_text(json.dumps(values))
    return folder


def titan_lamella(
    shape: Shape, seq_len: int, folder: Path, checkpointing: str, options: dict[str, Any], **settings: str
) -> Contestant:
    """The model that `lamella train` trains: sliced, or dense with trains="all". `settings` are the recipe's."""
    from lamella.recipe.training import Recipe
    from lamella.titan.parallelise import parallelize
    from lamella.train.assemble import model_config
    from lamella.train.balance import Balance
    from lamella.train.optimizer import optimizer_config

    write_model_folder(shape, seq_len, folder, sliced=settings.get("trains") != "all")
    recipe = Recipe(model=str(folder), seq_len=seq_len, lr=LR, activation_checkpointing=checkpointing, **settings)  # type: ignore[arg-type]
    config = model_config(recipe)
    model, dims = _titan_model(config, parallelize, recipe, options)
    optimizers = optimizer_config(recipe).build(model_parts=[model])
    balance = Balance(model, recipe, dims.get_optional_mesh("loss"))  # type: ignore[arg-type]
    optimizers.register_step_pre_hook(lambda *_: balance.update())

    def step(batch: Batch, mark: Mark) -> None:
        balance.aim(1)
        _titan_step(model, optimizers, dims, batch, mark)

    return Contestant(model, optimizers, step, config.get_nparams_and_flops(model, seq_len)[1])


def titan_llama(shape: Shape, seq_len: int, checkpointing: str, options: dict[str, Any]) -> Contestant:
    """torchtitan's own Llama, all its parameters trained, as torchtitan lays it over the ranks."""
    from torchtitan.components.optimizer import default_adamw
    from torchtitan.models.llama3 import parallelize_llama

    from lamella.recipe.training import Recipe
    from lamella.titan.parallelise import _sum_reductions

    def parallelize(model: nn.Module, **kwargs: Any) -> nn.Module:
        model = parallelize_llama(model, **kwargs)
        if not torch.accelerator.is_available():
            _sum_reductions(model)  # gloo cannot do what FSDP asks for otherwise
        return model

    config = _titan_llama_config(shape, seq_len)
    recipe = Recipe(trains="all", activation_checkpointing=checkpointing)  # type: ignore[arg-type]
    model, dims = _titan_model(config, parallelize, recipe, options)
    optimizers = default_adamw(lr=LR).build(model_parts=[model])
    weights = sum(p.numel() for n, p in model.named_parameters() if p.dim() > 1 and (shape.tied or "tok_" not in n))
    flops = 6 * weights + 12 * shape.layers * shape.hidden_size * seq_len
    return Contestant(model, optimizers, lambda b, mark: _titan_step(model, optimizers, dims, b, mark), flops)


def _titan_llama_config(shape: Shape, seq_len: int) -> Any:
    from torchtitan.models.common import ComplexRoPE, Embedding, Linear, RMSNorm
    from torchtitan.models.common.attention import FlexAttention, ScaledDotProductAttention
    from torchtitan.models.common.config_utils import make_ffn_config, make_gqa_config
    from torchtitan.models.llama3 import Llama3Model
    from torchtitan.models.llama3.model import Llama3TransformerBlock

    from lamella.titan.moe import UNSET

    D = shape.hidden_size
    # FlexAttention, torchtitan's default, has no backward pass on a CPU; this one is causal without documents
    attention = (FlexAttention if torch.accelerator.is_available() else ScaledDotProductAttention).Config()
    norm = RMSNorm.Config(normalized_shape=D, param_init=UNSET)
    rope = ComplexRoPE.Config(dim=D // shape.heads, max_seq_len=seq_len, theta=10000.0)
    layer = Llama3TransformerBlock.Config(
        attention_norm=norm,
        ffn_norm=norm,
        attention=make_gqa_config(
            dim=D, n_heads=shape.heads, n_kv_heads=shape.kv_heads, inner_attention=attention, rope=rope, fuse_qkv=True,
            wqkv_param_init={}, wo_param_init=UNSET,
        ),
        feed_forward=make_ffn_config(
            dim=D, hidden_dim=shape.intermediate_size, w1_param_init=UNSET, w2w3_param_init=UNSET
        ),
    )  # fmt: skip
    return Llama3Model.Config(
        dim=D,
        vocab_size=shape.vocab_size,
        enable_weight_tying=shape.tied,
        tok_embeddings=Embedding.Config(num_embeddings=shape.vocab_size, embedding_dim=D, param_init=UNSET),
        norm=norm,
        lm_head=Linear.Config(in_features=D, out_features=shape.vocab_size, param_init=UNSET),
        layers=[layer] * shape.layers,
    )


def _titan_model(config: Any, parallelize: Any, recipe: Any, options: dict[str, Any]) -> tuple[nn.Module, Any]:
    """As torchtitan's Trainer builds it: on the meta device, over the ranks, then filled."""
    from torchtitan.config import CompileConfig, ParallelismConfig
    from torchtitan.distributed import ParallelDims
    from torchtitan.tools.utils import device_type

    from lamella.titan.checkpointing import policy
    from lamella.train.assemble import training_config

    parallelism = ParallelismConfig(spmd_backend="partial_dtensor", **options)
    dims = ParallelDims.from_config(parallelism, torch.distributed.get_world_size())
    with torch.device("meta"):
        model = config.build()
    model = parallelize(
        model, parallel_dims=dims, training=training_config(recipe), parallelism=parallelism,
        compile_config=CompileConfig(), ac_config=policy(recipe.activation_checkpointing), dump_folder="",
    )  # fmt: skip
    model.to_empty(device=device_type)
    if config.enable_weight_tying:
        model.tok_embeddings.weight = model.lm_head.weight
    for module in model.modules():
        if hasattr(module, "_init_self_buffers"):
            module._init_self_buffers()
    draw_weights(model)
    return model.train(), dims


def _titan_step(model: nn.Module, optimizers: Any, dims: Any, batch: Batch, mark: Mark) -> None:
    from torchtitan.components.loss import cross_entropy_loss
    from torchtitan.distributed.utils import clip_grad_norm_, dist_sum_tensor

    count = (batch.labels >= 0).sum()
    if dims.dp_enabled:
        count = dist_sum_tensor(count, dims.get_mesh("batch"))
    loss = cross_entropy_loss(_titan_logits(model, batch), batch.labels) / count
    mark("forward")
    loss.backward()
    mark("backward")
    clip_grad_norm_(list(model.parameters()), 1.0, foreach=True)
    mark("clip")
    optimizers.step()
    optimizers.zero_grad(set_to_none=True)  # last, not first: the other models' steps come between
    mark("optimizer")


def _titan_logits(model: Any, batch: Batch) -> Tensor:
    from torchtitan.models.common.attention import ScaledDotProductAttention

    masks = None
    if not isinstance(model.config.first_attention.inner_attention, ScaledDotProductAttention.Config):
        masks = model.get_attention_masks(batch.positions)
    return model(batch.input_ids, batch.positions, masks)


# the transformers home


def transformers_model(shape: Shape, seq_len: int, sliced: bool, checkpointing: str, dtype: torch.dtype) -> Contestant:
    """Stock LlamaForCausalLM, all trained; or its sliced form, experts and router trained."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from transformers import LlamaConfig, LlamaForCausalLM

    from lamella.hf.models import LamellaLlamaConfig, LamellaLlamaForCausalLM

    values = hf_values(shape, seq_len)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device(device):
        if sliced:
            model: Any = LamellaLlamaForCausalLM(LamellaLlamaConfig(**values, moe=moe_config(shape).to_dict()))
        else:
            model = LlamaForCausalLM(LlamaConfig(**values))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not sliced or ".experts.trainable_" in name or name.endswith(".router.weight"))
    if checkpointing != "none":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    draw_weights(model)
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for module in (*model.model.layers, model):
        fully_shard(module, mp_policy=policy)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LR, fused=True)

    def step(batch: Batch, mark: Mark) -> None:
        logits = model(input_ids=batch.input_ids, position_ids=batch.positions, use_cache=False).logits
        loss = F.cross_entropy(logits.flatten(0, 1).float(), batch.labels.flatten())
        mark("forward")
        loss.backward()
        mark("backward")
        torch.nn.utils.clip_grad_norm_(trained, 1.0, foreach=True)
        mark("clip")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        mark("optimizer")

    return Contestant(model, optimizer, step, _hf_flops(model, shape, seq_len))


def _hf_flops(model: nn.Module, shape: Shape, seq_len: int) -> int:
    """As in lamella.titan.flops, which needs torchtitan."""
    flops = 12.0 * shape.layers * shape.hidden_size * seq_len
    for name, p in model.named_parameters():
        if p.dim() > 1 and (shape.tied or "embed_tokens" not in name):
            flops += (6 if p.requires_grad else 4) * p.numel() * (0.5 if ".experts." in name else 1)
    return int(flops)
