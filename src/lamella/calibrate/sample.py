"""One dense FFN layer, what calibration saw of it, and how its neurons are split into parts.

Shapes: T calibration tokens, D model width, F FFN neurons, G parts of f = F/G neurons, s of them shared (always on),
E = G - s routed experts, A active parts, K = A - s routed experts per token, n = s*f shared neurons.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as functional
from torch import Tensor

from lamella.architecture.moe import Activation
from lamella.errors import UserError, check_choice
from lamella.moe.activations import ACTIVATIONS


class FFN(NamedTuple):
    """Dense FFN. Gated: y = down (act(gate x) * (up x)). Two-matrix (GPT-2, OPT): gate is None and
    y = down act(up x + up_bias) + down_bias."""

    gate_FD: Tensor | None
    up_FD: Tensor
    down_DF: Tensor
    up_bias_F: Tensor | None = None
    down_bias_D: Tensor | None = None
    activation: Activation = "silu"


class LayerSample(NamedTuple):
    """What calibration saw of one layer. float32."""

    ffn: FFN
    x_TD: Tensor
    """The FFN's input."""
    h_TF: Tensor
    """Hidden activations: the input of the down projection."""
    dh_TF: Tensor | None = None
    """Gradient of the summed next-token loss with respect to h; None if nobody asked for it."""


class Partition(NamedTuple):
    shared_n: Tensor
    """int64 [s*f] neuron ids, ascending."""
    experts_Ef: Tensor
    """int64 [E, f] neuron ids, each row ascending. Every neuron that is not shared is in one expert ("gradient-sharing"
    may repeat some and leave out others)."""


class RouterInit(NamedTuple):
    """logits = x @ weight.T + bias; a token chooses the experts with the top K logits."""

    weight_ED: Tensor
    bias_E: Tensor
    """It takes part in the selection alone, never in a gate's weight."""
    up_ED: Tensor | None = None
    """CMoE's analytic router has these rows, too: logits = |silu(x @ weight.T) * (x @ up.T)| + bias."""


def need_gradient(sample: LayerSample, method: str) -> Tensor:
    """dh; UserError where the sample has none."""
    if sample.dh_TF is None:
        raise UserError(f"{method} needs the loss's gradient; calibrate with gradients, or choose another method")
    return sample.dh_TF


def hidden(ffn: FFN, x_TD: Tensor) -> Tensor:
    """h [T, F]: the input of the down projection."""
    check_choice("the activation", ffn.activation, ACTIVATIONS)
    act = ACTIVATIONS[ffn.activation]
    up_TF = functional.linear(x_TD, ffn.up_FD, ffn.up_bias_F)
    if ffn.gate_FD is None:
        return act(up_TF)
    return act(x_TD @ ffn.gate_FD.T) * up_TF


def output(ffn: FFN, h_TF: Tensor) -> Tensor:
    """y [T, D] from the hidden activations."""
    return functional.linear(h_TF, ffn.down_DF, ffn.down_bias_D)


def partition_of(expert_F: Tensor, num_routed: int) -> Partition:
    """The partition in which neuron n belongs to expert expert_F[n], or to the shared part where that is -1."""
    experts = [(expert_F == e).nonzero().flatten() for e in range(num_routed)]
    return Partition((expert_F < 0).nonzero().flatten(), torch.stack(experts))


def routed_neurons(shared_n: Tensor, ffn_width: int) -> Tensor:
    """The ids, ascending, of the neurons that are not shared."""
    is_routed_F = torch.ones(ffn_width, dtype=torch.bool)
    is_routed_F[shared_n] = False
    return is_routed_F.nonzero().flatten()


def top_neurons(score_F: Tensor, count: int) -> Tensor:
    """The ids, ascending, of the `count` highest scores; of equal ones, the lowest ids."""
    return score_F.argsort(descending=True, stable=True)[:count].sort().values


def membership(partition: Partition, ffn_width: int) -> Tensor:
    """float [E, F]: 1 where the neuron is in the expert."""
    member_EF = torch.zeros(len(partition.experts_Ef), ffn_width)
    return member_EF.scatter_(1, partition.experts_Ef, 1.0)


def expert_outputs(sample: LayerSample, partition: Partition) -> Tensor:
    """[T, E, D]: W_down,e h_e of every token and expert; without the output bias."""
    down_DF = sample.ffn.down_DF
    return torch.stack([sample.h_TF[:, ids] @ down_DF[:, ids].T for ids in partition.experts_Ef], dim=1)


def expert_norms(sample: LayerSample, partition: Partition) -> Tensor:
    """[T, E]: |W_down,e h_e|, without holding the outputs of more than one expert."""
    down_DF = sample.ffn.down_DF
    return torch.stack([(sample.h_TF[:, ids] @ down_DF[:, ids].T).norm(dim=1) for ids in partition.experts_Ef], dim=1)


def router_logits(router: RouterInit, x_TD: Tensor) -> Tensor:
    """[T, E], the selection bias included."""
    logits_TE = x_TD @ router.weight_ED.T
    if router.up_ED is not None:
        logits_TE = (functional.silu(logits_TE) * (x_TD @ router.up_ED.T)).abs()
    return logits_TE + router.bias_E


def choose(logits_TE: Tensor, num_chosen: int) -> Tensor:
    """int64 [T, K]: the experts with the top logits."""
    return logits_TE.topk(num_chosen, dim=1).indices


def rows(sample: LayerSample, tokens: slice | Tensor) -> LayerSample:
    """The sample of some of the tokens."""
    dh_TF = None if sample.dh_TF is None else sample.dh_TF[tokens]
    return LayerSample(sample.ffn, sample.x_TD[tokens], sample.h_TF[tokens], dh_TF)


def weights_only(ffn: FFN) -> LayerSample:
    """A sample of no tokens, for the methods that look at the weights alone."""
    width, neurons = ffn.up_FD.shape[1], len(ffn.up_FD)
    return LayerSample(ffn, torch.empty(0, width), torch.empty(0, neurons), torch.empty(0, neurons))
