"""The command `lamella`. Each command imports what it needs when it runs: `lamella --help` must not import torch."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from lamella.cli_adapters import adapters_app
from lamella.cli_data import Overwrite, data_app
from lamella.cli_evaluate import SEQ_LEN, Device, evaluate
from lamella.cli_export import export, push, serve_model
from lamella.cli_generate import generate
from lamella.cli_plan import JsonFile, Words, plan
from lamella.cli_runs import runs_app
from lamella.cli_service import access_app, backup, doctor, restore, serve
from lamella.errors import UserError, check_choice
from lamella.installation import command as typed
from lamella.installation import shipped, unfit_libraries_told

app = typer.Typer(
    help="Dense Llama checkpoints into fine-grained mixtures of experts: convert, verify, train, evaluate, export.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
# What several commands say alike.
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print every tensor that would be written, and write nothing.")]
MODEL = "Convert this model: a folder or its URL (s3://bucket/model), a .gguf file or a hub name."
OUT = "Write the converted model to this folder, or to this URL shard by shard."


def main() -> None:
    """Be the entry point of `lamella`."""
    _exit_cleanly(app)


def run_command(command: Callable[..., Any]) -> None:
    """Be the entry point of a top-level script that is one command."""
    single = typer.Typer(
        add_completion=False, pretty_exceptions_enable=False, context_settings={"help_option_names": ["-h", "--help"]}
    )
    single.command()(command)
    _exit_cleanly(single)


@contextmanager
def _reported() -> Iterator[None]:
    """Tell the service, where it started this command, what the command failed of."""
    if "LAMELLA_FAILURE_FILE" not in os.environ:  # else nothing more is imported
        yield
        return
    from lamella.run.failure import reported

    with reported():
        yield


def _exit_cleanly(typer_app: typer.Typer) -> None:
    try:
        with _reported(), unfit_libraries_told():
            typer_app()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


@app.command()
def version() -> None:
    """Print the version of lamella."""
    from lamella import __version__

    print(__version__)


@app.command(
    epilog="Keys of a recipe that every method has: model, out, method. `lamella keys convert METHOD` lists the others "
    "of slice, partition, upcycle, merge, adapters or attention, with their defaults."
)
def convert(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[RECIPE.yaml [OUT]] [key=value ...]",
            help="A recipe, as a file or a name of `lamella recipes`, or a config of mergekit-moe, the folder to make, "
            "and settings that replace its own.",
        ),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help=MODEL, show_default="the recipe's, or the embedded SmolLM2-135M")
    ] = None,
    out: Annotated[str | None, typer.Option(help=OUT, show_default="the recipe's, or artifacts/moe")] = None,
    part: Annotated[
        str | None,
        typer.Option(
            metavar="I/N",
            help="Make the I-th of N parts alone, as one of several machines; the last to be made finishes the model.",
        ),
    ] = None,
    join: Annotated[
        bool, typer.Option("--join", help="Make nothing; finish the model whose parts are all there.")
    ] = False,
    calibration: Annotated[
        str | None,
        typer.Option(help="Calibrate on the training part of this text, whatever the recipe's calibration.data is."),
    ] = None,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
) -> None:
    """Convert a dense model into a mixture of experts, or several models into one, by the method that a recipe names.

    Without a recipe every FFN becomes 8 frozen slices and 8 trainable copies of them (method slice).
    """
    from lamella.recipe.conversion import read_conversion

    words = [*(words or []), *([] if calibration is None else [f"calibration.data={calibration}"])]
    recipe = read_conversion(words)  # refuses before torch is imported
    from lamella.conversion.command import run_part, run_recipe, run_slicing
    from lamella.recipe.methods.slice import SliceOptions

    if part is not None or join:
        if dry_run or (join and part is not None):
            raise UserError("--part, --join and --dry-run do not go together; give one of them")
        run_part(recipe, model, out, part, overwrite)
    elif words:
        run_recipe(recipe, model, out, overwrite=overwrite, dry_run=dry_run)
    else:
        run_slicing(model, out, SliceOptions(), overwrite=overwrite, dry_run=dry_run)


def _methods() -> list[str]:
    """The methods of conversion, for a shell to complete."""
    from lamella.recipe.methods import METHODS

    return list(METHODS)


@app.command()
def keys(
    kind: Annotated[
        str | None,
        typer.Argument(
            metavar="[train | convert]",
            help="The kind of recipe; without it, all that can be listed.",
            autocompletion=lambda: ["train", "convert"],
        ),
    ] = None,
    method: Annotated[
        str | None,
        typer.Argument(
            metavar="[METHOD]",
            help="The method of a conversion: slice, partition, upcycle, merge, adapters or attention; of a training: "
            "adapters.",
            autocompletion=_methods,
        ),
    ] = None,
) -> None:
    """List every key that a recipe may have, with its type, its default and what it does."""
    from lamella.recipe import keys as known

    if kind is None:
        print(known.overview())
        return
    print(known.describe(known.keys(kind, method)))
    if kind == "convert" and method is None:
        print(f"\nEach method has keys of its own:\n\n{known.overview()}")


@app.command()
def verify(
    dense: Annotated[
        str | None,
        typer.Option(
            help="The dense model: a folder, a .gguf file or a hub name.", show_default="the embedded SmolLM2-135M"
        ),
    ] = None,
    moe: Annotated[
        str | None,
        typer.Option(help="The folder of the converted model.", show_default="artifacts/moe, made if missing"),
    ] = None,
    data: Annotated[str, typer.Option(help="Compare on the held-out part of this text.")] = "python-docs",
    tokens: Annotated[int, typer.Option(help="Compare this many tokens in float32.")] = 512,
    bf16_tokens: Annotated[
        int, typer.Option(help="Compare this many tokens in bfloat16, too, which CPUs are slow at.")
    ] = 256,
    seq_len: Annotated[int, typer.Option(help=SEQ_LEN)] = 256,
    ratios: Annotated[bool, typer.Option(help="Also measure what random routing does to the perplexity.")] = True,
    device: Device = "auto",
    json: JsonFile = None,
) -> None:
    """Compare a converted model's logits with those of the dense model that it was made of."""
    from lamella.evaluate.commands import verify as run

    sizes: dict[str, Any] = {"tokens": tokens, "bf16_tokens": bf16_tokens, "seq_len": seq_len}
    if not run(dense, moe, data=data, **sizes, ratios=ratios, device=device, json_path=json):
        from lamella.run.failure import tell

        tell("numerics", False, f"the logits of {moe or 'artifacts/moe'} are not the dense model's")
        raise typer.Exit(1)


app.command()(evaluate)


@app.command(
    epilog="`lamella keys train` lists every key of a training recipe, with its default: model, out, data, steps, lr "
    "and many more."
)
def train(
    words: Words = None,
    nproc: Annotated[
        int | None,
        typer.Option(
            help="Train with this many processes on this machine.",
            show_default="the GPUs; on CPU 3 for the demo, else 1",
        ),
    ] = None,
) -> None:
    """Train a converted model as a recipe says; called again, go on where the run was interrupted.

    Without a recipe it trains the embedded model for a few steps. A recipe with `method: adapters` learns an adapter of
    a dense model for each domain, and routers that choose among them.
    """
    from lamella.recipe.adapters_training import read_adapters_training
    from lamella.recipe.files import arguments
    from lamella.recipe.stages import prepare_stages

    if (adapters := read_adapters_training(*arguments(words or []))) is not None:
        if nproc not in (None, 1):
            raise UserError("adapters are trained by one process; leave --nproc out")
        from lamella.train.adapters_recipe import train_adapters

        train_adapters(adapters)
        return
    prepare_stages(*arguments(words or []))  # refuses before anything that reads data is imported
    from lamella.data.sources import open_source
    from lamella.run.launch import default_nproc, launch

    ranks = default_nproc(words or []) if nproc is None else nproc
    if code := launch(words or [], ranks, check_source=open_source):
        raise typer.Exit(code)


@app.command(hidden=True, context_settings={"ignore_unknown_options": True})
def slurm(
    when: Annotated[str, typer.Argument(help="Whether it is before or after an attempt.")],
    number: Annotated[int, typer.Argument(help="Before it, the ranks of the job; after it, the exit code of srun.")],
    words: Annotated[list[str] | None, typer.Argument(metavar="[RECIPE.yaml] [key=value ...]")] = None,
) -> None:
    """Answer launch/slurm/train.sbatch on the batch host: whether the recipe is right, and whether to queue again."""
    from lamella.data.sources import open_source
    from lamella.run.slurm import after, before

    if when == "before":
        before(words or [], number, open_source)
        return
    try:
        code = after(words or [], number, os.environ["SLURM_JOB_ID"])
    except OSError as error:  # uncounted attempts would have no end
        print(f"error: the attempt cannot be recorded: {error}", file=sys.stderr)
        code = 1
    raise typer.Exit(code)


app.add_typer(data_app, name="data")
app.command()(serve)
app.command()(doctor)
app.command()(backup)
app.command()(restore)
app.add_typer(runs_app, name="runs")
app.add_typer(access_app, name="access")
app.add_typer(adapters_app, name="adapters")


@app.command()
def recipes(
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="Print this recipe; without a name, all names.")
    ] = None,
) -> None:
    """Print the recipes that lamella brings; `convert`, `train` and `plan` take their names as well as files."""
    from lamella.recipe.files import read_recipe_text

    if name is not None:
        print(read_recipe_text(Path(name)), end="")
        return
    uses = {
        "conversions/*.yaml": typed("lamella convert NAME key=value ..."),
        "recipes/*.yaml": typed("lamella train NAME key=value ..."),
        "clusters/*.yaml": typed("lamella runs submit RECIPE.yaml --executor slurm --cluster NAME"),
        "slurm/*": f"{typed('lamella recipes NAME')} > FILE && sbatch FILE RECIPE.yaml key=value ...",
    }
    for pattern, use in uses.items():
        print(use, *(f"  {file}" for file in shipped(pattern)), sep="\n")


app.command(
    epilog="`lamella keys train` lists the keys of a training recipe, and `lamella keys convert METHOD` those that "
    "--conversion takes."
)(plan)
app.command()(generate)
app.command()(push)
app.command(name="serve-model")(serve_model)
app.command()(export)


@app.command()
def demo(
    story: Annotated[
        str | None,
        typer.Argument(
            metavar="[STORY]",
            help="Show this: whole (slices, from converting to export), adapters as experts, or merge (three models "
            "become one).",
            show_default="whole",
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Write everything to this folder.", show_default="artifacts/demo, -STORY")
    ] = None,
    ranks: Annotated[
        int | None,
        typer.Option(help="Of story whole: train with this many processes.", show_default="the GPUs; on CPU 3"),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="Train for this many optimizer steps.", show_default="12, adapters 60")
    ] = None,
) -> None:
    """Show what lamella does on a small real model: convert, train, export, compare; every figure is measured."""
    check_choice("story", story, (None, "whole", "adapters", "merge"))
    chosen = {} if steps is None else {"steps": steps}
    if story == "adapters":
        from lamella.demo_adapters import run_adapters_demo

        if ranks is not None:
            raise UserError("--ranks has no effect on the story adapters; leave it out")
        run_adapters_demo(out or Path("artifacts/demo-adapters"), **chosen)
        return
    if story == "merge":
        from lamella.demo_merge import run_merge_demo

        if ranks is not None:
            raise UserError("--ranks has no effect on the story merge; leave it out")
        run_merge_demo(out or Path("artifacts/demo-merge"), **chosen)
        return
    from lamella.demo import run_demo

    run_demo(out or Path("artifacts/demo"), ranks=ranks, **chosen)


if __name__ == "__main__":
    main()
