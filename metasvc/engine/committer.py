"""Group commit: changes of many operations become one batch, batches go to the store one after the other.

What it owns: the open batch, the batch in flight, and the futures of those who wait. It must not know what
the rows mean.

Interleavings:

- add() is synchronous: an operation's changes enter memory and the open batch in the same stretch, so the
  order of batches is the order of operations, and batch n+1 never holds what n builds upon.
- While a batch is in flight the next one fills. It is sent in the tick after the first change if nothing is
  in flight, so operations that arrive in one tick share a batch.
- Where the owner of the loop says that nobody else needs it (`may_block`), and the last commits were quick, a commit may run
  on the loop itself: the hand-over to a thread and back is a fifth of a small commit (docs/adr/0043).
- A commit whose outcome is unknown (StoreError) is settled by last_batch(): applied, or sent again, until the
  ownership has run out; a full disk makes operations wait until it has room. When the ownership has run out, was
  lost (Fenced), or the store will never take the batch (StoreRefused), the committer *fails*: every waiter and
  every later operation gets the error, and nothing unacknowledged is ever acknowledged (fail-stop).
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

from chunkstore.errors import AtollError
from metasvc.engine.memory import Rows
from metasvc.engine.owner import Owner
from metasvc.errors import Fenced, StoreError, StoreRefused
from metasvc.store import VolumeStore
from metasvc.store.tables import Batch, Key, Row, Table

RETRY_FIRST_S = 0.05
RETRY_MAX_S = 1.0
BLOCK_S = 0.001
"""The loop does not stand still for a commit if one of the last `_JUDGED` took longer: the disk may be busy."""
_JUDGED = 16
TELL_EVERY_S = 30.0
"""A store that does not take a batch is logged at once, and again after so long."""

Tap = Callable[[Mapping[Table, Mapping[Any, Row | None]]], None]
"""Takes the changes of a batch: by table and key the row, None if it is gone. They are not changed afterwards."""

log = logging.getLogger(__name__)


class _OpenBatch:
    __slots__ = ("changes", "number", "waiters")

    def __init__(self, number: int) -> None:
        self.number = number
        self.changes: dict[Table, dict[Any, Row | None]] = {}
        self.waiters: list[asyncio.Future[None]] = []


class Committer:
    """Sends batches of one volume to its store."""

    def __init__(
        self, store: VolumeStore, owner: Owner, rows: Rows, *, on_failure: Callable[[AtollError], None]
    ) -> None:
        self._store = store
        self._owner = owner
        self._rows = rows
        self._on_failure = on_failure
        self._open = _OpenBatch(owner.ownership.last_batch + 1)
        self._sender: asyncio.Task[None] | None = None
        self._in_flight: _OpenBatch | None = None
        self.failure: AtollError | None = None
        self.batches_total = 0
        self.changes_total = 0
        self.commit_ns_total = 0
        self.observe: Callable[[int, float], None] | None = None
        """Told of each batch that is durable: its rows, and the seconds that the store took."""
        self.taps: list[Tap] = []
        """Each is told of every batch, in order, in the stretch in which it counts as durable. Must not raise."""
        self.may_block: Callable[[], bool] | None = None
        """Says whether nobody but the one who waits for the batch needs the event loop now."""
        self._took_s: deque[float] = deque(maxlen=_JUDGED)
        rows.durable_batch = owner.ownership.last_batch

    def add(self, changes: Mapping[Table, Mapping[Any, Row | None]], fresh: list[Any]) -> int:
        """Put changes in force and into the open batch; its number. No await."""
        batch = self._open
        for ino in fresh:
            self._rows.mark_fresh(ino)
        self._rows.apply(changes, batch.number)
        for table, rows in changes.items():
            held = batch.changes.get(table)
            if held is None:
                batch.changes[table] = dict(rows)
            else:
                held.update(rows)
        if self._sender is None:
            self._sender = asyncio.get_running_loop().create_task(self._send(), name="metasvc-committer")
        return batch.number

    async def wait(self, batch: int) -> None:
        """Wait until a batch is durable. Raises what made the committer fail. May be cancelled safely."""
        if self.failure is not None:
            raise self.failure
        if batch <= self._rows.durable_batch:
            return
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        flying = self._in_flight
        (flying if flying is not None and batch <= flying.number else self._open).waiters.append(waiter)
        await waiter

    async def flush(self) -> None:
        """Wait until all that was added is durable."""
        if self._sender is not None:
            await self.wait(self._open.number if self._open.changes else self._open.number - 1)

    async def _send(self) -> None:
        try:
            while self._open.changes:
                batch = self._in_flight = self._open
                self._open = _OpenBatch(batch.number + 1)
                await self._commit(batch)
                keys = [(table, key) for table, rows in batch.changes.items() for key in rows]
                self._in_flight = None
                self._rows.mark_durable(batch.number, keys)
                for tap in self.taps:
                    tap(batch.changes)
                self.batches_total += 1
                self.changes_total += len(keys)
                for waiter in batch.waiters:
                    if not waiter.done():
                        waiter.set_result(None)
            self._sender = None
        except AtollError as exc:
            self._fail(exc)
        except BaseException as exc:
            # A driver's bug or the end of the loop: what is in flight is unknown, so stop all the same.
            self._fail(StoreError(f"the commit failed unexpectedly: {exc!r}"))
            raise

    async def _commit(self, batch: _OpenBatch) -> None:
        puts: dict[Table, list[Row]] = {}
        deletes: dict[Table, list[Key]] = {}
        for table, rows in batch.changes.items():
            put = [row for row in rows.values() if row is not None]
            if put:
                puts[table] = put
            if len(put) < len(rows):
                gone = [key for key, row in rows.items() if row is None]
                deletes[table] = gone if table.grouped else [(key,) for key in gone]
        rows_batch = Batch(puts, deletes)
        delay_s = RETRY_FIRST_S
        loop = asyncio.get_running_loop()
        told_s = -math.inf
        while True:
            self._owner.check()
            began = time.monotonic()
            try:
                if self._may_block():
                    await self._store.commit(self._owner.ownership, batch.number, rows_batch, here=True)
                else:
                    await self._store.commit(self._owner.ownership, batch.number, rows_batch)
                # Not the loop's time: that stands while the loop does.
                took_s = time.monotonic() - began
                self._took_s.append(took_s)
                self.commit_ns_total += int(took_s * 1e9)
                if self.observe is not None:
                    self.observe(sum(len(rows) for rows in batch.changes.values()), took_s)
                return
            except (Fenced, StoreRefused):
                raise
            except StoreError as error:
                if loop.time() >= told_s + TELL_EVERY_S:
                    told_s = loop.time()
                    log.warning("a batch was not taken, operations wait until it is: %s", error)
                if await self._is_applied(batch.number, delay_s):
                    return
            delay_s = min(RETRY_MAX_S, delay_s * 2)

    def _may_block(self) -> bool:
        took_s = self._took_s
        return self.may_block is not None and len(took_s) == _JUDGED and max(took_s) < BLOCK_S and self.may_block()

    async def _is_applied(self, number: int, delay_s: float) -> bool:
        """Find out what became of a batch, waiting for the store to answer while the ownership lasts."""
        while True:
            await asyncio.sleep(delay_s)
            self._owner.check()
            try:
                return await self._store.last_batch(self._owner.ownership) >= number
            except Fenced:
                raise
            except StoreError:
                delay_s = min(RETRY_MAX_S, delay_s * 2)

    def _fail(self, error: AtollError) -> None:
        self.failure = error
        waiters = self._open.waiters + (self._in_flight.waiters if self._in_flight else [])
        for waiter in waiters:
            if not waiter.done():
                waiter.set_exception(error)
        self._on_failure(error)
