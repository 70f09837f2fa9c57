"""The commands that use a model or hand it on: `lamella generate`, `serve-model` and `push`. Each imports what it needs
when it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from lamella.cli_evaluate import Device, TopK, Twins
from lamella.cli_plan import JsonFile

Folder = Annotated[
    str, typer.Argument(metavar="DIR", help="The folder of a model, a run directory, 'embedded', or a hub name.")
]
Prompts = Annotated[list[str] | None, typer.Option(help="Go on after this text; several are computed together.")]
PromptFile = Annotated[Path | None, typer.Option(help="Go on after each line of this file.")]
Chat = Annotated[
    bool,
    typer.Option(
        "--chat", help="Answer in the model's chat template; without a prompt, line by line in a conversation."
    ),
]
System = Annotated[str | None, typer.Option(help="Begin the conversation with this instruction.")]
MaxTokens = Annotated[int, typer.Option(help="Write at most this many tokens.")]
Temperature = Annotated[float, typer.Option(help="Draw tokens at this temperature; at 0 always take the likeliest.")]
TopP = Annotated[float, typer.Option(help="Draw from the likeliest tokens that have this share of the probability.")]
SampleTopK = Annotated[int, typer.Option(help="Draw from this many of the likeliest tokens; 0: from all.")]
Seed = Annotated[int | None, typer.Option(help="Seed of the draws.", show_default="another each time")]
Stop = Annotated[list[str] | None, typer.Option(help="End before this text; may be given several times.")]
Dtype = Annotated[
    str,
    typer.Option(
        help="Compute in float32, bfloat16 or float16, or as stored (auto); int8, and float16 on a CPU, "
        "are of the weights alone; the rest is float32."
    ),
]
ExpertMemory = Annotated[
    str | None,
    typer.Option(
        help="Keep at most this much of a converted model's experts in memory, such as 2GiB, and read the others "
        "when they are needed.",
        show_default="all",
    ),
]
ExpertsOn = Annotated[str, typer.Option(help="The others wait on disk, or, beside a GPU, in main memory (cpu).")]

Slices = Annotated[
    str,
    typer.Option(
        help="With --expert-memory: frozen slices as stored, or int8: rounded when the model is opened, all of them in "
        "memory, so that twins alone are read."
    ),
]


def generate(
    folder: Folder,
    prompt: Prompts = None,
    prompt_file: PromptFile = None,
    chat: Chat = False,
    system: System = None,
    max_tokens: MaxTokens = 128,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    sample_top_k: SampleTopK = 0,
    seed: Seed = None,
    stop: Stop = None,
    dtype: Dtype = "auto",
    top_k: TopK = None,
    twins: Twins = None,
    expert_memory: ExpertMemory = None,
    experts_on: ExpertsOn = "disk",
    slices: Slices = "stored",
    device: Device = "auto",
    json: JsonFile = None,
) -> None:
    """Write text with a model: converted, trained, exported or dense."""
    from lamella.generation.command import run
    from lamella.generation.sampling import Sampling

    sampling = Sampling(max_tokens, temperature, top_p, sample_top_k, seed, tuple(stop or ()))
    what: dict[str, Any] = {"chat": chat, "system": system, "json_path": json, "dtype": dtype, "device": device}
    what |= {"top_k": top_k, "twins": twins, "expert_memory": expert_memory, "experts_on": experts_on, "slices": slices}
    run(folder, prompt or [], prompt_file, sampling, **what)


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
    import sys

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
