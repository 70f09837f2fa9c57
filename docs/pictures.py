"""Draw the pictures of the README and of the documentation. Run: uv run python docs/pictures.py

Every picture is an SVG in docs/pictures/, the same bytes at every run. They explain; none shows a measurement.
"""

from __future__ import annotations

import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

FOLDER = Path(__file__).parent / "pictures"
INK, FAINT, PAPER = "#1f2a44", "#8a93a6", "#ffffff"
FROZEN, TWIN, SHARED, OFF, ACTION = "#9db8d9", "#f4a64f", "#7cc4a4", "#eceff4", "#e9e4f5"
CHOSEN_A = (0, 1, 0, 0, 1, 0, 1, 0)  # per pair: 0 the slice, 1 its twin
CHOSEN_B = (1, 0, 0, 1, 1, 1, 0, 0)
FLAT = (0, 1, 2, 4, 8, 9, 13, 15)  # of 16 experts: what a top-8 may take


def canvas(width: float, height: float) -> Axes:
    """Axes of `width` x `height` units without anything around them; 12 units are an inch."""
    figure = plt.figure(figsize=(width / 12, height / 12), facecolor=PAPER)
    ax = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(0, height))
    ax.axis("off")
    return ax


def box(
    ax: Axes, x: float, y: float, w: float, h: float, text: str = "", color: str = PAPER, fontsize: float = 9
) -> None:
    """A rounded box whose lower left corner is (x, y), with centred text."""
    ax.add_patch(FancyBboxPatch((x, y), w, h, boxstyle="round,pad=0,rounding_size=0.9", fc=color, ec=INK, lw=1.1))
    say(ax, x + w / 2, y + h / 2, text, fontsize=fontsize)


def cell(ax: Axes, x: float, y: float, w: float, h: float, color: str, *, on: bool = True, **options: object) -> None:
    """A plain rectangle; one that is not `on` is only outlined."""
    face, edge, width = (color, INK, 1.0) if on else (OFF, FAINT, 0.6)
    ax.add_patch(Rectangle((x, y), w, h, fc=face, ec=edge, lw=width, **options))


def say(ax: Axes, x: float, y: float, text: str, **options: object) -> None:
    """Text around a point."""
    ax.text(x, y, text, **({"ha": "center", "va": "center", "color": INK, "fontsize": 9} | options))


def arrow(ax: Axes, start: tuple[float, float], end: tuple[float, float], **options: object) -> None:
    """An arrow from one point to another."""
    style = {"arrowstyle": "-|>", "mutation_scale": 11, "color": INK, "lw": 1.3, "shrinkA": 0, "shrinkB": 0} | options
    ax.add_patch(FancyArrowPatch(start, end, **style))


def way_of_data() -> None:
    """From the dense checkpoint to what is served."""
    ax = canvas(112, 33)
    stations = [
        (1, "dense checkpoint", "safetensors, GGUF,\nhub name"),
        (31, "MoE checkpoint", "same logits,\n8 slices + 8 twins"),
        (61, "run directory", "recipe, metrics,\ncheckpoints"),
        (91, "for others", "GLM4-MoE, Mixtral,\nGGUF, dense again"),
    ]
    for x, name, what in stations:
        box(ax, x, 13, 20, 11, color=FROZEN if x < 60 else TWIN)
        say(ax, x + 10, 20.8, name, weight="bold", fontsize=10)
        say(ax, x + 10, 16.4, what, fontsize=8)
    for x, verb, how in ((21, "convert", "no training"), (51, "train", "torchtitan"), (81, "export", "compared")):
        arrow(ax, (x, 18.5), (x + 10, 18.5))
        say(ax, x + 5, 20.4, verb, weight="bold")
        say(ax, x + 5, 16.9, how, fontsize=7, color=FAINT)
    for x, words in ((41, "verify: logits against the dense model"), (71, "evaluate: perplexity, dense beside it")):
        arrow(ax, (x, 13), (x, 8.3), linestyle="--")
        box(ax, x - 14.5, 4.2, 29, 4, words, ACTION, fontsize=8)
    arrow(ax, (101, 13), (101, 8.3), linestyle="--")
    box(ax, 88.5, 4.2, 22.5, 4, "served by stock tools", ACTION, fontsize=8)
    say(ax, 1, 29.5, "The way of the data", ha="left", weight="bold", fontsize=12)


def pairs(ax: Axes, x: float, y: float, chosen: tuple[int, ...], label: str) -> None:
    """Eight pairs side by side, slices below and twins above; what the token passes is coloured."""
    say(ax, x - 1.5, y + 4.6, label, ha="right", fontsize=8.5)
    for i, twin in enumerate(chosen):
        cell(ax, x + i * 4, y + 5, 3.4, 4.2, TWIN, on=twin == 1)
        cell(ax, x + i * 4, y, 3.4, 4.2, FROZEN, on=twin == 0)


def twin_routing() -> None:
    """One of each pair, and beside it any eight of sixteen."""
    ax = canvas(112, 47)
    say(ax, 1, 43.8, "Twin routing: a token passes one of each pair", ha="left", weight="bold", fontsize=12)
    say(ax, 1, 40.6, "1  the dense FFN, cut in 8", ha="left", fontsize=9)
    for i in range(8):
        cell(ax, 1 + i * 2.2, 24, 2.2, 13, FROZEN)
        say(ax, 2.1 + i * 2.2, 30.5, str(i + 1), fontsize=8)
    say(ax, 9.8, 21.8, "the sum of the slices\nis the FFN", fontsize=8, va="top")
    arrow(ax, (20, 30.5), (25.5, 30.5))
    say(ax, 39, 40.6, "2  each slice gets a twin, and the router picks", ha="left", fontsize=9)
    pairs(ax, 39, 28, CHOSEN_A, "token “def”")
    pairs(ax, 39, 14.5, CHOSEN_B, "token “the”")
    for y in (28, 14.5):
        arrow(ax, (71.5, y + 4.6), (76.5, y + 4.6))
    say(ax, 77, 40.6, "3  the sum is whole", ha="left", fontsize=9)
    for y, chosen in ((28, CHOSEN_A), (14.5, CHOSEN_B)):
        for i, twin in enumerate(chosen):
            cell(ax, 77 + i * 2.2, y + 1.6, 2.2, 6, TWIN if twin else FROZEN)
            say(ax, 78.1 + i * 2.2, y + 4.6, str(i + 1), fontsize=7.5)
    say(ax, 96.3, 32.6, "every part once", ha="left", fontsize=8.5)
    say(ax, 96.3, 19.1, "every part once", ha="left", fontsize=8.5)
    ax.plot((1, 111), (11.6, 11.6), color=FAINT, lw=0.6)
    say(ax, 1, 8.2, "Flat routing, for comparison:\nany 8 of the 16", ha="left", fontsize=8.5)
    for i in range(8):
        cell(ax, 39 + i * 4, 5.6, 3.4, 3.4, TWIN, on=i + 8 in FLAT)
        cell(ax, 39 + i * 4, 1.4, 3.4, 3.4, FROZEN, on=i in FLAT)
    arrow(ax, (71.5, 5.2), (76.5, 5.2))
    say(ax, 77, 5.2, "parts 1 and 2 twice, 4 and 7 not at all:\nthe dense model is lost", ha="left", fontsize=8.5)
    cell(ax, 1, 15.6, 2, 2, FROZEN)
    say(ax, 4, 16.6, "slice, frozen", ha="left", fontsize=8)
    cell(ax, 1, 12.7, 2, 2, TWIN)
    say(ax, 4, 13.7, "twin, trained", ha="left", fontsize=8)


def slices() -> None:
    """The three matrices of an FFN, cut into slices."""
    ax = canvas(112, 42)
    say(ax, 1, 39, "A slice: the same neurons of all three matrices", ha="left", weight="bold", fontsize=12)
    say(ax, 4, 19, "x", fontsize=14, style="italic")
    arrow(ax, (6, 20), (12, 25.5))
    arrow(ax, (6, 18), (12, 12.5))
    for y, name in ((20.6, "W_gate"), (3.8, "W_up")):
        for i in range(8):
            cell(ax, 13, y + i * 1.6, 15, 1.6, TWIN if i == 5 else FROZEN)
        say(ax, 20.5, y - 1.7, f"{name}   [F, D]", fontsize=8.5)
    say(ax, 20.5, 35.2, "rows = neurons", fontsize=8, color=FAINT)
    arrow(ax, (29, 26), (35, 20.5))
    arrow(ax, (29, 11.5), (35, 17.5))
    box(ax, 35.5, 16, 16, 6, "silu(gate) · up", ACTION)
    arrow(ax, (52, 19), (57, 19))
    for i in range(8):
        cell(ax, 58 + i * 1.9, 11.5, 1.9, 15, TWIN if i == 2 else FROZEN)
    say(ax, 65.6, 9.4, "W_down   [D, F]", fontsize=8.5)
    say(ax, 65.6, 28.2, "columns = neurons", fontsize=8, color=FAINT)
    arrow(ax, (74, 19), (79, 19))
    say(ax, 81, 19, "y", fontsize=14, style="italic")
    words = (
        "D: model width, F: FFN width.",
        "A slice has F/8 neurons: its rows of\nW_gate and W_up, and its columns of\nW_down (orange).",
        "No neuron looks at another one, so the\noutputs of the 8 slices add up to y.",
    )
    say(ax, 83.5, 19, "\n\n".join(words), ha="left", fontsize=8, linespacing=1.5)


def partition() -> None:
    """Sixteen parts of which four are shared and four of twelve are chosen."""
    ax = canvas(112, 38)
    say(ax, 1, 35, "Partition: a token passes half of the neurons", ha="left", weight="bold", fontsize=12)
    chosen = {"token “def”": (5, 8, 9, 14), "token “the”": (4, 7, 12, 14)}
    say(ax, 31, 31, "shared: every token", fontsize=8.5)
    say(ax, 71, 31, "12 routed experts: the router chooses 4", fontsize=8.5)
    for row, (token, experts) in enumerate(chosen.items()):
        y = 21 - row * 10
        say(ax, 19.5, y + 3.5, token, ha="right", fontsize=9)
        for i in range(16):
            x = 21 + i * 5 + (2 if i >= 4 else 0)
            cell(ax, x, y, 4.4, 7, SHARED if i < 4 else FROZEN, on=i < 4 or i in experts)
    words = (
        "All 16 parts together are the dense FFN. 8 of 16 are computed, so the logits are not the dense model's.",
        "Refitted down projections make up for a part of what is missing; training does the rest.",
    )
    say(ax, 1, 4.6, "\n".join(words), ha="left", fontsize=9, linespacing=1.7)


def upcycling() -> None:
    """Copies, copies in shards, copies drawn anew in part, and copies that add nothing at first."""
    ax = canvas(112, 40)
    say(ax, 1, 37, "Upcycling: more parameters, the same logits at the start", ha="left", weight="bold", fontsize=12)
    columns = [
        (2, "sparse upcycling", "whole copies;\nthe router chooses 2 of 4"),
        (30, "virtual groups", "copies in 4 shards;\n2 of each shard are chosen"),
        (58, "drop-upcycling", "half of each copy's\nneurons drawn anew"),
        (86, "identity", "dense FFN shared,\ncopies add 0 at first"),
    ]
    for x, name, what in columns:
        say(ax, x + 11, 31.8, name, weight="bold", fontsize=9.5)
        say(ax, x + 11, 5.4, what, fontsize=8.5)
    for copy in range(4):
        y = 10 + copy * 5
        cell(ax, 4, y, 18, 4, FROZEN, on=copy in (1, 2))
        for shard in range(4):
            cell(ax, 32 + shard * 4.6, y, 4.2, 4, FROZEN, on=copy in (1, 2))
        on = copy in (0, 2)
        for part in range(6):
            redrawn = (part + copy) % 2 == 0
            cell(ax, 60 + part * 3, y, 3, 4, TWIN if redrawn else FROZEN, on=on)
        if copy == 3:
            cell(ax, 88, y, 18, 4, SHARED)
            say(ax, 97, y + 2, "shared", fontsize=8)
        else:
            cell(ax, 88, y, 18, 4, FROZEN, on=copy in (0, 1))
            say(ax, 97, y + 2, "+ 0", fontsize=8, color=INK if copy in (0, 1) else FAINT)
    words = "Coloured: computed for this token. Orange: drawn anew; then the copies differ, and so do the logits."
    say(ax, 1, 1.6, words, ha="left", fontsize=8, color=FAINT)


ROOMS = {  # what each knows
    "by_slicing": "convert_by_slicing.py",
    "cli": "the commands",
    "cli_data": "the commands of data",
    "cli_generate": "the command generate",
    "cli_plan": "the command plan",
    "cli_runs": "the commands of runs",
    "cli_service": "serve, keys of access",
    "cli_adapters": "the commands of adapters",
    "cli_export": "the commands that hand a model on",
    "cli_evaluate": "the command evaluate",
    "demo": "the whole way, shown",
    "demo_adapters": "adapters, shown",
    "demo_merge": "a merge, shown",
    "worker": "what torchrun starts",
    "api": "from Python",
    "command_options": "options from fields",
    "generation": "text from a model",
    "train": "the trainer on its engine",
    "service": "submit, watch, resume",
    "evaluate": "logits, perplexity, tasks",
    "export": "for other tools",
    "conversion": "dense to experts",
    "calibrate": "what layers see on text",
    "data": "text to samples",
    "hf": "the transformers home",
    "titan": "the torchtitan home",
    "checkpoint": "files of weights",
    "moe": "the maths, on tensors",
    "run": "a run from outside",
    "plan": "memory, time, cost",
    "recipe": "what a person may ask for",
    "architecture": "what a model consists of",
    "jsons": "the type of JSON",
    "installation": "what is installed",
    "display": "bars and durations",
    "errors": "what to tell a user",
}


def contracts() -> list[dict[str, Any]]:
    """What pyproject.toml says about imports; import-linter holds it."""
    project = tomllib.loads((FOLDER.parents[1] / "pyproject.toml").read_text())
    return project["tool"]["importlinter"]["contracts"]


def layers() -> list[list[str]]:
    """The rooms, the highest first."""
    rows = next(contract["layers"] for contract in contracts() if contract["type"] == "layers")
    return [row.split(" | ") for row in rows]


def without_torch() -> set[str]:
    """The rooms that must not import torch."""
    sources = next(c["source_modules"] for c in contracts() if "torch" in c.get("forbidden_modules", ()))
    return {module.removeprefix("lamella.") for module in sources}


def rooms() -> None:
    """The packages and modules of src/lamella in layers."""
    rows, light, pitch, width = layers(), without_torch(), 5.4, 22.5
    top = len(rows) * pitch + 5
    ax = canvas(112, top + 7)
    say(ax, 1, top + 4, "Rooms: each may import those below it, never one above", ha="left", weight="bold", fontsize=12)
    arrow(ax, (5, top - 1), (5, 8), color=FAINT)
    say(ax, 3, top / 2, "may import", rotation=90, fontsize=8, color=FAINT)
    for number, row in enumerate(rows):
        y = top - (number + 1) * pitch
        left = 60 - len(row) * (width + 1) / 2
        for place, name in enumerate(row):
            x = left + place * (width + 1)
            box(ax, x, y, width, 4.6, color=SHARED if name in light else FROZEN)
            say(ax, x + width / 2, y + 3.1, name, weight="bold", fontsize=8.5)
            say(ax, x + width / 2, y + 1.3, ROOMS[name], fontsize=7)
    cell(ax, 12, 1.2, 2, 2, SHARED)
    say(ax, 15, 2.2, "never imports torch", ha="left", fontsize=8)
    cell(ax, 38, 1.2, 2, 2, FROZEN)
    say(ax, 41, 2.2, "computes on tensors, or imports what it needs when it runs", ha="left", fontsize=8)


PICTURES: dict[str, Callable[[], None]] = {
    "way-of-data": way_of_data,
    "twin-routing": twin_routing,
    "slices": slices,
    "partition": partition,
    "upcycling": upcycling,
    "rooms": rooms,
}


def draw(folder: Path, suffix: str = "svg") -> None:
    """Write every picture into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    style = {"font.family": "DejaVu Sans", "svg.hashsalt": "lamella", "svg.fonttype": "path"}
    for name, picture in PICTURES.items():
        with plt.rc_context(style):
            picture()
            metadata = {"Date": None} if suffix == "svg" else None
            plt.savefig(folder / f"{name}.{suffix}", dpi=110, metadata=metadata)
            plt.close()


if __name__ == "__main__":
    draw(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER)
