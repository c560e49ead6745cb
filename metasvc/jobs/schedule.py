"""When and how fast the jobs of a volume work, and what became of them.

Owns one task for each job: it works, rests, and works again; an error is logged and the job rests longer. Everything that a
job does may be cut off at any moment: what is left is found again in the metadata.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Any, Final

from chunkstore.errors import AtollError, ObjectMissing
from chunkstore.slices import ChunkStore
from metasvc.api import MetaClient
from metasvc.api.admin import MetaAdmin
from metasvc.engine.audit import audit
from metasvc.engine.engine import Engine
from metasvc.engine.packing import Packing
from metasvc.jobs.backups import Backups
from metasvc.jobs.collecting import DeleteSlices, collect_garbage, expire_trash
from metasvc.jobs.compaction import compact
from metasvc.jobs.packing import AGE_S, LEAST_BYTES, LOOK_AT_ONCE, pack_small, repack
from metasvc.model import VolumeFormat

FAILURE_REST_S: Final = 60.0
CHUNKS_AT_ONCE: Final = 16
FIRST_BACKUP_S: Final = 1.0
"""A volume that never was backed up does not wait, nor one whose owner ended when a backup was due."""

Writing = Callable[[], AbstractAsyncContextManager[tuple[MetaClient, ChunkStore]]]
"""Opens a session, to which new slices belong, and the chunk store that they are written to. Jobs enter it at the same time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JobRates:
    """How often each job looks for work, in seconds."""

    garbage_s: float = 10.0
    garbage_age_s: float = 0.0
    """How long ago the last reference must have gone: readers elsewhere may still hold the map of before."""
    trash_s: float = 300.0
    compaction_s: float = 30.0
    packs_s: float = 30.0
    packs_age_s: float = AGE_S
    repack_s: float = 3600.0
    packs_pause_s: float = 0.2
    """Rest after each pack: at most 20 MiB/s, 5,000 files of 4 KiB."""
    compaction_pause_s: float = 0.5
    """Rest after each chunk: at most 128 MiB/s of reading and writing, in practice far less."""
    counters_first_s: float = 300.0
    """After the volume was opened; then every ``counters_s``."""
    counters_s: float = 86400.0
    backups_s: float = 10.0
    """How often it is looked whether a backup is due."""
    counters_pause_s: float = 0.1
    """Rest after each page of 1,000 inodes: less than 10,000 a second, 3 % of a CPU (0.4 ms of the loop for each page)."""


@dataclass(slots=True)
class JobState:
    """What one job did since the volume was opened."""

    runs: int = 0
    failures: int = 0
    done: int = 0
    """Objects deleted, entries of the trash removed, chunks compacted, counters repaired, backups made."""
    last_error: str = ""


@dataclass(slots=True)
class Jobs:
    """The background work of one volume."""

    admin: MetaAdmin
    volume_format: Callable[[], VolumeFormat]
    """The format as it is now: how long the trash keeps may be changed."""
    delete: DeleteSlices
    writing: Writing
    log: Any
    """A structlog logger, bound to the volume."""
    rates: JobRates = field(default_factory=JobRates)
    packing: Packing | None = None
    """If small slices are to be gathered."""
    audited: Engine | None = None
    """If the counters of this engine are to be compared with its inodes."""
    backups: Backups | None = None
    """If garbage may have to wait for backups; they are made if it has a policy."""
    states: dict[str, JobState] = field(default_factory=dict)
    _collected_to_ns: int | None = None
    """Nothing that became garbage up to then is left; None if that is not known."""

    async def run(self) -> None:
        """Work until cancelled."""
        rates = self.rates
        jobs: list[tuple[str, Callable[[], Awaitable[int]], float]] = [
            ("garbage", self.collect, rates.garbage_s),
            ("trash", self.expire, rates.trash_s),
            ("compaction", self.compact, rates.compaction_s),
        ]
        if self.packing is not None:
            jobs += [("packs", self.pack, rates.packs_s), ("repack", self.repack, rates.repack_s)]
        async with asyncio.TaskGroup() as tasks:
            for name, work, rest_s in jobs:
                tasks.create_task(self._repeat(name, work, rest_s), name=f"job {name}")
            if self.backups is not None and self.backups.policy is not None:
                first_s = min(FIRST_BACKUP_S, rates.backups_s)
                repeating = self._repeat("backups", self.backups.back_up, rates.backups_s, first_s=first_s)
                tasks.create_task(repeating, name="job backups")
            if self.audited is not None:
                first_s = rates.counters_first_s
                repeating = self._repeat("counters", self.audit, rates.counters_s, first_s=first_s)
                tasks.create_task(repeating, name="job counters")

    async def _repeat(
        self, name: str, work: Callable[[], Awaitable[int]], rest_s: float, *, first_s: float | None = None
    ) -> None:
        state = self.states[name] = JobState()
        await asyncio.sleep(rest_s if first_s is None else first_s)
        while True:
            try:
                state.done += await work()
                state.last_error = ""
            except AtollError as error:
                self.log.warning("a job failed and is tried again", job=name, code=error.code, error=str(error))
                await self._failed(state, error)
            except Exception as error:
                # The edge of a job: logged, and the volume lives on.
                self.log.exception("a job failed unexpectedly and is tried again", job=name)
                await self._failed(state, error)
            state.runs += 1
            await asyncio.sleep(rest_s)

    async def _failed(self, state: JobState, error: Exception) -> None:
        state.failures += 1
        state.last_error = str(error)
        await asyncio.sleep(FAILURE_REST_S)

    async def collect(self) -> int:
        """Delete garbage, as far as no backup may name it; how many objects."""
        old_ns = time.time_ns() - int(self.rates.garbage_age_s * 1e9)
        # The bucket is not asked for backups while there is nothing to delete.
        if not await self.admin.garbage(before_ns=old_ns, limit=1):
            return 0
        held_from_ns = None if self.backups is None else await self.backups.held_from_ns()
        if held_from_ns is not None and held_from_ns == self._collected_to_ns:
            # What became garbage since then waits, and may be much: it is not looked through again and again.
            return 0
        collected = await collect_garbage(
            self.admin,
            self.delete,
            block_bytes=self.volume_format().block_bytes,
            min_age_s=self.rates.garbage_age_s,
            held_from_ns=held_from_ns,
        )
        self._collected_to_ns = held_from_ns if held_from_ns is not None and held_from_ns <= old_ns else None
        if collected.objects:
            self.log.info("garbage deleted", slices=collected.slices, objects=collected.objects)
        return collected.objects

    async def expire(self) -> int:
        """Remove trash whose time is up; how many entries."""
        removed = await expire_trash(self.admin, trash_days=self.volume_format().trash_days)
        if removed:
            self.log.info("trash expired", entries=removed)
        return removed

    async def compact(self) -> int:
        """Compact chunks until none is left, or those that are left are being written; how many."""
        total = 0
        # Each look goes on behind the one before, so what it finds is worked on and not looked for again.
        candidates = await self.admin.compaction_candidates(limit=CHUNKS_AT_ONCE)
        if not candidates:
            return total
        async with self.writing() as (meta, chunks):
            while candidates:
                compacted = 0
                for ino, chunk in candidates:
                    try:
                        compacted += await compact(meta, self.admin, chunks, ino=ino, chunk=chunk)
                    except ObjectMissing as error:
                        # Staged on another node and not uploaded yet, or gone: the next look may find it.
                        self.log.info("a chunk cannot be compacted now", inode=ino, chunk=chunk, error=str(error))
                    await asyncio.sleep(self.rates.compaction_pause_s)
                if compacted:
                    self.log.info("chunks compacted", chunks=compacted)
                total += compacted
                if compacted < len(candidates):
                    break
                candidates = await self.admin.compaction_candidates(limit=CHUNKS_AT_ONCE)
        return total

    async def pack(self) -> int:
        """Gather small slices; how many refs were moved."""
        assert self.packing is not None
        rates = self.rates
        # Opened only if there is something to do: a session is a row.
        before_ns = time.time_ns() - int(rates.packs_age_s * 1e9)
        if (
            sum(piece.length for piece in await self.packing.small(before_ns=before_ns, limit=LOOK_AT_ONCE))
            < LEAST_BYTES
        ):
            return 0
        async with self.writing() as (meta, chunks):
            moved = await pack_small(self.packing, meta, chunks, age_s=rates.packs_age_s, pause_s=rates.packs_pause_s)
        if moved:
            self.log.info("small files packed", refs=moved)
        return moved

    async def repack(self) -> int:
        """Gather what is left of packs; how many refs were moved."""
        assert self.packing is not None
        pieces, after = await self.packing.sparse(after=None)
        if not pieces and after is None:
            return 0
        async with self.writing() as (meta, chunks):
            moved = await repack(self.packing, meta, chunks, pause_s=self.rates.packs_pause_s)
        if moved:
            self.log.info("packs packed again", refs=moved)
        return moved

    async def audit(self) -> int:
        """Compare the counters with the inodes; how many were wrong, and were repaired."""
        assert self.audited is not None
        found = await audit(self.audited, pause_s=self.rates.counters_pause_s)
        for wrong in found.differences:
            self.log.error(
                "a counter was wrong and is repaired: please report this",
                counter=wrong.counter,
                quota=wrong.quota,
                found=wrong.found,
                expected=wrong.expected,
            )
        self.log.info("counters compared", inodes=found.inodes, quotas=found.quotas, wrong=len(found.differences))
        return len(found.differences)
