"""Hooks of mkdocs: the reference pages are made from the code, and pictures of the benchmarks come from their place."""

from __future__ import annotations

import sys
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

sys.path.insert(0, str(Path(__file__).parent))

import reference

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what docs/ does not hold."""
    for name, page in reference.PAGES.items():
        files.append(File.generated(config, name, content=page()))
    for picture in sorted(RESULTS.glob("*.png")):
        files.append(File.generated(config, f"results/{picture.name}", abs_src_path=str(picture)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """In the repository a page names a result's picture where it lies; in the site results/ lies beside the pages."""
    return markdown.replace("../benchmarks/results/", "results/")
