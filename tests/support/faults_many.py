"""Run under torchrun: training runs with faults in one process group, because starting one costs 15 s.

The argument is a JSON file with a list of jobs: {"words": as after `train.py`, "fault": for LAMELLA_FAULT, "damage":
[[path, how], ...] done before}. What a job raises on rank R goes to out/raised-R.json.
"""

import json
import os
import shutil
import sys
from pathlib import Path

import torch

from lamella.recipe.files import arguments
from lamella.recipe.stages import prepare_recipe
from lamella.run.failure import classify, reason_of
from lamella.run.folder import RunDir
from lamella.train.stage import prepare, redirected_output, train_run


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


HOW = {
    "truncate": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "halve": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "flip": flip,
    "remove": lambda path: shutil.rmtree(path) if path.is_dir() else path.unlink(),
    "seal": lambda path: path.write_text(path.read_text().replace('"world_size": 2', '"world_size": 3')),
    "unfinished": lambda path: path.write_text(path.read_text().replace('"finished"', '"running"')),
}


def run(job: dict, rank: int) -> None:
    recipe = prepare_recipe(*arguments(job["words"]))
    recipe.check_world_size(int(os.environ["WORLD_SIZE"]))
    os.environ["LAMELLA_FAULT"] = job.get("fault", "")
    out = Path(recipe.out)
    try:
        config = prepare(recipe, rank)
        assert config is not None, f"{out} is finished"
        with redirected_output(RunDir(out).log_file(rank)) as terminal:
            config.stream = terminal
            train_run(config, recipe, rank, terminal)
    except BaseException as error:
        out.mkdir(exist_ok=True)
        (out / f"raised-{rank}.json").write_text(json.dumps([classify(error), reason_of(error)]))


def main() -> None:
    rank = int(os.environ["RANK"])
    for job in json.loads(Path(sys.argv[1]).read_text()):
        if rank == 0:
            for path, how in job.get("damage", []):
                HOW[how](Path(path))
        if torch.distributed.is_initialized():
            torch.distributed.barrier()
        run(job, rank)
        torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
