"""Packed batches out of anybody's hands: what is no batch is an error, and takes no more memory than it has bytes."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metasvc.errors import SchemaTooNew
from metasvc.store.packed import pack_batch, unpack_batch
from metasvc.store.tables import TABLES, Batch, Table
from tests.metasvc.store.rows_of import batches, example_row

_NO_BATCH = (ValueError, TypeError, struct.error, SchemaTooNew)


@given(batch=batches(), data=st.data())
def test_a_batch_that_was_cut_off_is_none(batch: Batch, data: st.DataObject) -> None:
    packed = pack_batch(batch)
    length = data.draw(st.integers(0, max(0, len(packed) - 1)))
    try:
        found = unpack_batch(packed[:length])
    except _NO_BATCH:
        return
    # Cut where a section ends: then it is the batch of the sections before.
    assert len(pack_batch(found)) == length


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.name)
def test_rows_that_are_fewer_than_they_say_are_none(table: Table) -> None:
    packed = pack_batch(Batch({table: [example_row(table, 1), example_row(table, 2)]}, {}))
    for length in range(9, len(packed)):
        with pytest.raises((ValueError, struct.error)):
            unpack_batch(packed[:length])
    many = packed[:4] + b"\xff\xff\xff\xff" + packed[8:]
    with pytest.raises((ValueError, struct.error)):
        unpack_batch(many)


def test_rows_without_a_key_are_none() -> None:
    with pytest.raises(ValueError, match="key"):
        unpack_batch(bytes.fromhex("0200010001000000") + bytes(8))


@given(packed=st.binary(max_size=200))
def test_noise_is_a_batch_or_an_error(packed: bytes) -> None:
    try:
        unpack_batch(packed)
    except _NO_BATCH:
        pass
