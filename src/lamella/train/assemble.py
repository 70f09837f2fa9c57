"""A recipe -> torchtitan's Trainer.Config."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import torch
from torchtitan.components.loss import BaseLoss, ChunkedLossWrapper, CrossEntropyLoss
from torchtitan.config import CommConfig, CompileConfig, DebugConfig, ParallelismConfig, TrainingConfig
from torchtitan.distributed.pipeline_parallel import pipeline_llm
from torchtitan.protocols.model_spec import ModelSpec
from torchtitan.tools.logging import logger

from lamella.errors import UserError
from lamella.export.trained import model_dtype
from lamella.plan.choose import chosen
from lamella.plan.fit import check_fit
from lamella.plan.layout import Device, Layout
from lamella.plan.model import read_model
from lamella.plan.report import expert_warnings
from lamella.plan.start import with_deltas
from lamella.recipe.training import Recipe
from lamella.run.folder import RunDir
from lamella.run.store import absolute
from lamella.titan.checkpointing import policy
from lamella.titan.config import decoder_config
from lamella.titan.decoder import LamellaDecoder
from lamella.titan.float8 import check_float8, with_float8
from lamella.titan.inner_attention import FLEX_LEAST_WIDTH, check_kernels
from lamella.titan.parallelise import parallelize
from lamella.titan.state_dict import LamellaStateDictAdapter
from lamella.train.checkpoint import CommittedCheckpoints
from lamella.train.compiled import compiles
from lamella.train.data import MixedSamples, SampleLoader
from lamella.train.distil import DistilLoss
from lamella.train.lora import add_lora
from lamella.train.metrics import LamellaMetrics
from lamella.train.optimizer import Schedules, optimizer_config
from lamella.train.overlay import overlay
from lamella.train.trainer import LamellaTrainer, TokenisedAlready


def has_gpu() -> bool:
    """Whether torch has an accelerator here."""
    return torch.accelerator.is_available()


def model_config(recipe: Recipe) -> LamellaDecoder.Config:
    """The torchtitan config of the recipe's model; UserError where the two do not fit."""
    attention = _attention(recipe, recipe.model)
    if attention != "sdpa" and not has_gpu():
        raise UserError(f"attention {attention!r} has no backward pass on CPU; use attention: sdpa or auto")
    config = decoder_config(recipe.model, attention, recipe.expert_path)
    config.trains, config.frozen_weights = recipe.trains, _frozen_weights(recipe)
    config.offloads_frozen = recipe.offload == "frozen"
    config.file_dtype = _dtype_name(recipe.model)
    if recipe.parallel.context > 1 and attention == "varlen":
        raise UserError("parallel.context needs attention: flex or sdpa; varlen kernels want whole samples")
    check_fit(recipe, read_model(recipe.model), str(recipe.model))
    add_lora(recipe, config)
    return config


def _attention(recipe: Recipe, folder: str) -> str:
    """The kind of attention of the model in a folder; UserError where this GPU lacks its kernels."""
    kind = recipe.attention
    if not has_gpu():
        return "sdpa" if kind == "auto" else kind
    width = read_model(folder).H
    if kind == "auto":
        kind = "flex" if width >= FLEX_LEAST_WIDTH else "sdpa"
    major = torch.cuda.get_device_capability()[0] if torch.cuda.is_available() else 0
    check_kernels(kind, width, _precision(recipe), major)
    return kind


def teacher_config(recipe: Recipe, student: LamellaDecoder.Config) -> LamellaDecoder.Config | None:
    """The config of the model beside the student that it learns from, if there is one.

    Raises:
        UserError: it cannot be the student's teacher.
    """
    folder = recipe.distil.teacher
    if recipe.objective != "distil" or folder is None:
        return None
    attention = _attention(recipe, folder) if has_gpu() else "sdpa"
    config = decoder_config(folder, attention, recipe.expert_path)
    config.trains, config.file_dtype = "nothing", _dtype_name(folder)
    config.offloads_frozen = student.offloads_frozen
    if config.vocab_size != student.vocab_size:
        raise UserError(
            f"the teacher {folder} has {config.vocab_size} token ids, the model {student.vocab_size}; "
            "a teacher needs the same tokenizer"
        )
    if recipe.seq_len > config.max_seq_len:
        raise UserError(
            f"seq_len {recipe.seq_len} is longer than the teacher's {config.max_seq_len} positions; lower it"
        )
    for layer in config.layers:  # torchtitan does this for the student: no cache for positions that do not come
        layer.attention.rope = dataclasses.replace(layer.attention.rope, max_seq_len=recipe.seq_len)
    return config


def _frozen_weights(recipe: Recipe) -> str:
    """Replicated weights are held in the precision of the computation, which must not change them."""
    if recipe.frozen_weights == "auto":
        return "sharded" if has_gpu() or recipe.precision == "bfloat16" else "replicated"
    dtype = _dtype_name(recipe.model)
    if recipe.frozen_weights == "replicated" and _precision(recipe) not in ("float32", dtype):
        raise UserError(
            f"frozen_weights: replicated would round the {dtype} weights of {recipe.model} to {_precision(recipe)}; "
            f"set frozen_weights: sharded or precision: float32"
        )
    return recipe.frozen_weights


def _dtype_name(model: str) -> str:
    return str(model_dtype(Path(model))).removeprefix("torch.")


def _precision(recipe: Recipe) -> str:
    if recipe.precision == "auto":
        return "bfloat16" if has_gpu() else "float32"
    return recipe.precision


def trainer_config(
    recipe: Recipe, run: RunDir, model: LamellaDecoder.Config, train: MixedSamples, heldout: MixedSamples | None
) -> LamellaTrainer.Config:
    """torchtitan's config with the recipe's `torchtitan:` section laid over it."""
    recipe, notes = decided(recipe)
    compiled = compiles(recipe, model, has_gpu())
    if recipe.dense_products == "float8":
        check_float8(torch.cuda.get_device_capability() if torch.cuda.is_available() else None)
        model = with_float8(model, compiled)
    config = LamellaTrainer.Config(
        recipe=recipe,
        notes=notes,
        heldout=heldout,
        teacher=teacher_config(recipe, model),
        model_spec=ModelSpec(
            name="lamella",
            flavor=Path(recipe.model).name,
            model=model,
            parallelize_fn=parallelize,
            pipelining_fn=pipeline_llm,
            post_optimizer_build_fn=None,
            state_dict_adapter=LamellaStateDictAdapter,
        ),
        hf_assets_path=str(Path(recipe.model).resolve()),
        dump_folder=str(run.path.resolve()),
        tokenizer=TokenisedAlready.Config(),
        loss=loss_config(recipe, model.vocab_size),
        dataloader=SampleLoader.Config(
            samples=train, samples_per_step=recipe.samples_per_step, end=recipe.steps * recipe.samples_per_step
        ),
        optimizer=optimizer_config(recipe),
        lr_scheduler=Schedules.Config(
            warmup_steps=recipe.warmup_steps,
            router_warmup_steps=recipe.router_warmup_steps,
            decay_ratio=recipe.decay_ratio,
            decay_type=recipe.decay,
            min_lr_factor=recipe.min_lr_ratio,
        ),
        training=training_config(recipe),
        parallelism=parallelism_config(recipe),
        metrics=LamellaMetrics.Config(
            log_freq=recipe.log_every_steps,
            enable_tensorboard=recipe.tensorboard,
            save_tb_folder="tensorboard",
            disable_color_printing=True,
        ),
        checkpoint=checkpoint_config(recipe),
        activation_checkpoint=policy(recipe.activation_checkpointing),
        compile=CompileConfig(enable=compiled, components=["model"]),
        # a saving rank or a busy machine must not look like a hang
        comm=CommConfig(
            init_timeout_seconds=1800,
            train_timeout_seconds=900,
            trace_buf_size=20000 if has_gpu() else 0,
            save_traces_folder="log",
        ),
        debug=DebugConfig(seed=recipe.seed, enable_structured_logging=False),
    )
    return overlay(config, recipe.torchtitan)


def parallelism_config(recipe: Recipe) -> ParallelismConfig:
    """torchtitan's section `parallelism`: how the ranks are laid out."""
    return ParallelismConfig(
        spmd_backend="partial_dtensor",  # plain tensors inside a module: the experts are no DTensor code
        data_parallel_replicate_degree=recipe.parallel.replicate,
        expert_parallel_degree=recipe.parallel.expert,
        context_parallel_degree=recipe.parallel.context,
        tensor_parallel_degree=recipe.parallel.tensor,
        pipeline_parallel_degree=recipe.parallel.pipeline,
        pipeline_parallel_microbatch_size=recipe.samples_per_micro_batch,
    )


def loss_config(recipe: Recipe, vocab_size: int) -> BaseLoss.Config:
    """The loss, in chunks of tokens where the recipe allows it."""
    if recipe.objective == "distil":
        return DistilLoss.Config(global_vocab_size=vocab_size, distil=recipe.distil)
    whole = CrossEntropyLoss.Config(global_vocab_size=vocab_size)
    chunks = recipe.loss_chunks
    return whole if chunks == 1 else ChunkedLossWrapper.Config(num_chunks=chunks, loss_fn=whole)


def training_config(recipe: Recipe) -> TrainingConfig:
    """torchtitan's section `training`: batch sizes, length, steps, precision."""
    return TrainingConfig(
        local_batch_size=_samples_at_once(recipe),
        global_batch_size=recipe.samples_per_step,
        seq_len=recipe.seq_len,
        max_norm=recipe.max_grad_norm,
        steps=recipe.steps,
        enable_cpu_offload=recipe.offload == "cpu",
        disable_cuda_graphs=True,  # some expert paths synchronise with the host
        mixed_precision_param=_precision(recipe),  # type: ignore[arg-type]
    )


def _samples_at_once(recipe: Recipe) -> int:
    """The samples of one rank's forward; a pipeline takes all micro-batches of a step together."""
    if recipe.parallel.pipeline == 1:
        return recipe.samples_per_micro_batch
    return recipe.samples_per_step // recipe.parallel.batch_ranks(int(os.environ.get("WORLD_SIZE", 1)))


def checkpoint_config(recipe: Recipe) -> CommittedCheckpoints.Config:
    """torchtitan's section `checkpoint`: where, how often, how many."""
    return CommittedCheckpoints.Config(
        enable=True,
        folder=absolute(recipe.checkpoint_folder) if recipe.checkpoint_folder else "checkpoints",
        async_mode="async" if recipe.checkpoint_async else "disabled",
        interval=recipe.save_every_steps,
        keep_latest_k=recipe.keep_checkpoints,
        initial_load_path=str(Path(recipe.model).resolve()),
        initial_load_in_hf=True,
        last_save_model_only=False,  # or the last checkpoint could not be resumed
    )


def decided(recipe: Recipe) -> tuple[Recipe, list[str]]:
    """The recipe without what it leaves to the memory of this rank's GPU, as `lamella plan` counts it.

    Returns:
        (the recipe, what a person should know of the layout).
    """
    num_ranks = int(os.environ.get("WORLD_SIZE", 1))
    model = with_deltas(read_model(recipe.model), recipe)
    teacher = None if recipe.distil.teacher is None or recipe.objective != "distil" else recipe.distil.teacher
    device: Device = "gpu" if has_gpu() else "cpu"
    layout = Layout(model, recipe, num_ranks, device, None if teacher is None else read_model(teacher))
    memory = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory if has_gpu() else None
    layout = chosen(layout, memory, int(os.environ.get("LOCAL_WORLD_SIZE", num_ranks)))
    kept, sync = layout.recipe.activation_checkpointing, layout.recipe.gradient_sync
    logger.info(f"Activation checkpointing: {kept}; gradients are summed once per {sync.replace('_', '-')}")
    return layout.recipe, expert_warnings(layout)
