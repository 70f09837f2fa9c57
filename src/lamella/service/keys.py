"""API keys: whose a request is, and what it may. Only their hashes are kept. Imports no torch."""

from __future__ import annotations

import getpass
import hashlib
import hmac
import re
import secrets
import time
from dataclasses import dataclass
from typing import Literal, get_args

from sqlalchemy import func, insert, select, update

from lamella.errors import UserError, check_choice
from lamella.service.schema import api_keys
from lamella.service.store import NotFound, Store

Scope = Literal["read", "submit", "admin"]
SCOPES: tuple[Scope, ...] = get_args(Scope)
PREFIX = "lamella"
SHAPE = re.compile(rf"{PREFIX}_([0-9a-f]{{12}})_([A-Za-z0-9_-]{{43}})")


@dataclass(frozen=True)
class Identity:
    """Whose a request is."""

    user: str
    scopes: frozenset[str]
    key: str | None = None
    run: str | None = None
    """The only run that the key is for; None: any."""

    def may(self, scope: Scope) -> bool:
        """admin may everything, and who may submit may read."""
        order = {"read": 0, "submit": 1, "admin": 2}
        return any(order[own] >= order[scope] for own in self.scopes if own in order)


@dataclass(frozen=True)
class Key:
    """What may be shown of a key."""

    id: str
    user: str
    scopes: list[str]
    run: str | None
    created: float
    expires: float | None
    revoked: float | None


def local_user() -> str:
    """Who uses a service without keys: whoever started it."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # an id without a name, as in containers
        return "local"


def are_needed(store: Store) -> bool:
    """Whether requests need a key: as soon as there was ever one."""
    with store.database.reading() as connection:
        return bool(connection.execute(select(func.count()).select_from(api_keys)).scalar())


MOST_DAYS = 36_500


def create(
    store: Store, user: str, scopes: list[str], run: str | None = None, days: float | None = None
) -> tuple[str, Key]:
    """(the key, shown this once; what is kept of it).

    Raises:
        UserError: no name, a scope that there is not, or no time in which it is valid.
        NotFound: no such run.
    """
    if not re.fullmatch(r"[A-Za-z0-9._@-]{1,100}", user):
        raise UserError(f"{user!r} is no name of a user; take letters, digits and . _ @ -")
    for scope in scopes:
        check_choice("a key's scope", scope, SCOPES)
    if not scopes:
        raise UserError(f"a key needs a scope: {', '.join(SCOPES)}")
    if days is not None and not 0 < days <= MOST_DAYS:
        raise UserError(f"a key is valid for more than 0 and at most {MOST_DAYS} days, not {days:g}")
    if run is not None:
        store.get(run)
    key_id, secret, now = secrets.token_hex(6), secrets.token_urlsafe(32), time.time()
    expires = None if days is None else now + days * 24 * 3600
    kept = Key(key_id, user, sorted(set(scopes)), run, now, expires, None)
    with store.database.writing() as connection:
        connection.execute(insert(api_keys).values(vars(kept) | {"hash": _hash(secret)}))
    return f"{PREFIX}_{key_id}_{secret}", kept


def find(store: Store, token: str) -> Identity | None:
    """Whose a key is; None of one that is wrong, expired or revoked."""
    shape = SHAPE.fullmatch(token)
    if shape is None:
        return None
    with store.database.reading() as connection:
        row = connection.execute(select(api_keys).where(api_keys.c.id == shape[1])).mappings().first()
    if row is None or not hmac.compare_digest(row["hash"], _hash(shape[2])):
        return None
    if row["revoked"] is not None or (row["expires"] is not None and row["expires"] < time.time()):
        return None
    return Identity(row["user"], frozenset(row["scopes"]), row["id"], row["run"])


def listed(store: Store) -> list[Key]:
    """All keys, without what would open anything."""
    columns = [column for column in api_keys.c if column.name != "hash"]
    with store.database.reading() as connection:
        rows = connection.execute(select(*columns).order_by(api_keys.c.created)).mappings()
        return [Key(**dict(row)) for row in rows]


def revoke(store: Store, key_id: str) -> None:
    """The key opens nothing from now on; NotFound of one that there is not."""
    with store.database.writing() as connection:
        done = connection.execute(
            update(api_keys).where(api_keys.c.id == key_id, api_keys.c.revoked.is_(None)).values(revoked=time.time())
        )
        if not done.rowcount and not connection.execute(select(api_keys.c.id).where(api_keys.c.id == key_id)).first():
            raise NotFound(f"there is no key {key_id}")


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()
