"""docs/families.md is what docs/families.py measures; if it is not, run that script."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "docs"))
import families

from lamella.architecture.rows import FAMILIES

ABILITIES, CONFIGS = (part.split("## ")[0] for part in families.PAGE.read_text().split("\n| family |")[1:])


def cells(table: str) -> dict[str, dict[str, str]]:
    """Family -> column -> cell."""
    head, _, *rows = (line.strip("| ").split(" | ") for line in table.splitlines() if "|" in line)
    return {row[0].strip("`"): dict(zip(head, row[1:], strict=True)) for row in rows}


def test_the_page_has_every_family_and_every_reason() -> None:
    assert cells(ABILITIES).keys() == cells(CONFIGS).keys() == FAMILIES.keys()
    page = families.PAGE.read_text()
    assert families.not_trained() in page
    assert families.not_held() in page


def test_the_page_says_what_the_table_says() -> None:
    for name, row in cells(ABILITIES).items():
        family = FAMILIES[name]
        assert row["slices"] == row["upcycling"] == row["partition, all parts"] == "exact"
        assert (row["dense again"], row["partition, half"]) == ("same bits", "runs")
        assert row["train"] == ("exact" if family.trains else "refused")
        assert row["attention experts"] == ("exact" if family.attention_experts else "refused")
        assert (row["to glm4-moe"] != "refused") <= family.llama_like


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gemma2", "phi3"])
def test_the_rows_are_measured_again(family: str) -> None:
    page = families.PAGE.read_text()
    for measure in (families.abilities, families.configs):
        assert families.table_row(family, families.row(family, measure)) in page
