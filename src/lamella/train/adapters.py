"""Adapters in the transformers home: learn one on a text, then teach routers which of them a token needs.

Shapes: B samples, T tokens of all of them, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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
from lamella.architecture.peft import CONFIG, WEIGHTS, PeftAdapter, Place, lora_config, read_peft, tensor_name
from lamella.architecture.rows import names_of
from lamella.checkpoint.pieces import Array, Stretches
from lamella.checkpoint.plan import OutputTensor, WritePlan
from lamella.checkpoint.source import copy_sidecars, read_config, read_folder
from lamella.checkpoint.write import appearing_folder, check_output, write_json, write_tensors
from lamella.conversion.adapters import read_low_rank
from lamella.errors import UserError, check_choice
from lamella.evaluate.checkpoints import model_path, open_checkpoint, parse_dtype, without_weights
from lamella.hf.adapters import AdapterBlock, AdapterFFN, AttentionAdapters, adapter_blocks, install_adapters
from lamella.hf.computing import Computing, computes_bfloat16
from lamella.jsons import Json
from lamella.moe.balancing import auxiliary_loss
from lamella.recipe.methods.adapters import takes_adapters
from lamella.train.adapter_routers import start_routers
from lamella.train.adapter_steps import Groups, Kept, Pace, samples_of, take_steps

Target = Literal["router", "mlp", "attention", "router_mlp"]
PART: dict[type[AdapterBlock], Block] = {AdapterFFN: "mlp", AttentionAdapters: "attention"}


def learn_adapter(
    model: str,
    data: Sequence[str],
    out: str | Path,
    *,
    rank: int = 16,
    alpha: float = 32.0,
    blocks: Sequence[str] = ("mlp",),
    pace: Pace | None = None,
    start: str | Path | None = None,
    dtype: str = "auto",
    device: str = "cpu",
    overwrite: bool = False,
    kept: Kept | None = None,
    on_step: Callable[[int, float], None] = lambda *_: None,
) -> list[float]:
    """Train LoRA of a dense model, and write it as the library peft does; the loss of each step.

    Args:
        data: sources of text, whose training parts are read in turn.
        alpha: the low-rank products are scaled by alpha / rank.
        blocks: what is changed, "mlp" (the FFNs), "attention" or both.
        start: the folder of an adapter to begin with, of this rank or a smaller one.
        dtype: of the dense model while it computes, see `training_dtype`; adapters train in float32.
        kept: where to go on from; None: an interrupted training begins anew.
        on_step: told the step's number, from 1, and its loss in nats per token.

    Raises:
        UserError: no such model or data; a model that cannot take adapters; a start that does not fit; an output that
            cannot be written.
        StopAskedError: see `Kept`.
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
    given = None if start is None else _fitting(start, config, adapters)
    texts = [samples_of(source, model, pace, len(data)) for source in data]
    base = open_checkpoint(model, device=device)
    install_adapters(base, adapters, Computing(adapter=0))
    _train_in_float32(base, training_dtype(dtype, device), device)
    groups = _start(base, pace, alpha / rank)
    if given is not None:
        _take_over(base, given)
    losses = take_steps(base, texts, pace, groups, kept=kept, on_step=on_step)
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


def _start(model: PreTrainedModel, pace: Pace, scale: float) -> Groups:
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


def _fitting(start: str | Path, config: Json, adapters: AdaptersConfig) -> PeftAdapter:
    """The adapter of a folder; UserError where the new one cannot hold it."""
    given = read_peft(start, sizes_of(config))
    if (largest := max(given.ranks.values())) > adapters.rank:
        raise UserError(f"the adapter {start} has rank {largest}, and what begins with it {adapters.rank}; raise rank")
    if outside := sorted({place.block for place in given.ranks} - set(adapters.blocks)):
        raise UserError(f"the adapter {start} changes {', '.join(outside)} as well; learn an adapter of that, too")
    return given


def _take_over(model: PreTrainedModel, given: PeftAdapter) -> None:
    """Begin with an adapter. Of a rank that it lacks A is drawn and B is 0, as in any other beginning."""
    for layer, block in _numbered(model):
        for module in MODULES[PART[type(block)]]:
            if (place := Place(layer, module)) in given.ranks:
                low, rank = block.adapters.low_rank(module), given.ranks[place]
                low.a.data[0, :rank] = read_low_rank(given, place, "a").to(low.a.device)
                low.b.data[0, :, :rank] = read_low_rank(given, place, "b").to(low.b.device)


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
    kept: Kept | None = None,
    on_step: Callable[[int, float], None] = lambda *_: None,
) -> list[float]:
    """Train the routers of a model with adapters, its adapters, or both; the loss of each step without the additions.

    Routers that were never trained start where `lamella.train.adapter_routers` says.

    Args:
        mix: a folder that `lamella convert method=adapters` made.
        data: source of text -> the name of the adapter that learned it; None is the zero expert.
        target: "router", "mlp" (the FFNs' adapters), "attention" (attention's adapters), or "router_mlp".
        balance: the weight of the balancing loss, which is 1 where the experts' loads are even.
        domain_loss: the weight of the routers' cross-entropy on the text's own adapter.
        adapter_lr: the adapters' largest learning rate; None: a tenth of the routers', as adapters have learned before.
        dtype: of the dense model while it computes, see `training_dtype`; what trains is held in float32.
        kept: where to go on from; None: an interrupted training begins anew.

    Raises:
        UserError: no such model, adapter or data; adapters that no router would choose; an unknown target.
        StopAskedError: see `Kept`.
    """
    pace, out = pace or Pace(lr=5e-3), Path(out)
    check_choice("target", target, get_args(Target))
    check_output(out, overwrite)
    adapters = _adapters_of(mix)
    _check_task(adapters, target, data)
    names = [*adapters.names, None]
    texts = [samples_of(source, mix, pace, len(data)) for source in data]
    model = open_checkpoint(mix, device=device)
    _train_in_float32(model, training_dtype(dtype, device), device)
    layers = adapter_blocks(model)
    if "router" not in target and all(layer.router.selection_bias[-1] > 0 for layer in layers):
        raise UserError("the routers send every token to the zero expert; train them first, with target router")
    experts = [names.index(name) for name in data.values()]
    if "router" in target and not any(layer.router.weight.any() for layer in layers):
        start_routers(model, texts, experts)
    groups = _unfrozen(layers, target, pace.lr, pace.lr / 10 if adapter_lr is None else adapter_lr)
    of_text = torch.tensor(experts, device=device)

    def additions(texts_B: Tensor) -> Tensor | None:
        if "router" not in target:
            return None
        return _additions(layers, of_text[texts_B], pace.seq_len, balance, domain_loss)

    losses = take_steps(model, texts, pace, groups, additions, kept, on_step)
    _write_mix(mix, out, model, overwrite)
    return losses


def _check_task(adapters: AdaptersConfig, target: str, data: Mapping[str, str | None]) -> None:
    """UserError for a target or an adapter that the model lacks."""
    for block in {"mlp": ["mlp"], "attention": ["attention"], "router_mlp": ["mlp"]}.get(target, []):
        if block not in adapters.blocks:
            raise UserError(f"target is {target!r}, but the model's adapters are of {', '.join(adapters.blocks)} alone")
    for source, name in data.items():
        if name is not None and name not in adapters.names:
            known = ", ".join(adapters.names)
            raise UserError(f"{source} is for the adapter {name!r}, which the model lacks; it has {known}")


def _adapters_of(mix: str) -> AdaptersConfig:
    config = read_config(Path(model_path(mix)))
    if config.get("adapters") is None:
        raise UserError(f"{mix} has no adapters as experts; make such a model: lamella convert method=adapters")
    return AdaptersConfig.from_dict(config["adapters"])


def _unfrozen(layers: Sequence[AdapterBlock], target: str, lr: float, adapter_lr: float) -> Groups:
    """What the target names, with its rates. Routers that train choose freely from now on."""
    routers = [layer.router for layer in layers if "router" in target]
    adapters = [layer.adapters for layer in layers if PART[type(layer)] in target.split("_")]
    groups: Groups = []
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
            tensors[tensor_name(place, "a")] = low.a[index].detach().float().cpu().contiguous()
            tensors[tensor_name(place, "b")] = (low.b[index].detach().float().cpu() / scale).contiguous()
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
