"""A recipe of adapters, carried out: an adapter for each domain, experts of them, routers. A second call goes on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

from lamella.architecture.peft import CONFIG
from lamella.checkpoint.write import check_output
from lamella.conversion import convert
from lamella.data.sources import open_source
from lamella.errors import UserError
from lamella.evaluate.checkpoints import model_path, without_weights
from lamella.recipe.adapters_training import AdaptersTraining
from lamella.recipe.methods.adapters import AdaptersOptions, adapters_sizes
from lamella.train.adapters import Pace, learn_adapter, train_routers
from lamella.train.adapters_command import progress

RECIPE = "recipe.json"


def train_adapters(recipe: AdaptersTraining, say: Callable[[str], None] = print) -> None:
    """Make `out`, and `out`-parts with an adapter of each domain and the untrained mix.

    Raises:
        UserError: no such model, text or adapter; an `out` that is there; parts that another recipe made.
    """
    out, parts = Path(recipe.out), Path(f"{recipe.out}-parts")
    check_output(out, False)
    _check(recipe)
    _begin(recipe, parts)
    try:
        folders = {name: _adapter(recipe, name, parts, say) for name in recipe.domains}
    except UserError:
        if [path.name for path in parts.iterdir()] == [RECIPE]:  # nothing was made yet
            shutil.rmtree(parts)
        raise
    mix = parts / "mix"
    if not (mix / "config.json").is_file():
        model = None if recipe.model == "embedded" else model_path(recipe.model)
        convert(model, mix, AdaptersOptions(adapters=tuple(folders.values()), top_k=recipe.routers.top_k))
    routers = recipe.routers
    say(f"routers: {routers.steps} steps, target {routers.target}")
    with progress(routers.steps, recipe.device) as (on_step, place):
        train_routers(
            str(mix), {domain.data: Path(folders[name]).name for name, domain in recipe.domains.items()}, out,
            target=routers.target, pace=_pace(recipe, routers.steps, routers.lr), balance=routers.balance,
            domain_loss=routers.domain_loss, adapter_lr=routers.adapter_lr, device=place, on_step=on_step,
        )  # fmt: skip
    say(f"Made {out}. Next: lamella evaluate {out}")


def _check(recipe: AdaptersTraining) -> None:
    """What can be known before the first step."""
    config = without_weights(recipe.model).config.to_dict()
    for domain in recipe.domains.values():
        open_source(domain.data)
    given = tuple(domain.adapter for domain in recipe.domains.values() if domain.adapter is not None)
    if given:
        adapters_sizes(AdaptersOptions(adapters=given), config)
    names = [Path(d.adapter).resolve().name if d.adapter else name for name, d in recipe.domains.items()]
    if len(set(names)) < len(names):
        raise UserError("two adapters' folders are called alike; rename one, or its domain")
    if recipe.routers.top_k > len(names) + 1:
        raise UserError(f"top_k is {recipe.routers.top_k}; there are {len(names)} adapters and the zero expert")


def _begin(recipe: AdaptersTraining, parts: Path) -> None:
    """The folder of the parts, which remembers what they are made by; routers may be trained anew with others."""
    values = recipe.model_dump(exclude={"routers", "device", "out"}) | {"top_k": recipe.routers.top_k}
    made_by = parts / RECIPE
    if made_by.is_file():
        if json.loads(made_by.read_text()) != values:
            raise UserError(f"{parts} was made by another recipe; give another out, or remove it")
        return
    check_output(parts, False)
    parts.mkdir(parents=True)
    made_by.write_text(json.dumps(values, indent=1) + "\n")


def _adapter(recipe: AdaptersTraining, name: str, parts: Path, say: Callable[[str], None]) -> str:
    """The folder of a domain's adapter, which is learned if it is neither given nor there."""
    domain, learning, folder = recipe.domains[name], recipe.adapters, parts / name
    if domain.adapter is not None:
        return str(Path(domain.adapter).expanduser().resolve())
    if not (folder / CONFIG).is_file():
        say(f"{name}: {learning.steps} steps on {domain.data}")
        with progress(learning.steps, recipe.device) as (on_step, place):
            learn_adapter(
                recipe.model, [domain.data], folder, rank=learning.rank, alpha=learning.alpha, blocks=learning.blocks,
                pace=_pace(recipe, learning.steps, learning.lr), device=place, on_step=on_step,
            )  # fmt: skip
    return str(folder)


def _pace(recipe: AdaptersTraining, steps: int, lr: float) -> Pace:
    return Pace(steps, lr, recipe.samples_per_step, recipe.seq_len, recipe.seed)
