"""Run: uv run convert_by_slicing.py [--model M] [--out DIR] [--slices 8] [--noise 0.02] [--dry-run]"""

from lamella.cli import convert_by_slicing, run_command

if __name__ == "__main__":
    run_command(convert_by_slicing)
