"""Volumes for tests of the engine: formatted, opened, and looked at as bytes."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from chunkstore.geometry import SliceId
from metasvc.api import MetaClient
from metasvc.api.admin import MetaAdmin
from metasvc.engine import Engine, EngineAdmin, EngineSession, first_rows
from metasvc.engine.engine import DEFAULT_MEMORY_BYTES
from metasvc.engine.memory_budget import MemoryBudget
from metasvc.model import Caller, Commit, FileMap, Ino, Inode, SliceKind, SliceRef, VolumeFormat, WrittenSlice
from metasvc.store import Store, VolumeStore
from metasvc.store.memory import MemoryStore
from tests.closing import close_at_end

ROOT = Caller()


def volume_format(**changes: Any) -> VolumeFormat:
    """Return a format with small values where tests want to reach limits."""
    values: dict[str, Any] = {
        "uuid": "11111111-2222-3333-4444-555555555555",
        "tenant": "local",
        "name": "default",
        "bucket_url": "file:objects",
        "block_bytes": 4 << 20,
        "compression": "none",
        "inline_limit_bytes": 32768,
        "capacity_bytes": 0,
        "max_inodes": 0,
        "trash_days": 0.0,
        "created_ns": 1,
    }
    return VolumeFormat(**{**values, **changes})


async def format_volume(store: Store, **changes: Any) -> VolumeStore:
    """Create a volume and open it."""
    form = volume_format(**changes)
    await store.create_volume(form, first_rows(form))
    return await store.open_volume(form.tenant, form.name)


class Opened:
    """An engine with one session, and shorthands."""

    def __init__(self, engine: Engine, session: MetaClient, admin: MetaAdmin) -> None:
        self.engine = engine
        self.meta = session
        self.admin = admin
        self._slice_ids: list[int] = []

    async def slice_id(self) -> SliceId:
        if not self._slice_ids:
            self._slice_ids = list(await self.meta.allocate_slices(64))
        return SliceId(self._slice_ids.pop(0))

    async def write(self, ino: Ino, offset: int, data: bytes, **more: Any) -> Inode:
        """Commit bytes as one inline slice."""
        slice_id = await self.slice_id()
        written = WrittenSlice(slice_id, len(data), SliceKind.INLINE, data, (SliceRef(offset, slice_id, 0, len(data)),))
        epoch = more.pop("size_epoch", None)
        if epoch is None:
            epoch = (await self.meta.getattr(ino)).size_epoch
        commit = Commit((written,), offset + len(data), epoch, mtime_ns=7, **more)
        return await self.meta.commit(ROOT, ino, commit)

    async def read(self, ino: Ino) -> bytes:
        """Return the content of a file all of whose slices are inline."""
        inode = await self.meta.getattr(ino)
        content = bytearray(inode.size_bytes)
        at = 0
        while at < inode.size_bytes:
            part = await self.meta.read_map(ino, start=at, end=inode.size_bytes)
            fill(content, part)
            at = part.end
        return bytes(content)

    async def problems(self) -> list[str]:
        """Return what fsck finds."""
        return [f"{problem.code} {problem.ino}: {problem.text}" async for problem in self.admin.check(repair=False)]


def fill(content: bytearray, part: FileMap) -> None:
    """Lay the inline slices of a map over zeros."""
    for ref in part.refs:
        data = part.slices[ref.slice_id].data
        content[ref.offset : ref.end] = data[ref.slice_offset : ref.slice_offset + ref.length]


async def _memory_store() -> Store:
    return MemoryStore()


class Way:
    """How the volumes of a test are reached, and where they are kept (tests/metasvc/engine/conftest.py)."""

    over_the_wire = False
    make_store: Callable[[], Awaitable[Store]] = staticmethod(_memory_store)


async def new_store() -> Store:
    """Return a new and empty store of the kind that the test runs on; it is closed when the test ends."""
    store = await Way.make_store()
    close_at_end(store.close)
    return store


@contextlib.asynccontextmanager
async def opened(
    store: VolumeStore, *, memory_bytes: int = DEFAULT_MEMORY_BYTES, **options: Any
) -> AsyncIterator[Opened]:
    """Open a volume with one session; at the end fsck must find nothing."""
    if Way.over_the_wire:
        from tests.metasvc.server.served import connected, served

        async with served(store, memory_bytes=memory_bytes, **options) as service, connected(service) as client:
            volume = Opened((await service.volume()).engine, client.meta, client.admin)
            yield volume
            assert await volume.problems() == []
        return
    async with await Engine.open(store, address="test", memory=MemoryBudget(memory_bytes), **options) as engine:
        async with await EngineSession.begin(engine, host="test", pid=1) as session:
            volume = Opened(engine, session, EngineAdmin(engine))
            yield volume
        assert await volume.problems() == []
