"""The bytes of a dump: what is read is what was written, or an error; never anything else."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import pytest
import zstandard
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from chunkstore.errors import AtollError, FormatUnsupported
from metasvc.api.dump_stream import DumpDamaged, Header, Packer, PieceKind, RowCount, Trailer, Unpacker
from tests.metasvc.store.rows_of import volume_format

HEADER = Header(volume_format(), 7, {"inode": (1, ("ino", "mode"))})
TRAILER = Trailer(volume_format(capacity_bytes=5), 9, {"inode": RowCount(3, 1)})


def pieces_of(*rows: bytes) -> list[bytes]:
    """Return the pieces of a dump, of which the first has the beginning of the file."""
    packer = Packer()
    return [
        packer.piece(PieceKind.HEADER, HEADER.packed()),
        *(packer.piece(PieceKind.ROWS, raw) for raw in rows),
        packer.piece(PieceKind.TRAILER, TRAILER.packed()),
    ]


PIECES = pieces_of(b"one" * 100, b"", b"two" * 50, bytes(range(256)))
WHOLE = b"".join(PIECES)


def read(*parts: bytes) -> list[tuple[PieceKind, bytes]]:
    unpacker = Unpacker()
    found = [piece for part in parts for piece in unpacker.feed(part)]
    unpacker.end()
    return found


@given(rows=st.lists(st.binary(max_size=500), max_size=5), cuts=st.lists(st.integers(0, 3000), max_size=8))
def test_what_was_written_comes_back_however_it_is_cut(rows: list[bytes], cuts: list[int]) -> None:
    whole = b"".join(pieces_of(*rows))
    places = [0, *sorted(min(cut, len(whole)) for cut in cuts), len(whole)]
    found = read(*(whole[start:end] for start, end in itertools.pairwise(places)))
    kinds = [PieceKind.HEADER, *[PieceKind.ROWS] * len(rows), PieceKind.TRAILER]
    assert [kind for kind, _ in found] == kinds
    assert [raw for _, raw in found[1:-1]] == rows
    assert Header.parse(found[0][1]) == HEADER
    assert Trailer.parse(found[-1][1]) == TRAILER


def test_without_its_end_it_is_cut_off_wherever_that_is() -> None:
    for length in range(len(WHOLE)):
        with pytest.raises(DumpDamaged, match="cut off"):
            read(WHOLE[:length])


def test_no_byte_may_be_another() -> None:
    for index in range(len(WHOLE)):
        changed = bytearray(WHOLE)
        changed[index] ^= 1 << (index % 8)
        with pytest.raises((DumpDamaged, FormatUnsupported)):
            read(bytes(changed))


@pytest.mark.parametrize(
    "order",
    [[0, 1, 3, 4, 5], [0, 1, 1, 2, 3, 4, 5], [0, 2, 1, 3, 4, 5], [0, 5], [0, 1, 2, 3, 4, 5, 4], [0, 1, 2, 3, 4, 5, 5]],
    ids=repr,
)
def test_no_piece_may_be_missing_repeated_or_moved(order: list[int]) -> None:
    with pytest.raises(DumpDamaged):
        read(*(PIECES[index] for index in order))


def test_pieces_of_another_dump_do_not_fit() -> None:
    other = pieces_of(b"three" * 100, b"", b"two" * 50, bytes(range(256)))
    with pytest.raises(DumpDamaged, match="piece 3 of the dump is not what was written"):
        read(*PIECES[:2], *other[2:])


def test_bytes_behind_the_end_are_refused() -> None:
    with pytest.raises(DumpDamaged, match="behind its end"):
        read(WHOLE, b"x")


@pytest.mark.parametrize("start", [b"x", b"ATLX", b"\x1f\x8b", b"SQLite format 3\0"], ids=repr)
def test_what_is_no_dump_is_told_at_its_first_bytes(start: bytes) -> None:
    with pytest.raises(DumpDamaged, match="no dump of AtollFS"):
        read(start + bytes(100))


def test_a_newer_version_is_refused_before_anything_else() -> None:
    newer = bytearray(WHOLE)
    newer[4] = 2
    with pytest.raises(FormatUnsupported, match=r"version 2, this AtollFS knows up to 1: upgrade"):
        read(bytes(newer))


def _forged(kind: int, codec: int, stored: bytes, raw_length: int) -> bytes:
    """Return the beginning of a file and one piece, digested as it should be."""
    begin = b"ATLD\x01\0\0\0"
    head = bytes([kind, codec, 0, 0]) + len(stored).to_bytes(4, "little") + raw_length.to_bytes(4, "little")
    return begin + head + blake3(begin + head + stored).digest(16) + stored


@pytest.mark.parametrize(
    ("kind", "codec", "stored", "raw_length", "error"),
    [
        (9, 0, b"x", 1, FormatUnsupported),
        (1, 7, b"x", 1, FormatUnsupported),
        (1, 0, b"x", 2, DumpDamaged),
        (1, 1, b"no zstd", 7, DumpDamaged),
        (1, 1, zstandard.compress(bytes(1000)), 10, DumpDamaged),
        (1, 0, b"x", 1 << 31, DumpDamaged),
        (2, 0, b"x", 1, DumpDamaged),
        (3, 0, b"x", 1, DumpDamaged),
    ],
)
def test_what_no_writer_makes_is_refused_though_its_digest_is_right(
    kind: int, codec: int, stored: bytes, raw_length: int, error: type[AtollError]
) -> None:
    with pytest.raises(error):
        read(_forged(kind, codec, stored, raw_length))


@pytest.mark.parametrize(
    "raw", [b"", b"[]", b"{}", b'{"tables": 5}', b"\xff", b"[" * 100_000], ids=lambda raw: repr(raw[:9])
)
def test_a_header_or_trailer_that_is_none_is_damage(raw: bytes) -> None:
    for kind in (Header, Trailer):
        with pytest.raises(DumpDamaged):
            kind.parse(raw)


def test_only_verifying_finds_the_same_damage_and_decompresses_no_rows() -> None:
    unpacker = Unpacker(rows=False)
    found = [piece for part in PIECES for piece in unpacker.feed(part)]
    unpacker.end()
    assert [raw for kind, raw in found if kind is PieceKind.ROWS] == [b""] * 4
    assert Trailer.parse(found[-1][1]) == TRAILER
    changed = bytearray(WHOLE)
    changed[len(PIECES[0]) + 40] ^= 1
    with pytest.raises(DumpDamaged, match="piece 2"):
        list(Unpacker(rows=False).feed(bytes(changed)))


def test_the_header_names_the_volume_as_it_was_formatted() -> None:
    changed = dataclasses.replace(HEADER, format=volume_format(name="other"))
    assert Header.parse(changed.packed()).format.name == "other"


GOLDEN = Path(__file__).with_name("golden-dump-v1.hex")


def test_a_dump_of_version_1_is_read_for_ever() -> None:
    found = read(bytes.fromhex(GOLDEN.read_text()))
    assert Header.parse(found[0][1]) == HEADER
    assert [raw for _, raw in found[1:-1]] == [b"one" * 100, b"", b"two" * 50, bytes(range(256))]
    assert Trailer.parse(found[-1][1]) == TRAILER
