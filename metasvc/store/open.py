"""From the URL of a store to the store.

Owns the list of schemes. A driver is imported when its scheme is asked for, so that a command pays for one only.
"""

from __future__ import annotations

from metasvc.errors import StoreError
from metasvc.store import Store

__all__ = ["open_store", "without_password"]

_SCHEMES = (
    "memory://, sqlite:///relative/path, sqlite:////absolute/path, postgresql://user:password@host/database, "
    "redis://user:password@host:port/db, rediss://…"
)


def without_password(url: str) -> str:
    """Return the URL of a store for messages and logs: without user and password, whatever else is wrong with it."""
    scheme, separator, rest = url.partition("://")
    return f"{scheme}{separator}{rest.rpartition('@')[2]}" if separator else url


async def open_store(url: str, *, create: bool = False) -> Store:
    """Open the database of a URL; with ``create`` make it if it is not there.

    Schemes: ``memory://`` (a new and empty one each time), ``sqlite:///relative/path``, ``sqlite:////absolute/path``,
    ``postgresql://`` or ``postgres://`` (metasvc.store.postgresql.address), where ``create`` makes tables, not the database;
    ``redis://`` or ``rediss://`` (metasvc.store.redis.address).
    The schema is brought up to date. Raises StoreError for another scheme or an unusable database, VolumeMissing if
    there is no database and ``create`` is false, SchemaTooNew if a newer AtollFS wrote it.
    """
    scheme, separator, rest = url.partition("://")
    if scheme == "memory" and separator and not rest:
        from metasvc.store.memory import MemoryStore

        return MemoryStore()
    if scheme == "sqlite" and rest.startswith("/") and len(rest) > 1:
        from metasvc.store.sqlite import SqliteStore

        return await SqliteStore.open(rest[1:], create=create)
    if scheme in {"postgresql", "postgres"} and separator:
        from metasvc.store.postgresql import PostgresqlStore

        return await PostgresqlStore.open(url, create=create)
    if scheme in {"redis", "rediss"} and separator:
        from metasvc.store.redis import RedisStore

        return await RedisStore.open(url, create=create)
    raise StoreError(f"the store {without_password(url)!r} is none that AtollFS knows: use one of {_SCHEMES}")
