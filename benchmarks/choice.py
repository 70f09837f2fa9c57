"""Run: uv run benchmarks/choice.py --questions 60 --json artifacts/choice.json

Multiple choice by lamella and by lm-evaluation-harness, which has to be installed (`lamella[tasks]`): the embedded
model answers the same questions, of embedded text, at several batch sizes of the harness. The figures must be equal;
seconds are of scoring, from the questions to the figures, without loading the model.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))  # runs where lamella is not installed, too
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from measure import print_table

from lamella.checkpoint.embedded import embedded_model
from lamella.data.sources import EMBEDDED_SOURCES
from lamella.evaluate.choice.continuations import continuations
from lamella.evaluate.choice.questions import Question

MEASURES = ("acc", "acc_norm", "acc_bytes")
YAML = """
task: local_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list: [{{metric: acc}}, {{metric: acc_norm}}, {{metric: acc_bytes}}]
"""
Figures = dict[str, tuple[float, float]]


def of_lamella(questions: list[Question]) -> Callable[[], Figures]:
    """What answers the questions; the model is loaded now."""
    from transformers import AutoTokenizer

    from lamella.evaluate.checkpoints import open_checkpoint
    from lamella.evaluate.choice.accuracy import accuracy, answer_questions
    from lamella.evaluate.choice.scoring import ModelScorer

    model = open_checkpoint(embedded_model(), "float32")
    scorer = ModelScorer(model, AutoTokenizer.from_pretrained(embedded_model()))

    def answer() -> Figures:
        found = accuracy(answer_questions(scorer, questions))
        return {name: (getattr(found, name), getattr(found, f"{name}_stderr")) for name in MEASURES}

    return answer


def of_the_harness(questions: list[Question], batch_size: int, folder: Path) -> Callable[[], Figures]:
    """The same by lm-evaluation-harness, its own class for transformers models and its own batching."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    file = folder / "task.jsonl"
    rows = ({"question": q.question, "choices": list(q.choices), "answer": q.answer} for q in questions)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = folder / "local_choice.yaml"
    task.write_text(YAML.format(file=file))
    model = HFLM(pretrained=str(embedded_model()), dtype="float32", device="cpu", batch_size=batch_size)
    manager = TaskManager()

    def answer() -> Figures:
        found: Any = simple_evaluate(model, tasks=[str(task)], task_manager=manager, log_samples=False)
        figures = found["results"]["local_choice"]
        return {name: (figures[f"{name},none"], figures[f"{name}_stderr,none"]) for name in MEASURES}

    return answer


def measured(name: str, answer: Callable[[], Figures]) -> dict[str, Any]:
    """A row: wall seconds, CPU seconds and figures."""
    wall, cpu = time.perf_counter(), time.process_time()
    figures = answer()
    return {
        "name": name, "wall_s": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu, "figures": figures,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=60, help="in all, half of code and half of prose")
    parser.add_argument("--batch-sizes", type=int, nargs="*", default=[1, 16], help="of the harness")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    arguments = parser.parse_args()
    questions = continuations(EMBEDDED_SOURCES, -(-arguments.questions // len(EMBEDDED_SOURCES)))
    rows = [measured("lamella", of_lamella(questions))]
    for size in arguments.batch_sizes:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(measured(f"harness, batch size {size}", of_the_harness(questions, size, Path(folder))))
    report = {"questions": len(questions), "equal": all(r["figures"] == rows[0]["figures"] for r in rows), "rows": rows}
    cells = [
        [r["name"], f"{r['wall_s']:.1f}", f"{r['cpu_s']:.1f}", *(f"{r['figures'][m][0]:.4f}" for m in MEASURES)]
        for r in rows
    ]
    print_table(
        f"{len(questions)} questions; all figures equal: {report['equal']}", ["", "wall s", "CPU s", *MEASURES], cells
    )
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
