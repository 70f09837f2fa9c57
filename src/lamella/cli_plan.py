"""The command `lamella plan`, which imports what it needs when it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

Words = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[RECIPE.yaml] [key=value ...]",
        help="A recipe, as a file or a name of `lamella recipes`, and settings that replace its own.",
    ),
]
JsonFile = Annotated[Path | None, typer.Option(help="Write the figures to this file, too.")]


def plan(
    words: Words = None,
    gpu: Annotated[
        str, typer.Option(help="Plan for this GPU: H100, H200, A100, ...; cpu plans for ranks without GPUs.")
    ] = "H100",
    ranks: Annotated[
        int | None,
        typer.Option(help="Plan for this many ranks, one for each GPU.", show_default="8, or the most below that fit"),
    ] = None,
    ranks_per_node: Annotated[
        int, typer.Option(help="So many GPUs of a machine are joined by fast links; between machines is a network.")
    ] = 8,
    suggest: Annotated[
        bool, typer.Option("--suggest", help="Compare layouts of these ranks, and name the fastest that fits.")
    ] = False,
    price_per_hour: Annotated[float | None, typer.Option(help="One GPU costs this much an hour.")] = None,
    tokens_per_second: Annotated[
        float | None,
        typer.Option(
            help="All ranks together were measured at this speed.", show_default="from the GPU's peak, at 30% MFU"
        ),
    ] = None,
    storage_gb_per_second: Annotated[
        float, typer.Option(help="All ranks together write checkpoints at this speed, in GB a second.")
    ] = 10.0,
    dense: Annotated[
        str | None,
        typer.Option(
            help="Plan as if this dense model (or config.json) had been converted; 8 slices if nothing else is said."
        ),
    ] = None,
    slices: Annotated[int | None, typer.Option(help="Into this many slices; short for --conversion slices=N.")] = None,
    conversion: Annotated[
        list[str] | None,
        typer.Option(
            metavar="RECIPE.yaml | key=value",
            help="By this recipe of a conversion, or with this key of one; may be given several times.",
        ),
    ] = None,
    json: JsonFile = None,
) -> None:
    """Compute memory per rank, time, traffic and cost of a training run, from its recipe and a config.json; start
    nothing."""
    from lamella.plan.command import run

    said = [*(conversion or []), *([] if slices is None else [f"slices={slices}"])]
    options: dict[str, Any] = {"price_per_hour": price_per_hour, "tokens_per_second": tokens_per_second}
    options |= {"per_node": ranks_per_node, "storage_rate": storage_gb_per_second * 1e9, "suggests": suggest}
    run(words or [], gpu_name=gpu, ranks=ranks, dense=dense, conversion=said, json_path=json, **options)
