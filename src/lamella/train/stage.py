"""What a rank does for one stage of a run: check it against the machine, build the trainer, train, say how it ended."""

from __future__ import annotations

import ctypes
import gc
import logging
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

import psutil

from lamella.data.sources import describe_source, open_source
from lamella.errors import UserError
from lamella.installation import command
from lamella.recipe.training import Recipe, differences
from lamella.run.failure import attempt_number, forget, report
from lamella.run.folder import RunDir, State, run_of_result
from lamella.run.gpus import check_seen
from lamella.run.heartbeat import Heartbeat
from lamella.run.launch import check_run_dir, default_threads
from lamella.run.processes import StopRequest
from lamella.run.supervise import LAUNCHED_AT

if TYPE_CHECKING:
    from lamella.train.trainer import LamellaTrainer

EXIT_BAD_INPUT = 2
M_MMAP_THRESHOLD = -3  # malloc.h


def train_stage(recipe: Recipe, rank: int, stop: StopRequest) -> bool:
    """Train one run, or continue it, on this rank; the process group stays for the next stage.

    Returns:
        whether the run is finished now.

    Raises:
        UserError: bad input, found before this rank joined the others.
    """
    stop.exit()
    config = prepare(recipe, rank)
    if config is None:
        return True
    stop.die()  # until the process group is there: a rank would wait for others that are gone
    with redirected_output(RunDir(Path(recipe.out)).log_file(rank)) as terminal:
        config.stream, config.stop = terminal, stop
        try:
            state = train_run(config, recipe, rank, terminal)
            _free_memory()
            _wait_for_all()
        except BaseException:
            # It has been reported. Threads that save, or wait for a lost peer, must not keep the process.
            terminal.flush()
            sys.stderr.flush()
            os._exit(1)
    return state == "finished"


def prepare(recipe: Recipe, rank: int) -> LamellaTrainer.Config | None:
    """Check the recipe against model, data, machine and run directory; None where the run is finished."""
    if _is_finished_without_its_model(recipe):
        return None
    model_folder = _model_folder(recipe, rank)
    run = check_run_dir(recipe, model_folder)
    if run.exists() and run.status()["state"] == "finished":
        if rank == 0:
            print(f"{run.path} is finished: {recipe.steps} steps. Set out= to another folder for a new run.")
        return None
    if rank == 0:
        _say_what_was_found(recipe)
    config = _trainer_config(recipe, run)
    if rank == 0 and not run.exists():
        try:
            run.create(recipe, model_folder)
        except OSError as error:
            raise UserError(f"{run.path} cannot be written: {error}; set out= to another folder") from None
    _wait_until(run.exists)
    if rank == 0:
        launched = float(os.environ.get(LAUNCHED_AT, psutil.Process().create_time()))
        run.event("start", time=launched, attempt=attempt_number())
    return config


def _say_what_was_found(recipe: Recipe) -> None:
    for word in dict.fromkeys(portion.source for portion in [*recipe.data, *(recipe.heldout_data or [])]):
        if (source := open_source(word)).kind == "files":
            print(f"data {describe_source(source)}", flush=True)


def _is_finished_without_its_model(recipe: Recipe) -> bool:
    """A stage whose model, the result of the stage before, was deleted to save room."""
    run = RunDir(Path(recipe.out))
    missing = not (Path(recipe.model) / "config.json").is_file()
    return missing and run.status()["state"] == "finished" and not differences(run.recipe(), recipe)


def _model_folder(recipe: Recipe, rank: int) -> Path:
    folder = Path(recipe.model)
    if (folder / "config.json").is_file():
        return folder
    if result := run_of_result(folder):
        if rank == 0:
            from lamella.export.trained import materialise

            materialise(result[0].path, result[1])
        return _wait_for_model(folder)
    if recipe.model != Recipe.model_fields["model"].default:
        raise UserError(f"there is no model {folder}; make it with `{command(f'lamella convert --out {folder}')}`")
    if rank == 0:
        from lamella.conversion import convert

        print(f"There is no {folder} yet: converting the embedded model first.", flush=True)
        convert(out=folder)
    return _wait_for_model(folder)


def _wait_for_model(folder: Path) -> Path:
    _wait_until((folder / "config.json").is_file)
    return folder


def _wait_until(is_there: Callable[[], bool]) -> None:
    """Wait for what rank 0 makes. If that fails, torchrun ends this rank by SIGTERM."""
    while not is_there():
        time.sleep(0.05)


def _trainer_config(recipe: Recipe, run: RunDir) -> LamellaTrainer.Config:
    import torch

    check_seen(torch.cuda.device_count(), torch.__version__, torch.version.cuda)
    _check_gpus(torch.cuda.device_count())
    return_freed_memory()
    torch.set_num_threads(recipe.threads_per_rank or default_threads())
    from lamella.train.assemble import has_gpu, model_config, trainer_config
    from lamella.train.tracking import check_trackers

    check_trackers(recipe.track)
    from lamella.train.data import check_learnable, check_objective, open_samples, steps_of_data

    if recipe.offload != "none" and not has_gpu():
        raise UserError(
            f"offload: {recipe.offload} moves a GPU's weights to main memory, and there is no GPU here; "
            "set offload: none"
        )
    model = model_config(recipe)
    common = (Path(recipe.model), recipe.seq_len)
    num_samples = recipe.steps * recipe.samples_per_step
    looked_at = 0 if recipe.router_fit is None else recipe.router_fit.samples
    train = open_samples(
        recipe.data, "train", *common, recipe.seed, num_samples, model.vocab_size, recipe.on_bad_data, looked_at
    )
    check_objective(recipe.objective, train)
    check_learnable(train)
    steps = steps_of_data(train, recipe.steps, recipe.samples_per_step, recipe.on_exhausted)
    recipe = recipe.model_copy(update={"steps": steps, "warmup_steps": min(recipe.warmup_steps, steps)})
    heldout = None
    if recipe.heldout_samples:
        portions = recipe.heldout_data or recipe.data
        heldout = open_samples(
            portions, "heldout", *common, None, recipe.heldout_samples, model.vocab_size, recipe.on_bad_data
        )
    return trainer_config(recipe, run, model, train, heldout)


def return_freed_memory(threshold_bytes: int = 16 << 20) -> None:
    """Make glibc give freed blocks of this size back to the system.

    It keeps those under 32 MB in its heap, where FSDP's gathered layers, freed and gathered again, leave holes: ranks
    training SmolLM2 on CPU grew to 4 GiB, and stay at 2.6 GiB with this.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have none
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, threshold_bytes)


def _check_gpus(count: int) -> None:
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if 0 < count < ranks:
        raise UserError(f"{ranks} ranks on this machine, but it has {count} GPUs; start at most {count} ranks here")


@contextmanager
def redirected_output(log_file: Path) -> Iterator[TextIO]:
    """Everything printed goes to the log file, by C++ libraries too; yields the terminal that was there."""
    terminal = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    sys.stdout.flush()
    sys.stderr.flush()
    log = os.open(log_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    saved = os.dup(1), os.dup(2)
    for descriptor in (1, 2):
        os.dup2(log, descriptor)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    logging.captureWarnings(True)
    try:
        yield terminal
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for descriptor, original in zip((1, 2), saved, strict=True):
            os.dup2(original, descriptor)


def train_run(config: LamellaTrainer.Config, recipe: Recipe, rank: int, terminal: TextIO) -> State:
    """Build the trainer, train, and say how it ended."""
    from torchtitan.observability import structured_logger

    run = RunDir(Path(recipe.out))
    forget(run, rank)
    structured_logger.init_structured_logger(
        source="training", output_dir=config.dump_folder, enable=config.debug.enable_structured_logging
    )
    finished = False
    trainer: LamellaTrainer | None = None
    config.heart = Heartbeat(run, rank)
    try:
        trainer = config.build()
        state = trainer.train()
        finished = True
    finally:
        if not finished:
            _report_failure(run, config.recipe, rank, terminal, trainer.step if trainer is not None else 0)
        config.heart.end()
        if trainer is not None:
            trainer.close()
    if rank == 0:
        print(f"{state}: {run.path} at step {trainer.step} of {config.recipe.steps}", file=terminal, flush=True)
    return state


def _free_memory() -> None:
    """What one stage's trainer held, which lies in cycles, is to be free before the next one's model comes."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _wait_for_all() -> None:
    import torch

    torch.distributed.barrier()


def leave_group() -> None:
    """End this rank's membership in the process group, if it has one."""
    import torch

    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _report_failure(run: RunDir, recipe: Recipe, rank: int, terminal: TextIO, step: int) -> None:
    """The exception goes on; here it is only said where people and programs look."""
    traceback.print_exc()
    error = sys.exc_info()[1]
    assert error is not None
    try:
        found = report(run, error, rank, int(os.environ["WORLD_SIZE"]), step)
        run.write_status("failed", found["step"], recipe.steps, found["reason"], found["failure"], found["retryable"])
    except OSError as full:
        print(f"rank {rank} failed: {error}\n(not recorded: {full})", file=terminal, flush=True)
        return
    if found["rank"] == rank:  # the others' words would hide it
        print(f"rank {rank} failed: {found['reason']}\n(more in {run.log_file(rank)})", file=terminal, flush=True)
