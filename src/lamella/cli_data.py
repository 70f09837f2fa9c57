"""The commands `lamella data ...`. Each imports what it needs when it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the output folder if it is there.")]
data_app = typer.Typer(help="Prepare text for training.", no_args_is_help=True)


@data_app.callback()
def _data() -> None:
    """Prepare text for training."""


@data_app.command("prepare")
def data_prepare(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="SOURCE...", help="A text as in `data` of a recipe; SOURCE#FIELD reads that field of its records."
        ),
    ],
    model: Annotated[str, typer.Option(help="Take the tokenizer of this model, a folder or a hub name.")],
    out: Annotated[Path, typer.Option(help="Write the shards to this folder, or go on with it after a kill.")],
    workers: Annotated[
        int | None, typer.Option(help="Tokenise with this many processes.", show_default="the cores", min=1)
    ] = None,
    shard_mb: Annotated[
        int | None,
        typer.Option(help="A shard holds this many MiB of text, the most that a kill loses.", show_default="64", min=1),
    ] = None,
    on_bad_data: Annotated[
        str, typer.Option(help="Fail on a broken record, or skip it; blank ones are left out.")
    ] = "fail",
    overwrite: Overwrite = False,
) -> None:
    """Tokenise text once, in parallel, into shards that training opens at any place; go on after a kill."""
    from lamella.data.readers import policy

    chosen = policy(on_bad_data)  # refuses before anything large is imported
    from lamella.data.command import run_prepare

    run_prepare(sources, model, out, workers=workers, shard_mb=shard_mb, on_bad_data=chosen, overwrite=overwrite)


@data_app.command("generate")
def data_generate(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="The dense model that writes: a folder, a hub name, or 'embedded'.")
    ],
    out: Annotated[Path, typer.Option(help="Write the documents to this JSONL file.")],
    tokens: Annotated[int, typer.Option(help="Write at least so many tokens in all.", min=1)] = 65_536,
    seed: Annotated[int, typer.Option(help="Draw first tokens and text by this seed.", min=0)] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file if it is there.")] = False,
) -> None:
    """Let a model write text of its own, which stands for what it learned from where that text cannot be had."""
    import json

    from lamella.errors import UserError
    from lamella.run.folder import write_atomic

    if out.suffix != ".jsonl":
        raise UserError(f"--out {out} is no JSONL file; give it a name that ends with .jsonl")
    if out.exists() and not overwrite:
        raise UserError(f"{out} is there; give another --out, or --overwrite")
    from lamella.calibrate.text import written_documents
    from lamella.checkpoint.source import Checkpoint

    source = Checkpoint.open(model)
    out.parent.mkdir(parents=True, exist_ok=True)
    documents = written_documents(source, tokens, seed)
    write_atomic(out, "".join(json.dumps({"text": document}) + "\n" for document in documents))
    print(f"{out}: {len(documents)} documents; name it as a source in `data`, `router_fit` or a calibration")


@data_app.command("show")
def data_show(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="As in `data` of a recipe.")],
    model: Annotated[str, typer.Option(help="Folder or hub name of the model whose tokenizer is used.")],
    count: Annotated[int, typer.Option(help="Records to show.", min=1)] = 1,
) -> None:
    """Print the first records as a model sees them, with marks around what it learns of them."""
    from lamella.data.command import run_show

    run_show(source, model, count=count)
