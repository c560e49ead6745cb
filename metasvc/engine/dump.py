"""A dump of a volume while it is used: all rows as they were after one batch, as a stream of pieces.

What it owns: which tables are carried, the walk over them, and the changes that come meanwhile (a tap of the committer). The
bytes are those of metasvc.api.dump_stream and metasvc.store.packed. Nobody is held back, and nothing is kept of the volume but
a page and what changed since the last one.

The stream: a header; for each table its rows, page by page in order of the key; after *each page* the changes of all batches
that became durable since the last such place, merged by key; at the end, when all that is under way is durable, the rest of
the changes, and the trailer with the number L of the last batch.

Theorem: who applies the pieces in order has exactly the rows that the volume had after batch L. Let k be the key of a row.

- No batch from the first one tapped up to L changed k. Then every page shows k as it was all the time: a page shows rows as
  some batch left them, not older than the last that was durable when the page was asked for, and the first page was asked for
  after the tap was put on. If there is a row, the one page that covers k has it; if there is none, no page does.
- Else let b be the last batch up to L that changed k. It was tapped, since it became durable after the tap was put on, and
  its change of k is the last one of k in the place where it stands, for batches become durable in order. What may come
  behind that place is a page that has k. It was asked for after that place, hence after b was durable, so it shows k as b left
  it or as a later batch did; and a later one that changes k is above L. But no page shows what a batch above L did: when the
  last page had come the dump waited for all batches that had begun (Committer.flush), and L is not below those.

The two places where it is decided what L is, and what the tap has, are one stretch without an await. That no other process
owned the volume meanwhile, so that its changes would have come past the tap, is asked of the store at the end: the ownership
must still be the one that was acquired, with its epoch.

What is not carried belongs to clients that live: sessions, their replies, their ranges of slice ids. What they *sustain* is
carried: nameless inodes that somebody has open. A loaded volume has no session for them, so whoever opens it first removes
them (Engine.open ends what is left of sessions without a row); without those rows they would stay for ever.

Memory: a page (2,000 rows, or 500 of up to 64 KiB each), and what changes while the reader takes a page. A reader that is slow
lets that grow, up to `TAPPED_BYTES`; beyond, the dump ends with DumpTooSlow, and the volume is none the worse. Not a file
instead of memory: at 10,000 creates a second that is 5 s of a reader that stands still, a reader that is that slow over and
over will not be done, and it would be the disk of the service, which has none of its own to fill.
"""

from __future__ import annotations

import asyncio
import errno
import time
from collections.abc import AsyncGenerator, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

from chunkstore.errors import AtollError
from metasvc.api.dump_stream import PIECE_BYTES, Header, Packer, PieceKind, RowCount, Trailer
from metasvc.engine.engine import Engine
from metasvc.engine.memory import cost_bytes
from metasvc.model import DumpPart
from metasvc.store.packed import TABLE_CODES, column_kinds, pack_batch
from metasvc.store.tables import (
    CHUNK,
    PACK,
    REPLIES,
    SESSION,
    SLICE,
    SLICE_RANGE,
    TABLES,
    XATTR,
    Batch,
    Key,
    Row,
    Table,
)

__all__ = ["CARRIED", "TAPPED_BYTES", "DumpTooSlow", "dump"]

CARRIED: Final = tuple(table for table in TABLES if table not in (SESSION, REPLIES, SLICE_RANGE))
"""The tables of a dump, in its order."""
TAPPED_BYTES: Final = 128 << 20
"""What changes may take that wait for a reader: about 200,000 rows."""
DUMPS_MAX: Final = 4
"""So many at once, of one volume."""
_PAGE_ROWS: Final = 2000
_WIDE_PAGE_ROWS: Final = 500
_WIDE: Final = (CHUNK, SLICE, XATTR, PACK)
"""Tables with rows of many bytes: pages of at most 32 MiB, usually far less."""


class DumpTooSlow(AtollError):
    """Say that more changed than memory may take before the reader of a dump took what there was."""

    code = "dump-too-slow"
    errno = errno.ENOBUFS
    retryable = True


async def dump(
    engine: Engine,
    *,
    tapped_bytes: int = TAPPED_BYTES,
    page_rows: int = _PAGE_ROWS,
    wide_page_rows: int = _WIDE_PAGE_ROWS,
) -> AsyncGenerator[DumpPart, None]:
    """Yield the bytes of a dump, in parts. Close it (aclosing) if it is not read to its end.

    Errors: DumpTooSlow, StoreError, and what makes the engine fail; what was yielded then is no whole dump, and says so by
    its lack of a trailer. Cost: a trip to the store for each page, and 2 us of CPU for each row (bench/dump.py), most of
    it in threads.
    """
    if len(engine.committer.taps) >= DUMPS_MAX:
        raise AtollError(f"{DUMPS_MAX} dumps of the volume are under way: wait for one to end", errno=errno.EBUSY)
    pieces = _Pieces()
    tap = _Tap(tapped_bytes)
    with tap.on(engine):
        yield DumpPart(await pieces.header(engine))
        for table in CARRIED:
            limit = wide_page_rows if table in _WIDE else page_rows
            after: Key | None = None
            is_last = False
            while not is_last:
                page = await engine.store.scan(table, after=after, limit=limit)
                _check(engine)
                for part in _cut(Batch({table: page}, {})):
                    yield await pieces.rows(part, table)
                if page:
                    after = table.key_of(page[-1])
                is_last = len(page) < limit
                for part in _cut(tap.take()):
                    yield await pieces.rows(part, table)
        await engine.settled()
        # No await between these two: see the module's text.
        rest, last_batch = tap.take(), engine.rows.durable_batch
        volume_format = engine.format
        await engine.owner.renew()
    for part in _cut(rest):
        yield await pieces.rows(part, CARRIED[-1])
    yield DumpPart(await pieces.trailer(Trailer(volume_format, last_batch, pieces.counts)))


def _check(engine: Engine) -> None:
    if engine.failure is not None:
        raise engine.failure
    engine.owner.check()


class _Tap:
    """Changes of the batches that became durable since they were last taken, merged by key: the last one counts."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._changes: dict[Table, dict[Any, Row | None]] = {}
        self._bytes = 0
        self._is_over = False

    @contextmanager
    def on(self, engine: Engine) -> Iterator[None]:
        """Hear of every batch until the block ends."""
        taps = engine.committer.taps
        taps.append(self.hear)
        try:
            yield
        finally:
            taps.remove(self.hear)

    def hear(self, changes: Mapping[Table, Mapping[Any, Row | None]]) -> None:
        """Add the changes of a batch (called by the committer)."""
        if self._is_over:
            return
        for table, rows in changes.items():
            if table not in CARRIED:
                continue
            held = self._changes.setdefault(table, {})
            for key, row in rows.items():
                if key in held:
                    self._bytes -= cost_bytes(held[key])
                held[key] = row
                self._bytes += cost_bytes(row)
        if self._bytes > self._max_bytes:
            self._is_over = True
            self._changes = {}

    def take(self) -> Batch:
        """Return the changes, and begin anew. DumpTooSlow. No await, hence atomic."""
        if self._is_over:
            raise DumpTooSlow(
                f"the volume changed by over {self._max_bytes >> 20} MiB of rows before the dump was taken any further: "
                "write it to a faster place, a local file for one, or when less is going on"
            )
        puts: dict[Table, list[Row]] = {}
        deletes: dict[Table, list[Key]] = {}
        for table, rows in self._changes.items():
            puts[table] = [row for row in rows.values() if row is not None]
            deletes[table] = [key if table.grouped else (key,) for key, row in rows.items() if row is None]
        self._changes, self._bytes = {}, 0
        return Batch(puts, deletes)


class _Pieces:
    """Makes the pieces, off the event loop, and counts what is in them."""

    def __init__(self) -> None:
        self._packer = Packer()
        self.counts: dict[str, RowCount] = {}

    async def header(self, engine: Engine) -> bytes:
        tables = {table.name: (TABLE_CODES[table], table.columns) for table in CARRIED}
        header = Header(engine.format, time.time_ns(), tables)
        return await asyncio.to_thread(self._packer.piece, PieceKind.HEADER, header.packed())

    async def rows(self, batch: Batch, table: Table) -> DumpPart:
        """Return the piece of a batch; ``table`` is the one that is being read."""
        count = 0
        for changed, rows in batch.puts.items():
            self.counts.setdefault(changed.name, RowCount()).puts += len(rows)
            count += len(rows)
        for changed, keys in batch.deletes.items():
            self.counts.setdefault(changed.name, RowCount()).deletes += len(keys)
            count += len(keys)
        data = await asyncio.to_thread(lambda: self._packer.piece(PieceKind.ROWS, pack_batch(batch)))
        return DumpPart(data, count, table.name)

    async def trailer(self, trailer: Trailer) -> bytes:
        return await asyncio.to_thread(self._packer.piece, PieceKind.TRAILER, trailer.packed())


def _cut(batch: Batch) -> Iterator[Batch]:
    """Yield parts of a batch that are pieces of a dump, `PIECE_BYTES` each or one row, in any order; none if it is empty."""
    for table, rows in batch.puts.items():
        for some in _ROWS[table].runs(rows):
            yield Batch({table: some}, {})
    for table, keys in batch.deletes.items():
        for some in _KEYS[table].runs(keys):
            yield Batch({}, {table: some})


class _Lengths:
    """How many bytes rows of some columns take, about: a character of text may be four."""

    def __init__(self, kinds: list[type]) -> None:
        self._fixed = 8 * len(kinds)
        self._sized = [(index, 4 if kind is str else 1) for index, kind in enumerate(kinds) if kind is not int]

    def runs(self, rows: list[Any]) -> Iterator[list[Any]]:
        """Yield rows in runs of at most `PIECE_BYTES`, or of one row."""
        if not self._sized:
            step = PIECE_BYTES // self._fixed
            for first in range(0, len(rows), step):
                yield rows[first : first + step]
            return
        first = size = 0
        for index, row in enumerate(rows):
            more = self._fixed + sum([len(row[column]) * most for column, most in self._sized])
            if size + more > PIECE_BYTES and index > first:
                yield rows[first:index]
                first, size = index, 0
            size += more
        if first < len(rows):
            yield rows[first:]


_ROWS: Final = {table: _Lengths(column_kinds(table)) for table in TABLES}
_KEYS: Final = {table: _Lengths(column_kinds(table)[: table.key_size]) for table in TABLES}
