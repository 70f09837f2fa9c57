"""The command `lamella`. Each command imports what it needs when it runs: `lamella --help` must not import torch."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from lamella.errors import UserError

app = typer.Typer(
    help="Dense Llama checkpoints into fine-grained mixtures of experts: convert, verify, train, evaluate, export.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """Entry point of `lamella`."""
    _exit_cleanly(app)


def run_command(command: Callable[..., Any]) -> None:
    """Entry point of a top-level script that is one command."""
    single = typer.Typer(
        add_completion=False, pretty_exceptions_enable=False, context_settings={"help_option_names": ["-h", "--help"]}
    )
    single.command()(command)
    _exit_cleanly(single)


def _exit_cleanly(typer_app: typer.Typer) -> None:
    try:
        typer_app()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


@app.command()
def version() -> None:
    """Print lamella's version."""
    from lamella import __version__

    print(__version__)


@app.command("convert")
def convert_by_slicing(
    model: Annotated[
        str | None, typer.Option(help="Folder, .gguf file or hub name.", show_default="the embedded SmolLM2-135M")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder to make.")] = Path("artifacts/moe"),
    slices: Annotated[int, typer.Option(help="Parts that each FFN is cut into; must divide its width.")] = 8,
    noise: Annotated[float, typer.Option(help="Noise on the copies, in standard deviations of each matrix.")] = 0.05,
    seed: Annotated[int, typer.Option(help="Of the noise.")] = 0,
    layers: Annotated[str, typer.Option(help="all, every:N, or a list such as 0,3,5-9.")] = "all",
    routing: Annotated[str, typer.Option(help="twin (one of each slice and its copy) or flat (any top-k).")] = "twin",
    gate: Annotated[str, typer.Option(help="sigmoid or softmax.")] = "sigmoid",
    top_k: Annotated[int | None, typer.Option(help="Experts per token.", show_default="the slices")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16.", show_default="the source's")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output folder.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be written, and stop.")] = False,
) -> None:
    """Cut a dense model's FFNs into frozen slices and trainable copies; the logits stay the dense model's."""
    from lamella.convert.command import run

    options = {"slices": slices, "noise": noise, "seed": seed, "layers": layers, "routing": routing, "gate": gate}
    run(model, out, options | {"top_k": top_k, "dtype": dtype}, overwrite=overwrite, dry_run=dry_run)


@app.command()
def train(
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="[RECIPE.yaml] [key=value ...]", help="Without a recipe: the embedded demo."),
    ] = None,
    nproc: Annotated[
        int | None, typer.Option(help="Ranks on this machine.", show_default="GPUs; on CPU 3 for the demo, else 1")
    ] = None,
) -> None:
    """Train a converted model: check the recipe, then start torchrun."""
    from lamella.train.launch import default_nproc, launch

    if code := launch(words or [], default_nproc(words or []) if nproc is None else nproc):
        raise typer.Exit(code)


if __name__ == "__main__":
    main()
