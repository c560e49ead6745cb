"""From the URL of a store to the store.

Owns the list of schemes. A driver is imported when its scheme is asked for, so that a command pays for one only.
"""

from __future__ import annotations

from metasvc.errors import StoreError
from metasvc.store import Store

__all__ = ["open_store"]

_SCHEMES = "memory://, sqlite:///relative/path, sqlite:////absolute/path"


async def open_store(url: str, *, create: bool = False) -> Store:
    """Open the database of a URL; with ``create`` make it if it is not there.

    Schemes: ``memory://`` (a new and empty one each time), ``sqlite:///relative/path``, ``sqlite:////absolute/path``.
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
    raise StoreError(f"the store {url!r} is none that AtollFS knows: use one of {_SCHEMES}")
