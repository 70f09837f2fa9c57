"""The command `lamella`. Each command imports what it needs when it runs: `lamella --help` must not import torch."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

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
    single = typer.Typer(add_completion=False, pretty_exceptions_enable=False, context_settings={"help_option_names": ["-h", "--help"]})
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


if __name__ == "__main__":
    main()
