"""`lamella serve`: from the options to a listening server. Imports no torch."""

from __future__ import annotations

import ipaddress
import logging
import os
import signal
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import uvicorn
from sqlalchemy.exc import DatabaseError

from lamella.errors import UserError
from lamella.run.folder import write_atomic
from lamella.run.gpus import visible_gpus
from lamella.service import keys
from lamella.service.app import RATE, make_app
from lamella.service.context import Limits, Service
from lamella.service.database import Database, Unavailable
from lamella.service.executors.executor import Place
from lamella.service.guard import LOOPBACK
from lamella.service.paths import ADDRESS, HOME, Roots
from lamella.service.queue import Capacity
from lamella.service.scheduler import FIRST_BACKOFF_S, Scheduler
from lamella.service.store import Store
from lamella.service.streams import Hub

STORE = "lamella.db"
HOST, PORT = "127.0.0.1", 7420
BACKLOG = 2048
"""Connections that wait to be taken."""
LATER_S = 2


@dataclass(frozen=True)
class Settings:
    """What `lamella serve` was asked for."""

    home: Path = HOME
    store: str | None = None
    """A URL of SQLAlchemy; None: a SQLite file in the home."""
    host: str = HOST
    port: int = PORT
    roots: Sequence[Path] = ()
    """None given: the folder in which it was started, and the home."""
    names: Sequence[str] = ()
    gpus: int | None = None
    cores: int | None = None
    rate: float = RATE
    limits: Limits = field(default_factory=Limits)
    backoff_s: float = FIRST_BACKOFF_S


def open_store(home: Path, url: str | None) -> Store:
    """The store, with the newest schema.

    Raises:
        UserError: a newer version has written it, it is damaged, or it cannot be reached.
    """
    try:
        home.mkdir(parents=True, exist_ok=True)
        database = Database(url or str(home / STORE))
        database.migrate()
    except Unavailable as error:
        raise UserError(str(error)) from None
    except OSError as error:
        raise UserError(f"the store's folder cannot be made: {error}") from None
    except DatabaseError as error:
        where = "the database" if url else home / STORE
        hint = "put a copy back with `lamella restore FILE`, or take another one"
        raise UserError(f"{where} is no store of lamella, or is damaged: {error.orig}; {hint}") from None
    return Store(database)


def make_service(settings: Settings) -> Service:
    """Everything that the app needs.

    Raises:
        UserError: a store of a newer version; more GPUs than there are; a root that is no folder.
    """
    cwd, home = Path.cwd(), settings.home.resolve()
    there = visible_gpus()
    if settings.gpus is not None and settings.gpus > there:
        raise UserError(f"--gpus {settings.gpus} is more than the {there} GPUs of this machine")
    if missing := [str(root) for root in settings.roots if not root.is_dir()]:
        raise UserError(f"--root names no folder: {', '.join(missing)}")
    cores = settings.cores or len(os.sched_getaffinity(0))
    capacity = Capacity(there if settings.gpus is None else settings.gpus, cores)
    store = open_store(home, settings.store)
    place = Place(home, cwd, capacity)
    scheduler = Scheduler(store, place, settings.backoff_s)
    roots = Roots.of([*settings.roots, home] if settings.roots else [cwd, home], home)
    return Service(store, place, scheduler, Hub(store), roots, settings.limits)


def serve(settings: Settings) -> None:
    """Listen until a signal asks to stop. Runs go on without the server.

    Raises:
        UserError: an address that others reach, without a key; a port in use.
    """
    local = is_loopback(settings.host)
    no_key = UserError(
        f"others can reach {settings.host}, and there is no key yet: make one with `lamella access create NAME`, "
        f"or listen on {HOST}"
    )
    if not local and settings.store is None and not (settings.home / STORE).is_file():
        raise no_key  # before a store is made
    _check_home(settings.home)
    service = make_service(settings)
    if not local and not keys.are_needed(service.store):
        raise no_key
    listener = _listen(settings.host, settings.port)
    port = listener.getsockname()[1]
    shown = f"[{settings.host}]" if ":" in settings.host else settings.host
    hosts = (*LOOPBACK, *settings.names) if local or settings.names else ()
    app = make_app(service, hosts=hosts, rate=settings.rate)
    address = settings.home / ADDRESS
    write_atomic(address, f"http://{shown}:{port}\n")
    print(f"lamella serves on http://{shown}:{port} (home {settings.home}); Ctrl-C ends it, and no run", flush=True)
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, timeout_graceful_shutdown=LATER_S, limit_concurrency=2000,
        server_header=False, backlog=BACKLOG,
    )  # fmt: skip
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("uvicorn.error").addFilter(_not_of_streams)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # uvicorn raises it again at its end: the rest must follow
    try:
        uvicorn.Server(config).run(sockets=[listener])
    finally:
        address.unlink(missing_ok=True)
        service.store.database.close()


def _not_of_streams(record: logging.LogRecord) -> bool:
    """Streams of events have no end of their own: that the server's end breaks them off is no error."""
    return "without completing response" not in record.getMessage()


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches the address."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _check_home(home: Path) -> None:
    try:
        home.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{home} cannot be written: {error}; set --home to another folder") from None


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # Named as TCP, connections send at once; else each answer's second part waits 40 ms for an acknowledgement.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(BACKLOG)  # before the address is told: who comes early waits, and is not refused
    except OSError as error:
        listener.close()
        raise UserError(f"{host}:{port} cannot be listened on: {error.strerror}; set --port") from None
    return listener
