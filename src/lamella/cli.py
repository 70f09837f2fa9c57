"""The command `lamella`. Each command imports what it needs when it runs: `lamella --help` must not import torch."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from lamella.errors import UserError
from lamella.installation import command as typed
from lamella.installation import shipped, unfit_libraries_told

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
        with unfit_libraries_told():
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


def convert_by_slicing(
    model: Annotated[
        str | None, typer.Option(help="Folder, .gguf file or hub name.", show_default="the embedded SmolLM2-135M")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder to make.", show_default="artifacts/moe")] = None,
    slices: Annotated[int, typer.Option(help="Parts that each FFN is cut into; must divide its width.")] = 8,
    noise: Annotated[float, typer.Option(help="Noise on the copies, in standard deviations of each matrix.")] = 0.02,
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
    from lamella.conversion.command import run_slicing

    options = {"slices": slices, "noise": noise, "seed": seed, "layers": layers, "routing": routing, "gate": gate}
    run_slicing(model, out, options | {"top_k": top_k, "dtype": dtype}, overwrite=overwrite, dry_run=dry_run)


@app.command()
def convert(
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="[RECIPE.yaml] [key=value ...]", help="Without a recipe: method slice, 8 slices."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Folder, .gguf file or hub name.", show_default="the recipe's, or the embedded SmolLM2-135M"),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder to make.", show_default="the recipe's, or artifacts/moe")
    ] = None,
    calibration: Annotated[
        str | None, typer.Option(help="Text to calibrate on, as the recipe's `calibration.data`; its training part.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output folder.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be written, and stop.")] = False,
) -> None:
    """Make experts out of a dense model by any method, as a recipe says; see launch/conversions/."""
    from lamella.conversion.command import run_recipe, run_slicing

    words = [*(words or []), *([] if calibration is None else [f"calibration.data={calibration}"])]
    if words:
        run_recipe(words, model, out, overwrite=overwrite, dry_run=dry_run)
    else:
        run_slicing(model, out, {}, overwrite=overwrite, dry_run=dry_run)


@app.command()
def verify(
    dense: Annotated[str | None, typer.Option(help="Dense model.", show_default="the embedded SmolLM2-135M")] = None,
    moe: Annotated[
        str | None, typer.Option(help="Converted model.", show_default="artifacts/moe, made if missing")
    ] = None,
    data: Annotated[str, typer.Option(help="Text; its held-out part is used.")] = "python-docs",
    tokens: Annotated[int, typer.Option(help="Tokens compared in float32.")] = 512,
    bf16_tokens: Annotated[int, typer.Option(help="Tokens compared in bfloat16, which CPUs are slow at.")] = 256,
    seq_len: Annotated[int, typer.Option(help="Tokens per window.")] = 256,
    ratios: Annotated[bool, typer.Option(help="Also measure what random routing does to the model.")] = True,
    device: Annotated[str, typer.Option(help="cpu, cuda or auto.")] = "cpu",
    json: Annotated[Path | None, typer.Option(help="Write the figures here too.")] = None,
) -> None:
    """Compare the logits of a dense model and its conversion, and what random routing does to it."""
    from lamella.evaluate.commands import verify as run

    sizes: dict[str, Any] = {"tokens": tokens, "bf16_tokens": bf16_tokens, "seq_len": seq_len}
    if not run(dense, moe, data=data, **sizes, ratios=ratios, device=device, json_path=json):
        raise typer.Exit(1)


@app.command()
def evaluate(
    folder: Annotated[str, typer.Argument(metavar="DIR", help="A model's folder, a run directory, or a hub name.")],
    data: Annotated[
        str, typer.Option(help="stdlib-code, python-docs, a file or folder, or a `datasets` name.")
    ] = "python-docs",
    split: Annotated[str, typer.Option(help="heldout, train or all.")] = "heldout",
    dense: Annotated[
        str | None, typer.Option(help="A dense model to measure beside it; 'embedded' is SmolLM2.")
    ] = None,
    tokens: Annotated[int, typer.Option(help="Tokens of text to score.")] = 8192,
    seq_len: Annotated[int, typer.Option(help="Tokens per window.")] = 1024,
    mode: Annotated[str | None, typer.Option(help="routed, dense, learned or random.", show_default="routed")] = None,
    dtype: Annotated[str, typer.Option(help="auto (the file's), float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str, typer.Option(help="cpu, cuda or auto.")] = "cpu",
    json: Annotated[Path | None, typer.Option(help="Write the figures here too.")] = None,
) -> None:
    """Perplexity of a model on a text, with a dense model beside it."""
    from lamella.evaluate.commands import evaluate_and_print

    options = {"data": data, "dense": dense, "split": None if split == "all" else split, "max_tokens": tokens}
    evaluate_and_print(folder, json, **options, seq_len=seq_len, mode=mode, dtype=dtype, device=device)


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
    from lamella.data.sources import open_source
    from lamella.run.launch import default_nproc, launch

    ranks = default_nproc(words or []) if nproc is None else nproc
    if code := launch(words or [], ranks, check_source=open_source):
        raise typer.Exit(code)


@app.command(hidden=True, context_settings={"ignore_unknown_options": True})
def slurm(
    when: Annotated[str, typer.Argument(help="before or after an attempt.")],
    number: Annotated[int, typer.Argument(help="Ranks of the job, or the exit code of srun.")],
    words: Annotated[list[str] | None, typer.Argument(metavar="[RECIPE.yaml] [key=value ...]")] = None,
) -> None:
    """What launch/slurm/train.sbatch asks on the batch host: check the recipe, and whether to queue the job again."""
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


data_app = typer.Typer(help="Training data.", no_args_is_help=True)
app.add_typer(data_app, name="data")


@data_app.callback()
def _data() -> None:
    """Training data."""


@data_app.command("prepare")
def data_prepare(
    sources: Annotated[
        list[str],
        typer.Argument(metavar="SOURCE...", help="As in `data` of a recipe; SOURCE#FIELD names a record's field."),
    ],
    model: Annotated[str, typer.Option(help="Folder or hub name of the model whose tokenizer is used.")],
    out: Annotated[Path, typer.Option(help="Folder to make, or to go on with after a kill.")],
    workers: Annotated[
        int | None, typer.Option(help="Processes that tokenise.", show_default="the cores", min=1)
    ] = None,
    shard_mb: Annotated[
        int | None, typer.Option(help="MiB of text per shard, the most that a kill loses.", show_default="64", min=1)
    ] = None,
    on_bad_data: Annotated[str, typer.Option(help="Broken records: fail or skip. Blank ones are left out.")] = "fail",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output folder.")] = False,
) -> None:
    """Tokenise text once, in parallel, into shards that training opens at any place; resumable."""
    from lamella.data.command import run_prepare
    from lamella.data.readers import policy

    run_prepare(
        sources, model, out, workers=workers, shard_mb=shard_mb, on_bad_data=policy(on_bad_data), overwrite=overwrite
    )


@app.command()
def recipes(
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="Print this file; without a name: all names.")
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
        "slurm/*": f"{typed('lamella recipes NAME')} > FILE && sbatch FILE RECIPE.yaml key=value ...",
    }
    for pattern, use in uses.items():
        print(use, *(f"  {file}" for file in shipped(pattern)), sep="\n")


@app.command()
def plan(
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="[RECIPE.yaml] [key=value ...]", help="Without a recipe: the embedded demo."),
    ] = None,
    gpu: Annotated[str, typer.Option(help="H100, H200, A100, ...; cpu plans for ranks without GPUs.")] = "H100",
    ranks: Annotated[
        int | None,
        typer.Option(help="Ranks of the run, one for each GPU.", show_default="8, or the most below that fit"),
    ] = None,
    price_per_hour: Annotated[float | None, typer.Option(help="Of one GPU.")] = None,
    tokens_per_second: Annotated[
        float | None, typer.Option(help="Of all ranks, measured.", show_default="from the GPU's peak, at 30% MFU")
    ] = None,
    dense: Annotated[
        str | None, typer.Option(help="A dense model (or its config.json) that is not converted yet.")
    ] = None,
    slices: Annotated[int | None, typer.Option(help="Into how many slices it would be converted.")] = None,
    json: Annotated[Path | None, typer.Option(help="Write the figures here too.")] = None,
) -> None:
    """Memory per rank, time and cost of a training run or its stages, from recipe and config.json; starts nothing."""
    from lamella.plan.command import run

    options: dict[str, Any] = {"price_per_hour": price_per_hour, "tokens_per_second": tokens_per_second}
    run(words or [], gpu_name=gpu, ranks=ranks, dense=dense, slices=slices, json_path=json, **options)


@app.command()
def export(
    source: Annotated[Path, typer.Argument(metavar="RUN_OR_DIR", help="A run directory or a converted model.")],
    to: Annotated[str, typer.Option(help="glm4-moe, mixtral, dense, or auto: the class that fits the router.")],
    out: Annotated[Path, typer.Option(help="Folder to make.")],
    dtype: Annotated[
        str | None, typer.Option(help="Of a GGUF file: F32, F16, BF16, Q8_0, Q4_0.", show_default="the model's own")
    ] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="A GGUF file whose tokenizer a GGUF file gets.")] = None,
    step: Annotated[
        int | None, typer.Option(help="Of a run directory's checkpoints.", show_default="the newest")
    ] = None,
    check: Annotated[bool, typer.Option(help="Reload in plain transformers and compare logits.")] = True,
    check_tokens: Annotated[
        int | None,
        typer.Option(min=2, help="Length of the compared text.", show_default="past every window, in bounds"),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output folder.")] = False,
) -> None:
    """Write a stock architecture, without custom code, or the dense model again."""
    from lamella.export.command import run

    run(
        source,
        to,
        out,
        step=step,
        check=check,
        check_tokens=check_tokens,
        overwrite=overwrite,
        dtype=dtype,
        tokenizer=tokenizer,
    )


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder of the demo.")] = Path("artifacts/demo"),
    ranks: Annotated[int, typer.Option(help="Training processes.")] = 3,
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 12,
) -> None:
    """Convert, compare, train, resume and export a real model; one table, report.json and a picture."""
    from lamella.demo import run_demo

    run_demo(out, ranks=ranks, steps=steps)


if __name__ == "__main__":
    main()
