"""The jobs of a volume that a service has open: its bucket and, while any of them writes, a session and a chunk store.

Owns opening these when they are first needed and closing them. The keys of the bucket are those that the service keeps for
the volume, else those of its environment; when they are replaced, whatever opens the bucket next has the new ones. A job that
finds no keys says so in the log, and asks again later.

Jobs that write at the same time share session and chunk store (`_Writing`), as those of a mount share the mount's: a cache
directory is one chunk store's at a time, and a job with hours of work must not keep the others from theirs.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from chunkstore.block import Codec
from chunkstore.buckets import open_bucket
from chunkstore.slices import ChunkStore, ChunkStoreConfig
from metasvc.api import MetaClient
from metasvc.engine import EngineSession
from metasvc.engine.packing import Packing
from metasvc.jobs.backups import BackupPolicy, Backups, Shelf
from metasvc.jobs.backups.keeping import AT_ONCE
from metasvc.jobs.collecting import delete_objects
from metasvc.jobs.reading import PackReader
from metasvc.jobs.schedule import JobRates, Jobs
from metasvc.model import Garbage
from metasvc.server.access import URL_LIFE_S

if TYPE_CHECKING:
    from chunkstore.buckets.retry import RetryingStore
    from metasvc.server.volumes import Volume

GARBAGE_AGE_S: Final = 60.0
"""Sessions elsewhere may have the map of before for so long without asking; whoever is later meets a missing object, and reads
the map again. Where URLs of blocks are signed it is so much more as they live: nobody asks who has one."""
CACHE_BYTES: Final = 256 * 1024 * 1024
"""For the blocks of the chunks that are compacted: two chunks and some."""
MOUNTPOINT: Final = "(jobs)"
"""What stands in the place of a mount point where sessions are listed."""


class _Writing:
    """The session and the chunk store that the jobs of one volume write with, open while any of them does.

    Interleavings: who comes waits until those before have opened (`_turn`), or until who left last has closed (`_is_closed`).
    Who leaves last waits for nobody before it closes, so nothing stays open, whoever is cancelled where.
    """

    def __init__(self, volume: Volume, *, cache_dir: Path, bucket: Callable[[], Awaitable[RetryingStore]]) -> None:
        self._volume = volume
        self._cache_dir = cache_dir
        self._bucket = bucket
        self._turn = asyncio.Lock()
        self._users = 0
        self._stack: AsyncExitStack | None = None
        self._is_closed = asyncio.Event()
        self._is_closed.set()
        self._open: tuple[MetaClient, ChunkStore]

    @asynccontextmanager
    async def taken(self) -> AsyncIterator[tuple[MetaClient, ChunkStore]]:
        """Use them. Errors of opening them are the first job's, those of closing them the last one's."""
        async with self._turn:
            await self._is_closed.wait()
            if self._stack is None:
                self._stack = await self._opened()
            self._users += 1
        try:
            yield self._open
        finally:
            self._users -= 1
            stack = self._stack
            if not self._users and stack is not None:
                self._stack = None
                self._is_closed.clear()
                try:
                    await stack.aclose()
                finally:
                    self._is_closed.set()

    async def _opened(self) -> AsyncExitStack:
        form = self._volume.format
        self._cache_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        config = ChunkStoreConfig(
            volume_uuid=form.uuid,
            cache_dir=self._cache_dir,
            codec=Codec.parse(form.compression),
            block_bytes=form.block_bytes,
            inline_limit_bytes=form.inline_limit_bytes,
            cache_limit_bytes=CACHE_BYTES,
        )
        session = await EngineSession.begin(
            self._volume.engine, host=socket.gethostname(), pid=os.getpid(), mountpoint=MOUNTPOINT
        )
        async with AsyncExitStack() as stack:
            meta = await stack.enter_async_context(session)
            chunks = await stack.enter_async_context(ChunkStore(config, bucket=await self._bucket()))
            self._open = meta, chunks
            return stack.pop_all()


class ServedJobs:
    """Run the jobs of the volumes of a service."""

    def __init__(
        self,
        *,
        cache_dir: Path,
        env: Mapping[str, str],
        log: Any,
        rates: JobRates | None = None,
        backup: BackupPolicy | None = None,
    ) -> None:
        """``cache_dir`` is for this process only; a directory per volume is made in it when one is needed."""
        self._backup = backup
        self._turn = asyncio.Semaphore(AT_ONCE)
        self._cache_dir = cache_dir
        self._env = env
        self._log = log
        self._rates = rates if rates is not None else JobRates(garbage_age_s=GARBAGE_AGE_S)

    async def run(self, volume: Volume) -> None:
        """Work for one volume until cancelled."""
        buckets: list[RetryingStore] = []
        """All that were opened; the last one is in use."""
        opened_with: Mapping[str, str] | None = None

        async def opened() -> RetryingStore:
            nonlocal opened_with
            kept = await volume.access.kept()
            env = self._env if kept is None else kept
            if not buckets or env is not opened_with:
                buckets.append(open_bucket(volume.format.bucket_url, env=env))
                opened_with = env
            return buckets[-1]

        async def delete(rows: Sequence[Garbage]) -> None:
            await delete_objects(await opened(), volume.format, rows)

        writing = _Writing(volume, cache_dir=self._cache_dir, bucket=opened).taken
        rates = self._rates
        if volume.access.may_sign and rates.garbage_age_s == GARBAGE_AGE_S:
            rates = replace(rates, garbage_age_s=URL_LIFE_S + GARBAGE_AGE_S)
        log = self._log.bind(volume=volume.name)
        engine = volume.engine

        async def shelf() -> Shelf:
            return Shelf(await opened(), volume.format.uuid)

        backups = Backups(
            shelf,
            volume.admin.dump,
            policy=self._backup,
            check_owned=engine.owner.check,
            log=log,
            turn=self._turn,
        )
        jobs = Jobs(volume.admin, lambda: volume.format, delete, writing, log, rates, Packing(engine), engine, backups)
        volume.jobs = lambda: jobs.states
        packs = volume.access.packs = PackReader(writing)
        volume.backups = backups if backups.policy is not None else None
        try:
            await jobs.run()
        finally:
            volume.access.packs = None
            await packs.close()
            for bucket in buckets:
                await bucket.close()
