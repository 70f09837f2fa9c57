"""The commands of the service: `lamella serve` and `lamella access ...`. Each imports what it needs when it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lamella.errors import UserError
from lamella.jsons import Json

access_app = typer.Typer(help="Make and revoke keys of the service.", no_args_is_help=True)
Home = Annotated[Path, typer.Option(help="The service keeps its store and the jobs' logs in this folder.")]
StoreUrl = Annotated[
    str | None,
    typer.Option(
        help="Keep the store there: postgresql+psycopg://USER@HOST/NAME.", show_default="a SQLite file in the home"
    ),
]
DEFAULT_HOME = Path("artifacts/service")


def check_installed() -> None:
    """UserError where the libraries of the service are missing."""
    from importlib.util import find_spec

    needed = ("fastapi", "uvicorn", "sqlalchemy", "alembic", "sse_starlette", "prometheus_client", "jinja2")
    missing = [name for name in needed if find_spec(name) is None]
    if missing:
        raise UserError(
            f"the service needs {', '.join(missing)}; install lamella with its extra `service`, or call `uv sync` in a "
            "checkout"
        )


def doctor(
    folder: Annotated[
        Path, typer.Argument(metavar="[FOLDER]", help="Models and run directories are to be written there.")
    ] = Path(),
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON in the place of a table.")] = False,
) -> None:
    """Look at GPUs, driver, memory, disk, ports and libraries, and say what is missing and what to do.

    Ends with exit code 1 where something is wrong; what is only missing is optional.
    """
    import json

    from lamella.run.doctor import Finding, examine

    def told(finding: Finding) -> Finding:
        if not as_json:
            print(f"{finding.state:<8} {finding.what:<16} {finding.said}", flush=True)
        return finding

    found = [told(finding) for finding in examine(folder)]
    if as_json:
        print(json.dumps([finding._asdict() for finding in found], indent=1))
    if any(finding.state == "wrong" for finding in found):
        raise typer.Exit(1)


def serve(
    home: Home = DEFAULT_HOME,
    host: Annotated[
        str, typer.Option(help="Listen on this address; one that others can reach needs a key first.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Listen on this port; 0 takes a free one.", min=0, max=65535)] = 7420,
    store: StoreUrl = None,
    root: Annotated[
        list[Path] | None,
        typer.Option(
            help="Jobs may read and write below this folder; may be given several times.",
            show_default="the folder where it is started",
        ),
    ] = None,
    name: Annotated[
        list[str] | None,
        typer.Option(help="The service is also called by this name; may be given several times."),
    ] = None,
    gpus: Annotated[
        int | None, typer.Option(help="Use so many GPUs for jobs.", show_default="all that are visible", min=0)
    ] = None,
    cores: Annotated[int | None, typer.Option(help="Use so many cores for jobs.", show_default="all", min=1)] = None,
    runs_per_user: Annotated[
        int, typer.Option(help="A user may have so many runs that have not ended; 0 sets no limit.", min=0)
    ] = 0,
    gpus_per_run: Annotated[int, typer.Option(help="A user's run may take so many GPUs; 0 sets no limit.", min=0)] = 0,
    rate: Annotated[float, typer.Option(help="Answer so many requests a second of one address.", min=1)] = 100.0,
) -> None:
    """Serve the HTTP API: submit, watch, cancel and resume jobs. Runs go on when the server ends, and are found again.

    Without keys whoever reaches the address may do everything, so it must be one of this machine alone.
    """
    check_installed()
    from lamella.service.context import Limits
    from lamella.service.serve import Settings
    from lamella.service.serve import serve as run

    limits = Limits(runs=runs_per_user, gpus=gpus_per_run)
    options: Json = {
        "store": store,
        "roots": tuple(root or ()),
        "names": tuple(name or ()),
        "gpus": gpus,
        "cores": cores,
    }
    run(Settings(home=home, host=host, port=port, rate=rate, limits=limits, **options))


def backup(
    out: Annotated[Path, typer.Argument(metavar="FILE", help="Write the copy to this new file.")],
    home: Home = DEFAULT_HOME,
) -> None:
    """Copy the store of the service, which may run meanwhile; run folders and logs are files of their own."""
    check_installed()
    from lamella.service.backup import backup as copy

    print(f"{copy(home, out)} runs in {out}")


def restore(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Take the copy in this file.")],
    home: Home = DEFAULT_HOME,
) -> None:
    """Put a copy in the place of the service's store; the store that was there is kept as lamella.db.before."""
    check_installed()
    from lamella.service.backup import restore as put_back

    print(f"{put_back(home, file)} runs in {home}")


@access_app.callback()
def _access() -> None:
    """Make and revoke keys of the service."""


@access_app.command("create")
def access_create(
    user: Annotated[str, typer.Argument(metavar="USER", help="Whose key it is.")],
    scope: Annotated[
        list[str] | None,
        typer.Option(help="It may read, submit or admin; may be given several times.", show_default="submit"),
    ] = None,
    days: Annotated[float | None, typer.Option(help="It opens nothing after so many days.")] = None,
    run: Annotated[str | None, typer.Option(help="It is for this run alone.")] = None,
    home: Home = DEFAULT_HOME,
    store: StoreUrl = None,
) -> None:
    """Make a key and print it, once. From the first key on the service answers nobody without one."""
    check_installed()
    from lamella.service import keys
    from lamella.service.serve import open_store

    token, key = keys.create(open_store(home, store), user, scope or ["submit"], run, days)
    print(token)
    typer.echo(f"key {key.id} of {user} ({', '.join(key.scopes)}); it is not shown again", err=True)


@access_app.command("ls")
def access_list(home: Home = DEFAULT_HOME, store: StoreUrl = None) -> None:
    """List the keys, without what opens anything."""
    check_installed()
    from lamella.service import keys
    from lamella.service.serve import open_store

    for key in keys.listed(open_store(home, store)):
        life = "revoked" if key.revoked else "valid" if key.expires is None else _left(key.expires)
        print(f"{key.id}  {key.user}  {','.join(key.scopes)}  {key.run or 'all runs'}  {life}")


def _left(expires: float) -> str:
    import time

    from lamella.display import duration

    left = expires - time.time()
    return f"valid for {duration(left)}" if left > 0 else "expired"


@access_app.command("revoke")
def access_revoke(
    key: Annotated[str, typer.Argument(metavar="ID", help="The key's id, as `lamella access ls` lists it.")],
    home: Home = DEFAULT_HOME,
    store: StoreUrl = None,
) -> None:
    """Make a key open nothing any more."""
    check_installed()
    from lamella.service import keys
    from lamella.service.serve import open_store

    keys.revoke(open_store(home, store), key)
    print(f"{key} is revoked")
