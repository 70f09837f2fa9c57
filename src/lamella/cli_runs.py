"""The commands `lamella runs ...`, against a server or, where none runs, against the run folders.

Each imports what it needs when it runs.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lamella.cli_service import DEFAULT_HOME, Home
from lamella.jsons import Json

if TYPE_CHECKING:
    from lamella.service.client import Client
    from lamella.service.folders import Folders

runs_app = typer.Typer(help="Submit runs, watch them, stop them and go on with them.", no_args_is_help=True)
RunName = Annotated[
    str, typer.Argument(metavar="RUN", help="The run's id as `lamella runs ls` lists it; without a server its folder.")
]
Server = Annotated[
    str | None,
    typer.Option(help="Ask the server at this address.", show_default="the one that runs here, else the run folders"),
]
Words = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[RECIPE.yaml] [key=value ...]",
        help="A recipe, as a file or a name of `lamella recipes`, and settings that replace its own.",
    ),
]
ENDED = ("succeeded", "failed", "cancelled")


@runs_app.callback()
def _runs() -> None:
    """Submit runs, watch them, stop them and go on with them."""


@runs_app.command(
    epilog="A verification, an evaluation or an export has no recipe file: say key=value alone, such as "
    "moe=artifacts/moe, folder=artifacts/moe, or source=artifacts/run to=auto out=artifacts/exported."
)
def submit(
    words: Words = None,
    kind: Annotated[
        str,
        typer.Option(
            help="The job: train, convert, verify, evaluate or export.",
            show_default="convert where the recipe has a method",
        ),
    ] = "",
    ranks: Annotated[
        int | None, typer.Option(help="Train with this many processes.", show_default="the GPUs, else 1", min=1)
    ] = None,
    name: Annotated[str, typer.Option(help="Call the run so.", show_default="made from its id")] = "",
    priority: Annotated[int, typer.Option(help="Runs of higher priority start first.")] = 0,
    cores: Annotated[
        int | None, typer.Option(help="Without GPUs: compute with this many cores.", show_default="all", min=1)
    ] = None,
    executor: Annotated[str, typer.Option(help="Run it here (local), or on slurm, kubernetes or skypilot.")] = "local",
    cluster: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE.yaml | key=value",
            help="How, where it is not here: a file such as launch/clusters/8-gpu-node.yaml, and settings (nodes, "
            "gpus_per_node, gpu, time, partition, account, image, volume, cloud, spot, ...); may be given again.",
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan and the files of the executor, and submit nothing.")
    ] = False,
    key: Annotated[
        str | None, typer.Option(help="Submit the same job with the same key again, and it is still one run.")
    ] = None,
    server: Server = None,
    home: Home = DEFAULT_HOME,
) -> None:
    """Show what a job would take, and submit it."""
    job = job_of(words or [], kind, ranks)
    options: Json = {"name": name, "priority": priority, "executor": executor, "cluster": _cluster(cluster or [])}
    options |= {} if cores is None else {"cores": cores}
    backend = _backend(server, home)
    plan = backend.plan(job, **options)
    _show_plan(plan, with_files=dry_run)
    if dry_run:
        return
    run = backend.submit(job, key, **options)
    print(f"{run['id']} is {run['state']}; `lamella runs watch {run['id']}` follows it")


@runs_app.command("ls")
def list_runs(
    limit: Annotated[int, typer.Option(help="List so many of the newest.", min=1, max=500)] = 30,
    state: Annotated[
        list[str] | None, typer.Option(help="List those of this state; may be given several times.")
    ] = None,
    server: Server = None,
    home: Home = DEFAULT_HOME,
) -> None:
    """List runs, the newest first."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None)
    for column in ("run", "kind", "name", "user", "state", "done", "left", "loss"):
        table.add_column(
            column, no_wrap=column == "run", justify="right" if column in ("done", "left", "loss") else "left"
        )
    for run in _backend(server, home).runs(limit=limit, state=state):
        table.add_row(run["id"], run["kind"], run["name"], run["user"], _state(run), *_progress(run))
    console = Console()
    (console if console.is_terminal else Console(width=160)).print(table)


@runs_app.command()
def show(run: RunName, server: Server = None, home: Home = DEFAULT_HOME) -> None:
    """Show a run: its state, why it failed, its progress, checkpoints and recipe."""
    import yaml

    backend = _backend(server, home)
    found = backend.show(run)
    done, left, loss = _progress(found)
    lines = {
        "run": found["id"], "name": found["name"], "state": _state(found), "reason": found["reason"],
        "done": done, "left": left, "loss": loss, "attempts": found["attempt"], "folder": found["out"],
    }  # fmt: skip
    for name, value in lines.items():
        if value not in ("", None):
            print(f"{name:<12}{value}")
    steps = [str(checkpoint["step"]) for checkpoint in backend.checkpoints(run)]
    if steps:
        print(f"{'checkpoints':<12}step {', '.join(steps)}")
    print(yaml.safe_dump(found["spec"]["job"], sort_keys=False), end="")


@runs_app.command()
def logs(
    run: RunName,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the run has ended.")] = False,
    source: Annotated[str, typer.Option(help="Print this log: job, or rank-0, rank-1, ... of training.")] = "job",
    server: Server = None,
    home: Home = DEFAULT_HOME,
) -> None:
    """Print what a run prints."""
    for text in _backend(server, home).logs(run, source, follow):
        sys.stdout.write(text)
        sys.stdout.flush()


@runs_app.command()
def watch(
    run: RunName,
    every: Annotated[float, typer.Option(help="Look every this many seconds.", min=0.2)] = 2.0,
    server: Server = None,
    home: Home = DEFAULT_HOME,
) -> None:
    """Print the progress of a run until it has ended; exit code 1 where it failed."""
    backend, shown = _backend(server, home), ""
    while True:
        found = backend.show(run)
        done, left, loss = _progress(found)
        parts = [_state(found), done, f"loss {loss}" if loss else "", f"ETA {left}" if left else ""]
        line = "  ".join(part for part in parts if part)
        if line != shown:
            print(line, flush=True)
            shown = line
        if found["state"] in ENDED:
            if found["state"] == "failed":
                print(found["reason"], file=sys.stderr)
                raise typer.Exit(1)
            return
        time.sleep(every)


@runs_app.command()
def cancel(run: RunName, server: Server = None, home: Home = DEFAULT_HOME) -> None:
    """End a run; training saves a checkpoint first."""
    _change(run, "cancel", server, home)


@runs_app.command()
def pause(run: RunName, server: Server = None, home: Home = DEFAULT_HOME) -> None:
    """Let training save a checkpoint and stop, until it is resumed."""
    _change(run, "pause", server, home)


@runs_app.command()
def resume(run: RunName, server: Server = None, home: Home = DEFAULT_HOME) -> None:
    """Go on with a paused run from its newest checkpoint."""
    _change(run, "resume", server, home)


@runs_app.command()
def retry(run: RunName, server: Server = None, home: Home = DEFAULT_HOME) -> None:
    """Try a run again that failed or was cancelled; training goes on from its newest checkpoint."""
    _change(run, "retry", server, home)


@runs_app.command()
def fork(
    run: RunName,
    out: Annotated[str, typer.Option(help="Write the new run to this folder.")],
    step: Annotated[
        int | None,
        typer.Option(
            help="Start from the weights of this checkpoint.", show_default="the model that the run began with"
        ),
    ] = None,
    words: Annotated[
        list[str] | None, typer.Argument(metavar="[key=value ...]", help="Settings that replace the run's own.")
    ] = None,
    server: Server = None,
    home: Home = DEFAULT_HOME,
) -> None:
    """Start a new run from a checkpoint of another one, or from the same model with other settings."""
    made = _backend(server, home).fork(run, out, step, _settings(words or []))
    print(f"{made['id']} is {made['state']}")


@runs_app.command()
def compare(
    runs: Annotated[list[str], typer.Argument(metavar="RUN RUN...", help="The runs; without a server their folders.")],
    server: Server = None,
    home: Home = DEFAULT_HOME,
) -> None:
    """Show in what runs differ: settings, progress, last metrics."""
    from rich.console import Console
    from rich.table import Table

    from lamella.errors import UserError
    from lamella.run.folder import flatten

    if len(runs) < 2:
        raise UserError("give two runs or more to compare")
    backend = _backend(server, home)
    found = [backend.show(run) for run in runs]
    columns: list[Json] = []
    for run in found:
        done, _, _ = _progress(run)
        last = run["progress"].get("metrics", {})
        recipe = run["spec"]["job"].get("recipe", run["spec"]["job"])
        columns.append({"state": run["state"], "done": done} | last | flatten(recipe))
    table = Table(box=None)
    for name in ("", *(run["id"] for run in found)):
        table.add_column(name)
    for row in dict.fromkeys(key for column in columns for key in column):
        values = [_short(column.get(row)) for column in columns]
        if len(set(values)) > 1:
            table.add_row(row, *values)
    console = Console()
    (console if console.is_terminal else Console(width=160)).print(table)


def _backend(server: str | None, home: Path) -> Client | Folders:
    """The server, where one answers; else the folders."""
    from lamella.cli_service import check_installed
    from lamella.service.client import Client, NoServer

    try:
        client = Client(server, home=home)
        if server is None:
            client.alive()
        return client
    except NoServer:
        if server is not None:
            raise
    check_installed()
    from lamella.service.folders import Folders

    return Folders(home=home)


def _change(run: str, what: str, server: str | None, home: Path) -> None:
    found = _backend(server, home).change(run, what)
    print(f"{found['id']} is {_state(found)}")


def job_of(words: list[str], kind: str, ranks: int | None) -> Json:
    """The job that the words of the command say."""
    from lamella.recipe.files import arguments, parse_yaml, read_recipe_text, set_by_word
    from lamella.recipe.stages import DEMO_RECIPE

    path, settings = arguments(words)
    if kind in ("verify", "evaluate", "export"):
        return {"kind": kind} | _settings(settings)
    chosen = Path(path) if path is not None else DEMO_RECIPE if kind in ("", "train") else None
    values = {} if chosen is None else parse_yaml(read_recipe_text(chosen), str(chosen))
    for word in settings:
        set_by_word(values, word)
    kind = kind or ("convert" if "method" in values else "train")
    return {"kind": kind, "recipe": values} | ({"ranks": ranks} if kind == "train" and ranks is not None else {})


def _cluster(words: list[str]) -> Json:
    from lamella.recipe.files import arguments, parse_yaml, read_recipe_text

    path, settings = arguments(words)
    values = {} if path is None else parse_yaml(read_recipe_text(Path(path)), path)
    return values | _settings(settings)


def _settings(words: list[str]) -> Json:
    from lamella.recipe.files import set_by_word

    values: Json = {}
    for word in words:
        set_by_word(values, word)
    return values


def _show_plan(plan: Json, with_files: bool) -> None:
    if plan["text"]:
        print(plan["text"])
    if plan["problem"]:
        print(f"not planned: {plan['problem']}", file=sys.stderr)
    need = f"{plan['gpus']} GPUs" if plan["gpus"] else f"{plan['cores']} cores"
    print(f"command           {plan['command']}")
    print(f"runs on           {plan['executor']}" + (f", {need}" if plan["executor"] == "local" else ""))
    for file, content in plan["files"].items() if with_files else ():
        print(f"--- {file}\n{content.rstrip()}")


def _state(run: Json) -> str:
    return f"{run['state']} ({run['failure']})" if run.get("failure") and run["state"] == "failed" else run["state"]


def _progress(run: Json) -> Iterator[str]:
    """('step 12 of 20', '3:05', '2.345'), each empty where it is not known."""
    from lamella.display import duration

    progress = run["progress"]
    step, steps = progress.get("step"), progress.get("steps")
    yield f"step {step} of {steps}" if steps else ""
    left = progress.get("estimatedRemainingSeconds")
    yield duration(left) if left and run["state"] not in ENDED else ""
    loss = progress.get("metrics", {}).get("loss")
    yield f"{loss:.3f}" if isinstance(loss, float) else ""


def _short(value: object) -> str:
    return "" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)
