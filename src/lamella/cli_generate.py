"""`lamella generate`: text from a model. Imports what it needs when it runs."""

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
        help="With --expert-memory: frozen slices as stored, or int8 or int4: rounded when the model is opened, all of "
        "them in memory, so that twins alone are read."
    ),
]
DraftName = Annotated[
    str | None,
    typer.Option(
        "--draft",
        metavar="DIR",
        help="Let a smaller model with the same tokenizer write ahead, or the model itself with fewer experts (self); "
        "the text stays the model's own.",
    ),
]
DraftTokens = Annotated[int, typer.Option(help="With --draft: write so many tokens ahead.")]
DraftDtype = Annotated[str, typer.Option(help="With --draft DIR: the draft's --dtype.")]


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
    draft: DraftName = None,
    draft_tokens: DraftTokens = 4,
    draft_dtype: DraftDtype = "auto",
    device: Device = "auto",
    json: JsonFile = None,
) -> None:
    """Write text with a model: converted, trained, exported or dense."""
    from lamella.generation.command import run
    from lamella.generation.sampling import Sampling

    sampling = Sampling(max_tokens, temperature, top_p, sample_top_k, seed, tuple(stop or ()))
    what: dict[str, Any] = {"chat": chat, "system": system, "json_path": json, "dtype": dtype, "device": device}
    what |= {"top_k": top_k, "twins": twins, "expert_memory": expert_memory, "experts_on": experts_on, "slices": slices}
    what |= {"draft": draft, "draft_tokens": draft_tokens, "draft_dtype": draft_dtype}
    run(folder, prompt or [], prompt_file, sampling, **what)
