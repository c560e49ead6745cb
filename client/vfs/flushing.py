"""The background flush: what was written is committed within seconds, and whatever failed is tried again.

Owns which files are dirty and when a file that failed is tried next. Must not know how a flush works (client.vfs.writing).

Interleavings: `run` is the only task; it starts flushes in a TaskGroup of its own, at most `flush_tasks` at once. A file may
be flushed by close or fsync at the same time: Writing.flush joins them. A failure here is logged and kept to the file; the
application hears of it from its own fsync or close, which tries again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, Final

from chunkstore.errors import AtollError
from client.vfs.clock import Clock
from client.vfs.metrics import VfsMetrics
from client.vfs.options import VfsOptions
from client.vfs.writing import Writing
from metasvc.model import Ino

_RETRY_FIRST_S: Final = 1.0
_RETRY_MAX_S: Final = 30.0


class _Retry:
    """How the last flushes of a file in the background went."""

    __slots__ = ("failures", "may_pass", "not_before_s")

    def __init__(self) -> None:
        self.failures = 0
        self.may_pass = False
        """Whether the last failure may pass by itself."""
        self.not_before_s = 0.0


class Flusher:
    """Flush dirty files that are old enough, or full."""

    def __init__(self, options: VfsOptions, clock: Clock, metrics: VfsMetrics, *, log: Any) -> None:
        """Take settings. `after_flush` is set by the owner of the files: called after each flush that succeeded here."""
        self._options = options
        self._clock = clock
        self._metrics = metrics
        self._log = log
        self._dirty: dict[Writing, _Retry] = {}
        self._full: set[Writing] = set()
        self._wake = asyncio.Event()
        self.after_flush: Callable[[Writing], Awaitable[None]] | None = None

    def became_dirty(self, file: Writing) -> None:
        """Take note of a file that has something pending now."""
        self._dirty.setdefault(file, _Retry())

    def became_clean(self, file: Writing) -> None:
        """Take note that nothing is pending any more."""
        self._dirty.pop(file, None)
        self._full.discard(file)

    def wants_flush(self, file: Writing) -> None:
        """Flush this file soon: a slice of it is full."""
        self._full.add(file)
        self._wake.set()

    def lost(self, file: Writing, lost_bytes: int) -> None:
        """Take note that written bytes cannot be committed any more: the session that wrote them has ended."""
        self._metrics.lost_bytes += lost_bytes
        self._log.error(
            "written data are lost: the session they belong to was ended by the metadata service",
            inode=file.inode.ino,
            lost_bytes=lost_bytes,
        )

    @property
    def dirty_files(self) -> int:
        """Return how many files have something pending."""
        return len(self._dirty)

    async def run(self) -> None:
        """Flush what is due, for ever."""
        while True:
            try:
                await asyncio.wait_for(self._wake.wait(), self._options.flush_interval_s)
            except TimeoutError:
                pass
            self._wake.clear()
            try:
                await self.flush_due()
            except Exception:  # noqa: BLE001 - an edge, logged with its traceback
                # An edge: a bug with one file must not end the flushing of all others.
                self._log.exception("the background flush failed unexpectedly")

    async def flush_due(self) -> None:
        """Flush the files that are due now. Never raises for a file's sake."""
        now = self._clock.monotonic_s()
        oldest = now - self._options.flush_age_s
        due = [
            file
            for file, retry in self._dirty.items()
            if retry.not_before_s <= now and (file in self._full or file.dirty_since_s <= oldest)
        ]
        self._full.clear()
        if due:
            await self._flush(due)

    async def flush_all(self) -> None:
        """Flush every dirty file; those that fail again and again, until the caller gives up or trying is no use."""
        delay_s = _RETRY_FIRST_S
        while self._dirty:
            await self._flush(list(self._dirty))
            if not any(retry.may_pass for retry in self._dirty.values()):
                return
            await asyncio.sleep(delay_s)
            delay_s = min(_RETRY_MAX_S, 2 * delay_s)

    def dirty_inodes(self) -> list[Ino]:
        """Return the inodes of files that have something pending."""
        return [file.inode.ino for file in self._dirty]

    async def _flush(self, files: list[Writing]) -> None:
        slots = asyncio.Semaphore(self._options.flush_tasks)

        async def one(file: Writing) -> None:
            async with slots:
                await self._flush_one(file)

        async with asyncio.TaskGroup() as group:
            for file in files:
                group.create_task(one(file))

    async def _flush_one(self, file: Writing) -> None:
        retry = self._dirty.get(file)
        try:
            await file.flush()
        except (AtollError, OSError) as error:
            self._metrics.flush_failures += 1
            if retry is not None:
                retry.failures += 1
                retry.may_pass = isinstance(error, AtollError) and error.retryable
                delay_s = min(_RETRY_MAX_S, _RETRY_FIRST_S * 2.0 ** (retry.failures - 1))
                retry.not_before_s = self._clock.monotonic_s() + delay_s
                kept = "flush failed, the data are kept" if file.is_dirty else "flush failed"
                self._log.warning(kept, inode=file.inode.ino, retry_s=delay_s, error=str(error))
        else:
            if retry is not None:
                retry.failures, retry.may_pass = 0, False
        # An error leaves nothing pending where data were lost for good.
        if self.after_flush is not None and not file.is_dirty:
            await self.after_flush(file)
