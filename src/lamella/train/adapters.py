"""Adapters in the transformers home: learn one on a text, then teach routers which of them a token needs.

The dense weights stay as they are, so a step is a forward pass and a backward pass for activations alone, in one
process. Samples are packed windows of text; what a step reads depends on the seed and its number alone.

Shapes: B samples, L tokens of each, V vocabulary, T = B*L tokens, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast, get_args

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from lamella.architecture.adapters import ADAPTERS_IN_HF, MODULES, AdaptersConfig, Block
from lamella.architecture.converted import REMOTE_CODE
from lamella.architecture.model import sizes_of
from lamella.architecture.peft import CONFIG, WEIGHTS, PeftAdapter, Place, lora_config
from lamella.architecture.rows import names_of
from lamella.checkpoint.pieces import Array, Stretches
from lamella.checkpoint.plan import OutputTensor, WritePlan
from lamella.checkpoint.source import copy_sidecars, read_config, read_folder
from lamella.checkpoint.write import appearing_folder, check_output, write_json, write_tensors
from lamella.data.packing import IGNORE_INDEX, PackedSamples, token_file
from lamella.data.sources import open_source
from lamella.errors import UserError, check_choice
from lamella.evaluate.checkpoints import model_path, open_checkpoint, parse_dtype, without_weights
from lamella.hf.adapters import AdapterBlock, AdapterFFN, AttentionAdapters, adapter_blocks, install_adapters
from lamella.hf.computing import Computing, computes_bfloat16
from lamella.moe.balancing import auxiliary_loss
from lamella.moe.learning import rate_at
from lamella.recipe.methods.adapters import takes_adapters

Target = Literal["router", "mlp", "attention", "router_mlp"]
PART: dict[type[AdapterBlock], Block] = {AdapterFFN: "mlp", AttentionAdapters: "attention"}
LEAST_RATE = 0.1
"""Of the largest rate: the cosine falls to this."""


@dataclass(frozen=True)
class Pace:
    """How long and how fast to train."""

    steps: int = 60
    lr: float = 1e-3
    samples_per_step: int = 4
    seq_len: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "samples_per_step", "seq_len"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise UserError(f"lr is {self.lr}; it must be a positive number")

    def factor(self, step: int) -> float:
        """The share of `lr` at a step, from 0."""
        return rate_at(step, self.steps, LEAST_RATE)


def learn_adapter(
    model: str,
    data: Sequence[str],
    out: str | Path,
    *,
    rank: int = 16,
    alpha: float = 32.0,
    blocks: Sequence[str] = ("mlp",),
    pace: Pace | None = None,
    dtype: str = "auto",
    device: str = "cpu",
    overwrite: bool = False,
    on_step: Callable[[int, float], None] = lambda *_: None,
) -> list[float]:
    """Train LoRA of a dense model, and write it as the library peft does; the loss of each step.

    Args:
        data: sources of text, whose training parts are read in turn.
        alpha: the low-rank products are scaled by alpha / rank.
        blocks: what is changed, "mlp" (the FFNs), "attention" or both.
        dtype: of the dense model while it computes, see `training_dtype`; adapters train in float32.
        on_step: told the step's number, from 1, and its loss in nats per token.

    Raises:
        UserError: no such model or data; a model that cannot take adapters; an output that cannot be written.
    """
    pace, out = pace or Pace(), Path(out)
    if rank < 1 or not alpha > 0:
        raise UserError(f"rank {rank} and alpha {alpha}: both must be positive")
    check_output_folder(out, overwrite)
    config = without_weights(model).config.to_dict()
    if config["model_type"] not in names_of(takes_adapters):
        raise UserError(f"{config['model_type']} cannot learn adapters; {', '.join(names_of(takes_adapters))} can")
    layers = tuple(range(sizes_of(config).num_layers))
    adapters = AdaptersConfig(("new",), layers, rank, blocks=tuple(cast("Sequence[Block]", blocks)))
    samples = [_samples(source, model, pace) for source in data]
    base = open_checkpoint(model, device=device)
    install_adapters(base, adapters, Computing(adapter=0))
    _train_in_float32(base, training_dtype(dtype, device), device)
    groups = _start(base, pace, alpha / rank)
    losses = []
    for step, losses_of_step in enumerate(_steps(base, samples, pace, groups, lambda *_: None), 1):
        losses.append(losses_of_step)
        on_step(step, losses_of_step)
    write_adapter(out, base, rank, alpha, base_name=model_path(model), overwrite=overwrite)
    return losses


def check_output_folder(out: Path, overwrite: bool) -> None:
    """UserError if `out` cannot be made; nothing is touched."""
    if out.exists() and overwrite and (out / CONFIG).is_file():
        return
    check_output(out, overwrite)


def training_dtype(dtype: str, device: str) -> torch.dtype | None:
    """The dtype of dense weights, which do not train; None: each as it is stored.

    Args:
        dtype: "auto" is bfloat16 where the device multiplies it faster, and elsewhere as the file is stored.
    """
    if isinstance(parsed := parse_dtype(dtype), torch.dtype):
        return parsed
    return torch.bfloat16 if computes_bfloat16(torch.device(device)) else None


def _train_in_float32(model: PreTrainedModel, dense_dtype: torch.dtype | None, device: str) -> None:
    """Adapters and routers in float32, which small steps need, and the rest in its dtype, on the model's device."""
    small = {p for block in adapter_blocks(model) for part in (block.adapters, block.router) for p in part.parameters()}
    for parameter in model.parameters():
        if (dtype := torch.float32 if parameter in small else dense_dtype) is not None:
            parameter.data = parameter.data.to(device, dtype)


def _start(model: PreTrainedModel, pace: Pace, scale: float) -> list[dict[str, object]]:
    """A is drawn as peft draws it, B stays 0. The scale is in B, so B's rate has it, too."""
    generator = torch.Generator().manual_seed(pace.seed)
    halves: dict[str, list[nn.Parameter]] = {"a": [], "b": []}
    for block in adapter_blocks(model):
        block.router.requires_grad_(False)
        for name, parameter in block.adapters.named_parameters():
            halves[name[-1]].append(parameter)
            if name.endswith("_a"):
                bound = parameter.shape[-1] ** -0.5
                drawn = (torch.rand(parameter.shape, generator=generator) * 2 - 1) * bound
                parameter.data.copy_(drawn)
    return [{"params": halves["a"], "lr": pace.lr}, {"params": halves["b"], "lr": pace.lr * scale}]


def train_routers(
    mix: str,
    data: Mapping[str, str | None],
    out: str | Path,
    *,
    target: str = "router",
    pace: Pace | None = None,
    balance: float = 0.0,
    domain_loss: float = 1.0,
    adapter_lr: float | None = None,
    dtype: str = "auto",
    device: str = "cpu",
    overwrite: bool = False,
    on_step: Callable[[int, float], None] = lambda *_: None,
) -> list[float]:
    """Train the routers of a model with adapters, its adapters, or both; the loss of each step without the additions.

    Args:
        mix: a folder that `lamella convert method=adapters` made.
        data: source of text -> the name of the adapter that learned it; None is the zero expert.
        target: "router", "mlp" (the FFNs' adapters), "attention" (attention's adapters), or "router_mlp".
        balance: the weight of the balancing loss, which is 1 where the experts' loads are even.
        domain_loss: the weight of the routers' cross-entropy on the text's own adapter.
        adapter_lr: the adapters' largest learning rate; None: a tenth of the routers', as adapters have learned before.
        dtype: of the dense model while it computes, see `training_dtype`; what trains is held in float32.

    Raises:
        UserError: no such model, adapter or data; adapters that no router would choose; an unknown target.
    """
    pace, out = pace or Pace(lr=5e-3), Path(out)
    check_choice("target", target, get_args(Target))
    check_output(out, overwrite)
    adapters = _adapters_of(mix)
    names = [*adapters.names, None]
    for block in {"mlp": ["mlp"], "attention": ["attention"], "router_mlp": ["mlp"]}.get(target, []):
        if block not in adapters.blocks:
            raise UserError(f"target is {target!r}, but the model's adapters are of {', '.join(adapters.blocks)} alone")
    for source, name in data.items():
        if name not in names:
            known = ", ".join(str(n) for n in names[:-1])
            raise UserError(f"{source} is for the adapter {name!r}, which the model lacks; it has {known}")
    samples = [_samples(source, mix, pace) for source in data]
    model = open_checkpoint(mix, device=device)
    _train_in_float32(model, training_dtype(dtype, device), device)
    layers = adapter_blocks(model)
    if "router" not in target and all(layer.router.selection_bias[-1] > 0 for layer in layers):
        raise UserError("the routers send every token to the zero expert; train them first, with target router")
    groups = _unfrozen(layers, target, pace.lr, pace.lr / 10 if adapter_lr is None else adapter_lr)
    experts = torch.tensor([names.index(name) for name in data.values()], device=device)

    def additions(sources_B: Tensor) -> Tensor:
        return _additions(layers, experts[sources_B], pace.seq_len, balance, domain_loss)

    losses = []
    extra = additions if "router" in target else lambda _: None
    for step, loss in enumerate(_steps(model, samples, pace, groups, extra), 1):
        losses.append(loss)
        on_step(step, loss)
    _write_mix(mix, out, model, overwrite)
    return losses


def _adapters_of(mix: str) -> AdaptersConfig:
    config = read_config(Path(model_path(mix)))
    if config.get("adapters") is None:
        raise UserError(f"{mix} has no adapters as experts; make such a model: lamella convert method=adapters")
    return AdaptersConfig.from_dict(config["adapters"])


def _unfrozen(layers: Sequence[AdapterBlock], target: str, lr: float, adapter_lr: float) -> list[dict[str, object]]:
    """What the target names, with its rates. Routers that train choose freely from now on."""
    routers = [layer.router for layer in layers if "router" in target]
    adapters = [layer.adapters for layer in layers if PART[type(layer)] in target.split("_")]
    groups: list[dict[str, object]] = []
    for modules, rate in ((routers, lr), (adapters, adapter_lr)):
        if modules:
            groups.append({"params": [p for m in modules for p in m.requires_grad_(True).parameters()], "lr": rate})
    for router in routers:
        router.selection_bias.zero_()
    return groups


def _additions(
    layers: Sequence[AdapterBlock], experts_B: Tensor, seq_len: int, balance: float, domain_loss: float
) -> Tensor:
    """The mean over the layers of what is added to the loss."""
    wanted_T = experts_B.repeat_interleave(seq_len)
    total = torch.zeros((), device=experts_B.device)
    for layer in layers:
        assert layer.last_logits_TE is not None
        assert layer.last_routing is not None
        if domain_loss:
            total = total + domain_loss * F.cross_entropy(layer.last_logits_TE, wanted_T)
        if balance:
            probs_TE = layer.last_logits_TE.softmax(-1)
            total = total + balance * auxiliary_loss(probs_TE, layer.last_routing.expert_ids_TK)
    return total / len(layers)


def _samples(source: str, model: str, pace: Pace) -> PackedSamples:
    """Of a streamed source, as much as all steps could read."""
    limit = pace.steps * pace.samples_per_step * pace.seq_len + 1 if open_source(source).is_streamed else None
    return PackedSamples(token_file(source, "train", model_path(model), max_tokens=limit), pace.seq_len, pace.seed)


def _steps(
    model: PreTrainedModel,
    sources: Sequence[PackedSamples],
    pace: Pace,
    groups: list[dict[str, object]],
    additions: Callable[[Tensor], Tensor | None],
) -> Iterator[float]:
    """Train; after each step its mean loss, nats per token."""
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    rates = [group["lr"] for group in optimizer.param_groups]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for step in range(pace.steps):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * pace.factor(step)
        first = step * pace.samples_per_step
        numbers = range(first, first + pace.samples_per_step)
        sources_B = torch.tensor([number % len(sources) for number in numbers], device=model.device)
        drawn = [sources[number % len(sources)].sample(number // len(sources)) for number in numbers]
        ids_BL = torch.stack([sample.input_ids_L for sample in drawn]).to(model.device)
        labels_BL = torch.stack([sample.labels_L for sample in drawn]).to(model.device)
        logits_BLV = model(ids_BL, use_cache=False).logits
        loss = F.cross_entropy(logits_BLV.flatten(0, 1).float(), labels_BL.flatten(), ignore_index=IGNORE_INDEX)
        more = additions(sources_B)
        (loss if more is None else loss + more).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        yield loss.item()


def write_adapter(
    out: Path,
    model: PreTrainedModel,
    rank: int,
    alpha: float,
    *,
    base_name: str,
    index: int = 0,
    overwrite: bool = True,
) -> None:
    """Write adapter number `index` of a model as a folder that the library peft loads."""
    check_output_folder(out, overwrite)
    tensors, scale, numbered = {}, alpha / rank, _numbered(model)
    for layer_index, block in numbered:
        for module in MODULES[PART[type(block)]]:
            low, place = block.adapters.low_rank(module), Place(layer_index, module)
            tensors[PeftAdapter.tensor(place, "a")] = low.a[index].detach().float().cpu().contiguous()
            tensors[PeftAdapter.tensor(place, "b")] = (low.b[index].detach().float().cpu() / scale).contiguous()
    layers = sorted({number for number, _ in numbered})
    config = lora_config(base_name, rank, alpha, layers, numbered[0][1].config.blocks)
    with appearing_folder(out) as folder:
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
        write_json(folder / CONFIG, config)


def _numbered(model: PreTrainedModel) -> list[tuple[int, AdapterBlock]]:
    """(number in the decoder, block) of the blocks with adapters."""
    layers = enumerate(model.get_decoder().layers)
    return [(i, block) for i, layer in layers for block in layer.modules() if isinstance(block, AdapterBlock)]


def _write_mix(mix: str, out: Path, model: PreTrainedModel, overwrite: bool) -> None:
    """The folder that the model was made of, with the adapters and routers of the trained model."""
    source = Path(model_path(mix))
    trained = {
        ADAPTERS_IN_HF[PART[type(block)]].format(layer) + name: tensor
        for layer, block in _numbered(model)
        for part in ("adapters", "router")
        for name, tensor in getattr(block, part).state_dict(prefix=f"{part}.").items()
    }
    tensors = []
    for name, stored in read_folder(source).items():
        piece = Array(trained[name].detach().float().cpu().numpy()) if name in trained else Stretches.copy(stored)
        tensors.append(OutputTensor(name, stored.dtype, stored.shape, piece))
    plan = WritePlan(tensors, read_config(source))
    check_output(out, overwrite, plan.total_bytes)
    with appearing_folder(out) as folder:
        write_tensors(plan, folder)
        copy_sidecars(source, folder)
        for name in ("config.json", "README.md", f"{REMOTE_CODE}.py"):
            if (source / name).is_file():
                (folder / name).write_bytes((source / name).read_bytes())
