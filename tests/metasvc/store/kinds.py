"""The kinds of stores, for tests that run on all of them."""

from __future__ import annotations

from pathlib import Path

from metasvc.store import Store
from metasvc.store.memory import MemoryStore
from metasvc.store.postgresql import PostgresqlStore
from metasvc.store.redis import RedisStore
from metasvc.store.sqlite import SqliteStore
from tests.servers.fixtures import Servers

KINDS = ["memory", "sqlite", "postgresql", "redis"]


async def new_store_of(kind: str, directory: Path, servers: Servers | None) -> Store:
    """Return an empty store: in the directory or on a server, as the kind may be. Close it."""
    if kind == "sqlite":
        return await SqliteStore.open(str(directory / "meta.db"), create=True)
    if kind == "memory":
        return MemoryStore()
    assert servers is not None
    if kind == "postgresql":
        server = servers.postgresql
        return await PostgresqlStore.open(server.url(search_path=await server.new_schema(), connections=4), create=True)
    assert kind == "redis"
    url = servers.redis.url(prefix=servers.redis.new_prefix(), connections=4)
    return await RedisStore.open(url, create=True)
