"""What slicing must give, whole matrices at a time: the oracle of the conversion, which works in chunks.

    y = W_down (silu(W_gate x) * (W_up x)) = sum over slices i of the same with slice i's neurons

Shapes: D model width, F dense FFN width, S slices, f = F/S neurons per slice.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lamella.architecture.sizes import check_slices
from lamella.moe.packed import Experts
from support.models import TWO_MATRIX


def slice_gate_up(gate_FD: Tensor, up_FD: Tensor, slices: int) -> Tensor:
    """[F, D] gate and up matrices -> [S, 2f, D]."""
    f = check_slices(gate_FD.shape[0], slices)
    D = gate_FD.shape[1]
    return torch.cat([gate_FD.view(slices, f, D), up_FD.view(slices, f, D)], dim=1)


def slice_down(down_DF: Tensor, slices: int) -> Tensor:
    """[D, F] -> [S, D, f], contiguous."""
    f = check_slices(down_DF.shape[1], slices)
    return down_DF.view(-1, slices, f).transpose(0, 1).contiguous()


def slice_ffn(gate_FD: Tensor, up_FD: Tensor, down_DF: Tensor, slices: int) -> Experts:
    """The slices of a gated FFN, in order. The inverse is `unslice_ffn`."""
    return Experts(slice_gate_up(gate_FD, up_FD, slices), slice_down(down_DF, slices))


def unslice_ffn(experts: Experts) -> tuple[Tensor, Tensor, Tensor]:
    """(gate [F, D], up [F, D], down [D, F]) from slices laid side by side; bit for bit what `slice_ffn` was given."""
    S, f2, D = experts.gate_up_proj.shape
    gate, up = experts.gate_up_proj.view(S, 2, f2 // 2, D).unbind(1)
    return gate.reshape(-1, D), up.reshape(-1, D), experts.down_proj.transpose(0, 1).reshape(D, -1)


def moe_prefix(family: str, layer: int) -> str:
    """Of a converted layer's tensors."""
    prefixes = {"gpt2": f"transformer.h.{layer}.mlp.", "opt": f"model.decoder.layers.{layer}.fc1."}
    return prefixes.get(family, f"model.layers.{layer}.mlp.")


def dense_ffn(tensors: dict[str, Tensor], family: str, layer: int) -> dict[str, Tensor]:
    """A layer's FFN of a dense checkpoint by dense name, as stored."""
    parts = {
        "gpt2": [f"transformer.h.{layer}.mlp.{part}." for part in ("c_fc", "c_proj")],
        "opt": [f"model.decoder.layers.{layer}.{part}." for part in ("fc1", "fc2")],
    }
    prefixes = parts.get(family, [f"model.layers.{layer}.mlp."])
    return {name: tensor for name, tensor in tensors.items() if name.startswith(tuple(prefixes))}


def sliced_by_hand(ffn: dict[str, Tensor], family: str, slices: int) -> dict[str, Tensor]:
    """`dense_ffn`, whose order is that of the names, -> the packed tensors of its slices, slice by slice."""
    by_name = dict(sorted(ffn.items()))
    if family not in TWO_MATRIX:
        down_DF, gate_FD, up_FD = by_name.values()
        pairs = zip(gate_FD.chunk(slices), up_FD.chunk(slices), strict=True)
        packed = {"gate_up_proj": torch.stack([torch.cat(pair) for pair in pairs])}
    else:
        up_bias_F, up_FD, _, down_DF = by_name.values()
        if family == "gpt2":
            up_FD, down_DF = up_FD.T, down_DF.T
        packed = {"up_proj": torch.stack(up_FD.chunk(slices)), "up_bias": torch.stack(up_bias_F.chunk(slices))}
    return packed | {"down_proj": torch.stack(down_DF.chunk(slices, dim=1))}
