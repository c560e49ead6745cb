"""Reading slices: from images where they have the bytes, else from the bucket, verified, one fetch per block at a time.

Owns what is fetched: which frames or the whole of a block, when, and how much of it is held in memory. Must not know files,
or where images lie.

A random read costs two ranged GETs (header and frames; the header is kept), a sequential one a GET per block. The two are
sent at once where the slice is known to be stored raw (so is what compresses badly: images, archives, trained weights), else
one after the other. The bytes of a fetch go to those who wait for it straight from memory, and to the image meanwhile; later
reads find them in one of the two. If the image cannot take them they stay in memory as long as there is room (`_parked`).

Interleavings. A fetch is a task of this reader, never of a caller: a caller that is cancelled stops waiting, the fetch goes on
and its bytes are kept. `_fetches` has at most one fetch per block, from before its first request until its frames are in the
image (or parked), all of which is changed without an await in between; so two readers of a block share one fetch, and a
reader that wanted other frames than it brings waits for it and looks again. `forget` takes the fetches of a slice out of the
table: they end, and nothing of them is kept. A fetch that fails fails all who wait for it; the next reader starts anew.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple

from chunkstore.access import BlockAccess
from chunkstore.background import Executors, TaskSet
from chunkstore.block import BlockHeader, CodecKind, decode, decode_frame, header_size, read_header
from chunkstore.budget import ByteBudget
from chunkstore.errors import AtollError, BucketUnavailable, FormatUnsupported, ObjectCorrupt
from chunkstore.geometry import FRAME_BYTES, KIB, Buffer, SliceId, block_key, blocks_of_range, frame_length
from chunkstore.images.cache import ImageCache
from chunkstore.images.image import Run
from chunkstore.images.layout import Layout, is_small
from chunkstore.model import ChunkStoreConfig, SliceInfo

# Blocks up to this length are always fetched whole: a second request costs more than the bytes.
_WHOLE_UP_TO_BYTES: Final = 1024 * KIB
# A read from the start of a slice, so long, is taken for the start of a sequential one. (A kernel that reads ahead asks for
# 256 KiB when a program reads 128 KiB from the start, and for 16 KiB when it looks at a header.)
_SEQUENTIAL_FROM_BYTES: Final = 128 * KIB
# The next fetch of a block that was fetched from in pieces so many times brings all of it.
_PIECES: Final = 3
# Altered or torn on the way: asked for so many times, with pauses that double. What is altered in the bucket stays so, and is
# told after 0.6 s. Of answers of which 30 % are altered, three in a row are 1 in 37, eight 1 in 15,000.
_ATTEMPTS: Final = 8
_FIRST_PAUSE_S: Final = 0.005
_HEADERS_KEPT: Final = 1024
_POSITIONS_KEPT: Final = 4096
# Decoding so little on the event loop costs less than the hop to a thread: 16 us of BLAKE3, 60 us of zstd at worst.
_DECODE_HERE_BYTES: Final = 64 * KIB
# Prefetches leave the rest of the memory to readers that wait.
_PREFETCH_SHARE: Final = 0.75
_LOOKS: Final = 4

Key = tuple[SliceId, int]


class _Header:
    """Keep a verified header, and how often frames of its block were fetched."""

    __slots__ = ("header", "pieces")

    def __init__(self, header: BlockHeader) -> None:
        self.header = header
        self.pieces = 0


class _Fetch:
    """Hold a fetch of a block: its bytes when `done` is done, kept or given up when `settled` is.

    `frames` None: the whole block, which is `whole` then; else `pieces` has those frames.
    """

    __slots__ = (
        "block_index",
        "charge_bytes",
        "done",
        "frames",
        "in_pieces",
        "info",
        "is_wanted",
        "pieces",
        "raw_length",
        "settled",
        "whole",
    )

    def __init__(
        self,
        info: SliceInfo,
        block_index: int,
        *,
        raw_length: int,
        frames: range | None,
        in_pieces: bool = False,
    ) -> None:
        self.info = info
        self.block_index = block_index
        self.raw_length = raw_length
        self.frames = frames
        self.charge_bytes = raw_length if frames is None else len(frames) * FRAME_BYTES
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.settled: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.whole: Buffer | None = None
        self.pieces: Buffer | None = None
        self.is_wanted = True
        self.in_pieces = in_pieces
        """Whoever wants it reads short pieces."""

    def read(self, start: int, end: int) -> Buffer | None:
        """Return bytes of the block, offsets counted from its start, if this fetch brought all of them."""
        if self.whole is not None:
            return memoryview(self.whole)[start:end]
        if self.pieces is not None and self.frames is not None:
            base = self.frames.start * FRAME_BYTES
            if base <= start and end <= base + len(self.pieces):
                return memoryview(self.pieces)[start - base : end - base]
        return None

    def fail(self, error: BaseException) -> None:
        """Give those who wait an error, unless they have the bytes already."""
        if not self.done.done():
            self.done.set_exception(error)
            # Nobody may be waiting: a prefetch.
            self.done.exception()


class Brought(NamedTuple):
    """Hold the raw bytes of consecutive frames of a block, and the digests of all its frames where they are wanted."""

    raw: Buffer
    digests: Sequence[bytes]


class ReadCounters:
    """Count reads and fetches since the start."""

    __slots__ = ("corrupt", "fetched_bytes", "fetches", "hit_bytes", "hits", "miss_bytes", "misses", "prefetch_dropped")

    def __init__(self) -> None:
        """Start at zero."""
        self.hits = 0
        self.hit_bytes = 0
        self.misses = 0
        self.miss_bytes = 0
        self.fetches = 0
        self.fetched_bytes = 0
        self.corrupt = 0
        self.prefetch_dropped = 0


class SliceReader:
    """Read sealed slices."""

    def __init__(
        self,
        config: ChunkStoreConfig,
        *,
        access: BlockAccess,
        cache: ImageCache,
        executors: Executors,
        tasks: TaskSet,
    ) -> None:
        """Take what reaches the blocks to fetch and the images to fetch into."""
        self._config = config
        self._block_bytes = config.block_bytes
        self._access = access
        self._cache = cache
        self._executors = executors
        self._tasks = tasks
        self.memory = ByteBudget(config.read_memory_bytes)
        self.counters = ReadCounters()
        self._slots = asyncio.Semaphore(config.max_fetches)
        self._fetches: dict[Key, _Fetch] = {}
        self._parked: OrderedDict[Key, _Fetch] = OrderedDict()
        self._headers: OrderedDict[Key, _Header] = OrderedDict()
        self._positions: OrderedDict[SliceId, int] = OrderedDict()
        self._raw_slices: OrderedDict[SliceId, None] = OrderedDict()

    @property
    def fetch_count(self) -> int:
        """Return how many blocks are being fetched."""
        return len(self._fetches)

    def try_read(self, info: SliceInfo, start: int, end: int) -> Buffer | None:
        """Return bytes of a slice if they are in memory: page cache, a fetch that is done, an image not yet written."""
        slice_id = info.slice_id
        data = self._cache.try_read(slice_id, start, end)
        if data is None:
            if not self._fetches and not self._parked:
                return None
            data = self._from_memory(slice_id, start, end)
            if data is None:
                return None
        self.counters.hits += 1
        self.counters.hit_bytes += end - start
        self._note_position(slice_id, end)
        return data

    def _from_memory(self, slice_id: SliceId, start: int, end: int) -> Buffer | None:
        block_index, offset = divmod(start, self._block_bytes)
        if offset + end - start > self._block_bytes:
            return None
        key = slice_id, block_index
        fetch = self._fetches.get(key) or self._parked.get(key)
        return None if fetch is None else fetch.read(offset, offset + end - start)

    async def read(self, info: SliceInfo, start: int, end: int) -> Buffer:
        """Return bytes of a slice, fetching what is missing; errors name slice and object."""
        if (data := self.try_read(info, start, end)) is not None:
            return data
        if not 0 <= start < end <= info.length:
            raise ValueError(f"bytes {start} to {end} of slice {info.slice_id}, which has {info.length}")
        is_sequential = self._is_sequential(info.slice_id, start, end)
        self._note_position(info.slice_id, end)
        pieces = list(blocks_of_range(start, end, self._block_bytes))
        for piece in pieces[1:]:
            # They are wanted as well: fetch them while the first is waited for.
            self._prefetch_block(info, piece.block_index, of_memory=1.0)
        parts = [
            await self._read_block(info, piece.block_index, piece.start, piece.end, is_sequential=is_sequential)
            for piece in pieces
        ]
        return parts[0] if len(parts) == 1 else b"".join(parts)

    async def _read_block(
        self, info: SliceInfo, block_index: int, start: int, end: int, *, is_sequential: bool
    ) -> Buffer:
        """Return bytes `[start, end)` of a block."""
        base = block_index * self._block_bytes
        key = info.slice_id, block_index
        is_first_look, own_fetches = True, 0
        while own_fetches < _LOOKS:
            fetch = self._fetches.get(key) or self._parked.get(key)
            data = None if fetch is None else fetch.read(start, end)
            if data is None:
                data = await self._cache.read(info, base + start, base + end)
            if data is not None:
                if is_first_look:
                    self.counters.hits += 1
                    self.counters.hit_bytes += end - start
                return data
            if is_first_look:
                self.counters.misses += 1
                self.counters.miss_bytes += end - start
                is_first_look = False
            fetch = self._fetches.get(key)
            if fetch is None:
                # Fetches of others do not count: many readers of one block may each want other frames of it.
                own_fetches += 1
                frames = self._frames_to_fetch(info, block_index, start, end, is_sequential=is_sequential)
                # The last look takes no chances with evictions: what it brings covers all.
                fetch = self._start(
                    info,
                    block_index,
                    frames=None if own_fetches == _LOOKS else frames,
                    in_pieces=end - start < _SEQUENTIAL_FROM_BYTES,
                )
            await asyncio.shield(fetch.done)
            if (data := fetch.read(start, end)) is not None:
                return data
            # It brought a part of what is wanted: look again when that is in the image, beside the rest.
            await asyncio.shield(fetch.settled)
        raise BucketUnavailable(f"slice {info.slice_id}: block {block_index} was fetched and lost {_LOOKS} times")

    def prefetch(self, info: SliceInfo, start: int, end: int, *, in_pieces: bool = False) -> int:
        """Start fetching blocks, as far as memory allows; load what images have into the page cache. Return how far it came."""
        for piece in blocks_of_range(start, min(end, info.length), self._block_bytes):
            base = piece.block_index * self._block_bytes
            if not self._prefetch_block(info, piece.block_index, of_memory=_PREFETCH_SHARE, in_pieces=in_pieces):
                return base + piece.start
            self._cache.read_ahead(info.slice_id, base + piece.start, base + piece.end)
        return end

    async def settled(self, info: SliceInfo, start: int, end: int) -> None:
        """Wait until no fetch of these blocks is under way; what became of them is for those who read."""
        for piece in blocks_of_range(start, end, self._block_bytes):
            fetch = self._fetches.get((info.slice_id, piece.block_index))
            if fetch is not None:
                await asyncio.shield(fetch.settled)

    def _prefetch_block(self, info: SliceInfo, block_index: int, *, of_memory: float, in_pieces: bool = False) -> bool:
        """Start fetching a block unless that is needless; False where there is no room for it."""
        key = info.slice_id, block_index
        if key in self._fetches or key in self._parked:
            return True
        layout = Layout(info.length, self._block_bytes)
        if not self._cache.absent_frames(info, layout.frames_of_block(block_index)):
            return True
        if self._cache.may_have(info.slice_id) and self._cache.opened.get(info.slice_id) is None:
            # It lies on the disk but is not open, so nothing is known of its frames: the reader will open it.
            return True
        raw_length = layout.block_length(block_index)
        self._make_room(raw_length, of_limit=of_memory)
        if len(self._fetches) >= self._config.max_fetches or not self.memory.try_acquire(
            raw_length, of_limit=of_memory
        ):
            self.counters.prefetch_dropped += 1
            return False
        self._start(info, block_index, frames=None, is_charged=True, in_pieces=in_pieces)
        return True

    def forget(self, slice_ids: Iterable[SliceId]) -> None:
        """Keep nothing of what is being fetched of these slices."""
        gone = set(slice_ids)
        for key in [key for key in self._fetches if key[0] in gone]:
            self._fetches.pop(key).is_wanted = False
        for key in [key for key in self._parked if key[0] in gone]:
            self.memory.release(self._parked.pop(key).charge_bytes)
        for slice_id in gone:
            self._positions.pop(slice_id, None)
            self._raw_slices.pop(slice_id, None)

    async def fetch_block(self, info: SliceInfo, block_index: int) -> Buffer:
        """Return a whole block from the bucket, past images and other fetches."""
        raw_length = Layout(info.length, self._block_bytes).block_length(block_index)
        await self.memory.acquire(raw_length)
        try:
            return (await self._bring(_Fetch(info, block_index, raw_length=raw_length, frames=None))).raw
        finally:
            self.memory.release(raw_length)

    # --- what to fetch

    def _is_sequential(self, slice_id: SliceId, start: int, end: int) -> bool:
        if start == 0:
            return end >= _SEQUENTIAL_FROM_BYTES
        position = self._positions.get(slice_id)
        # The kernel sends several requests of one read-ahead at once, so they overtake each other.
        return position is not None and abs(start - position) <= max(end - start, FRAME_BYTES)

    def _note_position(self, slice_id: SliceId, end: int) -> None:
        self._positions[slice_id] = end
        if len(self._positions) > _POSITIONS_KEPT:
            self._positions.popitem(last=False)

    def _frames_to_fetch(
        self, info: SliceInfo, block_index: int, start: int, end: int, *, is_sequential: bool
    ) -> range | None:
        """Return the frames of a block to fetch, None for all of it."""
        layout = Layout(info.length, self._block_bytes)
        raw_length = layout.block_length(block_index)
        known = self._headers.get((info.slice_id, block_index))
        if raw_length <= _WHOLE_UP_TO_BYTES or is_sequential or (known is not None and known.pieces >= _PIECES):
            return None
        first = layout.first_frame(block_index)
        base = first * layout.frame_bytes
        wanted = layout.frames_of_range(base + start, base + end)
        absent = self._cache.absent_frames(info, wanted) or list(wanted)
        frames = range(absent[0] - first, absent[-1] - first + 1)
        return None if len(frames) * layout.frame_bytes * 2 >= raw_length else frames

    # --- fetching

    def _start(
        self,
        info: SliceInfo,
        block_index: int,
        *,
        frames: range | None,
        is_charged: bool = False,
        in_pieces: bool = False,
    ) -> _Fetch:
        """Start a fetch. No await between the look at `_fetches` and here."""
        layout = Layout(info.length, self._block_bytes)
        raw_length = layout.block_length(block_index)
        fetch = _Fetch(info, block_index, raw_length=raw_length, frames=frames, in_pieces=in_pieces)
        self._fetches[info.slice_id, block_index] = fetch
        work = self._run(fetch, is_charged=is_charged)
        self._tasks.start(work, name=f"fetch block {block_index} of slice {info.slice_id}")
        return fetch

    async def _run(self, fetch: _Fetch, *, is_charged: bool) -> None:
        """Fetch, hand over, keep. Never raises: errors go to those who wait for `done`."""
        info = fetch.info
        key = info.slice_id, fetch.block_index
        is_parked = False
        try:
            if not is_charged:
                self._make_room(fetch.charge_bytes)
                await self.memory.acquire(fetch.charge_bytes)
                is_charged = True
            async with self._slots:
                brought = await self._bring(fetch)
            if fetch.frames is None:
                fetch.whole = brought.raw
            else:
                fetch.pieces = brought.raw
            self.counters.fetches += 1
            self.counters.fetched_bytes += len(brought.raw)
            fetch.done.set_result(None)
            is_kept = fetch.is_wanted and await self._keep(fetch, brought)
            if fetch.is_wanted and not is_kept:
                self._park(key, fetch)
                is_parked = True
        except AtollError as error:
            fetch.fail(error)
        except asyncio.CancelledError:
            fetch.fail(BucketUnavailable(f"slice {info.slice_id}: the chunk store was closed"))
            raise
        except BaseException as error:
            fetch.fail(error)
            raise
        finally:
            if self._fetches.get(key) is fetch:
                del self._fetches[key]
            fetch.settled.set_result(None)
            if is_charged and not is_parked:
                self.memory.release(fetch.charge_bytes)
            elif is_parked and self.memory.has_waiters:
                self._make_room(self.memory.limit_bytes)

    def _park(self, key: Key, fetch: _Fetch) -> None:
        """Hold on to what no image took. It replaces what was parked of that block, which did not have what was wanted."""
        before = self._parked.pop(key, None)
        if before is not None:
            self.memory.release(before.charge_bytes)
        self._parked[key] = fetch

    def _make_room(self, size_bytes: int, *, of_limit: float = 1.0) -> None:
        """Let go of parked blocks, the oldest first, until so much more fits into that share of the memory."""
        while self._parked and self.memory.used_bytes + size_bytes > self.memory.limit_bytes * of_limit:
            _, fetch = self._parked.popitem(last=False)
            self.memory.release(fetch.charge_bytes)

    async def _keep(self, fetch: _Fetch, brought: Brought) -> bool:
        """Give what was fetched to the image of its slice; return whether it took it."""
        info = fetch.info
        if is_small(info.length, self._block_bytes):
            return self._cache.put_later(info, brought.raw)
        first = fetch.block_index * (self._block_bytes // min(FRAME_BYTES, self._block_bytes))
        count = len(brought.digests)
        if fetch.frames is not None:
            first, count = first + fetch.frames.start, len(fetch.frames)
        run = Run(first, count, brought.raw, in_pieces=fetch.in_pieces)
        return await self._cache.store_block(info, fetch.block_index, runs=[run], digests=brought.digests)

    async def _bring(self, fetch: _Fetch) -> Brought:
        """Return the verified bytes of a fetch; asks again where they are altered."""
        info, block_index = fetch.info, fetch.block_index
        key = block_key(self._config.volume_uuid, info.slice_id, block_index)
        origin = f"slice {info.slice_id}: object {key}"
        attempt = 1
        while True:
            try:
                if fetch.frames is None:
                    return await self._bring_whole(fetch, origin=origin)
                return await self._bring_frames(fetch, fetch.frames, origin=origin)
            except (ObjectCorrupt, FormatUnsupported):
                self.counters.corrupt += 1
                self._headers.pop((info.slice_id, block_index), None)
                if attempt == _ATTEMPTS:
                    raise
                await asyncio.sleep(_FIRST_PAUSE_S * 2 ** (attempt - 1))
                attempt += 1
            except AtollError as error:
                if key in error.message:
                    named = f"slice {info.slice_id}: {error.message}"
                else:
                    named = f"{origin}: {error.message}"
                raise type(error)(named, errno=error.errno, retryable=error.retryable) from error

    async def _bring_whole(self, fetch: _Fetch, *, origin: str) -> Brought:
        payload = await self._access.get(fetch.info, fetch.block_index)
        # Only side files keep the digests of frames.
        wants_digests = not is_small(fetch.info.length, self._block_bytes)
        arguments = (payload, fetch.info.digest(fetch.block_index), fetch.raw_length, origin)
        if fetch.raw_length <= _DECODE_HERE_BYTES:
            return _decode_whole(*arguments, wants_digests=wants_digests)
        return await self._executors.codec(_decode_whole, *arguments, wants_digests=wants_digests)

    async def _bring_frames(self, fetch: _Fetch, frames: range, *, origin: str) -> Brought:
        known = self._headers.get((fetch.info.slice_id, fetch.block_index))
        stored: Buffer | None = None
        if known is None:
            size = header_size(fetch.raw_length)
            if self._config.codec.kind is CodecKind.RAW or fetch.info.slice_id in self._raw_slices:
                # Frames that are stored raw lie where arithmetic says; both requests at once save a round trip.
                start = size + frames.start * FRAME_BYTES
                end = min(start + len(frames) * FRAME_BYTES, size + fetch.raw_length)
                head, stored = await asyncio.gather(
                    self._access.get(fetch.info, fetch.block_index, start=0, end=size),
                    self._access.get(fetch.info, fetch.block_index, start=start, end=end),
                )
            else:
                head = await self._access.get(fetch.info, fetch.block_index, start=0, end=size)
            header = read_header(
                head,
                expected_digest=fetch.info.digest(fetch.block_index),
                raw_length=fetch.raw_length,
                origin=origin,
            )
            known = _Header(header)
            self._headers[fetch.info.slice_id, fetch.block_index] = known
            if len(self._headers) > _HEADERS_KEPT:
                self._headers.popitem(last=False)
            if any(frame.is_zstd for frame in header.frames):
                stored = None
                self._raw_slices.pop(fetch.info.slice_id, None)
            else:
                self._raw_slices[fetch.info.slice_id] = None
                if len(self._raw_slices) > _POSITIONS_KEPT:
                    self._raw_slices.popitem(last=False)
        header = known.header
        start, end = header.frames[frames.start].start, header.frames[frames.stop - 1].end
        if stored is None:
            stored = await self._access.get(fetch.info, fetch.block_index, start=start, end=end)
        raw = await self._executors.codec(_decode_frames, header, frames, stored, origin)
        known.pieces += 1
        return Brought(raw, [frame.digest for frame in header.frames])


def _decode_whole(
    payload: Buffer, expected_digest: bytes, raw_length: int, origin: str, *, wants_digests: bool
) -> Brought:
    raw = decode(payload, expected_digest=expected_digest, raw_length=raw_length, origin=origin)
    if not wants_digests:
        return Brought(raw, ())
    # Verified a moment ago; reading the table again takes 28 us of the 1,000 that a block of 4 MiB takes.
    header = read_header(payload, expected_digest=expected_digest, raw_length=raw_length, origin=origin)
    return Brought(raw, [frame.digest for frame in header.frames])


def _decode_frames(header: BlockHeader, frames: range, stored: Buffer, origin: str) -> Buffer:
    view = memoryview(stored).cast("B")
    base = header.frames[frames.start].start
    parts = [
        decode_frame(
            header, index, view[header.frames[index].start - base : header.frames[index].end - base], origin=origin
        )
        for index in frames
    ]
    assert sum(len(part) for part in parts) == sum(frame_length(header.raw_length, index) for index in frames)
    return parts[0] if len(parts) == 1 else b"".join(parts)
