"""CMoE's analytic router (arXiv 2502.04416): one representative neuron per expert stands for it, logit = |its h|.

The representative is the neuron whose marker column is nearest to the mean of its expert's columns.
"""

from __future__ import annotations

import torch

from lamella.calibrate.sample import LayerSample, Partition, RouterInit
from lamella.conversion.partition.coactivation import marker_columns, marker_distances
from lamella.errors import UserError


def analytic_router(
    sample: LayerSample, partition: Partition, num_chosen: int, generator: torch.Generator
) -> RouterInit:
    ffn = sample.ffn
    if ffn.gate_FD is None or ffn.activation != "silu":
        raise UserError("the analytic router needs an FFN with a gate and silu; choose ridge, kmeans, random or zero")
    markers_FT = marker_columns(sample)
    representative = []
    for ids in partition.experts_Ef:
        markers_fT = markers_FT[ids]
        representative.append(ids[marker_distances(markers_fT, markers_fT.mean(0, keepdim=True)).argmin()])
    neurons_E = torch.stack(representative)
    return RouterInit(ffn.gate_FD[neurons_E], torch.zeros(len(neurons_E)), ffn.up_FD[neurons_E])
