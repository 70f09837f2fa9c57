"""Samples for the partition tests: a small FFN on clustered inputs, with the gradient of a real loss."""

from __future__ import annotations

import torch

from lamella.calibrate.sample import FFN, LayerSample, hidden, output

D, F, T, TOPICS = 12, 48, 320, 4


def sample_of(gated: bool = True, gradient: bool = True, seed: int = 0) -> LayerSample:
    """T tokens about TOPICS topics; the loss is a cross entropy on a fixed readout, which takes its labels from the
    dense output, so that dL/dh is of what the layer is there for."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    if gated:
        ffn = FFN(normal(F, D), normal(F, D), normal(D, F))
    else:
        ffn = FFN(None, normal(F, D), normal(D, F), normal(F), normal(D), "relu")
    topic_T = torch.arange(T) % TOPICS
    x_TD = 2 * normal(TOPICS, D)[topic_T] + 0.5 * normal(T, D)
    h_TF = hidden(ffn, x_TD)
    return LayerSample(ffn, x_TD, h_TF, _gradient(ffn, h_TF, normal(D, 7)) if gradient else None)


def _gradient(ffn: FFN, h_TF: torch.Tensor, readout_DV: torch.Tensor) -> torch.Tensor:
    h_TF = h_TF.clone().requires_grad_(True)
    logits_TV = output(ffn, h_TF) @ readout_DV / F
    loss = torch.nn.functional.cross_entropy(logits_TV, logits_TV.detach().argmax(1), reduction="sum")
    return torch.autograd.grad(loss, h_TF)[0]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
