"""Learning from a dense teacher: the loss, and the teachers.

Shapes: B batch, L sequence, N = B*L tokens, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torchtitan.components.loss import CrossEntropyLoss
from torchtitan.config import CompileConfig, ParallelismConfig, TrainingConfig
from torchtitan.distributed import ParallelDims
from torchtitan.tools.utils import device_type

from lamella.architecture import names
from lamella.data.packing import IGNORE_INDEX
from lamella.moe.learning import summed_kl
from lamella.recipe.sections import Distil
from lamella.titan.decoder import LamellaDecoder
from lamella.titan.parallelise import parallelize
from lamella.titan.state_dict import RowsReader


class Lesson(NamedTuple):
    """What the student is to learn from one batch; it takes the place of the labels."""

    labels_BL: Tensor
    teacher_BLV: Tensor
    """The teacher's logits."""


class DistilLoss(CrossEntropyLoss):
    """The cross-entropy; of a `Lesson`, mixed with the distance to the teacher."""

    @dataclass(kw_only=True, slots=True)
    class Config(CrossEntropyLoss.Config):
        """The cross-entropy's config, and the recipe's section `distil`."""

        distil: Distil

    def __init__(self, config: Config, *, compile_config: CompileConfig | None = None):
        super().__init__(config, compile_config=compile_config)
        self.distil = config.distil

    def __call__(
        self, pred: Tensor, labels: Tensor | Lesson, global_valid_tokens: Tensor | None = None, **kwargs: object
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss summed over the tokens, or their mean where the number of valid ones is given.

        Returns:
            (loss, no metrics).
        """
        if not isinstance(labels, Lesson):  # the held-out loss is that of the text alone
            return super().__call__(pred, labels, global_valid_tokens, **kwargs)
        labels, teacher_BLV = labels
        loss, metrics = super().__call__(pred, labels, global_valid_tokens, **kwargs)
        kept_N = labels.flatten() != IGNORE_INDEX
        kl = summed_kl(pred.flatten(0, 1), teacher_BLV.flatten(0, 1), self.distil.temperature, kept_N)
        if global_valid_tokens is not None:
            kl = kl / global_valid_tokens
        return self.distil.weight * kl + (1 - self.distil.weight) * loss, metrics


@torch.no_grad()
def teacher_logits(teacher: LamellaDecoder, inputs_BL: Tensor, student_keywords: dict[str, Tensor]) -> Tensor:
    """[B, L, V]. Of what the student is told the teacher gets the positions: it makes masks for its own attention.

    Args:
        student_keywords: what the student's forward is given besides the token ids.
    """
    return teacher(inputs_BL, positions=student_keywords.get("positions"))


def devices_of(training: TrainingConfig) -> tuple[torch.device, torch.device]:
    """Where a model's weights and its buffers lie: FSDP fetches offloaded weights from main memory, never buffers."""
    device = torch.device(device_type)
    return (torch.device("cpu") if training.enable_cpu_offload else device), device


def load_teacher(
    folder: Path,
    config: LamellaDecoder.Config,
    parallel_dims: ParallelDims,
    training: TrainingConfig,
    parallelism: ParallelismConfig,
) -> LamellaDecoder:
    """The model of a folder, laid over the ranks like the student, with nothing to train."""
    with torch.device("meta"):
        model = config.build()
    parallelize(
        model,
        parallel_dims=parallel_dims,
        training=training,
        parallelism=parallelism,
        compile_config=None,
        ac_config=None,
        dump_folder="",
    )
    weights, buffers = devices_of(training)
    model.to_empty(device=weights)
    with torch.no_grad():
        model.init_weights(buffer_device=buffers)
    state = names.to_hf(model.state_dict())
    dcp.load(state, storage_reader=RowsReader(str(folder)))
    model.load_state_dict(names.from_hf(state), strict=False)  # a tied head is in neither form
    return model.eval()
