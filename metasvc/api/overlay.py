"""How references to slices overlay each other: the one rule that owner and clients share. Pure.

A *layer* is a list of SliceRef, sorted by offset, that never overlap; what no ref covers is not in the layer. Functions here
change a layer in place: a file written at random has thousands of refs, and copying or walking them for each would be
quadratic (6,400 refs onto as many: 35 s; so: 0.04 s).
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Final

from metasvc.model import SliceRef

Layer = list[SliceRef]

# Sorts behind every slice id, so that (offset, _BEHIND) finds the place after all refs of this offset.
_BEHIND: Final = 1 << 65


def first_behind(layer: Layer, position: int) -> int:
    """Return the index of the first ref that ends behind a position (it covers the position, or begins later)."""
    index = bisect_right(layer, (position, _BEHIND))
    if index:
        ref = layer[index - 1]
        if ref[0] + ref[3] > position:
            return index - 1
    return index


def cut(layer: Layer, start: int, end: int) -> None:
    """Take the range `[start, end)` out of a layer."""
    if start >= end:
        return
    first = first_behind(layer, start)
    past = bisect_left(layer, (end,), lo=first)
    if first >= past:
        return
    kept: list[SliceRef] = []
    head, tail = layer[first], layer[past - 1]
    if head[0] < start:
        kept.append(SliceRef(head[0], head[1], head[2], start - head[0]))
    if tail[0] + tail[3] > end:
        skip = end - tail[0]
        kept.append(SliceRef(end, tail[1], tail[2] + skip, tail[3] - skip))
    layer[first:past] = kept


def overlay(layer: Layer, new: SliceRef) -> None:
    """Lay a newer ref over a layer. Neighbours that continue each other in the same slice become one ref."""
    start, slice_id, slice_offset, length = new
    if length <= 0:
        return
    if layer:
        last = layer[-1]
        behind_last = last[0] + last[3]
        if behind_last < start:  # the usual way: files are written from their beginning to their end
            layer.append(new)
            return
        if behind_last == start:
            if last[1] == slice_id and last[2] + last[3] == slice_offset:
                layer[-1] = SliceRef(last[0], slice_id, last[2], last[3] + length)
            else:
                layer.append(new)
            return
        cut(layer, start, start + length)
    at = bisect_left(layer, (start,))
    if at < len(layer):
        after = layer[at]
        if after[0] == start + length and after[1] == slice_id and after[2] == slice_offset + length:
            length += after[3]
            del layer[at]
    if at:
        before = layer[at - 1]
        if before[0] + before[3] == start and before[1] == slice_id and before[2] + before[3] == slice_offset:
            layer[at - 1] = SliceRef(before[0], slice_id, before[2], before[3] + length)
            return
    layer.insert(at, SliceRef(start, slice_id, slice_offset, length))


def overlay_all(layer: Layer, refs: Iterable[SliceRef]) -> None:
    """Lay refs over a layer, one after the other."""
    for ref in refs:
        overlay(layer, ref)


def clip(layer: Layer, start: int, end: int) -> Layer:
    """Return the part of a layer that lies in `[start, end)`, as a layer of its own."""
    part: Layer = []
    if start >= end:
        return part
    for index in range(first_behind(layer, start), len(layer)):
        offset, slice_id, slice_offset, length = layer[index]
        if offset >= end:
            break
        first, last = max(offset, start), min(offset + length, end)
        part.append(SliceRef(first, slice_id, slice_offset + first - offset, last - first))
    return part


def is_layer(refs: Sequence[SliceRef]) -> bool:
    """Return whether refs are sorted, not empty and do not overlap."""
    return all(ref.length > 0 for ref in refs) and all(a.end <= b.offset for a, b in pairwise(refs))
