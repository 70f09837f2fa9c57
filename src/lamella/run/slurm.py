"""What launch/slurm/train.sbatch asks before and after its attempt, on the batch host. Imports no torch.

Run: lamella slurm before NUM_RANKS [RECIPE.yaml] [key=value ...]
     lamella slurm after EXIT_CODE [RECIPE.yaml] [key=value ...]

A job is one attempt, and the queue starts the next one: by the rules of `lamella train`, except that a stop by a signal
(the end of the job's time) is always worth another.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from lamella.recipe.files import arguments
from lamella.recipe.stages import prepare_stages
from lamella.run.failure import attempt_number
from lamella.run.folder import RunDir
from lamella.run.launch import CheckSource, check_stages
from lamella.run.supervise import failure_of, forget_the_last, is_worth_another, last_words, record

REQUEUE = 75  # EX_TEMPFAIL of sysexits.h


def before(words: Sequence[str], num_ranks: int, check_source: CheckSource | None = None) -> None:
    """Check all stages, and forget what an earlier attempt said: this one may end before it can say anything.

    Raises:
        UserError: as of `lamella train`.
    """
    for stage in check_stages(words, num_ranks, check_source):
        forget_the_last(RunDir(Path(stage.out)), stage)


def after(words: Sequence[str], code: int, job: str) -> int:
    """What to do once srun has ended with this exit code: 0 the training is over, REQUEUE, or 1 after a failure.

    Args:
        job: its id, which stays when it is queued again. Failures of other jobs do not count.
    """
    for stage in prepare_stages(*arguments(words)):
        run = RunDir(Path(stage.out))
        state = run.status()["state"]
        if state == "finished":
            continue
        if state == "stopped":
            return 0
        failure = failure_of(run, code, f"srun ended with exit code {code}")
        assert failure is not None
        if run.exists():
            record(run, stage, failure, attempt=attempt_number(), job=job)
        fruitless = num_fruitless(run, job)
        if not is_worth_another(failure, fruitless, stage):
            print(last_words(run, failure, fruitless), file=sys.stderr)
            return 1
        print(f"{failure['failure']} at step {failure['step']}: {failure['reason']}\nqueueing again", file=sys.stderr)
        return REQUEUE
    return 0


def num_fruitless(run: RunDir, job: str) -> int:
    """The job's failures in a row since the last new checkpoint."""
    count = 0
    for event in run.events("save", "fault"):
        if event["event"] == "save":
            count = 0
        elif event.get("job") == job and event["failure"] != "preempted":
            count += 1
    return count
