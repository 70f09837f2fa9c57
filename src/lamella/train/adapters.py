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
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from lamella.architecture.adapters import FFN_MODULES, AdaptersConfig
from lamella.architecture.converted import REMOTE_CODE
from lamella.architecture.model import sizes_of
from lamella.architecture.peft import CONFIG, WEIGHTS, PeftAdapter, Place, lora_config
from lamella.architecture.rows import names_of
from lamella.checkpoint.source import copy_sidecars, read_config
from lamella.checkpoint.write import appearing_folder, check_output, write_json
from lamella.data.packing import IGNORE_INDEX, PackedSamples, token_file
from lamella.errors import UserError, check_choice
from lamella.evaluate.checkpoints import model_path, open_checkpoint, without_weights
from lamella.hf.adapters import AdapterFFN, adapter_layers, install_adapters
from lamella.hf.computing import Computing
from lamella.moe.balancing import auxiliary_loss
from lamella.recipe.methods.adapters import takes_adapters

Target = Literal["router", "mlp", "router_mlp"]
WARMUP = 0.1
"""Of the steps: the rate rises over this share of them, then falls along a cosine to a tenth."""


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
        warmup = max(1, round(WARMUP * self.steps))
        if step < warmup:
            return (step + 1) / warmup
        return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - warmup) / max(1, self.steps - warmup)))


def learn_adapter(
    model: str,
    data: Sequence[str],
    out: str | Path,
    *,
    rank: int = 16,
    alpha: float = 32.0,
    pace: Pace | None = None,
    device: str = "cpu",
    overwrite: bool = False,
    on_step: Callable[[int, float], None] = lambda *_: None,
) -> list[float]:
    """Train LoRA on the FFNs of a dense model, and write it as the library peft does; the loss of each step.

    Args:
        data: sources of text, whose training parts are read in turn.
        alpha: the low-rank products are scaled by alpha / rank.
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
    samples = [_samples(source, model, pace) for source in data]
    base = open_checkpoint(model, device=device)
    layers = tuple(range(sizes_of(config).num_layers))
    install_adapters(base, AdaptersConfig(("new",), layers, rank), Computing(adapter=0))
    for layer in adapter_layers(base):
        layer.to(device)
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


def _start(model: PreTrainedModel, pace: Pace, scale: float) -> list[dict[str, object]]:
    """A is drawn as peft draws it, B stays 0. The scale is in B, so B's rate has it, too."""
    generator = torch.Generator().manual_seed(pace.seed)
    halves: dict[str, list[nn.Parameter]] = {"a": [], "b": []}
    for layer in adapter_layers(model):
        layer.router.requires_grad_(False)
        for name, parameter in layer.adapters.named_parameters():
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
    device: str = "cpu",
    overwrite: bool = False,
    on_step: Callable[[int, float], None] = lambda *_: None,
) -> list[float]:
    """Train the routers of a model with adapters, its adapters, or both; the loss of each step without the additions.

    Args:
        mix: a folder that `lamella convert method=adapters` made.
        data: source of text -> the name of the adapter that learned it; None is the zero expert.
        target: "router", "mlp" (the adapters) or "router_mlp".
        balance: the weight of the balancing loss, which is 1 where the experts' loads are even.
        domain_loss: the weight of the routers' cross-entropy on the text's own adapter.

    Raises:
        UserError: no such model, adapter or data; adapters that no router would choose; an unknown target.
    """
    pace, out = pace or Pace(lr=5e-3), Path(out)
    if target == "attention":
        raise UserError("target is 'attention', but adapters of attention are not carried; use router, mlp, router_mlp")
    check_choice("target", target, get_args(Target))
    check_output(out, overwrite)
    names = [*_names_of(mix), None]
    for source, name in data.items():
        if name not in names:
            known = ", ".join(str(n) for n in names[:-1])
            raise UserError(f"{source} is for the adapter {name!r}, which the model lacks; it has {known}")
    samples = [_samples(source, mix, pace) for source in data]
    model = open_checkpoint(mix, device=device)
    layers = adapter_layers(model)
    if target == "mlp" and all(layer.router.selection_bias[-1] > 0 for layer in layers):
        raise UserError("the routers send every token to the zero expert; train them first, with target router")
    wanted = {"router": ("router",), "mlp": ("adapters",), "router_mlp": ("router", "adapters")}[target]
    groups = _unfrozen(layers, wanted, pace.lr)
    experts = torch.tensor([names.index(name) for name in data.values()], device=device)

    def additions(sources_B: Tensor) -> Tensor:
        return _additions(layers, experts[sources_B], pace.seq_len, balance, domain_loss)

    losses = []
    extra = additions if "router" in wanted else lambda _: None
    for step, loss in enumerate(_steps(model, samples, pace, groups, extra), 1):
        losses.append(loss)
        on_step(step, loss)
    _write_mix(mix, out, model, overwrite)
    return losses


def _names_of(mix: str) -> tuple[str, ...]:
    config = read_config(Path(model_path(mix)))
    if config.get("adapters") is None:
        raise UserError(f"{mix} has no adapters as experts; make such a model: lamella convert method=adapters")
    return AdaptersConfig.from_dict(config["adapters"]).names


def _unfrozen(layers: Sequence[AdapterFFN], wanted: tuple[str, ...], lr: float) -> list[dict[str, object]]:
    """Routers choose freely from now on. Adapters, which have learned, are changed at a tenth of the rate."""
    groups = []
    for part, rate in (("router", lr), ("adapters", lr / 10)):
        if part in wanted:
            parameters = [p for layer in layers for p in getattr(layer, part).requires_grad_(True).parameters()]
            groups.append({"params": parameters, "lr": rate})
    for layer in layers if "router" in wanted else ():
        layer.router.selection_bias.zero_()
    return groups


def _additions(
    layers: Sequence[AdapterFFN], experts_B: Tensor, seq_len: int, balance: float, domain_loss: float
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
    return PackedSamples(token_file(source, "train", model_path(model)), pace.seq_len, pace.seed)


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
    tensors, scale = {}, alpha / rank
    for layer_index, layer in _numbered(model):
        for module in FFN_MODULES:
            low, place = layer.adapters.low_rank(module), Place(layer_index, module)
            tensors[PeftAdapter.tensor(place, "a")] = low.a[index].detach().float().cpu().contiguous()
            tensors[PeftAdapter.tensor(place, "b")] = (low.b[index].detach().float().cpu() / scale).contiguous()
    config = lora_config(base_name, rank, alpha, [number for number, _ in _numbered(model)])
    with appearing_folder(out) as folder:
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
        write_json(folder / CONFIG, config)


def _numbered(model: PreTrainedModel) -> list[tuple[int, AdapterFFN]]:
    """(number in the decoder, layer) of the layers with adapters."""
    layers = model.get_decoder().layers
    return [(i, layer.mlp) for i, layer in enumerate(layers) if isinstance(layer.mlp, AdapterFFN)]


def _write_mix(mix: str, out: Path, model: PreTrainedModel, overwrite: bool) -> None:
    """The trained model, with the small files of the folder that it was made of."""
    source = Path(model_path(mix))
    check_output(out, overwrite)
    with appearing_folder(out) as folder:
        model.save_pretrained(folder)
        copy_sidecars(source, folder)
        for name in ("config.json", "README.md", f"{REMOTE_CODE}.py"):
            if (source / name).is_file():
                (folder / name).write_bytes((source / name).read_bytes())
