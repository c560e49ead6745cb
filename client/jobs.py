"""What the holder of a volume does by itself while it is mounted: garbage, expired trash, compaction.

Owns when and how fast. Each job is one task that works, rests, and works again; an error is logged once and the job rests
longer. Everything it does could be cut off at any moment: the work is found again in the metadata. (The scrub of the cache
is the chunk store's own.)
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Final

from chunkstore.errors import AtollError
from chunkstore.geometry import SliceId
from chunkstore.slices import ChunkStore
from client.admin.gc import Tally, collect_garbage, expire_trash
from client.admin.live import live_slice
from client.compaction import compact
from client.volume import OpenVolume
from metasvc.api import MetaClient

FAILURE_REST_S: Final = 60.0
CHUNKS_AT_ONCE: Final = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class JobRates:
    """How often each job looks for work, in seconds."""

    garbage_s: float = 10.0
    trash_s: float = 300.0
    compaction_s: float = 30.0
    compaction_pause_s: float = 0.5
    """Rest after each chunk: at most 128 MiB/s of reading and writing, in practice far less."""


class Jobs:
    """The background work of one mount."""

    def __init__(
        self, volume: OpenVolume, meta: MetaClient, chunks: ChunkStore, *, log: Any, rates: JobRates | None = None
    ) -> None:
        """Take the mount's session (new slices belong to it) and chunk store."""
        self._volume = volume
        self._meta = meta
        self._chunks = chunks
        self._log = log
        self._rates = rates if rates is not None else JobRates()

    async def run(self) -> None:
        """Work until cancelled."""
        rates = self._rates
        async with asyncio.TaskGroup() as tasks:
            for name, work, rest_s in (
                ("garbage", self.collect, rates.garbage_s),
                ("trash", self.expire, rates.trash_s),
                ("compaction", self.compact, rates.compaction_s),
            ):
                tasks.create_task(self._repeat(name, work, rest_s), name=f"job {name}")

    async def _repeat(self, name: str, work: Callable[[], Awaitable[None]], rest_s: float) -> None:
        while True:
            await asyncio.sleep(rest_s)
            try:
                await work()
            except AtollError as error:
                self._log.warning("a job failed and is tried again", job=name, code=error.code, error=str(error))
                await asyncio.sleep(FAILURE_REST_S)
            except Exception:  # noqa: BLE001 - the edge of a job: logged, and the mount lives on
                self._log.exception("a job failed unexpectedly and is tried again", job=name)
                await asyncio.sleep(FAILURE_REST_S)

    async def collect(self) -> None:
        """Delete garbage."""
        tally = Tally()
        await collect_garbage(self._volume, tally)
        if tally.deleted_objects:
            self._log.info("garbage deleted", slices=tally.garbage_slices, objects=tally.deleted_objects)

    async def expire(self) -> None:
        """Remove trash whose time is up."""
        removed = await expire_trash(self._volume)
        if removed:
            self._log.info("trash expired", entries=removed)

    async def compact(self) -> None:
        """Compact chunks until none is left, or those that are left are being written."""
        while candidates := await self._volume.admin.compaction_candidates(limit=CHUNKS_AT_ONCE):
            compacted = 0
            for ino, chunk in candidates:
                if await compact(self._meta, self._volume.admin, self._chunks, ino=ino, chunk=chunk):
                    compacted += 1
                await asyncio.sleep(self._rates.compaction_pause_s)
            if compacted:
                self._log.info("chunks compacted", chunks=compacted)
            if compacted < len(candidates):
                return


async def settle_staged(
    volume: OpenVolume, chunks: ChunkStore, lengths: dict[SliceId, int], staged: list[SliceId], *, log: Any
) -> None:
    """Give up what an earlier mount staged and never committed; what was committed is being uploaded.

    ``lengths`` are those of the staged slices, read before.
    """
    given_up = 0
    for slice_id in staged:
        if await live_slice(volume.admin, slice_id) is None:
            await chunks.delete(slice_id, lengths.get(slice_id, 0))
            given_up += 1
    if staged:
        log.info("data of an earlier mount are uploaded", slices=len(staged) - given_up, never_committed=given_up)
