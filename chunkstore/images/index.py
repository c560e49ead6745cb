"""What lies in the cache, how big it is, and in which order it was used. Small enough for millions of images.

Pure bookkeeping in memory: no files, no event loop; each method is atomic for lack of an await. An entry of a dict costs
165 bytes, which would be 50 MB for 300,000 images, so only the recently used are in one (`_recent`, in order of use). When
it is full its older half becomes a *segment*: two arrays sorted by slice id, 16 bytes per image. What was found at start is
one segment. The order of use is exact among the recent and between segments, and by slice id, so by age, within a segment.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Iterable
from typing import Final, NamedTuple

from chunkstore.geometry import SliceId

RECENT_LIMIT: Final = 32768
# What a file system gives space in, at least. A side file is charged with one of these.
SPACE_UNIT_BYTES: Final = 4096

# A packed entry in 64 bits: 1 (never 0, which marks a removed one), kind, then
# small: length (28 bits), check (32 bits); big: length (32 bits), space in units of 64 KiB, rounded up (17 bits).
_LIVE: Final = 1
_BIG: Final = 2
_BIG_UNIT_BYTES: Final = 65536


class Entry(NamedTuple):
    """Describe one image. `check` is None for a big one; `space_bytes` is what it takes on the disk, about."""

    length: int
    check: int | None
    space_bytes: int


def small_entry(length: int, check: int) -> Entry:
    """Return the entry of a small image."""
    return Entry(length, check, -(-length // SPACE_UNIT_BYTES) * SPACE_UNIT_BYTES)


def big_entry(length: int, present_bytes: int) -> Entry:
    """Return the entry of a big image that holds so many bytes."""
    return Entry(length, None, -(-present_bytes // _BIG_UNIT_BYTES) * _BIG_UNIT_BYTES + SPACE_UNIT_BYTES)


def _pack(entry: Entry) -> int:
    if entry.check is not None:
        return _LIVE | entry.length << 2 | entry.check << 30
    units = (entry.space_bytes - SPACE_UNIT_BYTES) // _BIG_UNIT_BYTES
    return _LIVE | _BIG | entry.length << 2 | units << 34


def _unpack(packed: int) -> Entry:
    if packed & _BIG:
        return big_entry(packed >> 2 & 0xFFFFFFFF, (packed >> 34) * _BIG_UNIT_BYTES)
    return small_entry(packed >> 2 & 0xFFFFFFF, packed >> 30)


class _Segment:
    """Hold entries that were not used lately: sorted by slice id, removed ones zeroed."""

    __slots__ = ("cursor", "ids", "live", "packed")

    def __init__(self, ids: array[int], packed: array[int]) -> None:
        self.ids = ids
        self.packed = packed
        self.live = len(ids)
        self.cursor = 0

    def find(self, slice_id: int) -> int:
        """Return the position of a live entry, or -1."""
        position = bisect_left(self.ids, slice_id)
        if position < len(self.ids) and self.ids[position] == slice_id and self.packed[position]:
            return position
        return -1

    def take(self, position: int) -> int:
        """Remove and return the entry at a position."""
        packed = self.packed[position]
        self.packed[position] = 0
        self.live -= 1
        return packed

    def first(self) -> int:
        """Return the position of the first live entry; there must be one."""
        while not self.packed[self.cursor]:
            self.cursor += 1
        return self.cursor


class FoundImages(NamedTuple):
    """Hold the result of a scan, sorted by slice id, and the space of all."""

    ids: array[int]
    packed: array[int]
    space_bytes: int


class ImageIndex:
    """Know every image in the cache that may be evicted."""

    def __init__(self, *, recent_limit: int = RECENT_LIMIT) -> None:
        """Start empty, and not loaded: what lies on the disk from before is not known yet."""
        self._recent: OrderedDict[int, int] = OrderedDict()
        self._recent_limit = recent_limit
        self._segments: list[_Segment] = []
        self._count = 0
        self._gone_while_loading: set[int] | None = set()
        self.space_bytes = 0

    def __len__(self) -> int:
        """Return how many images are known."""
        return self._count

    def __contains__(self, slice_id: SliceId) -> bool:
        """Return whether an image is known."""
        return slice_id in self._recent or any(segment.find(slice_id) >= 0 for segment in self._segments)

    @property
    def is_loaded(self) -> bool:
        """Return whether `load` has been called, so that what is not found here is not on the disk."""
        return self._gone_while_loading is None

    def load(self, found: FoundImages) -> list[tuple[SliceId, Entry]]:
        """Add what a scan of the directory found, as used before all else; return those removed meanwhile. Once."""
        assert self._gone_while_loading is not None
        segment = _Segment(found.ids, found.packed)
        self.space_bytes += found.space_bytes
        gone: list[tuple[SliceId, Entry]] = []
        for slice_id in {*self._recent, *self._gone_while_loading, *(i for s in self._segments for i in s.ids)}:
            position = segment.find(slice_id)
            if position >= 0:
                entry = _unpack(segment.take(position))
                self.space_bytes -= entry.space_bytes
                if slice_id in self._gone_while_loading:
                    gone.append((SliceId(slice_id), entry))
        self._gone_while_loading = None
        self._count += segment.live
        if segment.live:
            self._segments.insert(0, segment)
        return gone

    def get(self, slice_id: SliceId) -> Entry | None:
        """Return the entry of a slice without counting it as used. Costs 0.1 us, or 1 us per segment."""
        packed = self._recent.get(slice_id)
        if packed is not None:
            return _unpack(packed)
        for segment in self._segments:
            position = segment.find(slice_id)
            if position >= 0:
                return _unpack(segment.packed[position])
        return None

    def put(self, slice_id: SliceId, entry: Entry) -> None:
        """Add or replace an entry, as used last."""
        if self._gone_while_loading is not None:
            self._gone_while_loading.discard(slice_id)
        self._remove(slice_id)
        self._recent[slice_id] = _pack(entry)
        self._count += 1
        self.space_bytes += entry.space_bytes
        if len(self._recent) > self._recent_limit:
            self._retire()

    def touch(self, slice_id: SliceId) -> None:
        """Count an image as used last; unknown ones are ignored."""
        if slice_id in self._recent:
            self._recent.move_to_end(slice_id)
        elif (entry := self.get(slice_id)) is not None:
            self.put(slice_id, entry)

    def remove(self, slice_id: SliceId) -> Entry | None:
        """Forget an image and return its entry, None if it was unknown."""
        if self._gone_while_loading is not None:
            self._gone_while_loading.add(slice_id)
        return self._remove(slice_id)

    def oldest(self) -> tuple[SliceId, Entry] | None:
        """Return the image that was used longest ago; None if there is none."""
        for segment in self._segments:
            if segment.live:
                position = segment.first()
                return SliceId(segment.ids[position]), _unpack(segment.packed[position])
        if self._recent:
            slice_id = next(iter(self._recent))
            return SliceId(slice_id), _unpack(self._recent[slice_id])
        return None

    def _remove(self, slice_id: int) -> Entry | None:
        packed = self._recent.pop(slice_id, None)
        if packed is None:
            for number, segment in enumerate(self._segments):
                position = segment.find(slice_id)
                if position >= 0:
                    packed = segment.take(position)
                    if not segment.live:
                        del self._segments[number]
                    break
            else:
                return None
        entry = _unpack(packed)
        self._count -= 1
        self.space_bytes -= entry.space_bytes
        return entry

    def _retire(self) -> None:
        """Turn the older half of the recent ones into a segment: 10 ms for 16,384."""
        older = [self._recent.popitem(last=False) for _ in range(len(self._recent) // 2)]
        self._segments.append(_Segment(*_arrays(older)))


def found_images(found: Iterable[tuple[SliceId, Entry]]) -> FoundImages:
    """Return what `load` takes. Runs on a thread: 2 us per image."""
    space_bytes = 0
    pairs: list[tuple[int, int]] = []
    for slice_id, entry in found:
        space_bytes += entry.space_bytes
        pairs.append((slice_id, _pack(entry)))
    return FoundImages(*_arrays(pairs), space_bytes)


def _arrays(pairs: list[tuple[int, int]]) -> tuple[array[int], array[int]]:
    pairs.sort()
    return array("Q", [pair[0] for pair in pairs]), array("Q", [pair[1] for pair in pairs])
