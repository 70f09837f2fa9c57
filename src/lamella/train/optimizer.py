"""AdamW in parameter groups, each with its own rate, decay and, in a router warmup, its own start."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torchtitan.components.optimizer import LRSchedulersContainer, OptimizersContainer, ParamGroupConfig

from lamella.recipe.training import Recipe
from lamella.titan.config import read_hf_config
from lamella.train.rounded_adamw import RoundedAdamW
from lamella.train.skip import SkipNonFinite

ROUTER = r"\.router\."
LORA = r"\.experts\.lora_"
EXPERTS = r"\.moe\."


def optimizer_config(recipe: Recipe) -> OptimizersContainer.Config:
    """The recipe's groups; torchtitan gives each parameter to the first pattern that it matches."""
    model = read_hf_config(recipe.model)
    moe = model.moe
    rest_decay = recipe.weight_decay if recipe.rest_weight_decay is None else recipe.rest_weight_decay
    rest_lr, router_lr = recipe.lr * recipe.rest_lr_scale, recipe.lr * recipe.router_lr_scale
    groups = []
    if recipe.trains == "all":
        groups.append(_group(recipe, r"norm\.weight$|\.bias$", rest_lr, 0.0))
    if model.has_experts and recipe.trains != "experts":
        groups.append(_group(recipe, ROUTER, router_lr, recipe.router_weight_decay))
    if moe is not None:
        if moe.lora_rank or recipe.lora is not None:
            groups.append(_group(recipe, LORA, recipe.lr * recipe.lora_lr_scale, recipe.weight_decay))
        if moe.output_bias:
            groups.append(_group(recipe, r"\.output_bias$", recipe.lr, 0.0))
        groups.append(_group(recipe, EXPERTS, recipe.lr, recipe.weight_decay))
    if recipe.trains == "all":
        groups.append(_group(recipe, ".*", rest_lr, rest_decay))
    return Optimizers.Config(param_groups=groups)


def _group(recipe: Recipe, pattern: str, lr: float, weight_decay: float) -> ParamGroupConfig:
    kwargs = {"lr": lr, "weight_decay": weight_decay, "betas": (recipe.beta1, recipe.beta2), "eps": 1e-8}
    name = "AdamW" if recipe.optimizer.states == "float32" else RoundedAdamW.__name__
    return ParamGroupConfig(pattern=pattern, optimizer_name=name, optimizer_kwargs=kwargs)


class Optimizers(OptimizersContainer):
    """torchtitan's, which knows AdamW with bfloat16 moments too."""

    @dataclass(kw_only=True, slots=True)
    class Config(OptimizersContainer.Config):
        """torchtitan's."""

        pass

    @staticmethod
    def _resolve_optimizer_factory(name: str) -> Callable[..., Optimizer]:
        if name == RoundedAdamW.__name__:
            return RoundedAdamW
        return OptimizersContainer._resolve_optimizer_factory(name)


def group_name(param_names: list[str]) -> str:
    """What a group of `optimizer_config` is called in reports: router, lora, experts or rest."""
    for name, pattern in {"router": ROUTER, "lora": LORA, "experts": EXPERTS}.items():
        if all(re.search(pattern, param) for param in param_names):
            return name
    return "rest"


class Schedules(LRSchedulersContainer):
    """torchtitan's warmup and decay, which groups other than the router's join after a router warmup."""

    def __init__(self, schedulers: list[LambdaLR]):
        self.schedulers = schedulers
        self.skips: SkipNonFinite | None = None

    def follow(self, skips: SkipNonFinite) -> None:
        """Stand still in skipped steps from now on: torchtitan moves the schedule after each."""
        self.skips = skips

    def step(self) -> None:
        """Go on by one optimizer step, where it was taken."""
        if self.skips is None or not self.skips.skipped:
            super().step()

    @dataclass(kw_only=True, slots=True)
    class Config(LRSchedulersContainer.Config):
        """torchtitan's schedule, and the router's own warmup."""

        router_warmup_steps: int = 0
        """Optimizer steps in which the router alone learns."""

        def build(self, *, optimizers: OptimizersContainer, training_steps: int) -> Schedules:
            """The schedules of all groups, at their first step."""
            # slots make a new class, which bare super() does not know
            common = LRSchedulersContainer.Config.build(self, optimizers=optimizers, training_steps=training_steps)
            container = Schedules(common.schedulers)
            for scheduler in container.schedulers if self.router_warmup_steps else ():
                for i, group in enumerate(scheduler.optimizer.param_groups):
                    if group_name(group["param_names"]) != "router":
                        scheduler.lr_lambdas[i] = partial(
                            delayed, scheduler.lr_lambdas[i], self.router_warmup_steps, self.warmup_steps
                        )
            container.load_state_dict(container.state_dict())  # computes the rates anew
            for scheduler in container.schedulers:
                for group, rate in zip(scheduler.optimizer.param_groups, scheduler.get_last_lr(), strict=True):
                    group["lr"] = rate
            return container


def delayed(schedule: Callable[[int], float], delay_steps: int, warmup_steps: int, step: int) -> float:
    """The schedule's factor at `step` (from 0): none before the delay, then a linear warmup up to it."""
    since = step - delay_steps
    return 0.0 if since < 0 else schedule(step) * min(1.0, (since + 1) / max(1, warmup_steps))
