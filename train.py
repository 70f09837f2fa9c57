"""Run: uv run torchrun --nproc-per-node=3 train.py [RECIPE.yaml] [key=value ...]"""

from lamella.worker import main

if __name__ == "__main__":
    main()
