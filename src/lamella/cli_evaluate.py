"""The command `lamella evaluate`: the perplexity of a text, or the accuracy at a task. It imports what it needs when
it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lamella.cli_plan import JsonFile
from lamella.errors import UserError

Device = Annotated[str, typer.Option(help="The model is computed here: cpu, cuda, or auto for a GPU if there is one.")]
SEQ_LEN = "The text is cut into windows of this many tokens."


Folder = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="The folder of a model, a run directory, a hub name; a GGUF file; or the address of a server that speaks "
        "OpenAI's protocol, http://HOST:PORT/v1, with #NAME behind it where it serves several models.",
    ),
]
Data = Annotated[
    str | None,
    typer.Option(
        help="Measure on this text: stdlib-code, python-docs, a file or folder, or a `datasets` name.",
        show_default="python-docs",
    ),
]
Split = Annotated[
    str | None, typer.Option(help="Take this part of the text: heldout, train or all.", show_default="heldout")
]
Dense = Annotated[str | None, typer.Option(help="Measure this dense model beside it; 'embedded' is SmolLM2-135M.")]
Tokens = Annotated[int | None, typer.Option(help="Score this many tokens of the text.", show_default="8192")]
SeqLen = Annotated[int | None, typer.Option(help=SEQ_LEN, show_default="1024")]
Task = Annotated[
    str | None,
    typer.Option(
        metavar="FILE_OR_NAME",
        help="Answer multiple-choice questions instead: a JSONL file, continuations (from embedded text), medmcqa, "
        "casehold, mathqa, codemmlu, mmlu (or NAME=FILE with its columns), or a task of lm-evaluation-harness.",
    ),
]
Beside = Annotated[
    list[str] | None, typer.Option(metavar="DIR", help="With --task: measure this model, too; may be repeated.")
]
Limit = Annotated[int | None, typer.Option(help="With --task: take at most this many questions of each domain.")]
Picture = Annotated[
    Path | None, typer.Option(help="With --task: draw the experts that each domain uses in this file (.png).")
]
ModeWord = Annotated[
    str | None,
    typer.Option(
        help="Let the router choose (routed), take the frozen slices alone (dense), their copies alone (learned), "
        "or any at random (random).",
        show_default="routed",
    ),
]
TopK = Annotated[
    int | None,
    typer.Option(help="Take this many experts per token (flat routing).", show_default="as the model was made"),
]
Twins = Annotated[
    float | None,
    typer.Option(
        help="At most this share of a token's slices is replaced by trained twins, 0 to 1 (twin routing).",
        show_default="as the router says",
    ),
]
Tokenizer = Annotated[
    str | None,
    typer.Option(
        metavar="DIR",
        help="Of a GGUF file or a server: the folder of the model that it was made of, which tells the tokens.",
        show_default="the folder of the file",
    ),
]
Dtype = Annotated[str, typer.Option(help="Compute in float32, bfloat16 or float16, or as the file is stored (auto).")]


def evaluate(
    folder: Folder,
    data: Data = None,
    split: Split = None,
    dense: Dense = None,
    tokens: Tokens = None,
    seq_len: SeqLen = None,
    task: Task = None,
    beside: Beside = None,
    limit: Limit = None,
    picture: Picture = None,
    mode: ModeWord = None,
    top_k: TopK = None,
    twins: Twins = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    tokenizer: Tokenizer = None,
    json: JsonFile = None,
) -> None:
    """Measure the perplexity of a model on a text, or its accuracy at a task; if asked for, with others beside it."""
    of_a_text: dict[str, str | float | None] = {
        "--data": data,
        "--split": split,
        "--tokens": tokens,
        "--seq-len": seq_len,
    }
    of_a_text |= {"--top-k": top_k, "--twins": twins} if task is not None else {}
    of_a_task = {"--beside": beside, "--limit": limit, "--picture": picture}
    for option, value in (of_a_task if task is None else of_a_text).items():
        if value is not None:
            raise UserError(f"{option} has no effect with{'out' if task is None else ''} --task; leave it out")
    if task is not None:
        from lamella.evaluate.choice.command import run_task

        run_task(
            folder, task, dense=dense, beside=beside or [], limit=limit, mode=mode, dtype=dtype, device=device,
            tokenizer=tokenizer, json_path=json, picture=picture,
        )  # fmt: skip
        return
    from lamella.evaluate.commands import evaluate_and_print

    options = {"data": data or "python-docs", "dense": dense, "max_tokens": 8192 if tokens is None else tokens}
    options |= {"split": None if split == "all" else split or "heldout", "seq_len": seq_len or 1024}
    options |= {"tokenizer": tokenizer}
    evaluate_and_print(folder, json, **options, mode=mode, top_k=top_k, twins=twins, dtype=dtype, device=device)
