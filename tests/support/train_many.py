"""Run under torchrun: several training runs in one process group, because starting one costs 15 s.

The argument is a JSON file: [["out=a", "steps=3", ...], ...], each as after `train.py`. A recipe with offload: frozen
is refused without a GPU; the word OFFLOADS has FSDP do all that it does for one, which needs none.
"""

import json
import os
import sys
from pathlib import Path

import torch

from lamella.recipe.files import arguments
from lamella.recipe.stages import prepare_recipe
from lamella.run.folder import RunDir
from lamella.train.stage import prepare, redirected_output, train_run

OFFLOADS = "frozen experts wait"


def main() -> None:
    rank = int(os.environ["RANK"])
    for words in json.loads(Path(sys.argv[1]).read_text()):
        recipe = prepare_recipe(*arguments([word for word in words if word != OFFLOADS]))
        recipe.check_world_size(int(os.environ["WORLD_SIZE"]))
        config = prepare(recipe, rank)
        assert config is not None
        config.model_spec.model.offloads_frozen = OFFLOADS in words
        with redirected_output(RunDir(Path(recipe.out)).log_file(rank)) as terminal:
            config.stream = terminal
            train_run(config, recipe, rank, terminal)
        torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
