"""The bytes of journals: what is read is what was written, or nothing, or an error; never anything else."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chunkstore.geometry import SliceId
from metasvc.errors import SchemaTooNew, StoreRefused
from metasvc.model import Counter, Dentry, Ino, Session, SessionId, Slice
from metasvc.store.packed import pack_batch, unpack_batch
from metasvc.store.sqlite.journal_format import (
    BLOCK_BYTES,
    Header,
    pack_header,
    pack_record,
    read_journal,
)
from metasvc.store.tables import SESSION, TABLES, Batch
from tests.metasvc.store.rows_of import INT64_MAX, batch_of, batches, example_row

KEY = bytes(range(32))
HALF_BLOCKS = 8
HEADER = Header(5, 7, HALF_BLOCKS * BLOCK_BYTES, KEY, "uuid-1")


class Image:
    """The bytes of a journal, and what a writer does to them."""

    def __init__(self) -> None:
        self.bytes = bytearray(pack_header(HEADER).ljust(HEADER.file_bytes, b"\0"))
        self.half = self.block = 0

    def append(self, number: int, packed: bytes = b"") -> int:
        """Write a record where it belongs; its offset."""
        record = pack_record(KEY, number, packed)
        if self.block + len(record) // BLOCK_BYTES > HALF_BLOCKS:
            self.half, self.block = 1 - self.half, 0
        offset = (1 + self.half * HALF_BLOCKS + self.block) * BLOCK_BYTES
        self.bytes[offset : offset + len(record)] = record
        self.block += len(record) // BLOCK_BYTES
        return offset

    def numbers(self) -> list[int]:
        """Return the numbers of the batches that a reader finds."""
        return [number for number, _ in read_journal(bytes(self.bytes), path="J").records]


@given(batch=batches())
def test_a_batch_comes_back(batch: Batch) -> None:
    back = unpack_batch(pack_batch(batch))
    assert back == batch
    assert all(type(row) is table.row for table, rows in back.puts.items() for row in rows)


def test_a_batch_of_all_tables_comes_back() -> None:
    batch = Batch(
        {table: [example_row(table, number) for number in range(30)] for table in TABLES},
        {table: [table.key_of(example_row(table, number)) for number in range(30, 40)] for table in TABLES},
    )
    assert unpack_batch(pack_batch(batch)) == batch


def test_the_bytes_are_those_of_the_documentation() -> None:
    packed = pack_batch(batch_of(Counter("n", 5), Dentry(Ino(1), b"ab", Ino(2), 3)))
    assert packed.hex(" ", -4) == (
        "0c000200 01000000 01000000 05000000 00000000 6e020004 00010000 00010000 00000000 00020000 00020000 00000000 "
        "00030000 00000000 006162"
    )
    record = pack_record(KEY, 9, packed)
    assert len(record) == BLOCK_BYTES
    assert record[16:32].hex() == "0900000000000000" + "3b000000" + "00000000"
    assert record[:16].hex() == "5bedaea2be4ad734a14b5bc1ef1290d9"
    head = pack_header(HEADER)
    assert (
        head[:32].hex() == "41544c4a" + "01000000" + "0500000000000000" + "0700000000000000" + "00800000" + "06000000"
    )
    assert head[32:70] == KEY + b"uuid-1"
    assert head[70:86].hex() == "eff77bd6fb749d34992c321dccd7ddb4"


@pytest.mark.parametrize(
    "row",
    [
        Slice(SliceId(INT64_MAX + 1), 0, 1, 0, b""),
        Slice(SliceId(5), 0, 1, 0, "text"),  # type: ignore[arg-type]
        Slice(SliceId(5), 0, 1, 0, None),  # type: ignore[arg-type]
        Slice(SliceId(5), 1.5, 1, 0, b""),  # type: ignore[arg-type]
        Counter("\udcff", 1),
        Counter(b"bytes", 1),  # type: ignore[arg-type]
        Counter(None, 1),  # type: ignore[arg-type]
        Counter("a", None),  # type: ignore[arg-type]
        Session(SessionId(1), "h", 1, "/m", 1, "text"),  # type: ignore[arg-type]
    ],
    ids=repr,
)
def test_what_sqlite_would_not_take_is_not_packed(row: Any) -> None:
    with pytest.raises(StoreRefused, match="does not fit"):
        pack_batch(batch_of(row))


def test_rows_of_a_writer_with_fewer_columns_get_the_defaults_of_the_others() -> None:
    whole = pack_batch(Batch({SESSION: [Session(SessionId(1), "host", 2, "/mnt", 3)]}, {}))
    # Without the last column: its empty value has only a length, which is the last fixed part.
    section, fixed, rest = whole[:8], whole[8:40], whole[44:]
    older = section[:2] + (5).to_bytes(2, "little") + section[4:] + fixed + rest
    assert unpack_batch(older).puts == {SESSION: [Session(SessionId(1), "host", 2, "/mnt", 3, b"")]}


@pytest.mark.parametrize("start", ["ff00020001000000", "0102020001000000", "0100ff0001000000"])
def test_rows_of_a_newer_writer_are_refused(start: str) -> None:
    with pytest.raises(SchemaTooNew, match="upgrade"):
        unpack_batch(bytes.fromhex(start) + bytes(100))


def test_the_chain_goes_over_both_halves_and_forgets_earlier_turns() -> None:
    image = Image()
    assert image.numbers() == []
    for number in range(1, 100):
        image.append(number)
        kept = min(number, HALF_BLOCKS + (number - 1) % HALF_BLOCKS + 1)
        assert image.numbers() == list(range(number - kept + 1, number + 1))


def test_a_batch_that_went_past_the_journal_ends_the_chain_before_it() -> None:
    image = Image()
    for number in (1, 2, 3):
        image.append(number)
    image.half, image.block = 1, 0
    for number in (5, 6):
        image.append(number)
    assert image.numbers() == [5, 6]


@settings(max_examples=200)
@given(seed=st.integers(0, 1 << 32))
def test_a_torn_write_leaves_what_was_there_before_it_or_is_whole(seed: int) -> None:
    rand = random.Random(seed)
    image = Image()
    last = rand.randrange(1, 60)
    for number in range(1, last + 1):
        image.append(number, rand.randbytes(rand.choice([0, 100, 5000])))
    before, numbers = bytes(image.bytes), image.numbers()
    offset = image.append(last + 1, rand.randbytes(rand.choice([0, 100, 5000, 9000])))
    written = bytes(image.bytes)
    # Sectors reach the disk in any order.
    for start in range(offset, offset + 4 * BLOCK_BYTES, 512):
        if rand.random() < 0.5 and start < len(written):
            image.bytes[start : start + 512] = before[start : start + 512]
    found = image.numbers()
    # Of the half that was begun anew the old records may be gone: SQLite has them.
    assert found[-1:] in (numbers[-1:], [last + 1])
    if bytes(image.bytes) == written:
        assert found[-1] == last + 1
    assert found == list(range(found[0], found[-1] + 1))
    assert set(found) - {last + 1} <= set(numbers)


@settings(max_examples=200)
@given(seed=st.integers(0, 1 << 32))
def test_damage_is_an_error_or_cuts_off_the_end_and_never_changes_a_batch(seed: int) -> None:
    rand = random.Random(seed)
    image = Image()
    contents = {number: rand.randbytes(rand.choice([10, 5000])) for number in range(1, rand.randrange(2, 40))}
    for number, packed in contents.items():
        image.append(number, packed)
    numbers = image.numbers()
    position = rand.randrange(len(image.bytes))
    image.bytes[position] ^= 1 << rand.randrange(8)
    try:
        found = read_journal(bytes(image.bytes), path="J").records
    except (StoreRefused, SchemaTooNew):
        return
    assert all(contents[number] == packed for number, packed in found)
    lost = set(numbers) - {number for number, _ in found}
    # The last record cannot be told from one that was never whole; what is missing before the others is told by the database.
    assert not lost or lost == {numbers[-1]} or max(lost) < found[0][0]


def test_a_damaged_record_before_a_whole_one_is_an_error() -> None:
    image = Image()
    offsets = [image.append(number, b"content") for number in range(1, 6)]
    image.bytes[offsets[2] + 33] ^= 1
    with pytest.raises(StoreRefused, match=r"J is a damaged journal, .* batch 4 behind 2.*backup.*move the file away"):
        image.numbers()


def test_bytes_of_a_user_are_no_record_though_they_look_like_one() -> None:
    image = Image()
    forged = pack_record(bytes(32), 3, pack_batch(batch_of(Counter("forged", 1))))
    # It begins at a block of its own in the content of a row, behind the last record of a later turn.
    image.append(1, bytes(BLOCK_BYTES - 32) + forged)
    image.half, image.block = 0, 0
    image.append(2)
    assert bytes(image.bytes).count(forged) == 1
    assert image.numbers() == [2]


def test_a_newer_version_is_refused_and_a_damaged_header_is_an_error() -> None:
    for position, value, error in (
        (0, b"X", StoreRefused),
        (4, b"\2", SchemaTooNew),
        (6, b"\1", StoreRefused),
        (8, b"\xff", StoreRefused),
        (40, b"\xff", StoreRefused),
        (66, b"X", StoreRefused),
    ):
        image = Image()
        image.bytes[position : position + 1] = value
        with pytest.raises(error, match=r"^J "):
            image.numbers()
    for size in (0, 100, BLOCK_BYTES, HEADER.file_bytes - BLOCK_BYTES):
        image = Image()
        del image.bytes[size:]
        with pytest.raises(StoreRefused, match="J is a damaged journal"):
            image.numbers()


def test_a_uuid_that_does_not_fit_into_a_header_is_refused() -> None:
    with pytest.raises(StoreRefused, match="2000 bytes"):
        pack_header(Header(1, 1, BLOCK_BYTES, KEY, "u" * 2000))
