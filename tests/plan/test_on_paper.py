"""The table of docs/how-to/train-on-many-nodes.md is what `lamella plan` says of the shipped recipes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lamella.plan.command import run
from support.planning import LLAMA3_8B

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "how-to" / "train-on-many-nodes.md"
# the sizes on the models' cards
LARGE: dict[str, dict[str, Any]] = {
    "Llama 3 8B": {},
    "Llama 3.1 70B": {
        "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
    },
    "Llama 3.1 405B": {
        "hidden_size": 16384, "intermediate_size": 53248, "num_hidden_layers": 126, "num_attention_heads": 128,
    },
}  # fmt: skip
RECIPES = {
    "Llama 3 8B": ["launch/recipes/llama3-8b.yaml", "activation_checkpointing=none"],
    "Llama 3.1 70B": ["launch/recipes/llama3-70b-64xh100.yaml"],
    "Llama 3.1 405B": ["launch/recipes/llama3-405b-512xh100.yaml"],
}


def table() -> dict[str, dict[str, str]]:
    """Column -> row -> what the page says."""
    lines = [line for line in PAGE.read_text().splitlines() if line.startswith("| ") or line.startswith("| | ")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    start = next(i for i, row in enumerate(rows) if "Llama 3 8B" in row)
    names = rows[start][1:]
    return {name: {row[0]: row[i + 1] for row in rows[start + 1 :] if len(row) == 4} for i, name in enumerate(names)}


def said(values: dict[str, Any]) -> dict[str, str]:
    """The cells of a plan's column."""
    step, faults, parameters = values["step"], values["faults"], values["parameters"]
    return {
        "GPUs": str(values["ranks"]["ranks"]),
        "parameters, of them trained": f"{parameters['all'] / 1e9:.1f}B, {parameters['trained'] / 1e9:.1f}B",
        "memory of a GPU": f"{values['memory_per_rank']['peak_bytes'] / 2**30:.1f} GiB",
        "tokens a step": f"{values['batch']['tokens_per_step'] / 1e6:.1f}M",
        "a GPU receives in a step, over NVLink": f"{step['bytes_inside_of_a_node'] / 2**30:,.0f} GiB",
        "over the network": f"{step['bytes_over_the_network'] / 2**30:,.0f} GiB",
        "a step at best": f"{step['seconds']:.1f} s",
        "MFU at best": f"{step['roofline_mfu']:.0%}",
        "a checkpoint": f"{values['memory_per_rank']['checkpoint_bytes'] / 2**30:,.0f} GiB",
        "written in": f"{faults['write_s']:.0f} s",
        "time between faults": f"{faults['hours_between'] / 24:.0f} days",
        "of the time trains": f"{faults['effective']:.1%}",
    }


@pytest.mark.parametrize("name", LARGE)
def test_the_page_says_what_is_planned(name: str, tmp_path: Path) -> None:
    config = LLAMA3_8B | {"max_position_embeddings": 131072, "dtype": "bfloat16"} | LARGE[name]
    (tmp_path / "config.json").write_text(json.dumps(config))
    written, out = table()[name], tmp_path / "plan.json"
    first, *settings = RECIPES[name]
    words = [str(ROOT / first), *settings]
    run(words, ranks=int(written["GPUs"]), dense=str(tmp_path / "config.json"), conversion=["slices=8"], json_path=out)
    values = json.loads(out.read_text())
    planned = said(values)
    assert {row: written[row] for row in planned} == planned
    assert not [warning for warning in values["warnings"] if warning.startswith("does not fit")]
