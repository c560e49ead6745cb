"""The slice overlay against a plain list of bytes' origins."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from chunkstore.geometry import SliceId
from client.vfs import overlay
from client.vfs.overlay import Layer, Piece
from metasvc.model import SliceRef

SPAN = 96
Origin = tuple[int, int] | None
"""Where a byte comes from: (slice id, offset in the slice), or nowhere."""

ranges = st.tuples(st.integers(0, SPAN), st.integers(0, SPAN)).map(lambda pair: (min(pair), max(pair)))
writes = st.tuples(ranges, st.integers(1, 3), st.integers(0, 40))
"""Few slices and small offsets in them, so that refs that continue each other are met often."""
steps = st.lists(st.one_of(writes.map(lambda w: ("write", *w)), ranges.map(lambda r: ("cut", r, 0, 0))), max_size=30)


def play(operations: list[tuple[str, tuple[int, int], int, int]]) -> tuple[Layer, list[Origin]]:
    layer: Layer = []
    model: list[Origin] = [None] * SPAN
    for verb, (start, end), slice_id, slice_offset in operations:
        if verb == "cut":
            overlay.cut(layer, start, end)
            model[start:end] = [None] * (end - start)
        else:
            overlay.overlay(layer, SliceRef(start, SliceId(slice_id), slice_offset, end - start))
            model[start:end] = [(slice_id, slice_offset + i) for i in range(end - start)]
    return layer, model


def origins(found: list[Piece]) -> list[Origin]:
    result: list[Origin] = []
    for start, end, slice_id, slice_offset in found:
        result += [None if slice_id is None else (slice_id, slice_offset + i) for i in range(end - start)]
    return result


@given(steps, ranges)
def test_a_layer_reads_as_the_list_of_bytes_it_stands_for(
    operations: list[tuple[str, tuple[int, int], int, int]], part: tuple[int, int]
) -> None:
    layer, model = play(operations)
    start, end = part
    assert overlay.is_layer(layer)
    assert origins(overlay.pieces([layer], start, end)) == model[start:end]


@given(steps, steps, steps, ranges)
def test_newer_layers_hide_older_ones(
    newest: list[tuple[str, tuple[int, int], int, int]],
    middle: list[tuple[str, tuple[int, int], int, int]],
    oldest: list[tuple[str, tuple[int, int], int, int]],
    part: tuple[int, int],
) -> None:
    played = [play(operations) for operations in (newest, middle, oldest)]
    expected = [a or b or c for a, b, c in zip(*(model for _, model in played), strict=True)]
    found = overlay.pieces([layer for layer, _ in played], *part)
    assert origins(found) == expected[part[0] : part[1]]


@given(steps, steps)
def test_overlaying_a_layer_is_the_same_as_reading_through_it(
    newer: list[tuple[str, tuple[int, int], int, int]], older: list[tuple[str, tuple[int, int], int, int]]
) -> None:
    top, _ = play(newer)
    bottom, _ = play(older)
    through = overlay.pieces([top, bottom], 0, SPAN)
    overlay.overlay_all(bottom, top)
    assert overlay.is_layer(bottom)
    assert overlay.pieces([bottom], 0, SPAN) == through


@given(steps, ranges)
def test_a_clipped_layer_has_what_lies_in_the_range(
    operations: list[tuple[str, tuple[int, int], int, int]], part: tuple[int, int]
) -> None:
    layer, model = play(operations)
    start, end = part
    clipped = overlay.clip(layer, start, end)
    assert overlay.is_layer(clipped)
    expected = [origin if start <= i < end else None for i, origin in enumerate(model)]
    assert origins(overlay.pieces([clipped], 0, SPAN)) == expected


@given(steps, ranges)
def test_pieces_are_in_order_complete_and_as_few_as_possible(
    operations: list[tuple[str, tuple[int, int], int, int]], part: tuple[int, int]
) -> None:
    layer, _ = play(operations)
    start, end = part
    found = overlay.pieces([layer], start, end)
    if start < end:
        assert (found[0].start, found[-1].end) == (start, end)
    for one, two in pairwise(found):
        assert one.end == two.start
        continues = one.slice_id == two.slice_id and (
            one.slice_id is None or one.slice_offset + one.end - one.start == two.slice_offset
        )
        assert not continues


@given(steps, steps, st.integers(0, SPAN))
def test_next_data_and_next_hole_find_the_first_byte_of_their_kind(
    newer: list[tuple[str, tuple[int, int], int, int]],
    older: list[tuple[str, tuple[int, int], int, int]],
    position: int,
) -> None:
    top, above = play(newer)
    bottom, below = play(older)
    both = [a or b for a, b in zip(above, below, strict=True)]
    data = next((i for i in range(position, SPAN) if both[i] is not None), None)
    hole = next((i for i in range(position, SPAN) if both[i] is None), max(position, SPAN))
    assert overlay.next_data([top, bottom], position) == data
    assert overlay.next_hole([top, bottom], position) == hole


def test_appending_keeps_one_ref_and_a_change_in_the_middle_makes_three() -> None:
    layer: Layer = []
    for block in range(100):
        overlay.overlay(layer, SliceRef(block * 10, SliceId(1), block * 10, 10))
    assert layer == [SliceRef(0, SliceId(1), 0, 1000)]
    overlay.overlay(layer, SliceRef(500, SliceId(2), 0, 10))
    assert [ref.offset for ref in layer] == [0, 500, 510]
