"""Writing one slice: the tail that grows in memory, and what makes it immutable and durable.

Owns the life of an unsealed slice; its full blocks are the matter of `chunkstore.flight`. Must not know files or metadata.

Bytes are appended to the *tail*, the last incomplete block, in memory. When it is full its buffer becomes a block in flight,
private and unchanged from then on. Where too many tails lie idle, one that wants to grow is *spilled* to the draft of the
image and grows there.

States: open -> frozen (seal has begun, and may fail and begin again) -> sealed; discarded from any of them. A frozen slice
never grows, because a put that timed out may still arrive, and must find the same bytes under the same key.

Interleavings. One task at a time calls `append` and `overwrite`; without an awaitable they are atomic. Seal runs as a task of
the store, one at a time, so a caller that is cancelled leaves it to finish, and the next `seal` finds how far it came.
Cancelled in `append`: `length` says what was taken. Readers may come at any time, see `chunkstore.flight`. Discarding waits,
in the background, for puts under way before it deletes objects. A crash before the seal leaves objects that no metadata name,
for gc, and a draft that the next start removes; after it, staged images are found again (`chunkstore.images.staging`).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable

from chunkstore.block import block_digest, frame_digests
from chunkstore.errors import AtollError, CacheFull, ObjectCorrupt
from chunkstore.flight import HASH_HERE_BYTES, Flight, WriteServices
from chunkstore.geometry import Buffer, SliceId, blocks_of_range
from chunkstore.images.directory import StagedName, root_of
from chunkstore.model import MAX_SLICE_BYTES, Sealed, SliceInfo
from chunkstore.tail import Tail

log = logging.getLogger(__name__)


class SliceWriter:
    """Build one slice. Made by `ChunkStore.writer`; used by one task at a time, `try_read` and `read` by any.

    A slice grows by `append` only. A block is taken for upload as soon as it is full; from then on its bytes cannot change
    (`mutable_from` moves up). A call that writes and returns None has taken the data; an awaitable must be awaited before the
    next call that writes (it is back-pressure, or a tail that lies on disk), and has taken them when it is done.
    The first `seal` of a slice over the inline limit freezes it: whether it succeeds or not, nothing can be appended after
    that (`is_frozen`), because a PUT that timed out may still arrive and must find the same bytes. Write on in a new slice.
    """

    def __init__(self, slice_id: SliceId, services: WriteServices) -> None:
        """Start an empty slice."""
        self._slice_id = slice_id
        self._services = services
        self._memory = services.memory
        self._block_bytes = services.config.block_bytes
        self._flight = Flight(slice_id, services)
        self._tail = Tail(services.memory, self._block_bytes)
        self._is_spilled = False
        self._length = 0
        self._sealing: asyncio.Task[Sealed] | None = None
        self._sealed: Sealed | None = None

    @property
    def slice_id(self) -> SliceId:
        """Return the id that the slice was opened with."""
        return self._slice_id

    @property
    def length(self) -> int:
        """Return how many bytes were appended."""
        return self._length

    @property
    def mutable_from(self) -> int:
        """Return the first offset that `overwrite` still takes: the start of the last, incomplete block."""
        return self._length if self._flight.is_frozen else self._tail_start

    @property
    def is_frozen(self) -> bool:
        """Return whether `seal` has begun, so that only reading, sealing (again) and discarding are left."""
        return self._flight.is_frozen

    @property
    def _tail_start(self) -> int:
        return len(self._flight.blocks) * self._block_bytes

    # --- growing

    def append(self, data: Buffer) -> Awaitable[None] | None:
        """Add bytes at the end. None: taken, without waiting. An awaitable: await it before writing more.

        A failed upload is kept and reported by `seal`; only where memory is at its bound and the cache disk takes nothing
        does this raise: CacheFull, or what the bucket said. ValueError over 4 GiB - 1. RuntimeError once frozen. After a
        cancellation `length` says how much was taken.
        """
        self._check_open()
        size = len(data)
        if self._length + size > MAX_SLICE_BYTES:
            raise ValueError(
                f"slice {self._slice_id} would have {self._length + size} bytes, at most {MAX_SLICE_BYTES}"
            )
        if not self._is_spilled and self._tail.length + size < self._block_bytes and self._tail.try_append(data):
            self._length += size
            return None
        view = memoryview(data)
        taken = self._append_to_tail(view)
        return None if taken == size else self._append_slowly(view[taken:])

    def _append_to_tail(self, view: memoryview) -> int:
        """Append as much as memory takes at once; return how much."""
        taken = 0
        while taken < len(view) and not self._is_spilled:
            step = min(self._block_bytes - self._tail.length, len(view) - taken)
            if not self._tail.try_append(view[taken : taken + step]):
                break
            self._length += step
            taken += step
            if self._tail.length == self._block_bytes:
                self._take_tail()
        return taken

    async def _append_slowly(self, view: memoryview) -> None:
        """Append with spilling and waiting."""
        while view:
            taken = self._append_to_tail(view)
            if taken == 0:
                step = min(self._tail_start + self._block_bytes - self._length, len(view))
                if self._is_spilled:
                    await self._append_to_draft(view[:step])
                    taken = step
                elif self._memory.has_tail_room(self._tail.charge_for(step)) or not await self._spill():
                    await self._memory.wait(self._tail.charge_for(step))
            view = view[taken:]

    async def _append_to_draft(self, piece: memoryview) -> None:
        if not await self._flight.draft.write(self._length, piece):
            raise CacheFull(
                f"slice {self._slice_id}: memory for written data is at its bound and the cache disk takes no more: "
                "free space under --cache-dir"
            )
        self._length += len(piece)
        if self._length == self._tail_start + self._block_bytes:
            self._is_spilled = False
            self._flight.add(self._block_bytes, raw=None, charge_bytes=0)

    async def _spill(self) -> bool:
        """Move the tail to the draft; False if the disk does not take it."""
        if not await self._flight.draft.write(self._tail_start, self._tail.view()):
            return False
        self._tail.drop()
        self._is_spilled = True
        return True

    def _take_tail(self) -> None:
        """Make the tail a block: its buffer is not touched any more."""
        raw, charge_bytes = self._tail.take()
        self._flight.add(len(raw), raw=raw, charge_bytes=charge_bytes)

    def overwrite(self, offset: int, data: Buffer) -> Awaitable[None] | None:
        """Replace bytes in `[mutable_from, length)`; the same promise as `append`. ValueError outside of that range."""
        self._check_open()
        start, end = self._tail_start, offset + len(data)
        if not start <= offset <= end <= self._length:
            raise ValueError(
                f"bytes {offset} to {end} of slice {self._slice_id}: only {start} to {self._length} can change"
            )
        if self._is_spilled:
            return self._overwrite_draft(offset, data)
        self._tail.overwrite(offset - start, data)
        return None

    async def _overwrite_draft(self, offset: int, data: Buffer) -> None:
        if not await self._flight.draft.write(offset, data):
            raise CacheFull(f"slice {self._slice_id}: the cache disk takes no more: free space under --cache-dir")

    def _check_open(self) -> None:
        if self._flight.is_frozen or self._flight.is_discarded:
            raise RuntimeError(f"slice {self._slice_id} is {'discarded' if self._flight.is_discarded else 'frozen'}")

    # --- reading

    def try_read(self, start: int, end: int) -> Buffer | None:
        """Return bytes `[start, end)` (cut at `length`) as written so far if that needs no waiting, else None; maybe a view."""
        end = min(end, self._length)
        if start >= end:
            return b""
        if self._sealed is not None:
            if self._sealed.inline is not None:
                return self._sealed.inline[start:end]
            return self._services.reader.try_read(self._sealed.info, start, end)
        tail_start = self._tail_start
        if start >= tail_start:
            if self._is_spilled:
                return self._flight.draft.try_read(start, end)
            return self._tail.copy(start - tail_start, end - tail_start)
        index = start // self._block_bytes
        block = self._flight.blocks[index]
        base = index * self._block_bytes
        if end > base + block.length:
            return None
        if block.raw is not None:
            return memoryview(block.raw)[start - base : end - base].toreadonly()
        return self._flight.draft.try_read(start, end) if block.in_draft else None

    async def read(self, start: int, end: int) -> Buffer:
        """Return bytes `[start, end)` (cut at `length`) as written so far."""
        end = min(end, self._length)
        if start >= end:
            return b""
        if self._sealed is not None and self._sealed.inline is None:
            return await self._services.reader.read(self._sealed.info, start, end)
        if (data := self.try_read(start, end)) is not None:
            return data
        parts = [
            await self._read_block(piece.block_index, piece.start, piece.end)
            for piece in blocks_of_range(start, end, self._block_bytes)
        ]
        return b"".join(parts)

    async def _read_block(self, index: int, start: int, end: int) -> Buffer:
        """Return bytes of one block, offsets counted from its start."""
        base = index * self._block_bytes
        if (data := self.try_read(base + start, base + end)) is not None:
            return data
        if (info := self._sealed_info()) is not None:
            # Sealed since the read began: the draft has become the image, or is gone.
            return await self._services.reader.read(info, base + start, base + end)
        block = self._flight.blocks[index] if index < len(self._flight.blocks) else None
        if block is None or block.in_draft:
            try:
                data = await self._flight.draft.read(base + start, base + end)
            except OSError:
                if (info := self._sealed_info()) is None:
                    raise
                return await self._services.reader.read(info, base + start, base + end)
            if len(data) == end - start:
                return data
        if block is not None and block.is_uploaded:
            # The draft could not take it: a block of the slice as far as it is uploaded can be read like any other.
            digests = b"".join([other.digest.ljust(16) for other in self._flight.blocks[: index + 1]])
            raw = await self._services.reader.fetch_block(
                SliceInfo(self._slice_id, base + block.length, digests), index
            )
            return memoryview(raw)[start:end]
        raise ObjectCorrupt(f"slice {self._slice_id}: block {index} was cut short on the cache disk")

    def _sealed_info(self) -> SliceInfo | None:
        return None if self._sealed is None else self._sealed.info

    # --- sealing

    async def seal(self) -> Sealed:
        """Make the slice immutable and durable as the store's durability says; what it returns is to be committed.

        Up to the inline limit: the bytes come back as `inline`, nothing is stored. OBJECT: all blocks are in the bucket.
        LOCAL: data and the record that they wait for upload are on disk.
        On an error (BucketUnavailable, BucketDenied, BucketFull …) or cancellation nothing is dropped: the writer can be
        read and sealed again; what was uploaded is not sent twice. After success a second call returns the same value.
        An empty slice seals as `inline=b""`.
        """
        if self._sealed is not None:
            return self._sealed
        if self._flight.is_discarded:
            raise RuntimeError(f"slice {self._slice_id} is discarded")
        self._flight.freeze(is_single=not self._flight.blocks and not self._is_spilled)
        if self._length <= self._services.config.inline_limit_bytes and not self._is_spilled:
            self._sealed = Sealed(self._slice_id, self._length, self._tail.copy(0, self._length), b"")
            self._tail.drop()
            return self._sealed
        if self._sealing is None or self._sealing.done():
            self._sealing = self._services.tasks.start(
                self._seal(), name=f"seal slice {self._slice_id}", raises=(AtollError, OSError)
            )
        return await asyncio.shield(self._sealing)

    async def _seal(self) -> Sealed:
        flight = self._flight
        if self._length <= self._services.config.inline_limit_bytes:
            return await self._seal_inline()
        if flight.is_local and not self._services.has_room(self._length):
            flight.give_up_local()
        info = None
        if flight.is_local:
            info = await (self._stage_draft() if flight.blocks or self._is_spilled else self._stage_tail())
        if info is None:
            info = await self._put_in_bucket()
        self._sealed = Sealed(self._slice_id, self._length, None, info.digests)
        flight.release()
        return self._sealed

    async def _seal_inline(self) -> Sealed:
        """Read a short slice that was spilled back from the draft."""
        inline = await self._flight.draft.read(0, self._length)
        if len(inline) != self._length:
            raise ObjectCorrupt(f"slice {self._slice_id}: was cut short on the cache disk")
        self._sealed = Sealed(self._slice_id, self._length, inline, b"")
        self._flight.draft.discard()
        return self._sealed

    def _take_last_block(self) -> None:
        """Make what is left of the tail the last block."""
        if self._is_spilled:
            self._is_spilled = False
            if self._tail_start < self._length:
                self._flight.add(self._length - self._tail_start, raw=None, charge_bytes=0)
        elif self._tail.length:
            self._take_tail()

    async def _put_in_bucket(self) -> SliceInfo:
        """Bring all blocks into the bucket; what the draft has of the slice becomes its image."""
        self._take_last_block()
        flight = self._flight
        await flight.finish(lambda block: block.is_uploaded)
        info = self._info()
        if flight.draft.exists:
            if all(block.in_draft for block in flight.blocks) and not flight.draft.is_broken:
                await flight.draft.publish(info, frame_digests=self._frame_digests())
            else:
                flight.draft.discard()
        elif len(flight.blocks) == 1 and (raw := flight.blocks[0].raw) is not None:
            self._services.cache.put_later(info, raw)
        return info

    async def _stage_tail(self) -> SliceInfo | None:
        """Stage a slice that is all in memory; None if the disk does not take it."""
        raw = self._tail.view()
        if len(raw) <= HASH_HERE_BYTES:
            digests = frame_digests(raw)
        else:
            digests = await self._services.executors.codec(frame_digests, raw)
        info = SliceInfo(self._slice_id, self._length, block_digest(digests, self._length))
        name = StagedName(self._slice_id, self._length, info.digests)
        try:
            await self._services.staging.stage(info, name, raw, frame_digests=digests)
        except OSError as error:
            self._services.cache.failed(error, self._slice_id)
            self._flight.give_up_local()
            return None
        self._services.staged.add(name, digests=info.digests)
        self._tail.drop()
        return info

    async def _stage_draft(self) -> SliceInfo | None:
        """Stage a slice that has a draft; None if the disk does not take it all."""
        self._take_last_block()
        flight = self._flight
        await flight.finish(lambda block: block.is_uploaded or bool(block.digest))
        if not flight.is_local or flight.draft.is_broken or not all(block.in_draft for block in flight.blocks):
            flight.give_up_local()
            return None
        info = self._info()
        name = StagedName(self._slice_id, self._length, root_of(info.digests))
        try:
            await flight.draft.stage(info, name, frame_digests=self._frame_digests())
        except OSError as error:
            self._services.cache.failed(error, self._slice_id)
            flight.give_up_local()
            return None
        self._services.staged.add(name, digests=info.digests)
        return info

    def _info(self) -> SliceInfo:
        return SliceInfo(self._slice_id, self._length, b"".join([block.digest for block in self._flight.blocks]))

    def _frame_digests(self) -> list[bytes]:
        return [digest for block in self._flight.blocks for digest in block.frame_digests]

    # --- giving up

    def abandon(self) -> None:
        """Close and remove the draft, when the store closes. What was not sealed is lost with the process anyway."""
        self._flight.draft.discard()

    async def discard(self) -> None:
        """Give the slice up: memory, image and (best effort, in the background) objects go. Idempotent, never raises.

        After a successful seal it does nothing: use `ChunkStore.delete`.
        """
        if self._sealed is not None or self._flight.is_discarded:
            return
        self._flight.is_discarded = True
        self._services.tasks.start(self._clean_up(), name=f"discard slice {self._slice_id}")

    async def _clean_up(self) -> None:
        """Wait for what is under way, then remove what there is. A seal that succeeds meanwhile is undone as well."""
        if self._sealing is not None and not self._sealing.done():
            await asyncio.wait([self._sealing])
        flight = self._flight
        for block in flight.blocks:
            if block.is_under_way and block.task is not None:
                await asyncio.wait([block.task])
        if self._sealed is None:
            self._tail.drop()
            flight.release()
        flight.draft.discard()
        await self._services.staged.remove(self._slice_id)
        self._services.cache.forget([self._slice_id])
        blocks = [
            (self._slice_id, block.index) for block in flight.blocks if block.is_tried or self._sealed is not None
        ]
        try:
            await self._services.access.delete(blocks)
        except AtollError as error:
            log.info("slice %d was discarded, but not its objects: %s; gc removes them", self._slice_id, error)
