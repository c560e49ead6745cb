"""Which bytes of a file come from which slice: read through layers, newest first. Pure.

A file is read through several layers (metasvc.api.overlay, with offsets in the file): the slice being written, the slices
being committed, the committed map; what none of them has is a hole.

Knows no I/O and no lengths of files: callers cut reads at the length.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from chunkstore.geometry import SliceId
from metasvc.api.overlay import Layer, clip, cut, first_behind, is_layer, overlay, overlay_all

__all__ = [
    "Layer",
    "Piece",
    "clip",
    "cut",
    "first_behind",
    "is_layer",
    "next_data",
    "next_hole",
    "overlay",
    "overlay_all",
    "pieces",
]


class Piece(NamedTuple):
    """Say where the bytes `[start, end)` of a file come from: a slice, from `slice_offset` on, or nowhere (a hole)."""

    start: int
    end: int
    slice_id: SliceId | None
    slice_offset: int


def pieces(layers: Sequence[Layer], start: int, end: int) -> list[Piece]:
    """Cut the range `[start, end)` of a file into pieces, in order, by layers given newest first.

    Pieces that continue each other are joined, across the borders of chunks too.
    """
    found: list[Piece] = []
    _walk(layers, 0, start, end, found)
    return found


def _walk(layers: Sequence[Layer], depth: int, start: int, end: int, found: list[Piece]) -> None:
    if depth == len(layers):
        _add(found, Piece(start, end, None, 0))
        return
    layer = layers[depth]
    position = start
    for index in range(first_behind(layer, start), len(layer)):
        offset, slice_id, slice_offset, length = layer[index]
        if offset >= end:
            break
        if offset > position:
            _walk(layers, depth + 1, position, offset, found)
            position = offset
        stop = min(offset + length, end)
        _add(found, Piece(position, stop, slice_id, slice_offset + position - offset))
        position = stop
    if position < end:
        _walk(layers, depth + 1, position, end, found)


def _add(found: list[Piece], piece: Piece) -> None:
    if found:
        last = found[-1]
        if last.slice_id == piece.slice_id and (
            piece.slice_id is None or last.slice_offset + last.end - last.start == piece.slice_offset
        ):
            found[-1] = Piece(last.start, piece.end, last.slice_id, last.slice_offset)
            return
    found.append(piece)


def next_data(layers: Sequence[Layer], position: int) -> int | None:
    """Return the first offset at or behind a position that some layer has; None if there is none."""
    best: int | None = None
    for layer in layers:
        index = first_behind(layer, position)
        if index < len(layer):
            offset = max(position, layer[index][0])
            best = offset if best is None else min(best, offset)
    return best


def next_hole(layers: Sequence[Layer], position: int) -> int:
    """Return the first offset at or behind a position that no layer has."""
    moved = True
    while moved:
        moved = False
        for layer in layers:
            index = first_behind(layer, position)
            if index < len(layer) and layer[index][0] <= position:
                position = layer[index].end
                moved = True
    return position
