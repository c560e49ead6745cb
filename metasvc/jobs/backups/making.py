"""Writing one backup: a dump in parts, then its manifest.

The dump is verified on its way (metasvc.api.dump_stream), and so is that it is whole. Memory: `PUTS_AT_ONCE` parts on their way
and the one that fills; while all of them are on their way the dump is not read on, and what changes meanwhile waits in the
owner (DumpTooSlow if that is too much).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing, suppress
from typing import Final

from chunkstore.errors import AtollError
from metasvc.api.dump_stream import Header, PieceKind, Trailer, Unpacker
from metasvc.jobs.backups.shelf import PART_BYTES, Manifest, Shelf, new_name
from metasvc.model import DumpPart

PUTS_AT_ONCE: Final = 4
LONGEST_S: Final = 12 * 3600.0
"""Half of what parts without a manifest are left alone for."""
_CLEANUP_S: Final = 30.0


class BackupTooSlow(AtollError):
    """Say that a backup was not done in its time."""

    code = "backup-too-slow"
    errno = 110
    retryable = True


async def make_backup(
    shelf: Shelf,
    dump: Callable[[], AsyncGenerator[DumpPart, None]],
    *,
    window_s: int,
    check_owned: Callable[[], None],
    part_bytes: int = PART_BYTES,
    longest_s: float = LONGEST_S,
    clock_ns: Callable[[], int] = time.time_ns,
) -> Manifest:
    """Dump a volume into its bucket. ``check_owned`` raises if somebody else may own the volume now.

    Errors: those of the dump and of the bucket, BackupTooSlow. There is no backup then, and its parts are removed as far as
    the bucket takes that now; one that was on its way may come later. If it is cancelled they stay.
    """
    name = new_name(clock_ns())
    writing = _Writing(shelf, name, part_bytes)
    began_s = time.clock_gettime(time.CLOCK_BOOTTIME)
    try:
        async with asyncio.timeout(longest_s):
            await writing.run(dump)
        # Not the timer alone: it does not count while the machine sleeps.
        if time.clock_gettime(time.CLOCK_BOOTTIME) - began_s >= longest_s:
            raise TimeoutError
        manifest = writing.manifest(window_s=window_s, finished_ns=clock_ns())
        check_owned()
        await shelf.put_manifest(manifest)
    except (AtollError, TimeoutError) as error:
        if writing.is_done and not isinstance(error, TimeoutError):
            # Its manifest may turn up: the parts stay, and are removed if it has not by tomorrow.
            raise
        with suppress(AtollError, TimeoutError):
            async with asyncio.timeout(_CLEANUP_S):
                await shelf.remove_parts(name)
        if isinstance(error, TimeoutError):
            raise BackupTooSlow(
                f"a backup was given up after {longest_s / 3600:.3g} h: the bucket is too slow"
            ) from None
        raise
    return manifest


class _Writing:
    """The parts of one backup on their way."""

    def __init__(self, shelf: Shelf, name: str, part_bytes: int) -> None:
        self._shelf = shelf
        self._name = name
        self._part_bytes = part_bytes
        self._slots = asyncio.Semaphore(PUTS_AT_ONCE)
        self._unpacker = Unpacker(rows=False)
        self._header: Header | None = None
        self._trailer: Trailer | None = None
        self._parts = 0
        self._size_bytes = 0
        self.is_done = False
        """Whether all parts are in the bucket."""

    async def run(self, dump: Callable[[], AsyncGenerator[DumpPart, None]]) -> None:
        """Put all parts."""
        try:
            async with asyncio.TaskGroup() as uploads, aclosing(dump()) as parts:
                waiting = bytearray()
                async for part in parts:
                    await asyncio.to_thread(self._verify, part.data)
                    waiting += part.data
                    while len(waiting) >= self._part_bytes:
                        await self._put(uploads, bytes(waiting[: self._part_bytes]))
                        del waiting[: self._part_bytes]
                self._unpacker.end()
                if waiting:
                    await self._put(uploads, bytes(waiting))
        except BaseExceptionGroup as group:
            raise _first(group) from group
        self.is_done = True

    def manifest(self, *, window_s: int, finished_ns: int) -> Manifest:
        """Return the manifest of what was put."""
        header, trailer = self._header, self._trailer
        assert header is not None, "a dump begins with one"
        assert trailer is not None, "a dump that is whole has one"
        return Manifest(
            name=self._name,
            uuid=trailer.format.uuid,
            tenant=trailer.format.tenant,
            volume=trailer.format.name,
            made_ns=header.made_ns,
            finished_ns=finished_ns,
            last_batch=trailer.last_batch,
            rows=trailer.row_count,
            inodes=trailer.rows["inode"].puts if "inode" in trailer.rows else 0,
            parts=self._parts,
            size_bytes=self._size_bytes,
            window_s=window_s,
        )

    def _verify(self, data: bytes) -> None:
        for kind, raw in self._unpacker.feed(data):
            if kind is PieceKind.HEADER:
                self._header = Header.parse(raw)
            elif kind is PieceKind.TRAILER:
                self._trailer = Trailer.parse(raw)

    async def _put(self, uploads: asyncio.TaskGroup, data: bytes) -> None:
        await self._slots.acquire()
        uploads.create_task(self._put_part(self._parts, data), name=f"part {self._parts} of backup {self._name}")
        self._parts += 1
        self._size_bytes += len(data)

    async def _put_part(self, number: int, data: bytes) -> None:
        try:
            await self._shelf.put_part(self._name, number, data)
        finally:
            self._slots.release()


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
