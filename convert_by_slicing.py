"""Run: uv run convert_by_slicing.py [--model M] [--out DIR] [--slices 8] [--noise 0.02] [--dry-run]"""

from lamella.by_slicing import main

if __name__ == "__main__":
    main()
