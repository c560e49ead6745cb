"""The world of the PostgreSQL store, for the contract suite and the store's own tests."""

from __future__ import annotations

import asyncio

import asyncpg

from metasvc.store import Store
from metasvc.store.postgresql import PostgresqlStore
from tests.metasvc.store.contract import World
from tests.servers.postgresql import PostgreSQL


class PostgresqlWorld(World):
    """Each process is a PostgresqlStore of its own, with few connections, on a schema that only this world has."""

    lasting = True

    def __init__(self, server: PostgreSQL, *, port: int | None = None, connections: int = 4) -> None:
        """``port``: of a proxy before the server."""
        super().__init__()
        self.server = server
        self.schema = ""
        self._making = asyncio.Lock()
        self.connections = connections
        self.port = port

    @property
    def url(self) -> str:
        """The URL for a process."""
        return self.server.url(port=self.port, search_path=self.schema, connections=self.connections)

    async def make(self) -> None:
        """Make the schema, without tables, unless it was made."""
        async with self._making:
            if not self.schema:
                self.schema = await self.server.new_schema()

    async def open_store(self) -> Store:
        await self.make()
        return await PostgresqlStore.open(self.url, create=True)

    async def lapse(self) -> None:
        await self.sql(f"UPDATE {self.schema}.volume SET owner_expires = clock_timestamp() WHERE tenant = 'tenant'")

    async def die(self) -> None:
        await self.end_processes()
        await self.lapse()

    async def sql(self, statement: str, *values: object) -> list[asyncpg.Record]:
        """Run a statement as a superuser; the rows."""
        connection = await self.server.administrator()
        try:
            return await connection.fetch(statement, *values)
        finally:
            await connection.close()

    async def number(self, statement: str, *values: object) -> int:
        """Return the number that a statement answers."""
        return int((await self.sql(statement, *values))[0][0])
