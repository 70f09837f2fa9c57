"""A recipe of adapters, carried out: an adapter for each domain, experts of them, routers. A second call goes on."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from lamella.architecture.peft import CONFIG
from lamella.checkpoint.write import check_output
from lamella.conversion import convert
from lamella.data.sources import open_source
from lamella.errors import UserError
from lamella.evaluate.checkpoints import model_path, parse_device, without_weights
from lamella.recipe.adapters_training import COMMON, ROUTERS, AdaptersTraining, make_adapters_training
from lamella.recipe.files import parse_yaml, read_recipe_text
from lamella.recipe.methods.adapters import AdaptersOptions, adapters_sizes
from lamella.run.folder import RunDir, write_atomic
from lamella.train.adapter_steps import Pace
from lamella.train.adapters import learn_adapter, train_routers
from lamella.train.adapters_run import AdaptersRun


def train_adapters(recipe: AdaptersTraining, say: Callable[[str], None] = print) -> None:
    """Make `out`, and the run directory `out`-parts with an adapter of each domain and the untrained mix.

    Raises:
        UserError: no such model, text or adapter; an `out` that is there; parts that another recipe made.
        SystemExit: a signal asked it to stop.
    """
    out, parts = Path(recipe.out), recipe.parts
    check_output(out, False)
    _check(recipe)
    device, fresh = parse_device(recipe.device), _begin(recipe, parts)
    run = AdaptersRun(recipe, parts, say)
    try:
        with run.under_way():
            folders = _adapters(recipe, run, device)
            mix = parts / "mix"
            if not (mix / "config.json").is_file():
                model = None if recipe.model == "embedded" else model_path(recipe.model)
                options = AdaptersOptions(adapters=tuple(folders.values()), top_k=recipe.routers.top_k)
                convert(model, mix, options)
            _routers(recipe, run, folders, out, device)
    except UserError:
        if fresh and run.done == 0:  # nothing was made yet
            shutil.rmtree(parts)
        raise
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


def _begin(recipe: AdaptersTraining, parts: Path) -> bool:
    """Make the run directory, or check that the recipe made it; routers may be trained anew with others. Whether it is
    new."""
    run = RunDir(parts)
    if run.exists():
        before = make_adapters_training(parse_yaml(read_recipe_text(run.config), str(run.config)))
        if before.making_parts() != recipe.making_parts():
            raise UserError(f"{parts} was made by another recipe; give another out, or remove it")
        if before.routers != recipe.routers:
            (parts / f"{ROUTERS}.resume").unlink(missing_ok=True)
    else:
        check_output(parts, False)
        parts.mkdir(parents=True)
    fresh = not run.exists()
    write_atomic(run.config, recipe.to_yaml())
    return fresh


def _adapters(recipe: AdaptersTraining, run: AdaptersRun, device: str) -> dict[str, str]:
    """domain -> the folder of its adapter, which is learned if it is neither given nor there."""
    learned = [name for name, domain in recipe.domains.items() if domain.adapter is None]
    start = None
    if COMMON in recipe.steps_of:
        texts = [recipe.domains[name].data for name in learned]
        start = _learn(recipe, run, COMMON, texts, _pace(recipe, COMMON), None, device)
    folders = {}
    for name, domain in recipe.domains.items():
        if domain.adapter is not None:
            folders[name] = str(Path(domain.adapter).expanduser().resolve())
            continue
        pace = _pace(recipe, name)
        folders[name] = str(_learn(recipe, run, name, [domain.data], pace, start, device))
    return folders


def _learn(
    recipe: AdaptersTraining,
    run: AdaptersRun,
    name: str,
    texts: list[str],
    pace: Pace,
    start: Path | None,
    device: str,
) -> Path:
    folder, learning = recipe.parts / name, recipe.adapters
    if (folder / CONFIG).is_file():
        run.passed(name)
        return folder
    run.say(f"{name}: {pace.steps} steps on {', '.join(texts)}")
    with run.training(name, pace) as (on_step, kept):
        learn_adapter(
            recipe.model, texts, folder, rank=learning.rank, alpha=learning.alpha, blocks=learning.blocks, pace=pace,
            start=start, device=device, kept=kept, on_step=on_step,
        )  # fmt: skip
    return folder


def _routers(recipe: AdaptersTraining, run: AdaptersRun, folders: dict[str, str], out: Path, device: str) -> None:
    routers, pace = recipe.routers, _pace(recipe, ROUTERS)
    run.say(f"routers: {pace.steps} steps, target {routers.target}")
    data = {domain.data: Path(folders[name]).name for name, domain in recipe.domains.items()}
    with run.training(ROUTERS, pace) as (on_step, kept):
        train_routers(
            str(recipe.parts / "mix"), data, out, target=routers.target, pace=pace, balance=routers.balance,
            domain_loss=routers.domain_loss, adapter_lr=routers.adapter_lr, device=device, kept=kept, on_step=on_step,
        )  # fmt: skip


def _pace(recipe: AdaptersTraining, training: str) -> Pace:
    lr = recipe.routers.lr if training == ROUTERS else recipe.adapters.lr
    skip = recipe.samples_read_before(training)
    falls = training != COMMON  # the adapters of the domains begin with what it has learned, and end with lower rates
    return Pace(recipe.steps_of[training], lr, recipe.samples_per_step, recipe.seq_len, recipe.seed, skip, falls)
