"""What each rank runs: `torchrun ... -m lamella.worker [RECIPE.yaml] [key=value ...]` (train.py is the same).

All that a person may have got wrong is found before the ranks meet, and said once: by rank 0, or where that one finds
nothing, by another. A mistake in the recipe is answered before torch is imported.
"""

from __future__ import annotations

import os
import socket
import sys
import time
from pathlib import Path
from typing import NoReturn

from lamella.errors import UserError
from lamella.installation import unfit_libraries_told
from lamella.recipe.files import arguments
from lamella.recipe.stages import prepare_stages
from lamella.run.folder import write_atomic
from lamella.run.gpus import rank_environment
from lamella.run.processes import StopRequest, die_with_parent
from lamella.run.supervise import REFUSAL_FILE

EXIT_BAD_INPUT = 2


def main(words: list[str] | None = None) -> None:
    """Train all stages, in one process group; exits 2 on bad input and 1 when the training fails."""
    rank = int(os.environ.get("RANK", 0))
    stop = StopRequest()
    stop.exit()
    if "TORCHELASTIC_RUN_ID" in os.environ:
        die_with_parent()  # torchrun starts ranks in sessions of their own: nothing else would end them
    try:
        stages = prepare_stages(*arguments(sys.argv[1:] if words is None else words))
        for recipe in stages:
            recipe.check_world_size(int(os.environ.get("WORLD_SIZE", 1)))
        alone_without_torchrun()
        os.environ.update(rank_environment())
        with unfit_libraries_told():
            from lamella.train.stage import leave_group, train_stage

        for recipe in stages:
            if not train_stage(recipe, rank, stop):
                break
    except UserError as error:
        _refuse(error, rank)
    leave_group()


def _refuse(error: UserError, rank: int) -> NoReturn:
    if rank != 0:  # where rank 0 is refused too, it alone speaks: torchrun ends all ranks when one ends
        time.sleep(5)
    if REFUSAL_FILE in os.environ:
        write_atomic(Path(os.environ[REFUSAL_FILE]), str(error))
    else:
        print(f"error: {error}", file=sys.stderr, flush=True)
    sys.exit(EXIT_BAD_INPUT)


def alone_without_torchrun() -> None:
    """`python train.py` is a run of one rank."""
    if "RANK" in os.environ:
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_WORLD_SIZE="1")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))


if __name__ == "__main__":
    main()
