"""The commands `lamella adapters ...`. Each imports what it needs when it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lamella.cli_data import Overwrite
from lamella.errors import UserError, check_choice

adapters_app = typer.Typer(help="Learn adapters, and routers that choose among them.", no_args_is_help=True)
Steps = Annotated[int, typer.Option(help="Train for this many optimizer steps.")]
SeqLen = Annotated[int, typer.Option(help="Samples are windows of this many tokens.")]
PerStep = Annotated[int, typer.Option(help="A step reads this many samples.")]
Seed = Annotated[int, typer.Option(help="Samples and first weights are drawn from this seed.")]
Dtype = Annotated[
    str,
    typer.Option(
        help="Compute dense weights in float32 or bfloat16; auto: bfloat16 on a GPU, or a CPU that has units for it."
    ),
]
Device = Annotated[str, typer.Option(help="Train here: cpu, cuda, or auto for a GPU if there is one.")]


@adapters_app.callback()
def _adapters() -> None:
    """Learn adapters, and routers that choose among them."""


@adapters_app.command("learn")
def learn(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A dense model: a folder, a hub name, or 'embedded'.")],
    data: Annotated[list[str], typer.Option(help="Learn this text, as in `data` of a recipe; may be repeated.")],
    out: Annotated[Path, typer.Option(help="Write the adapter to this folder, as the library peft does.")],
    rank: Annotated[int, typer.Option(help="The low-rank matrices have this rank.")] = 16,
    alpha: Annotated[float, typer.Option(help="Their product is scaled by alpha / rank.")] = 32.0,
    steps: Steps = 60,
    lr: Annotated[float, typer.Option(help="The largest learning rate.")] = 1e-3,
    seq_len: SeqLen = 256,
    samples_per_step: PerStep = 4,
    seed: Seed = 0,
    block: Annotated[
        list[str] | None,
        typer.Option(help="Change the FFNs (mlp) or attention; may be repeated.", show_default="mlp"),
    ] = None,
    start: Annotated[
        str | None, typer.Option(help="Begin with the adapter of this folder.", show_default="a new one")
    ] = None,
    keep_rate: Annotated[
        bool,
        typer.Option("--keep-rate", help="The learning rate does not fall: for an adapter that others start from."),
    ] = False,
    dtype: Dtype = "auto",
    device: Device = "auto",
    overwrite: Overwrite = False,
) -> None:
    """Train a low-rank adapter (LoRA) of a dense model on a text."""
    from lamella.train.adapter_steps import Pace
    from lamella.train.adapters import learn_adapter
    from lamella.train.adapters_command import progress

    pace = Pace(steps, lr, samples_per_step, seq_len, seed, falls=not keep_rate)
    with progress(steps, device) as (on_step, place):
        learn_adapter(
            model, data, out, rank=rank, alpha=alpha, blocks=block or ["mlp"], pace=pace, start=start, dtype=dtype,
            device=place, overwrite=overwrite, on_step=on_step,
        )  # fmt: skip
    print(f"Made {out}. Next: lamella convert method=adapters model={model} 'adapters=[{out}, ...]' out=DIR")


@adapters_app.command("route")
def route(
    mix: Annotated[str, typer.Argument(metavar="DIR", help="A model that `lamella convert method=adapters` made.")],
    data: Annotated[
        list[str],
        typer.Option(
            metavar="SOURCE=ADAPTER",
            help="A text and the adapter that learned it, 'none' for the zero expert; repeated.",
        ),
    ],
    out: Annotated[Path, typer.Option(help="Write the trained model to this folder.")],
    target: Annotated[
        str, typer.Option(help="Train the routers (router), FFNs' adapters (mlp) or attention's, or router_mlp.")
    ] = "router",
    steps: Steps = 60,
    lr: Annotated[float, typer.Option(help="The routers' largest learning rate.")] = 5e-3,
    adapter_lr: Annotated[
        float | None, typer.Option(help="The adapters' largest learning rate.", show_default="a tenth of --lr")
    ] = None,
    seq_len: SeqLen = 256,
    samples_per_step: PerStep = 4,
    balance: Annotated[float, typer.Option(help="The weight of a loss that evens the experts' loads.")] = 0.0,
    domain_loss: Annotated[float, typer.Option(help="The weight of naming each text's own adapter.")] = 1.0,
    seed: Seed = 0,
    dtype: Dtype = "auto",
    device: Device = "auto",
    overwrite: Overwrite = False,
) -> None:
    """Teach the routers of a model with adapters which of them a token needs."""
    from lamella.train.adapter_steps import Pace
    from lamella.train.adapters import train_routers
    from lamella.train.adapters_command import progress

    sources: dict[str, str | None] = {}
    for word in data:
        source, _, name = word.rpartition("=")
        if not source:
            raise UserError(f"data is {word!r}; write SOURCE=ADAPTER, such as python-docs=docs")
        sources[source] = None if name == "none" else name
    with progress(steps, device) as (on_step, place):
        train_routers(
            mix, sources, out, target=target, pace=Pace(steps, lr, samples_per_step, seq_len, seed), balance=balance,
            domain_loss=domain_loss, adapter_lr=adapter_lr, dtype=dtype, device=place, overwrite=overwrite,
            on_step=on_step,
        )  # fmt: skip
    print(f"Made {out}. Next: lamella evaluate {out}")


@adapters_app.command("export")
def export(
    mix: Annotated[Path, typer.Argument(metavar="DIR", help="A model with adapters as experts.")],
    to: Annotated[str, typer.Option(help="moe: merged experts, for `lamella export`; peft: a folder per adapter.")],
    out: Annotated[Path, typer.Option(help="Write to this folder.")],
    overwrite: Overwrite = False,
) -> None:
    """Write a model with adapters as merged experts of the FFN's size, or as adapters of peft and the routers."""
    check_choice("to", to, ("moe", "peft"))
    from lamella.export.adapters import merge_experts, write_peft_adapters

    if to == "moe":
        moe = merge_experts(mix, out, overwrite=overwrite)
        print(f"Made {out}: {moe.num_experts} experts per layer. Next: lamella export {out} --to mixtral --out DIR")
    else:
        names = write_peft_adapters(mix, out, overwrite=overwrite)
        print(f"Made {out}: {', '.join(names)}, and routers.safetensors")
