"""What a recipe asks of a model, as far as its config.json shows: training and `lamella plan` refuse the same.

Imports no torch.
"""

from __future__ import annotations

from lamella.architecture.moe import LORA_PATHS
from lamella.architecture.moe_tensors import is_frozen
from lamella.errors import UserError
from lamella.plan.model import Model
from lamella.recipe.sections import TwinShare
from lamella.recipe.training import Recipe


def check_fit(recipe: Recipe, model: Model, name: str) -> None:
    """UserError where the model, called `name` there, cannot be trained as the recipe says."""
    if recipe.seq_len > model.max_positions:
        raise UserError(
            f"seq_len {recipe.seq_len} is longer than the model's {model.max_positions} positions; lower seq_len"
        )
    _check_trained(recipe, model, name)
    _check_routing(recipe, model, name)
    _check_lora(recipe, model, name)
    _check_experts(recipe, model, name)
    if recipe.offload == "frozen" and not any(is_frozen(weight.name) for weight in model.weights()):
        raise UserError(f"offload: frozen is for frozen experts, and {name} has none; set offload: none, or cpu")
    if recipe.parallel.tensor > 1:
        _check_tensor(recipe, model)
    if recipe.parallel.pipeline > 1:
        _check_pipeline(recipe, model, name)
    if recipe.objective == "distil" and recipe.distil.teacher is None:
        _check_teacher_inside(recipe, model, name)


def _check_trained(recipe: Recipe, model: Model, name: str) -> None:
    if model.moe is not None or recipe.trains == "all":
        return
    if model.attention_moe is None:
        raise UserError(f"{name} is a dense model without experts; convert it first, or set trains: all")
    if recipe.trains == "experts":
        raise UserError(
            f"{name} has experts in attention alone, of which only routers train; set trains: experts+router, or all"
        )


def _check_routing(recipe: Recipe, model: Model, name: str) -> None:
    """Settings of another routing than the model's."""
    routing = None if model.moe is None else model.moe.routing
    asked = {
        "twin_share": ("twin", isinstance(recipe.twin_share, TwinShare)),
        "routing_loss": ("twin", recipe.routing_loss is not None),
        "router_fit": ("twin", recipe.router_fit is not None),
        "top_k_schedule": ("flat", recipe.top_k_schedule is not None),
    }
    for setting, (kind, is_set) in asked.items():
        if is_set and routing != kind:
            raise UserError(f"{setting} is for {kind} routing, which {name} does not have; leave it out")
    if model.moe is not None and recipe.top_k_schedule is not None:
        smallest = min(model.moe.for_layer(layer).num_experts for layer in model.moe.moe_layers)
        if recipe.top_k_schedule.start > smallest:
            raise UserError(
                f"top_k_schedule.start is {recipe.top_k_schedule.start}, but a layer of {name} has {smallest} experts; "
                "lower it"
            )


def _check_lora(recipe: Recipe, model: Model, name: str) -> None:
    if recipe.lora is not None:
        if model.moe is None:
            raise UserError(f"lora adds to frozen experts, and {name} has none; leave it out")
        model.moe.with_lora(recipe.lora.rank, recipe.lora.alpha)
    if recipe.lora is not None or (model.moe is not None and model.moe.lora_rank):
        if recipe.expert_path not in LORA_PATHS:
            raise UserError(f"expert_path {recipe.expert_path} computes no LoRA; choose one of {', '.join(LORA_PATHS)}")
        if recipe.parallel.expert > 1:
            raise UserError("parallel.expert cannot share out experts with LoRA; set it to 1")


def _check_experts(recipe: Recipe, model: Model, name: str) -> None:
    degree = recipe.parallel.expert
    if degree > 1 and model.moe is None:
        raise UserError(f"parallel.expert={degree} shares out experts, and {name} has none; set it to 1")
    for moe in filter(None, map(model.moe_of, range(model.num_layers))):
        if moe.num_frozen_experts % degree or moe.num_trainable_experts % degree:
            raise UserError(
                f"parallel.expert={degree} does not divide {moe.num_frozen_experts} frozen and "
                f"{moe.num_trainable_experts} trainable experts; choose a divisor of both"
            )


def _check_tensor(recipe: Recipe, model: Model) -> None:
    degree = recipe.parallel.tensor
    if model.attention_moe is not None:
        raise UserError("parallel.tensor has no way for attention experts; set it to 1")
    if not model.family.llama_like:
        raise UserError(f"parallel.tensor has no way for the decoder of {model.family.name}; set it to 1")
    if model.N % degree or model.G % degree:
        raise UserError(
            f"parallel.tensor={degree} does not divide {model.N} heads and {model.G} key/value heads; choose a divisor "
            "of both"
        )
    if model.moe is not None and recipe.parallel.expert % degree:
        raise UserError(
            f"parallel.tensor={degree} shares out attention, and experts only as parallel.expert says: set that to a "
            f"multiple of {degree}"
        )
    if recipe.objective == "distil":
        raise UserError("parallel.tensor has no way for a teacher; leave it out, or set it to 1")


def _check_pipeline(recipe: Recipe, model: Model, name: str) -> None:
    stages = recipe.parallel.pipeline
    if model.tied:
        raise UserError(
            f"parallel.pipeline puts embedding and head on different ranks, but {name} ties them; set it to 1"
        )
    if recipe.objective == "distil" or recipe.routing_loss is not None or recipe.router_fit is not None:
        raise UserError(
            "parallel.pipeline has no way for a teacher, a routing_loss or a router_fit; leave them out, or set it to 1"
        )
    if stages > model.num_layers + 2:  # embedding and head count as a layer each
        raise UserError(f"parallel.pipeline={stages} is too many stages for {model.num_layers} layers; lower it")
    if model.moe is None and model.attention_moe is None:
        return
    # Every group of the optimizer needs a parameter in each stage.
    wanted = {layer for layer in range(model.num_layers) if (model.moe_of if model.moe else model.heads_of)(layer)}
    for stage in range(stages):
        layers = recipe.parallel.layers_of(stage, model.num_layers)
        if not wanted & set(layers):
            held = f"the layers {layers[0]}-{layers[-1]}, none of which has experts" if layers else "no layer"
            raise UserError(f"parallel.pipeline={stages} gives stage {stage} {held}, so no experts to train; lower it")


def _check_teacher_inside(recipe: Recipe, model: Model, name: str) -> None:
    """UserError where the frozen slices are not, or will not stay, a whole dense model."""
    moe = model.moe
    layers = [] if moe is None else [moe.for_layer(layer) for layer in moe.moe_layers]
    if recipe.trains == "all":
        reason = "trains: all changes it"
    elif any(m.num_frozen_experts == 0 or m.shared_intermediate_size for m in layers):
        reason = f"{name} has not all of its neurons in frozen slices"
    else:
        return
    raise UserError(
        f"objective: distil learns from the dense model inside the converted one, but {reason}; "
        "set distil.teacher to a folder with the dense model"
    )
