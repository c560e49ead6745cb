"""The volume row as SQL: who owns a volume, and the commit that only its owner can make.

Owns the statements that write the volume row. Each is one statement that commits by itself: no transaction is ever left
open, and none waits for a client while it holds a lock.

Why this fences, at READ COMMITTED: every statement here that changes anything first updates the volume row, where it is as the
statement expects. Two that run at once wait for each other at the row's lock; the later one looks at the row again as the
earlier one left it, and changes nothing if it does not match any more. So they have an order, and after

- a takeover (``epoch`` grows) commits of the owner before find no row, whenever they were sent;
- settle() (``attempt`` grows) commits that the same owner sent before find no row, those included that the network or a
  frozen server still holds back. What settle() answers is final: it waits for a commit that has the row, and
  voids one that has not come so far;
- a commit (``last_batch`` grows) the same batch finds no row, so it is applied once.

The rows of a batch are written by the same statement, from the row that the update returned: no row, nothing written. That a
batch sees the rows as they were when its statement began does no harm, because whoever could have changed
them in between has changed the volume row too.

The expiry is by the server's clock, read when the row is looked at (clock_timestamp()), not when the statement began.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import Any, Final

import asyncpg

from metasvc.errors import Fenced, NotOwner, VolumeExists, VolumeMissing
from metasvc.store import Ownership
from metasvc.store.postgresql.rows import Shape, changes_sql, changes_values, delete_some_sql, shape_of
from metasvc.store.tables import TABLES, Batch, Key, Table

__all__ = [
    "acquire",
    "commit",
    "create_volume",
    "delete_some_rows",
    "disown_deleted",
    "find_deleted",
    "forget_deleted",
    "release",
    "renew",
    "replace_format",
    "settle",
]

_OWNED: Final = "id = $1 AND owner_nonce = $2 AND epoch = $3"
_EXPIRED: Final = "(owner_nonce IS NULL OR owner_expires <= clock_timestamp())"
_ACQUIRE: Final = (
    "UPDATE volume SET owner_nonce = $2, owner_address = $3, owner_expires = clock_timestamp() + $4::interval, "
    f"epoch = epoch + 1, attempt = 0 WHERE id = $1 AND epoch = $5 AND tenant IS NOT NULL AND (owner_nonce = $2 OR {_EXPIRED}) "
    "RETURNING epoch, last_batch"
)
_RENEW: Final = f"UPDATE volume SET owner_expires = clock_timestamp() + $4::interval WHERE {_OWNED} RETURNING 1"
_RELEASE: Final = f"UPDATE volume SET owner_nonce = NULL, owner_address = NULL, owner_expires = NULL WHERE {_OWNED}"
_SETTLE: Final = f"UPDATE volume SET attempt = attempt + 1 WHERE {_OWNED} RETURNING attempt, last_batch"
_REPLACE_FORMAT: Final = f"UPDATE volume SET format = $5 WHERE {_OWNED} AND attempt = $4 RETURNING 1"
_STATE: Final = (
    "SELECT tenant IS NULL AS is_deleted, owner_nonce, owner_address, epoch, attempt, last_batch, "
    "greatest(0, extract(epoch FROM owner_expires - clock_timestamp()))::float8 AS expires_in_s FROM volume WHERE "
)
_DISOWN: Final = (
    "UPDATE volume SET tenant = NULL, name = NULL, owner_nonce = NULL, owner_address = NULL, owner_expires = NULL, "
    f"epoch = epoch + 1 WHERE tenant = $1 AND name = $2 AND {_EXPIRED} RETURNING id"
)
_CREATE: Final = (
    "WITH made AS (INSERT INTO volume (tenant, name, format) VALUES ($1, $2, $3) ON CONFLICT (tenant, name) DO NOTHING "
    "RETURNING id)"
)
_COMMIT: Final = (
    "WITH own AS (UPDATE volume SET last_batch = $5 "
    f"WHERE {_OWNED} AND attempt = $4 AND last_batch = $5 - 1 RETURNING id)"
)


_FORGET: Final = "DELETE FROM volume WHERE id = $1 AND tenant IS NULL" + "".join(
    f' AND NOT EXISTS (SELECT FROM "{table.name}" WHERE volume = $1)' for table in TABLES
)


@dataclass(frozen=True, slots=True)
class Settled:
    """What is final about an ownership's commits."""

    attempt: int
    """Commits carry it from now on."""
    last_batch: int


async def acquire(connection: asyncpg.Connection, volume_id: int, nonce: str, address: str, ttl_s: float) -> Ownership:
    """Take the ownership. NotOwner, Fenced for a volume that was deleted. Two trips.

    The epoch must be the one that was read: an acquisition that was thought lost and comes late must not end this one.
    """
    while True:
        state = await _state(connection, volume_id)
        if state["owner_nonce"] not in (None, nonce) and state["expires_in_s"] > 0:
            raise NotOwner(state["owner_address"], state["expires_in_s"])
        values = (volume_id, nonce, address, timedelta(seconds=ttl_s), state["epoch"])
        taken = await connection.fetchrow(_ACQUIRE, *values)
        if taken is not None:
            return Ownership(nonce=nonce, epoch=taken["epoch"], last_batch=taken["last_batch"])
        # Somebody was quicker, or renewed: once more.


async def renew(connection: asyncpg.Connection, volume_id: int, ownership: Ownership, ttl_s: float) -> None:
    """Set the expiry, counted from now. Fenced."""
    values = (volume_id, ownership.nonce, ownership.epoch, timedelta(seconds=ttl_s))
    if await connection.fetchval(_RENEW, *values) is None:
        raise await _fenced(connection, volume_id, ownership)


async def release(connection: asyncpg.Connection, volume_id: int, ownership: Ownership) -> None:
    """Clear the owner; nothing if the ownership is not the stored one."""
    await connection.execute(_RELEASE, volume_id, ownership.nonce, ownership.epoch)


async def settle(connection: asyncpg.Connection, volume_id: int, ownership: Ownership) -> Settled:
    """Void the commits of this owner that are under way, or wait for the one that has the row; what is so then. Fenced."""
    row = await connection.fetchrow(_SETTLE, volume_id, ownership.nonce, ownership.epoch)
    if row is None:
        raise await _fenced(connection, volume_id, ownership)
    return Settled(row["attempt"], row["last_batch"])


async def commit(
    connection: asyncpg.Connection, volume_id: int, ownership: Ownership, attempt: int, number: int, batch: Batch
) -> bool:
    """Check the ownership and apply a batch, in one statement: one trip. Fenced.

    False if only ``attempt`` is not the stored one: settle, then commit again.
    """
    shape = shape_of(batch)
    owner = (volume_id, ownership.nonce, ownership.epoch, attempt, number)
    if await connection.fetch(_commit_sql(shape), *owner, *changes_values(shape, batch)):
        return True
    state = await _state(connection, volume_id)
    if _is_of(state, ownership) and state["last_batch"] == number - 1 and state["attempt"] != attempt:
        return False
    raise _refusal(state, ownership, number)


async def replace_format(
    connection: asyncpg.Connection, volume_id: int, ownership: Ownership, attempt: int, text: str
) -> bool:
    """Store another format; False if only ``attempt`` is not the stored one. Fenced."""
    values = (volume_id, ownership.nonce, ownership.epoch, attempt, text)
    if await connection.fetchval(_REPLACE_FORMAT, *values) is not None:
        return True
    state = await _state(connection, volume_id)
    if not _is_of(state, ownership):
        raise _refusal(state, ownership, None)
    return False


async def create_volume(connection: asyncpg.Connection, tenant: str, name: str, text: str, batch: Batch) -> None:
    """Add a volume with its first rows, in one statement. VolumeExists."""
    shape = shape_of(batch)
    sql = f"{_CREATE}{changes_sql(shape, 'made', 4)} SELECT id FROM made"
    if await connection.fetchval(sql, tenant, name, text, *changes_values(shape, batch)) is None:
        raise VolumeExists(f"volume {tenant}/{name} exists already; choose another name or delete it first")


async def disown_deleted(connection: asyncpg.Connection, tenant: str, name: str) -> None:
    """Take name and owner from a volume, so that its rows can be removed. VolumeMissing; NotOwner if somebody owns it."""
    if await connection.fetchval(_DISOWN, tenant, name) is not None:
        return
    state = await connection.fetchrow(f"{_STATE} tenant = $1 AND name = $2", tenant, name)
    if state is None:
        raise VolumeMissing(f"there is no volume {tenant}/{name}; make it with: atoll format")
    raise NotOwner(state["owner_address"] or "another process", state["expires_in_s"] or 0.0)


async def find_deleted(connection: asyncpg.Connection) -> int | None:
    """Return the id of a volume that was deleted and has not gone; None if there is none."""
    found: int | None = await connection.fetchval("SELECT id FROM volume WHERE tenant IS NULL ORDER BY id LIMIT 1")
    return found


async def delete_some_rows(
    connection: asyncpg.Connection, volume_id: int, table: Table, after: Key | None, limit: int
) -> Key | None:
    """Delete up to ``limit`` rows of a deleted volume with key > after; the last one's key, None if there were none.

    From where the last one ended, for entries of deleted rows stay in the index until a vacuum.
    """
    sql = delete_some_sql(table, is_first=after is None)
    last = await connection.fetchrow(sql, volume_id, limit, *(after or ()))
    return None if last is None else tuple(last)


async def forget_deleted(connection: asyncpg.Connection, volume_id: int) -> bool:
    """Delete the row of a deleted volume without rows; False if it has some, which another process may be deleting."""
    await connection.execute(_FORGET, volume_id)
    return await connection.fetchval("SELECT 1 FROM volume WHERE id = $1", volume_id) is None


@cache
def _commit_sql(shape: Shape) -> str:
    return f"{_COMMIT}{changes_sql(shape, 'own', 6)} SELECT id FROM own"


async def _state(connection: asyncpg.Connection, volume_id: int) -> Any:
    state = await connection.fetchrow(f"{_STATE} id = $1", volume_id)
    if state is None or state["is_deleted"]:
        raise Fenced("the volume was deleted")
    return state


async def _fenced(connection: asyncpg.Connection, volume_id: int, ownership: Ownership) -> Fenced:
    """Return the error that says what is stored instead."""
    return _refusal(await _state(connection, volume_id), ownership, None)


def _refusal(state: Any, ownership: Ownership, number: int | None) -> Fenced:
    if _is_of(state, ownership):
        return Fenced(f"batch {number} does not follow the stored batch {state['last_batch']}")
    epoch = state["epoch"]
    owned = state["owner_nonce"] is not None
    now_owner = f"{state['owner_address']} with epoch {epoch}" if owned else f"nobody since epoch {epoch}"
    return Fenced(f"the ownership with epoch {ownership.epoch} is over: the volume is owned by {now_owner}")


def _is_of(state: Any, ownership: Ownership) -> bool:
    return bool((state["owner_nonce"], state["epoch"]) == (ownership.nonce, ownership.epoch))
