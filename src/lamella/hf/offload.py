"""A converted model whose experts stay on disk, or in main memory beside a GPU: a part of them is in memory at a time.

The rest of the model is loaded as always. Experts are found in the folder's own safetensors.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lamella.architecture.converted import converted_family, is_converted, stored_ffn_config
from lamella.architecture.moe import MoEConfig
from lamella.checkpoint.dtypes import DTYPES
from lamella.checkpoint.sizes import bytes_of
from lamella.checkpoint.source import read_config
from lamella.errors import UserError, check_choice
from lamella.hf.blocks import ExpertsElsewhere, MoELayer, decoder_layers, experts_elsewhere
from lamella.hf.models import load
from lamella.hf.stored import Places, stored_experts
from lamella.moe.experts import router_scores
from lamella.moe.matrices import ROUNDED_DTYPES, PackedDtype
from lamella.moe.offload.cache import ExpertCache
from lamella.moe.offload.layer import Guess, OffloadedExperts
from lamella.moe.offload.pages import read_pages_alone
from lamella.moe.offload.slots import DiskHome, Home, MemoryHome
from lamella.moe.quantised import Quantised
from lamella.moe.routing import route

PLACES = ("disk", "cpu")
SLICES = ("stored", *ROUNDED_DTYPES)


def parse_memory(text: str) -> int:
    """'2GiB', '800MB' or '1.5G' in bytes; UserError for what is no size."""
    if (size := bytes_of(text)) is None:
        raise UserError(f"the memory for experts is {text!r}; write a size such as 2GiB or 800MB")
    return size


def load_offloaded(
    folder: Path, expert_memory: int, experts_on: str, dtype: torch.dtype | str, device: str, slices: str = "stored"
) -> PreTrainedModel:
    """The model; `expert_cache` has what counts what is read.

    Args:
        folder: of a converted model.
        expert_memory: bytes for experts: in main memory for a model on the CPU, else on the GPU.
        experts_on: where the others wait.
        slices: "stored", or "int8" or "int4": the frozen experts are rounded while they are read, unless the file holds
            them so, and all of them stay in memory; the budget counts them, and what is left is the trained twins'.

    Raises:
        UserError: another kind of model, or too little memory for the experts of one token in a layer.
    """
    check_choice("experts-on", experts_on, PLACES)
    if experts_on == "cpu" and torch.device(device).type == "cpu":
        raise UserError("experts on cpu are for a model on a GPU; here they can be on disk")
    if experts_on == "disk" and torch.device(device).type != "cpu":
        raise UserError("experts go to a GPU from main memory; use --experts-on cpu")
    check_choice("slices", slices, SLICES)
    moe, places = _places(folder)
    rounded: dict[int, Quantised] = {}
    if slices != "stored":
        kind = next(dtype for dtype in ROUNDED_DTYPES if dtype == slices)
        rounded, places = _rounded_slices(folder, moe, places, kind, torch.device(device))
        expert_memory -= sum(layer.nbytes for layer in rounded.values())
    stored = [DTYPES[m.values.dtype] for pair in places.values() for m in pair if m.scales is None]
    computed = (stored or [torch.float32])[0] if dtype == "auto" else dtype
    assert isinstance(computed, torch.dtype)
    home: Home = (
        DiskHome({key: (one.range(), other.range()) for key, (one, other) in places.items()}, computed)
        if experts_on == "disk"
        else MemoryHome(_in_memory(places, computed), torch.device(device))
    )
    cache = ExpertCache(home, _num_slots(expert_memory, home, moe, len(places), rounded))
    with experts_elsewhere():
        model = load(folder, computed, device)
    for parameter in model.parameters():  # not pages of the file, which the system counts and takes away
        parameter.data = parameter.data.clone()
    _install(model, moe, cache, rounded)
    if experts_on == "disk":
        read_pages_alone()
    return model


def expert_cache(model: PreTrainedModel) -> ExpertCache | None:
    """The cache of a model that `load_offloaded` loaded, with its counts; None for another one."""
    for module in model.modules():
        if isinstance(module, ExpertsElsewhere) and isinstance(module.given, OffloadedExperts):
            return module.given.cache
    return None


def _places(folder: Path) -> tuple[MoEConfig, Places]:
    """The config, and where each expert is stored."""
    config = read_config(folder)
    if config.get("moe") is None or not is_converted(config):
        raise UserError(f"{folder} is no converted model with experts in its FFNs; leave --expert-memory out")
    converted_family(config)
    moe = stored_ffn_config(config)
    assert moe is not None
    if not moe.gated or moe.lora_rank or any(config.get(entry) is not None for entry in ("attention_moe", "adapters")):
        raise UserError("experts of two matrices, low-rank deltas, attention experts and adapters stay in memory; "
                        "leave --expert-memory out")  # fmt: skip
    return moe, stored_experts(folder, moe)


def _in_memory(places: Places, dtype: torch.dtype) -> dict[int, tuple[list[Tensor], list[Tensor]]]:
    """All experts by layer, pinned where there is a GPU."""
    layers: dict[int, tuple[list[Tensor], list[Tensor]]] = {}
    for (layer, _), pair in places.items():
        for matrices, stored in zip(layers.setdefault(layer, ([], [])), pair, strict=True):
            matrix = stored.weight().to(dtype)
            matrices.append(matrix.pin_memory() if torch.cuda.is_available() else matrix)
    return layers


def _rounded_slices(
    folder: Path, moe: MoEConfig, places: Places, dtype: PackedDtype, device: torch.device
) -> tuple[dict[int, Quantised], Places]:
    """(the frozen experts of each layer in the dtype, the places of all others)."""
    if moe.frozen_dtype not in ("model", dtype):
        raise UserError(f"the slices of {folder} are stored in {moe.frozen_dtype}; take --slices {moe.frozen_dtype}")
    count = {layer: moe.for_layer(layer).num_frozen_experts for layer in moe.moe_layers}
    others = {key: pair for key, pair in places.items() if key[1] >= count[key[0]]}
    if not others or len(others) == len(places):
        raise UserError(f"{folder} has not both frozen slices and trained experts; leave --slices out")
    rounded = {}
    for layer, frozen in count.items():
        pairs = [places[layer, e] for e in range(frozen)]
        rounded[layer] = Quantised(*([pair[i].packed(dtype, device) for pair in pairs] for i in (0, 1)))
    return rounded, others


def _num_slots(budget: int, home: Home, moe: MoEConfig, num_experts: int, rounded: dict[int, Quantised]) -> int:
    least = max(moe.for_layer(layer).num_experts_per_tok for layer in moe.moe_layers)
    taken = sum(layer.nbytes for layer in rounded.values())
    if budget < least * home.slot_bytes:
        beside = f" beside {-(-taken // 2**10)}KiB of slices" if rounded else ""
        raise UserError(
            f"the memory for experts holds {max(0, budget // home.slot_bytes)} of them{beside}, but a token needs "
            f"{least} in a layer; give at least {-(-(least * home.slot_bytes + taken) // 2**10)}KiB"
        )
    return min(budget // home.slot_bytes, num_experts)


def _install(model: PreTrainedModel, moe: MoEConfig, cache: ExpertCache, rounded: dict[int, Quantised]) -> None:
    layers = decoder_layers(model)
    for at, index in reversed([*enumerate(moe.moe_layers)]):  # a layer's guess is of the next one, which is whole
        following = moe.moe_layers[at + 1] if at + 1 < len(moe.moe_layers) else None
        block = layers[index].mlp
        assert isinstance(block, MoELayer)
        assert isinstance(block.experts, ExpertsElsewhere)
        guess = None if following is None else _guess(layers[index], layers[following])
        block.experts.given = OffloadedExperts(index, cache, at == 0, following or 0, guess, rounded.get(index))


def _guess(layer: torch.nn.Module, following: torch.nn.Module) -> Guess:
    """The next layer's router on this layer's hidden state: with its norm's weights instead of this layer's."""
    block = following.mlp
    assert isinstance(block, MoELayer)
    weights = block.weights
    ours, theirs = (getattr(x, "post_attention_layernorm", None) for x in (layer, following))
    if ours is not None and theirs is not None:
        ratio_D = theirs.weight.float() / torch.where(ours.weight.abs() < 1e-4, 1.0, ours.weight.float())
        weights = weights._replace(router_RD=weights.router_RD.float() * ratio_D)
        if weights.router_up_RD is not None:
            weights = weights._replace(router_up_RD=weights.router_up_RD.float() * ratio_D)

    def guess(x_1D: Tensor) -> list[int]:
        now = block.computing
        config = now.applied(block.config)
        scores_1E = router_scores(x_1D, weights, config)
        routing = route(scores_1E, weights.selection_bias_R, config, weights.gate_scale_R, now.twin_share)
        return routing.expert_ids_TK[0].tolist()

    return guess
