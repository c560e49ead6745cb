"""Services and clients for tests: real gRPC on loopback, with something in between that cuts connections."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Self, cast

from client.meta.admin import RemoteAdmin
from client.meta.connection import SessionConnection
from client.meta.encryption import Trust
from client.meta.endpoint import Endpoint
from client.meta.remote import RemoteMeta
from metasvc.api.server import Server
from metasvc.model import Ino, VolumeFormat
from metasvc.server.certificate import Certificate
from metasvc.server.service import Service
from metasvc.server.tokens import Tokens, prepare
from metasvc.server.volumes import Volume, Volumes
from metasvc.store import Store, VolumeStore
from metasvc.store.memory import MemoryStore


class Kept:
    """A volume's store that stays open when its user closes it."""

    def __init__(self, inner: VolumeStore) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> object:
        return getattr(self._inner, name)

    async def close(self) -> None:
        """Leave it open."""


class OneVolume(MemoryStore):
    """A store whose one volume is opened already."""

    def __init__(self, volume: VolumeStore) -> None:
        super().__init__()
        self._one = volume

    async def open_volume(self, tenant: str, name: str) -> VolumeStore:  # type: ignore[override]
        return Kept(self._one)  # type: ignore[return-value]

    async def list_volumes(self) -> Sequence[VolumeFormat]:
        return [self._one.format]


@dataclass
class Served:
    """A service that may be stopped and started again at the same address."""

    store: Store
    name: str
    token: str
    options: dict[str, Any]
    port: int = 0
    volumes: Volumes | None = None
    service: Service | None = None
    certificate: Certificate | None = None
    trust: Trust | None = None

    async def start(self) -> None:
        self.volumes = Volumes(self.store, **self.options)
        self.service = Service(self.volumes, await Tokens.load(self.store))
        self.port = await self.service.start(f"127.0.0.1:{self.port}", certificate=self.certificate)
        self.volumes.serve_as(Server("127.0.0.1", self.port))

    async def stop(self) -> None:
        service, volumes, self.service, self.volumes = self.service, self.volumes, None, None
        if service is not None and volumes is not None:
            await service.stop(grace_s=0.2)
            await volumes.close()

    async def volume(self) -> Volume:
        assert self.volumes is not None
        tenant, _, name = self.name.partition("/")
        return await self.volumes.get(tenant, name)

    def endpoint(self, *, port: int | None = None) -> Endpoint:
        return Endpoint([Server("127.0.0.1", port or self.port)], self.token, trust=self.trust)


@contextlib.asynccontextmanager
async def served(
    store: VolumeStore | Store,
    *,
    name: str = "local/default",
    certificate: Certificate | None = None,
    trust: Trust | None = None,
    **options: Any,
) -> AsyncIterator[Served]:
    """Serve a volume, or a store, until the block ends."""
    whole = OneVolume(cast("VolumeStore", store)) if hasattr(store, "scan_dir") else store
    service = Served(whole, name, await prepare(whole), options, certificate=certificate, trust=trust)
    await service.start()
    try:
        yield service
    finally:
        await service.stop()


@dataclass
class Client:
    """A session over the wire."""

    connection: SessionConnection
    meta: RemoteMeta
    admin: RemoteAdmin

    async def released(self, *inos: Ino) -> None:
        """Release, and wait until the service knows of it: releases are answered before."""
        for ino in inos:
            await self.meta.release(ino)
        async with asyncio.timeout(60):
            while any(pending.name == "release" for pending in self.connection._pending.values()):
                await asyncio.sleep(0.005)


@contextlib.asynccontextmanager
async def connected(service: Served, *, port: int | None = None, timeout_s: float = 60.0) -> AsyncIterator[Client]:
    """Begin a session and end it."""
    endpoint = service.endpoint(port=port)
    connection = SessionConnection(
        endpoint, service.name, host="test", pid=1, mountpoint="/test", timeout_s=timeout_s, takes_leases=True
    )
    await connection.open(timeout_s=20)
    meta = RemoteMeta(connection, remembers=True)
    try:
        yield Client(connection, meta, RemoteAdmin(endpoint, service.name, timeout_s=20))
    finally:
        await meta.close()
        await connection.close()


@dataclass
class Cutter:
    """A TCP relay whose connections can be cut, all at once, in the middle of anything; or held silent."""

    target: int
    port: int = 0
    open: asyncio.Event = field(default_factory=asyncio.Event)
    """Cleared: what is sent arrives later, or never."""
    _server: asyncio.Server | None = None
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)
    _writers: set[asyncio.StreamWriter] = field(default_factory=set)

    async def __aenter__(self) -> Self:
        self.open.set()
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        self.cut()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def cut(self) -> None:
        """Reset all connections."""
        for writer in list(self._writers):
            writer.transport.abort()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            there, back = await asyncio.open_connection("127.0.0.1", self.target)
        except OSError:
            writer.transport.abort()
            return
        self._writers |= {writer, back}
        ways = [asyncio.create_task(self._relay(reader, back)), asyncio.create_task(self._relay(there, writer))]
        self._tasks |= set(ways)
        await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        for one in (writer, back):
            one.transport.abort()
            self._writers.discard(one)
        for task in ways:
            task.cancel()
            self._tasks.discard(task)

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                await self.open.wait()
                writer.write(data)
                await writer.drain()
