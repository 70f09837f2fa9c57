"""Learning from a dense teacher: the loss, and the teachers.

Shapes: B batch, L sequence, N = B*L tokens, C tokens of a chunk, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torchtitan.components.loss import CrossEntropyLoss
from torchtitan.config import CompileConfig, ParallelismConfig, TrainingConfig
from torchtitan.distributed import ParallelDims
from torchtitan.tools.utils import device_type

from lamella.architecture import names
from lamella.data.packing import IGNORE_INDEX
from lamella.recipe.sections import Distil
from lamella.titan.decoder import LamellaDecoder
from lamella.titan.parallelise import parallelize
from lamella.titan.state_dict import RowsReader

TOKENS_PER_CHUNK = 1024


def summed_kl(student_NV: Tensor, teacher_NV: Tensor, labels_N: Tensor, temperature: float) -> Tensor:
    """Sum over the tokens with a label of temperature^2 * KL(teacher || student), both softened by the temperature.

    A chunk of tokens at a time, whose float32 probabilities the backward pass computes again: of whole samples they
    would take several times the memory of the logits.
    """
    total = student_NV.new_zeros((), dtype=torch.float32)
    chunks = zip(*(t.split(TOKENS_PER_CHUNK) for t in (student_NV, teacher_NV, labels_N)), strict=True)
    for student_CV, teacher_CV, labels_C in chunks:
        total = total + checkpoint(_kl, student_CV, teacher_CV, labels_C, temperature, use_reentrant=False)
    return temperature**2 * total


def _kl(student_CV: Tensor, teacher_CV: Tensor, labels_C: Tensor, temperature: float) -> Tensor:
    student_CV, teacher_CV = ((x.float() / temperature).log_softmax(dim=-1) for x in (student_CV, teacher_CV))
    kl_C = F.kl_div(student_CV, teacher_CV, reduction="none", log_target=True).sum(dim=-1)
    return (kl_C * (labels_C != IGNORE_INDEX)).sum()


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
        kl = summed_kl(pred.flatten(0, 1), teacher_BLV.flatten(0, 1), labels.flatten(), self.distil.temperature)
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
