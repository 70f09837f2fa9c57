"""How the ranks of a run are laid out: the `parallel` group of a recipe, checked. Imports no torch.

A rank's place is (pipeline, replicate, shard, context, tensor); the shard degree is what is left over, and FSDP cuts
weights over shard * context ranks. Expert parallelism borrows ranks of one replica: it has no dimension of its own.
"""

from __future__ import annotations

from pydantic import PositiveInt

from lamella.errors import UserError
from lamella.recipe.check import Strict


class Parallel(Strict):
    """Degrees of parallelism besides FSDP, which takes the ranks that are left over."""

    replicate: PositiveInt = 1
    """The sharded model is held this many times (HSDP): weights are gathered inside a copy, gradients summed over the
    copies. One copy per node keeps the gathering off the slow network."""
    expert: PositiveInt = 1
    """This many ranks share out each layer's experts and exchange tokens instead of gathering experts. A slice and its
    twin lie on one rank. It must divide the number of slices and of trainable experts."""
    context: PositiveInt = 1
    """This many ranks share out the tokens of each sample, for long samples. Twice it must divide seq_len."""
    tensor: PositiveInt = 1
    """This many ranks share out attention heads, dense FFNs and vocabulary, and between these the tokens. It must
    divide heads, key/value heads and `expert`, which shares out the experts over the same ranks; it does not go
    together with `pipeline`."""
    pipeline: PositiveInt = 1
    """This many ranks share out the layers and hand activations on (schedule 1F1B). It wants at least as many
    micro-batches in a step as it has stages, and a model without tied embeddings."""

    @property
    def ranks_per_sample(self) -> int:
        """Ranks that compute the same samples together."""
        return self.context * self.tensor * self.pipeline

    def problems(self, seq_len: int) -> list[str]:
        """What is impossible on any number of ranks."""
        found = []
        if self.context > 1 and seq_len % (2 * self.context):
            found.append(
                f"2 * parallel.context must divide seq_len, and {seq_len} is no multiple of {2 * self.context}"
            )
        elif seq_len % (self.tensor * (2 * self.context if self.context > 1 else 1)):
            found.append(
                f"parallel.tensor must divide the tokens of a rank; {seq_len} of a sample is no multiple of it"
            )
        if self.tensor > 1 and self.pipeline > 1:
            found.append("parallel.tensor and parallel.pipeline do not go together; set one of them to 1")
        return found

    def layers_of(self, stage: int, num_layers: int) -> range:
        """The layers of a pipeline's stage. torchtitan counts embedding and head as a layer each, and gives the first
        stages one more where they do not come out even."""
        if self.pipeline == 1:
            return range(num_layers)
        share, more = divmod(num_layers + 2, self.pipeline)
        ends = [min(num_layers, (i + 1) * share + min(i + 1, more) - 1) for i in range(self.pipeline)]
        return range(ends[stage - 1] if stage else 0, ends[stage])

    def batch_ranks(self, num_ranks: int) -> int:
        """Ranks, or groups of them, that compute different samples.

        Raises:
            UserError: degrees that do not divide the number of ranks.
        """
        unit = self.replicate * self.ranks_per_sample
        if num_ranks % unit:
            raise UserError(
                f"{num_ranks} ranks cannot be laid out as {self._product()}; "
                f"start a multiple of {unit} ranks, or lower a degree under parallel:"
            )
        same_layers = num_ranks // (self.replicate * self.pipeline)
        if same_layers % self.expert:
            raise UserError(
                f"parallel.expert={self.expert} does not divide the {same_layers} ranks that hold one copy of a layer; "
                f"choose a divisor of it"
            )
        return num_ranks // self.ranks_per_sample

    def _product(self) -> str:
        degrees = {"replicate": self.replicate, "pipeline": self.pipeline}
        degrees |= {"context": self.context, "tensor": self.tensor}
        return " x ".join(f"{name} {degree}" for name, degree in degrees.items() if degree > 1)
