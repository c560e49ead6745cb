"""The world of the Redis store, for the contract suite and the store's own tests."""

from __future__ import annotations

import asyncio
from typing import Any

from metasvc.store import Store
from metasvc.store.redis import RedisStore
from tests.metasvc.store.contract import World
from tests.servers.redis import RedisAt


class RedisWorld(World):
    """Each process is a RedisStore of its own, with few connections, on a prefix that only this world has."""

    lasting = True

    def __init__(self, server: RedisAt, *, port: int | None = None, connections: int = 4) -> None:
        """``port``: of a proxy before the server."""
        super().__init__()
        self.server = server
        self.prefix = server.new_prefix()
        self.connections = connections
        self.port = port

    @property
    def url(self) -> str:
        """The URL for a process."""
        return self.server.url(port=self.port, prefix=self.prefix, connections=self.connections)

    async def open_store(self) -> Store:
        return await RedisStore.open(self.url, create=True)

    async def lapse(self) -> None:
        volume = await self.volume_key()
        if await self.command("HEXISTS", volume, "expires"):
            await self.command("HSET", volume, "expires", 0)

    async def die(self) -> None:
        await self.end_processes()
        await self.lapse()

    async def command(self, *arguments: Any) -> Any:
        """Run a command as a user who may do everything; its answer."""
        return await asyncio.to_thread(self.server.command, *arguments)

    async def volume_key(self) -> str:
        """Return the key of the hash of volume tenant/volume."""
        place = b"tenant\0volume\0"
        (member,) = await self.command(
            "ZRANGEBYLEX", f"{self.prefix}:{{catalog}}:volumes", b"[" + place, b"(" + place[:-1] + b"\1"
        )
        return f"{self.prefix}:{{{int(member[len(place) :])}}}:volume"

    async def keys(self) -> set[bytes]:
        """Return all keys of the world."""
        found: set[bytes] = set()
        cursor: Any = 0
        while True:
            cursor, some = await self.command("SCAN", cursor, "MATCH", f"{self.prefix}:*", "COUNT", 1000)
            found.update(some)
            if int(cursor) == 0:
                return found
