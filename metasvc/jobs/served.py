"""The jobs of a volume that a service has open: its bucket and, while chunks are compacted, a session and a chunk store.

Owns opening these when they are first needed and closing them. The keys of the bucket come from the environment of the
service. A job that finds no keys says so in the log, and asks again later.
"""

from __future__ import annotations

import os
import socket
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from chunkstore.block import Codec
from chunkstore.buckets import open_bucket
from chunkstore.slices import ChunkStore, ChunkStoreConfig
from metasvc.api import MetaClient
from metasvc.engine import EngineSession
from metasvc.engine.packing import Packing
from metasvc.jobs.collecting import delete_objects
from metasvc.jobs.schedule import JobRates, Jobs
from metasvc.model import Garbage

if TYPE_CHECKING:
    from chunkstore.buckets.retry import RetryingStore
    from metasvc.server.volumes import Volume

GARBAGE_AGE_S: Final = 60.0
"""Sessions elsewhere may have the map of before for so long without asking; whoever is later meets a missing object, and reads
the map again."""
CACHE_BYTES: Final = 256 * 1024 * 1024
"""For the blocks of the chunks that are compacted: two chunks and some."""
MOUNTPOINT: Final = "(jobs)"
"""What stands in the place of a mount point where sessions are listed."""


class ServedJobs:
    """Run the jobs of the volumes of a service."""

    def __init__(self, *, cache_dir: Path, env: Mapping[str, str], log: Any, rates: JobRates | None = None) -> None:
        """``cache_dir`` is for this process only; a directory per volume is made in it when one is needed."""
        self._cache_dir = cache_dir
        self._env = env
        self._log = log
        self._rates = rates if rates is not None else JobRates(garbage_age_s=GARBAGE_AGE_S)

    async def run(self, volume: Volume) -> None:
        """Work for one volume until cancelled."""
        bucket: RetryingStore | None = None

        def opened() -> RetryingStore:
            nonlocal bucket
            if bucket is None:
                bucket = open_bucket(volume.format.bucket_url, env=self._env)
            return bucket

        async def delete(rows: Sequence[Garbage]) -> None:
            await delete_objects(opened(), volume.format, rows)

        @asynccontextmanager
        async def writing() -> AsyncIterator[tuple[MetaClient, ChunkStore]]:
            form = volume.format
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
                volume.engine, host=socket.gethostname(), pid=os.getpid(), mountpoint=MOUNTPOINT
            )
            async with session as meta, ChunkStore(config, bucket=opened()) as chunks:
                yield meta, chunks

        log = self._log.bind(volume=volume.name)
        engine = volume.engine
        jobs = Jobs(volume.admin, lambda: volume.format, delete, writing, log, self._rates, Packing(engine), engine)
        volume.jobs = lambda: jobs.states
        try:
            await jobs.run()
        finally:
            if bucket is not None:
                await bucket.close()
