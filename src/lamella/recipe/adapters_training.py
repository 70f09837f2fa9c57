"""A training recipe of adapters: a YAML file and `key=value` words, checked. Imports no torch.

method: adapters
model: path/to/Llama-3.1-8B
out: artifacts/routed            # and artifacts/routed-parts, with an adapter for each domain
domains:
  code: {data: stdlib-code}      # an adapter is learned
  law: {data: law.jsonl, adapter: path/to/peft-adapter}
routers: {target: router_mlp, steps: 100}
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, PositiveInt, model_validator

from lamella.architecture.adapters import Block
from lamella.recipe.check import Problems, Strict, checked, refuse
from lamella.recipe.files import parse_yaml, read_recipe_text, set_by_word

METHOD: Literal["adapters"] = "adapters"
COMMON, ROUTERS = "common", "routers"
"""The trainings beside those of the domains."""
RESERVED = frozenset({COMMON, ROUTERS, "mix", "model", "log", "hf", "checkpoints", "tensorboard"})
"""What the run directory calls otherwise than a domain."""


class Domain(Strict):
    """One kind of text, and the adapter for it."""

    data: str
    """This text is learned, and shows the routers which tokens are the domain's."""
    adapter: str | None = None
    """This folder, as the library peft saves it, is the domain's adapter; null learns one."""


class Learning(Strict):
    """How the adapters of domains that have none are learned."""

    rank: PositiveInt = 16
    """The low-rank matrices have this rank."""
    alpha: float = Field(default=32.0, gt=0)
    """Their product is scaled by alpha / rank."""
    blocks: list[Block] = Field(default=["mlp"])
    """The FFNs (mlp), attention, or both are changed."""
    common_steps: int = Field(default=0, ge=0)
    """One adapter learns the texts of all these domains for so many steps first, at a rate that does not fall, and
    theirs begin as it."""
    steps: PositiveInt = 60
    """Each adapter has this many optimizer steps of its own."""
    lr: float = Field(default=1e-3, gt=0)
    """This is the largest learning rate."""


class Routers(Strict):
    """How the routers are trained, once the adapters are experts."""

    target: Literal["router", "router_mlp"] = "router"
    """The routers train alone, or together with the FFNs' adapters."""
    top_k: PositiveInt = 1
    """Each token is computed by this many experts, the zero expert among them."""
    steps: PositiveInt = 60
    """There are this many optimizer steps."""
    lr: float = Field(default=5e-3, gt=0)
    """This is the routers' largest learning rate."""
    adapter_lr: float | None = Field(default=None, gt=0)
    """This is the adapters' largest learning rate; null is a tenth of the routers'."""
    balance: float = Field(default=0.0, ge=0)
    """A loss that evens the experts' loads has this weight."""
    domain_loss: float = Field(default=1.0, ge=0)
    """The loss of naming each text's own adapter has this weight."""


class AdaptersTraining(Strict):
    """What to make of a dense model and some domains: an adapter for each, and routers that choose among them."""

    method: Literal["adapters"] = METHOD
    """This says that the recipe trains adapters."""
    model: str = "embedded"
    """The dense model: a folder, a hub name, or 'embedded'."""
    out: str = "artifacts/routed"
    """The model with routers is written to this folder, and what it is made of to the folder `out`-parts, which is the
    run directory; a second call goes on from it."""
    domains: dict[str, Domain] = Field(default_factory=dict)
    """Each domain by its name, which its adapter gets."""
    adapters: Learning = Learning()
    """The adapters are learned like this."""
    routers: Routers = Routers()
    """The routers are trained like this."""
    seq_len: PositiveInt = 256
    """Samples are windows of this many tokens."""
    samples_per_step: PositiveInt = 4
    """A step reads this many samples."""
    save_every_steps: PositiveInt = 20
    """What a training goes on from is written after so many steps."""
    seed: int = Field(default=0, ge=0)
    """Samples and first weights are drawn from this seed."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Training is done here."""

    @model_validator(mode="after")
    def _possible(self) -> AdaptersTraining:
        problems = [
            f"the domain {name!r} names a folder, so it must be without / and not empty"
            for name in self.domains
            if not name or "/" in name or name.startswith(".")
        ]
        problems += [f"a domain cannot be called {name!r}; rename it" for name in self.domains if name in RESERVED]
        if len(self.domains) < 1:
            problems.append("domains is empty; name at least one, such as domains={code: {data: stdlib-code}}")
        sources = [domain.data for domain in self.domains.values()]
        if len(set(sources)) < len(sources):
            problems.append("two domains have the same data; give each its own")
        if problems:
            raise Problems(problems)
        return self

    @property
    def parts(self) -> Path:
        """The run directory."""
        return Path(f"{self.out}-parts")

    @property
    def steps_of(self) -> dict[str, int]:
        """The trainings in their order, and how many steps each has."""
        learned = [name for name, domain in self.domains.items() if domain.adapter is None]
        common = {COMMON: self.adapters.common_steps} if learned and self.adapters.common_steps else {}
        return common | dict.fromkeys(learned, self.adapters.steps) | {ROUTERS: self.routers.steps}

    def samples_read_before(self, training: str) -> int:
        """Samples of a text that the trainings before this one have read."""
        learned = [name for name, domain in self.domains.items() if domain.adapter is None]
        common = -(-self.steps_of.get(COMMON, 0) * self.samples_per_step // max(1, len(learned)))
        return {COMMON: 0, ROUTERS: common + self.adapters.steps * self.samples_per_step}.get(training, common)

    def making_parts(self) -> dict[str, Any]:
        """What the parts depend on."""
        others = {"routers", "device", "out", "save_every_steps"}
        return self.model_dump(mode="json", exclude=others) | {"top_k": self.routers.top_k}

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def make_adapters_training(values: dict[str, Any]) -> AdaptersTraining:
    """The recipe of these keys.

    Raises:
        UserError: one line for each problem.
    """
    recipe, lines = checked(AdaptersTraining, values)
    refuse(lines)
    assert recipe is not None
    return recipe


def read_adapters_training(path: str | None, settings: Sequence[str]) -> AdaptersTraining | None:
    """The recipe of a file with settings laid over it; None where it trains something else.

    Raises:
        UserError: one line for each problem.
    """
    values: dict[str, Any] = {} if path is None else parse_yaml(read_recipe_text(Path(path)), path)
    if values.get("method") != METHOD and f"method={METHOD}" not in settings:
        return None
    for word in settings:
        set_by_word(values, word)
    return make_adapters_training(values)
