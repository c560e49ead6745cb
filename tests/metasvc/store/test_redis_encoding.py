"""Keys and rows of Redis as bytes: they sort as the keys do, and come back as they were."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metasvc.model import Inode
from metasvc.store.redis.encoding import END, codec_of, name_of, ordered_int, ordered_name, read_int
from metasvc.store.redis.keys import shape_of
from metasvc.store.tables import COUNTER, DENTRY, INODE, TABLES, Key, Row, Table
from tests.metasvc.store.rows_of import INT64_MAX, INT64_MIN, column_types, keys_of, rows_of

integers = st.one_of(
    st.integers(INT64_MIN, INT64_MAX),
    st.integers(0, 62).flatmap(lambda bits: st.integers(-(1 << bits) - 2, (1 << bits) + 2)),
)
names = st.one_of(st.binary(max_size=8), st.text("\0\1\2a\x7f", max_size=8).map(str.encode))


@given(one=integers, other=integers, rest=st.binary(max_size=3), end=st.binary(max_size=3))
def test_integers_sort_as_bytes_whatever_follows_them(one: int, other: int, rest: bytes, end: bytes) -> None:
    if one != other:
        assert (ordered_int(one) + rest < ordered_int(other) + end) == (one < other)
    assert read_int(rest + ordered_int(one) + end, len(rest)) == (one, len(rest) + len(ordered_int(one)))


@pytest.mark.parametrize("value", [INT64_MAX + 1, INT64_MIN - 1, 1 << 80])
def test_integers_of_more_than_64_bits_have_no_place(value: int) -> None:
    with pytest.raises(OverflowError):
        ordered_int(value)
    for table in TABLES:
        if table is not COUNTER:
            key = (value, b"n") if bytes in _key_types(table) else (value, 1)
            with pytest.raises(OverflowError):
                shape_of[table].bucket(key[: table.key_size])


@given(one=names, other=names, rest=st.binary(max_size=3), end=st.binary(max_size=3))
def test_names_sort_as_bytes_whatever_follows_them(one: bytes, other: bytes, rest: bytes, end: bytes) -> None:
    if one != other:
        assert (ordered_name(one) + END + rest < ordered_name(other) + END + end) == (one < other)
    assert END not in ordered_name(one)
    assert name_of(ordered_name(one)) == one


@pytest.mark.parametrize("table", TABLES, ids=repr)
@given(data=st.data())
def test_rows_come_back_as_they_were(table: Table, data: st.DataObject) -> None:
    row = data.draw(rows_of(table))
    shape, codec = shape_of[table], codec_of[table]
    bucket, place = shape.bucket(table.key_of(row)), shape.place(table.key_of(row))
    stored = codec.pack(row)
    if shape.is_hash:
        key, start = shape.key(bucket, place)
        found = codec.unpack(key, stored)
        assert start == 0
    else:
        key, start = shape.key(bucket, place + stored)
        found = codec.unpack(key, place + stored, start)
        assert start == len(place)
    assert key == table.key_of(row)
    assert found == row
    assert type(found) is table.row
    assert [type(value) for value in found] == column_types(table)


@pytest.mark.parametrize("table", TABLES, ids=repr)
@given(data=st.data())
def test_buckets_and_places_sort_as_keys(table: Table, data: st.DataObject) -> None:
    one, other = data.draw(_keys(table)), data.draw(_keys(table))
    shape = shape_of[table]

    def order(key: Key) -> tuple[Any, Any]:
        place = shape.place(key)
        return shape.bucket(key), int(place) if shape.is_hash else place

    assert (order(one) < order(other)) == (one < other)
    assert (order(one) == order(other)) == (one == other)


def _keys(table: Table) -> st.SearchStrategy[Key]:
    if table is COUNTER:
        return keys_of(table)
    return st.one_of(keys_of(table), st.tuples(*[integers if kind is int else names for kind in _key_types(table)]))


def _key_types(table: Table) -> list[type]:
    return column_types(table)[: table.key_size]


@given(parent=integers, other=integers)
def test_groups_are_bounded_by_their_members(parent: int, other: int) -> None:
    for table in TABLES:
        if table.grouped and table is not DENTRY:
            lower, upper = shape_of[table].group(parent)
            last: Any = b"n" if bytes in _key_types(table) else 5
            place = shape_of[table].place((other, last))
            is_in = lower[1:] <= place < upper[1:]
            same_bucket = shape_of[table].bucket((parent,)) == shape_of[table].bucket((other,))
            assert (is_in and same_bucket) == (parent == other)


def test_an_inode_of_today_takes_less_than_a_value_that_lies_in_its_bucket_may() -> None:
    now_ns = 1_790_000_000_123_456_789
    plain: Row = Inode(100_000_007, 0o100644, 1, 1000, 1000, 0, 150_000, now_ns, now_ns, now_ns, 99_000_001, 0, 1, 0)  # type: ignore[arg-type]
    assert len(codec_of[INODE].pack(plain)) == 33
    written = plain._replace(mtime_ns=now_ns + 3_000_000, ctime_ns=now_ns + 3_500_000)  # type: ignore[attr-defined]
    assert len(codec_of[INODE].pack(written)) <= 41
    worst: Row = Inode(*[INT64_MAX] * 14)  # type: ignore[arg-type]
    assert len(codec_of[INODE].pack(worst)) <= 4 + 13 * 8
