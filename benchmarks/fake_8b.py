"""Run: uv run benchmarks/fake_8b.py [--ranks 3 8 32] [--layers 32] [--json FILE]

The training step of Llama 3 8B in 8 slices as it runs on GPUs, without a GPU and without memory: tensors have shapes
and storages but no values (FakeTensorMode), collectives move nothing (torch's "fake" process group), Triton kernels are
their declared shapes. One rank takes two optimizer steps of two micro-batches; what asks for a value on the way to the
host raises, and torch's MemTracker says the most bytes that were alive, beside what `lamella plan` says.

Autograd needs a device that exists, so the tensors are on "cpu" and take the GPU's path: bfloat16, the `fused` experts,
causal attention by torch's flash operator, which keeps what FlexAttention keeps.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.testing._internal.distributed.fake_pg import FakeStore

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))  # runs where lamella is not installed, too

from measure import print_table, provenance, write_json

import lamella.titan  # noqa: F401  before torchtitan, which asks for the device when it is imported

GIB = 2**30
LLAMA3_8B = {
    "model_type": "lamella_llama", "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32,
    "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192, "dtype": "bfloat16",
    "tie_word_embeddings": False,
}  # fmt: skip
MICRO_BATCHES = 2


class Tracker(MemTracker):
    """torch's, without its accounts of single modules: they allow one call of each, and no frozen parameters."""

    def _track_module_params_and_buffers(self, module: nn.Module, install_grad_hooks: bool = True) -> tuple[int, int]:
        return super()._track_module_params_and_buffers(module, install_grad_hooks=False)

    def _pre_fw_hook(self, *_: object) -> None: ...

    def _post_fw_hook(self, *_: object) -> None: ...

    def _pre_bw_hook(self, *_: object) -> None: ...

    def _post_bw_hook(self, *_: object) -> None: ...


def write_config(folder: Path, layers: int) -> Path:
    """A folder with the config.json of the sliced model; its weights are never read."""
    moe = {
        "num_frozen_experts": 8, "num_trainable_experts": 8, "moe_intermediate_size": 1792, "num_experts_per_tok": 8,
        "moe_layers": list(range(layers)), "route_scale": 8.0,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(LLAMA3_8B | {"num_hidden_layers": layers, "moe": moe}))
    return folder


def causal(self: nn.Module, q: Tensor, k: Tensor, v: Tensor, **_: object) -> Tensor:
    """Keeps q, k, v, the outputs and a number per token and head, as FlexAttention does."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


@contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Inside, the GPU's paths are taken, of which nothing but the shapes is computed."""
    from lamella.moe.paths import fused
    from lamella.titan.decoder import LamellaDecoder
    from lamella.titan.inner_attention import DocumentAttention

    with (
        mock.patch.object(fused, "runs_triton", return_value=True),
        mock.patch.object(DocumentAttention, "forward", causal),
        mock.patch.object(LamellaDecoder, "get_attention_masks", lambda self, positions: positions.new_empty(0)),
    ):
        yield


def plan(folder: Path, recipe: Any, ranks: int) -> Any:
    """The layout that `lamella plan` has for H100s of 80 GB."""
    from lamella.plan.command import make_layout
    from lamella.plan.model import read_model

    return make_layout(recipe, read_model(folder), ranks, "H100")


def build(folder: Path, recipe: Any, ranks: int) -> SimpleNamespace:
    """Model and loss of one rank, as torchtitan's Trainer builds them, on the meta device."""
    from torchtitan.config import CompileConfig, ParallelismConfig
    from torchtitan.distributed import ParallelDims

    from lamella.titan.checkpointing import policy
    from lamella.titan.config import decoder_config
    from lamella.titan.parallelise import parallelize
    from lamella.train.assemble import loss_config, training_config

    config = decoder_config(folder, "sdpa", "fused")
    config.trains, config.frozen_weights, config.file_dtype = recipe.trains, "sharded", "bfloat16"
    for layer in config.layers:
        layer.attention.rope.max_seq_len = recipe.seq_len
    parallelism = ParallelismConfig(
        spmd_backend="partial_dtensor", data_parallel_replicate_degree=recipe.parallel.replicate
    )
    dims = ParallelDims.from_config(parallelism, ranks)
    with torch.device("meta"):
        model = config.build()
    model = parallelize(
        model, parallel_dims=dims, training=training_config(recipe), parallelism=parallelism,
        compile_config=CompileConfig(), ac_config=policy(recipe.activation_checkpointing), dump_folder="",
    )  # fmt: skip
    loss = loss_config(recipe, config.vocab_size).build(compile_config=None)
    if recipe.loss_chunks > 1:
        loss.set_lm_head(model.lm_head)
        model._skip_lm_head = True
    return SimpleNamespace(model=model.train(), loss=loss)


def fill(built: SimpleNamespace, recipe: Any) -> None:
    """Weights and an optimizer; inside FakeTensorMode they have no values."""
    from lamella.train.optimizer import optimizer_config

    built.model.to_empty(device="cpu")
    built.model.init_weights(buffer_device=torch.device("cpu"))
    built.optimizer = optimizer_config(recipe).build(model_parts=[built.model])


def optimizer_step(built: SimpleNamespace, recipe: Any) -> None:
    """As LamellaTrainer takes it, without the one look at the gradients' size that decides whether a step counts."""
    from torchtitan.distributed.utils import clip_grad_norm_

    from lamella.titan.shard import sum_gradients

    ids = torch.zeros(recipe.samples_per_micro_batch, recipe.seq_len, dtype=torch.int64)
    count = torch.ones(())
    for i in range(MICRO_BATCHES):
        sum_gradients(built.model, recipe.gradient_sync == "step", i == MICRO_BATCHES - 1)
        predicted = built.model(ids, ids)
        loss, _ = built.loss(predicted, ids, count)
        del predicted
        loss.backward()
    clip_grad_norm_(list(built.model.parameters()), 1.0, foreach=True)
    built.optimizer.step()
    built.optimizer.zero_grad(set_to_none=True)


def measure(ranks: int, layers: int, seq_len: int, settings: dict[str, Any]) -> dict[str, Any]:
    """Both figures for one number of ranks; starts and ends a process group."""
    from lamella.recipe.training import make_recipe

    with tempfile.TemporaryDirectory() as name:
        folder = write_config(Path(name), layers)
        values = {"model": name, "seq_len": seq_len, "samples_per_step": MICRO_BATCHES * ranks, "expert_path": "fused"}
        wanted = make_recipe(values | {"precision": "bfloat16", "activation_checkpointing": "auto"} | settings)
        layout = plan(folder, wanted, ranks)
        planned = fullest(layout)
        torch.distributed.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
        started = time.perf_counter()
        try:
            built = build(folder, layout.recipe, ranks)
            with FakeTensorMode(allow_non_fake_inputs=True), as_on_a_gpu():
                fill(built, layout.recipe)
                # AdamW's moments come with the first step; in it DTensor tries operations on tensors of whole shapes
                optimizer_step(built, layout.recipe)
                tracker = Tracker()
                tracker.track_external(built.model, *built.optimizer.optimizers)
                with tracker:
                    optimizer_step(built, layout.recipe)
                tracked = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]
        finally:
            torch.distributed.destroy_process_group()
    parts = {str(key).removeprefix("_MemRefType."): value for key, value in tracked.items() if value}
    return {
        "ranks": ranks, "layers": layers, "tokens": seq_len,
        "activation_checkpointing": layout.recipe.activation_checkpointing,
        "tracked_bytes": tracked["Total"], "tracked_parts": parts,
        "planned_bytes": planned.total_bytes, "planned_parts": planned.parts, "planned_moment": planned.name,
        "over": tracked["Total"] / planned.total_bytes, "wall_s": time.perf_counter() - started,
    }  # fmt: skip


def fullest(layout: Any) -> Any:
    """The moment in which `lamella plan` expects most memory."""
    from lamella.plan.memory import fullest

    return fullest(layout).peak()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[3, 8, 32])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--seq-len", type=int, default=8192)
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="keys of the recipe")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    settings = dict(word.split("=", 1) for word in args.set)
    rows = [measure(ranks, args.layers, args.seq_len, settings) for ranks in args.ranks]
    header = ["ranks", "layers", "tokens", "checkpointing", "tracked GiB", "planned GiB", "tracked/planned", "s"]
    table = [
        [
            str(r["ranks"]), str(r["layers"]), str(r["tokens"]), r["activation_checkpointing"],
            f"{r['tracked_bytes'] / GIB:.2f}", f"{r['planned_bytes'] / GIB:.2f}", f"{r['over']:.3f}",
            f"{r['wall_s']:.0f}",
        ]
        for r in rows
    ]  # fmt: skip
    print_table("Llama 3 8B in 8 slices, one rank of a fake step", header, table)
    for row in rows:
        for name in ("tracked_parts", "planned_parts"):
            print(row["ranks"], name, {key: f"{value / GIB:.2f}" for key, value in row[name].items()})
    write_json(args.json, {**provenance(torch.device("cpu")), "rows": rows})


if __name__ == "__main__":
    main()
