"""The kinds of stores, for tests that run on all of them."""

from __future__ import annotations

from pathlib import Path

from metasvc.store import Store
from metasvc.store.memory import MemoryStore
from metasvc.store.postgresql import PostgresqlStore
from metasvc.store.sqlite import SqliteStore
from tests.servers.postgresql import PostgreSQL

KINDS = ["memory", "sqlite", "postgresql"]


async def new_store_of(kind: str, directory: Path, server: PostgreSQL | None) -> Store:
    """Return an empty store: in the directory or on the server, as the kind may be. Close it."""
    if kind == "sqlite":
        return await SqliteStore.open(str(directory / "meta.db"), create=True)
    if kind == "postgresql":
        assert server is not None
        return await PostgresqlStore.open(server.url(search_path=await server.new_schema(), connections=4), create=True)
    assert kind == "memory"
    return MemoryStore()
