"""Which experts the questions of each domain use, counted while they are scored."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lamella.evaluate.checkpoints import has_moe_layers
from lamella.evaluate.choice.questions import Question
from lamella.hf.adapters import AdapterBlock, adapter_blocks, adapter_layers
from lamella.hf.blocks import MoELayer


def routed_layers(model: PreTrainedModel) -> Sequence[MoELayer | AdapterBlock]:
    """The layers whose FFNs are chosen by a router: experts, or adapters; where no FFN has any, the attention's."""
    return model.moe_layers if has_moe_layers(model) else adapter_layers(model) or adapter_blocks(model)


class ExpertUse:
    """Counts of chosen experts: [layers, experts] for each domain. An `Observer` of the scoring.

    Tokens that choices or questions share are computed once and so counted once, for the first of them.
    """

    def __init__(self, model: PreTrainedModel, questions: Sequence[Question]):
        """Count for a converted model; there is nothing to count of another one."""
        self.layers = routed_layers(model)
        self.domains = [question.domain for question in questions for _ in question.pairs]
        experts = max((layer.config.num_experts for layer in self.layers), default=0)
        self.counts = {domain: torch.zeros(len(self.layers), experts) for domain in dict.fromkeys(self.domains)}

    def __call__(self, numbers: list[int], lengths: list[int]) -> None:
        """Count what the pass chose that has just been computed; see `Observer`."""
        real_RL = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
        names = list(self.counts)
        domain_R = torch.tensor([names.index(self.domains[number]) for number in numbers])
        for index, layer in enumerate(self.layers):
            if layer.last_routing is None:
                continue
            ids_TK = layer.last_routing.expert_ids_TK.cpu()
            for number, name in enumerate(names):
                mine_T = (real_RL & (domain_R == number)[:, None]).flatten()
                chosen = ids_TK[mine_T].flatten().bincount(minlength=self.counts[name].shape[1])
                self.counts[name][index] += chosen

    def shares(self) -> dict[str, Tensor]:
        """[layers, experts] of each domain: the share of the choices of a layer that an expert got; rows sum to 1."""
        return {name: counts / counts.sum(1, keepdim=True).clamp(min=1) for name, counts in self.counts.items()}


def draw_expert_use(shares: dict[str, Tensor], path: Path, title: str) -> None:
    """One panel per domain: layers from top to bottom, experts from left to right, the darker the more used."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    columns = min(4, len(shares))
    rows = -(-len(shares) // columns)
    largest = max(float(share.max()) for share in shares.values())
    figure, axes = plt.subplots(
        rows,
        columns,
        figsize=(3.2 * columns, 3.2 * rows),
        squeeze=False,
        sharex=True,
        sharey=True,
        layout="constrained",
    )
    for axis in axes.flat[len(shares) :]:
        axis.set_axis_off()
    for axis, (domain, share) in zip(axes.flat, shares.items(), strict=False):
        image = axis.imshow(share, vmin=0, vmax=largest, aspect="auto", cmap="Blues", interpolation="nearest")
        axis.set(title=domain, xlabel="expert", ylabel="layer")
    figure.colorbar(image, ax=axes, label="share of the layer's choices")
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
    plt.close(figure)
