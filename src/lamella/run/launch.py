"""The way to a training run that needs no torch: arguments, recipe, and the call of torchrun."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from lamella.architecture.embedded import check_embedded_model
from lamella.errors import UserError
from lamella.installation import command
from lamella.recipe.files import arguments
from lamella.recipe.stages import prepare_recipe, prepare_stages
from lamella.recipe.training import Recipe
from lamella.run.failure import attempt_number
from lamella.run.folder import OWN_NAMES, RunDir, run_of_result
from lamella.run.gpus import visible_gpus
from lamella.run.store import CheckpointStore, absolute
from lamella.run.supervise import Supervisor

# A save takes longer than the 30 s that torchrun gives its ranks; hung ranks are the supervisor's business.
SHUTDOWN_TIMEOUT_S = 600
PROBE = ".lamella-"
CheckSource = Callable[[str], object]


def default_threads() -> int:
    """This machine's cores, shared among its ranks."""
    cores = len(os.sched_getaffinity(0))
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def torchrun_command(nproc: int, words: Sequence[str]) -> list[str]:
    """The command that starts the ranks of this machine."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={nproc}"]
    torchrun += ["--max-restarts=0", "--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"]
    torchrun += [f"--shutdown-timeout={SHUTDOWN_TIMEOUT_S}"]
    return [*torchrun, "-m", "lamella.worker", *words]


def check(words: Sequence[str], nproc: int, check_source: CheckSource | None = None) -> Recipe:
    """All that can be checked without torch; UserError before anything is started.

    Args:
        check_source: raises UserError for a source of data that is not there; None leaves that to the ranks.
    """
    recipe = prepare_recipe(*arguments(words))
    if nproc < 1:
        raise UserError(f"nproc is {nproc}; it must be at least 1")
    recipe.check_world_size(nproc)
    check_gpus(nproc)
    if check_source is not None:
        for portion in [*recipe.data, *(recipe.heldout_data or [])]:
            check_source(portion.source)
    teacher = recipe.distil.teacher if recipe.objective == "distil" else None
    if teacher is not None and not (Path(teacher) / "config.json").is_file():
        raise UserError(f"there is no teacher {teacher}; give the folder of a dense model")
    model = Path(recipe.model)
    if (model / "config.json").is_file():
        check_run_dir(recipe, model)
    elif run_of_result(model) is None and recipe.model == Recipe.model_fields["model"].default:
        check_embedded_model()
    elif run_of_result(model) is None:
        raise UserError(f"there is no model {model}; make it with `{command(f'lamella convert --out {model}')}`")
    return recipe


def check_gpus(nproc: int) -> None:
    """UserError where there are GPUs, but fewer than ranks: two cannot share one."""
    if 0 < (gpus := visible_gpus()) < nproc:
        raise UserError(
            f"{nproc} processes need a GPU each, and {gpus} can be used here; start {gpus}, or set "
            "CUDA_VISIBLE_DEVICES to nothing to train on the CPU"
        )


def check_stages(words: Sequence[str], nproc: int, check_source: CheckSource | None = None) -> list[Recipe]:
    """Each stage, checked; UserError before anything is started."""
    stages = prepare_stages(*arguments(words))
    return [check(words if len(stages) == 1 else _words_of(stage, words), nproc, check_source) for stage in stages]


def _words_of(stage: Recipe, words: Sequence[str]) -> list[str]:
    """The words that select this one of several stages."""
    return [*words, f"stage={Path(stage.out).name}"]


def check_run_dir(recipe: Recipe, model: Path) -> RunDir:
    """The recipe's run directory, new or holding the same run; else UserError."""
    run = RunDir(Path(recipe.out))
    # Looked at first: what another rank's start may put there meanwhile marks it as a run.
    foreign = run.path.is_file() or (run.path.is_dir() and any(is_foreign(p.name) for p in run.path.iterdir()))
    if run.exists():
        # A later attempt continues what the first one made, and other ranks may come when rank 0 has made it.
        if recipe.resume == "never" and attempt_number() == 0 and os.environ.get("RANK", "0") == "0":
            raise UserError(
                f"{run.path} holds a run already; set out= to another folder, or resume=auto to continue it"
            )
        run.check_same_run(recipe, model)
    elif foreign:
        raise UserError(f"{run.path} exists and is no run directory; set out= to another folder")
    check_writable(run.path)
    if recipe.checkpoint_folder is not None:
        CheckpointStore(absolute(recipe.checkpoint_folder)).check_reachable()
    return run


def is_foreign(name: str) -> bool:
    """Whether a name in a run directory is none that another rank's start may have put there already."""
    return name not in OWN_NAMES and not name.startswith((PROBE, ".config.yaml."))


def check_writable(folder: Path) -> None:
    """UserError where the folder, or the nearest one above it that exists, cannot be written to."""
    place = folder.resolve()
    while not place.exists():
        place = place.parent
    try:
        tempfile.TemporaryDirectory(dir=place, prefix=PROBE).cleanup()
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error}; set out= to another folder") from None


def default_nproc(words: Sequence[str]) -> int:
    """A rank per GPU that may be used; on CPU 3 for the embedded recipe, which is made for them, and 1 for others."""
    return visible_gpus() or (1 if arguments(words)[0] else 3)


def launch(words: Sequence[str], nproc: int, quiet: bool = False, check_source: CheckSource | None = None) -> int:
    """Check the recipe, then train with `nproc` ranks on this machine, in as many attempts as it takes; the exit code.

    Args:
        check_source: see `check`.

    Raises:
        UserError: bad input, whether found here or by the ranks.
    """
    stages = prepare_stages(*arguments(words))
    if len(stages) > 1:
        return _launch_each(stages, words, nproc, quiet, check_source)
    recipe = check(words, nproc, check_source)
    threads = recipe.threads_per_rank or max(1, len(os.sched_getaffinity(0)) // nproc)
    environment = dict(os.environ) | {"OMP_NUM_THREADS": str(threads)}
    return Supervisor(recipe, torchrun_command(nproc, words), environment, quiet).supervise()


def _launch_each(
    stages: list[Recipe], words: Sequence[str], nproc: int, quiet: bool, check_source: CheckSource | None
) -> int:
    """One stage after the other, until one is not finished; those that are finished say so themselves."""
    check_stages(words, nproc, check_source)
    for stage in stages:
        code = launch(_words_of(stage, words), nproc, quiet, check_source)
        if code or RunDir(Path(stage.out)).status()["state"] != "finished":
            return code
    return 0
