"""The commands that hand a model on: `lamella export`, `serve-model` and `push`. Each imports what it needs when it
runs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from lamella.cli_data import Overwrite


def export(
    source: Annotated[
        Path, typer.Argument(metavar="RUN_OR_DIR", help="A run directory, or the folder of a converted model.")
    ],
    to: Annotated[
        str,
        typer.Option(
            help="Write it as glm4-moe, mixtral, qwen3-moe, qwen2-moe, ernie, gguf or dense, as the class of "
            "transformers that fits (auto), or as it is with its frozen experts in fewer bits (lamella)."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Write the exported model to this folder.")],
    dtype: Annotated[
        str | None,
        typer.Option(
            help="Store the weights as f32, bf16 or f16; of a GGUF file also as q8_0, q4_0 or, by llama.cpp's own "
            "tool, a K-quant such as q4_k_m; with --to lamella frozen experts as int8 or int4.",
            show_default="the model's own",
        ),
    ] = None,
    max_shard_size: Annotated[
        str | None,
        typer.Option(help="Cut the weights into files of at most this size, such as 2GB.", show_default="5GB"),
    ] = None,
    mode: Annotated[
        str | None,
        typer.Option(help="With --to dense, of a trained model: 'dense' leaves its trained copies and routers out."),
    ] = None,
    perplexity: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TEXT_OR_REPORT",
            help="Measure the model on the held-out part of this text for the model card, or take a report of "
            "`lamella evaluate --json`; may be repeated.",
        ),
    ] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="Give a GGUF file the tokenizer of this GGUF file.")] = None,
    step: Annotated[
        int | None, typer.Option(help="Take a run's checkpoint of this step.", show_default="the newest")
    ] = None,
    check: Annotated[
        bool, typer.Option(help="Reload it in plain transformers or llama.cpp; compare the logits.")
    ] = True,
    check_tokens: Annotated[
        int | None,
        typer.Option(min=2, help="Compare on a text of this many tokens.", show_default="past every window, in bounds"),
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Write a model in a stock architecture, which needs no code of lamella, or as a dense model again."""
    from lamella.evaluate.card import measurements
    from lamella.export.command import run

    options: dict[str, Any] = {"dtype": dtype, "tokenizer": tokenizer, "max_shard_size": max_shard_size, "mode": mode}
    options |= {"check": check, "check_tokens": check_tokens, "overwrite": overwrite}
    run(source, to, out, step=step, measure=measurements(perplexity or []), **options)


Served = Annotated[
    Path,
    typer.Argument(metavar="DIR_OR_FILE", help="The folder of an exported, converted or dense model, or a GGUF file."),
]
EngineWord = Annotated[
    str,
    typer.Option(
        help="Serve with llama.cpp (GGUF files), vllm or transformers; auto takes what fits the model and is installed."
    ),
]
Port = Annotated[int, typer.Option(min=1, max=65535, help="Listen on this port, on this machine alone.")]
Context = Annotated[
    int | None,
    typer.Option(
        min=1, help="Keep this many tokens of prompt and answer (llama.cpp, vllm).", show_default="the model's own"
    ),
]
ServedDevice = Annotated[str, typer.Option(help="Compute on cpu, cuda or what is there (auto).")]
ServedDtype = Annotated[str, typer.Option(help="Compute in float32, bfloat16 or float16, or as stored (auto).")]
OnlyPrint = Annotated[bool, typer.Option("--dry-run", help="Print the server's own command and start nothing.")]


def serve_model(
    model: Served,
    engine: EngineWord = "auto",
    port: Port = 8000,
    context: Context = None,
    device: ServedDevice = "auto",
    dtype: ServedDtype = "auto",
    dry_run: OnlyPrint = False,
) -> None:
    """Start a server for a model that speaks OpenAI's protocol: transformers', llama.cpp's or vLLM's own."""
    from lamella.export.serving import command_for, open_served, run

    command = command_for(open_served(model, port, context, device, dtype), engine)
    if dry_run:
        print(command.describe())
        return
    print(f"{command.engine}: {command.url}, model {command.model}; Ctrl-C ends it", file=sys.stderr, flush=True)
    run(command)


Pushed = Annotated[Path, typer.Argument(metavar="DIR", help="The folder of a model.")]
Repo = Annotated[str, typer.Argument(metavar="REPO", help="Its name on the hub, such as me/my-model; made if new.")]
Private = Annotated[bool, typer.Option("--private", help="A repository that is made is seen by its owners alone.")]
Revision = Annotated[str | None, typer.Option(help="Send it to this branch.", show_default="main")]
OnlyList = Annotated[bool, typer.Option("--dry-run", help="List the files and their sizes, and send nothing.")]


def push(
    folder: Pushed, repo: Repo, private: Private = False, revision: Revision = None, dry_run: OnlyList = False
) -> None:
    """Send a model's folder to the hub; started again after an interruption, go on where it was."""
    from lamella.export.push import check_repo, files_of
    from lamella.export.push import push as send

    if not dry_run:
        print(send(folder, repo, private=private, revision=revision))
        return
    files = files_of(folder)
    check_repo(repo)
    for file in files:
        print(f"{file.bytes / 1e6:>12,.3f} MB  {file.name}")
    print(f"{sum(file.bytes for file in files) / 1e6:>12,.3f} MB  in {len(files)} files would go to {repo}")
