"""Making a volume from a dump, in any store: nobody can open it before all of it is there and was verified.

What it owns: the state ``loading`` in the volume's format, batches of bounded size, and by how much numbers are moved on. It
needs no engine: rows are put as they are, in order of the pieces, and the rules of POSIX have nothing to say.

A crash at any point leaves a volume in the state ``loading``, whose owner is gone: Engine.open refuses it, and the next load
to the same address deletes it and begins anew. A load that fails deletes what it made. The step from nothing to all is one
durable change of the format, after the last row, when the trailer said that there are no more.

Numbers. Objects are named by the volume's uuid and a slice id, so a loaded volume must never give out an id that the original
gave out after the dump, nor one of an earlier load of the same dump: the objects of those may be there. No row tells. So ids
begin at the time: at `SLICES_PER_SECOND` times the seconds since 1970, or `SLICES_APART` behind the dump's, whichever is more
(a clock that is wrong). An original whose ids began at 1 is never near; one that was loaded itself would have to give out two
million ids a second since then, a hundred times what an owner can. Ids stay below 2^53, which is as far as JSON reaches
everywhere, until 2106. Who has the bucket at hand gives besides the lowest id of which there can be no object
(metasvc.jobs.backups.slice_ids): then nothing is overwritten whatever the clocks said, however old the dump is. The other
numbers name nothing outside of the volume: they are moved on by `NUMBERS_APART`, so that what somebody remembers of the
original (a mount that was not unmounted) is not found, rather than taken for something else.

Objects of ids in between belong to no slice of the loaded volume: for its `atoll gc` they are leaked, and go.
"""

from __future__ import annotations

import asyncio
import logging
import struct
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Final

from chunkstore.errors import AtollError, FormatUnsupported
from metasvc.api.dump_stream import DumpDamaged, Header, PieceKind, RowCount, Trailer, Unpacker
from metasvc.engine.format import NEXT_INO, NEXT_SLICE
from metasvc.engine.owner import OWNER_TTL_S, Owner
from metasvc.errors import Fenced, NotOwner, StoreError, StoreRefused, VolumeExists, VolumeMissing
from metasvc.model import ROOT_INO, Counter, VolumeFormat
from metasvc.store import Store, VolumeStore
from metasvc.store.packed import TABLE_CODES, unpack_batch
from metasvc.store.tables import COUNTER, INODE, TABLES, Batch, Key, Row, Table

__all__ = ["Loaded", "load", "moved_on"]

SLICES_PER_SECOND: Final = 1 << 21
SLICES_APART: Final = 1 << 32
NUMBERS_APART: Final = 1 << 20
COMMIT_BYTES: Final = 4 << 20
"""Of packed rows in one commit: some ten thousand rows, more than a journal takes, which would write them twice."""
COMMIT_ROWS: Final = 50_000
REMOVE_S: Final = 30.0
"""So long a load that failed is removed; what is left goes with the next volume that is deleted."""
_RETRY_S: Final = 0.1
_PREFIX: Final = "next_"
"""How the names of counters begin from which numbers are taken."""
_BY_NAME: Final = {table.name: table for table in TABLES}

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Loaded:
    """What was loaded."""

    format: VolumeFormat
    header: Header
    trailer: Trailer
    rows: int
    """Rows and keys of all pieces."""


Told = Callable[[int, int], None]
"""Takes how many rows and keys, and bytes of the dump, are durable."""


def moved_on(name: str, value: int, *, now_ns: int, least_slice_id: int = 0) -> int:
    """Return the counter of a loaded volume from which numbers are taken, by name and value of the dump's."""
    if name == NEXT_SLICE:
        return max(value + SLICES_APART, now_ns // 1_000_000_000 * SLICES_PER_SECOND, least_slice_id)
    return value + NUMBERS_APART


async def load(
    store: Store,
    data: AsyncIterator[bytes],
    *,
    tenant: str,
    name: str,
    address: str,
    bucket_url: str | None = None,
    check: Callable[[VolumeFormat], None] | None = None,
    told: Told | None = None,
    least_slice_id: int = 0,
    clock_ns: Callable[[], int] = time.time_ns,
) -> Loaded:
    """Make a volume of the bytes of a dump, which come in pieces of any size. It can be opened when this returns.

    ``address``: what others are told of who loads it. ``bucket_url``: instead of the dump's. ``check`` may refuse the format
    that results, before anything is made; ``told`` is called after each commit.
    ``least_slice_id``: no lower id is given out, for the bucket has objects of those.

    Raises VolumeExists for a volume of that name, unless it is what a load left that did not come to its end, and for one of
    the same uuid: two volumes on the same objects delete each other's. StoreError while another load of it is under way (after
    10 s, for it may be dead), and as of any store; DumpDamaged, FormatUnsupported, SchemaTooNew. Nothing is left then, nor if
    it is cancelled, as far as the store can be reached. Memory: three commits, decoded. Cost: one trip for each commit.
    """
    reader = _Reader(data)
    header = await reader.header()
    volume_format = replace(
        header.format,
        tenant=tenant,
        name=name,
        bucket_url=header.format.bucket_url if bucket_url is None else bucket_url,
        loading=True,
    )
    if check is not None:
        check(volume_format)
    await _check_alone(store, volume_format)
    loading = await _make(store, volume_format, address=address, told=told)
    try:
        trailer = await loading.run(reader)
        if trailer.format.uuid != header.format.uuid:
            raise DumpDamaged("the dump begins with one volume and ends with another: take another dump")
        await loading.move_numbers_on(clock_ns(), least_slice_id=least_slice_id)
        await _check_alone(store, volume_format)
        changed = replace(trailer.format, tenant=tenant, name=name, bucket_url=volume_format.bucket_url, loading=False)
        await loading.publish(changed)
    except BaseException as error:
        # Fenced: another load has begun anew, and may be at its end.
        if not isinstance(error, Fenced):
            await _in_peace(_remove(store, volume_format, loading))
        raise
    finally:
        await _in_peace(loading.volume.close())
    return Loaded(changed, header, trailer, loading.rows)


async def _check_alone(store: Store, volume_format: VolumeFormat) -> None:
    """Refuse a second volume on the same objects, as far as this store knows."""
    for each in await store.list_volumes():
        if each.uuid == volume_format.uuid and not each.loading:
            raise VolumeExists(
                f"the store has volume {each.tenant}/{each.name} of the same uuid, and two volumes on the same objects delete "
                "each other's: delete that one's metadata first"
            )


async def _make(store: Store, volume_format: VolumeFormat, *, address: str, told: Told | None) -> _Loading:
    """Make the volume and own it; in the place of one whose load did not come to its end. VolumeExists, StoreError."""
    # The owner of one that was killed is waited for, where only its expiry tells.
    deadline_s = time.monotonic() + OWNER_TTL_S + 1
    while True:
        try:
            return await _made(store, volume_format, address=address, told=told)
        except VolumeExists:
            found = [
                each
                for each in await store.list_volumes()
                if (each.tenant, each.name) == (volume_format.tenant, volume_format.name)
            ]
            if not all(each.loading for each in found):
                raise
        try:
            await store.delete_volume(volume_format.tenant, volume_format.name)
        except VolumeMissing:
            pass
        except NotOwner as error:
            if time.monotonic() >= deadline_s:
                where = f"{volume_format.tenant}/{volume_format.name}"
                raise StoreError(f"volume {where} is being loaded by {error.owner}: wait for that to end") from error
            await asyncio.sleep(min(1.0, error.expires_in_s + _RETRY_S))


async def _made(store: Store, volume_format: VolumeFormat, *, address: str, told: Told | None) -> _Loading:
    """Make the volume and own it. A caller that is cancelled waits until that is done, and removes it: nothing is left."""

    async def make() -> _Loading:
        await store.create_volume(volume_format, Batch({}, {}))
        volume = await store.open_volume(volume_format.tenant, volume_format.name)
        try:
            return _Loading(volume, await Owner.acquire(volume, address=address, ttl_s=OWNER_TTL_S), told)
        except BaseException:
            await volume.close()
            raise

    task = asyncio.create_task(make())
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await _in_peace(_undo(store, volume_format, task))
        raise


async def _undo(store: Store, volume_format: VolumeFormat, making: asyncio.Task[_Loading]) -> None:
    (loading,) = await asyncio.gather(making, return_exceptions=True)
    if isinstance(loading, _Loading):
        await _remove(store, volume_format, loading)
        await loading.volume.close()


async def _remove(store: Store, volume_format: VolumeFormat, loading: _Loading) -> None:
    """Delete what was made, if it is still this load's. What stays, as the store is away, is replaced by the next load."""
    try:
        async with asyncio.timeout(REMOVE_S):
            await loading.owner.renew()
            await loading.owner.release()
            await store.delete_volume(volume_format.tenant, volume_format.name)
    except (AtollError, TimeoutError) as error:
        log.warning("what was loaded of %s/%s was not removed: %s", volume_format.tenant, volume_format.name, error)


async def _in_peace(work: Coroutine[None, None, None]) -> None:
    """Wait for the end of something short, also if the caller is cancelled meanwhile: then CancelledError, after it."""
    task = asyncio.create_task(work)
    cancelled = False
    while not task.done():
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError:
            cancelled = True
    task.result()
    if cancelled:
        raise asyncio.CancelledError


class _Reader:
    """Batches out of the bytes of a dump."""

    def __init__(self, data: AsyncIterator[bytes]) -> None:
        self._data = data
        self._unpacker = Unpacker()
        self._pieces: list[tuple[PieceKind, bytes]] = []
        self._tables: frozenset[str] = frozenset()
        self._counts: dict[str, RowCount] = {}
        self.taken_bytes = 0

    async def header(self) -> Header:
        """Return what the dump begins with. DumpDamaged, FormatUnsupported, SchemaTooNew."""
        piece = await self._next()
        assert piece is not None
        header = Header.parse(piece[1])
        for name, (number, columns) in header.tables.items():
            table = _BY_NAME.get(name)
            if table is None or TABLE_CODES[table] != number or columns != table.columns[: len(columns)]:
                raise FormatUnsupported(
                    f"the dump has a table {name!r} that this AtollFS does not know: upgrade AtollFS"
                )
        self._tables = frozenset(header.tables)
        return header

    async def batches(self, into: asyncio.Queue[tuple[Batch, int, int] | None]) -> Trailer:
        """Put batches that are worth a commit, each with its rows and the bytes read so far; None at the end."""
        merged, rows, size = _Merged(), 0, 0
        while (piece := await self._next()) is not None:
            kind, raw = piece
            if kind is PieceKind.TRAILER:
                trailer = Trailer.parse(raw)
                await self._read_to_end()
                self._check(trailer)
                await into.put((merged.batch(), rows, self.taken_bytes))
                await into.put(None)
                return trailer
            rows += await asyncio.to_thread(self._unpack, raw, merged)
            size += len(raw)
            if size >= COMMIT_BYTES or rows >= COMMIT_ROWS:
                await into.put((merged.batch(), rows, self.taken_bytes))
                merged, rows, size = _Merged(), 0, 0
        raise AssertionError("the end without a trailer is an error of its own")

    async def _next(self) -> tuple[PieceKind, bytes] | None:
        while not self._pieces:
            data = await anext(self._data, None)
            if data is None:
                self._unpacker.end()
                return None
            self.taken_bytes += len(data)
            self._pieces = await asyncio.to_thread(self._feed, data)
        return self._pieces.pop(0)

    def _feed(self, data: bytes) -> list[tuple[PieceKind, bytes]]:
        """Return the pieces that some bytes complete. Runs in a thread: decompressing and hashing let go of the GIL."""
        return list(self._unpacker.feed(data))

    async def _read_to_end(self) -> None:
        """Find out that nothing follows the trailer."""
        async for data in self._data:
            self.taken_bytes += len(data)
            for _ in self._unpacker.feed(data):
                pass

    def _unpack(self, raw: bytes, into: _Merged) -> int:
        """Add what is in a piece to a batch; how many rows and keys. Runs in a thread."""
        try:
            batch = unpack_batch(raw)
        except (ValueError, TypeError, struct.error) as error:
            raise DumpDamaged(f"the rows of the dump are none ({error}): take another dump") from error
        if not {table.name for table in (*batch.puts, *batch.deletes)} <= self._tables:
            raise DumpDamaged("the dump has rows of a table that its header does not name: take another dump")
        for table, rows in batch.puts.items():
            self._counts.setdefault(table.name, RowCount()).puts += len(rows)
        for table, keys in batch.deletes.items():
            self._counts.setdefault(table.name, RowCount()).deletes += len(keys)
        return into.add(batch)

    def _check(self, trailer: Trailer) -> None:
        expected = {name: count for name, count in trailer.rows.items() if count != RowCount()}
        if self._counts != expected:
            raise DumpDamaged("the dump has other rows than its trailer says: take another dump")


class _Merged:
    """Batches as one: of each key the last change counts."""

    def __init__(self) -> None:
        self._changes: dict[Table, dict[Key, Row | None]] = {}

    def add(self, batch: Batch) -> int:
        count = 0
        for table, rows in batch.puts.items():
            size = table.key_size
            self._changes.setdefault(table, {}).update((row[:size], row) for row in rows)
            count += len(rows)
        for table, keys in batch.deletes.items():
            self._changes.setdefault(table, {}).update(dict.fromkeys(keys))
            count += len(keys)
        return count

    def batch(self) -> Batch:
        puts = {table: [row for row in rows.values() if row is not None] for table, rows in self._changes.items()}
        deletes = {table: [key for key, row in rows.items() if row is None] for table, rows in self._changes.items()}
        return Batch(puts, deletes)


class _Loading:
    """The rows of a volume that is being loaded, and their owner."""

    def __init__(self, volume: VolumeStore, owner: Owner, told: Told | None) -> None:
        self.volume = volume
        self.owner = owner
        self.rows = 0
        self._told = told
        self._last_batch = owner.ownership.last_batch

    async def run(self, reader: _Reader) -> Trailer:
        """Commit all that a dump has; its trailer. While one batch is committed the next is read."""
        batches: asyncio.Queue[tuple[Batch, int, int] | None] = asyncio.Queue(maxsize=1)
        try:
            async with asyncio.TaskGroup() as tasks:
                renewing = tasks.create_task(self.owner.renew_forever(), name="owner of a load")
                reading = tasks.create_task(reader.batches(batches), name="reading of a dump")
                while (found := await batches.get()) is not None:
                    batch, rows, taken_bytes = found
                    await self._commit(batch)
                    self.rows += rows
                    if self._told is not None:
                        self._told(self.rows, taken_bytes)
                renewing.cancel()
        except BaseExceptionGroup as group:
            raise _first(group) from group
        return reading.result()

    async def move_numbers_on(self, now_ns: int, *, least_slice_id: int) -> None:
        """See the module's text. DumpDamaged if this is no volume."""
        counters: list[Any] = await self.volume.scan(COUNTER, after=None, limit=1000)
        values: dict[str, int] = dict(counters)
        roots = (await self.volume.load({INODE: [(ROOT_INO,)]}, {})).rows.get(INODE)
        if not roots or NEXT_INO not in values or NEXT_SLICE not in values:
            raise DumpDamaged("the dump has no root directory, or no counters: take another dump")
        moved: list[Row] = [
            Counter(name, moved_on(name, value, now_ns=now_ns, least_slice_id=least_slice_id))
            for name, value in values.items()
            if name.startswith(_PREFIX)
        ]
        await self._commit(Batch({COUNTER: moved}, {}))

    async def publish(self, volume_format: VolumeFormat) -> None:
        """Let the volume be opened, and give it up."""
        await self.owner.renew()
        await self.volume.put_format(self.owner.ownership, volume_format)
        with suppress(AtollError):  # it is there; the ownership runs out by itself
            await self.owner.release()

    async def _commit(self, batch: Batch) -> None:
        """Commit, as often as it takes while the ownership lasts: a store may be away for a moment."""
        number = self._last_batch + 1
        failure: StoreError | None = None
        while True:
            try:
                self.owner.check()
                if failure is not None and await self.volume.last_batch(self.owner.ownership) >= number:
                    break
                await self.volume.commit(self.owner.ownership, number, batch)
                break
            except StoreRefused:
                raise
            except Fenced as error:
                raise failure or error from None
            except StoreError as error:
                failure = error
            await asyncio.sleep(_RETRY_S)
        self._last_batch = number


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """Return the one error of a group that says what went wrong."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
