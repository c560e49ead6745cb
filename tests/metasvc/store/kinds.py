"""The kinds of stores, for tests that run on all of them."""

from __future__ import annotations

from pathlib import Path

from metasvc.store import Store
from metasvc.store.memory import MemoryStore
from metasvc.store.sqlite import SqliteStore
from tests.metasvc.store.postgresql_world import PostgresqlWorld
from tests.servers.postgresql import PostgreSQL

KINDS = ["memory", "sqlite", "postgresql"]


async def new_store_of(kind: str, directory: Path, server: PostgreSQL | None) -> Store:
    """Return an empty store: in the directory or on the server, as the kind may be. Close it."""
    if kind == "sqlite":
        return await SqliteStore.open(str(directory / "meta.db"), create=True)
    if kind == "postgresql":
        assert server is not None
        return await PostgresqlWorld(server).open_store()
    assert kind == "memory"
    return MemoryStore()
