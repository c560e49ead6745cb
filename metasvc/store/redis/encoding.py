"""Keys as bytes that sort as the keys do, and rows as few bytes: pure functions on values, no Redis in them.

Redis compares members of a sorted set with equal scores as memcmp does. So a key becomes bytes such that

    a < b  if and only if  ordered(a) + rest < ordered(b) + other    for any rest and other,

which holds where no key's bytes are the beginning of another's: integers say their length first, names end with a byte that is
less than any in them.

A row's other columns are packed by width: two bits for each integer say whether it has 1, 2, 4 or 8 bytes. An inode of
today takes 33 to 45 bytes so, 112 as it is. (Redis keeps values up to 64 bytes without an allocation of their own.)
"""

from __future__ import annotations

import struct
import typing
from collections.abc import Sequence
from typing import Any, Final

from metasvc.store.tables import DENTRY, INODE, TABLES, Key, Row, Table

__all__ = [
    "BUCKET_BITS",
    "END",
    "IN_BUCKET",
    "NO_ROW",
    "Codec",
    "codec_of",
    "name_of",
    "ordered_int",
    "ordered_name",
    "read_int",
]

BUCKET_BITS: Final = 6
"""Rows of 64 neighbouring ids lie together: 32 take a byte more for each row, 128 twice the time for each change (ADR 52)."""
IN_BUCKET: Final = (1 << BUCKET_BITS) - 1
END: Final = b"\0"
"""Ends the key in a member; no byte of a name is less."""
_NOT_NEGATIVE: Final = 0x80
_NEGATIVE: Final = 0x7F
_SIGN: Final = 1 << 63
_WORD: Final = 1 << 64
NO_ROW: Final = (TypeError, AttributeError, LookupError, ValueError, OverflowError, struct.error)
"""What is raised for values and bytes that are no row's: UnicodeError is a ValueError."""


# -- keys -------------------------------------------------------------------------------------------------------------


def ordered_int(value: int) -> bytes:
    """Return 1 to 9 bytes that sort as the integers do: 128 + n and n bytes, or 127 - n and n bytes of value + 256**n.

    OverflowError for integers of more than 64 bits.
    """
    if not -_SIGN <= value < _SIGN:
        raise OverflowError("an integer of more than 64 bits")
    if value >= 0:
        size = (value.bit_length() + 7) >> 3
        return bytes((_NOT_NEGATIVE + size,)) + value.to_bytes(size, "big")
    size = ((-value - 1).bit_length() + 7) >> 3
    return bytes((_NEGATIVE - size,)) + (value + (1 << (size << 3))).to_bytes(size, "big")


def read_int(data: bytes, start: int) -> tuple[int, int]:
    """Return the integer that ordered_int() put at ``start``, and where it ends."""
    tag = data[start]
    if tag >= _NOT_NEGATIVE:
        end = start + 1 + tag - _NOT_NEGATIVE
        return int.from_bytes(data[start + 1 : end], "big"), end
    size = _NEGATIVE - tag
    end = start + 1 + size
    return int.from_bytes(data[start + 1 : end], "big") - (1 << (size << 3)), end


def ordered_name(name: bytes) -> bytes:
    """Return the bytes of a name without any 0: 0 becomes 1 1, and 1 becomes 1 2. Names of files have neither, as a rule."""
    if b"\1" in name or b"\0" in name:
        return name.replace(b"\1", b"\1\2").replace(b"\0", b"\1\1")
    return name


def name_of(data: bytes) -> bytes:
    """Inverse of ordered_name()."""
    if b"\1" in data:
        return data.replace(b"\1\1", b"\0").replace(b"\1\2", b"\1")
    return data


# -- rows -------------------------------------------------------------------------------------------------------------

_LETTERS: Final = "BHIq"
_CLASS: Final = [0] * 9 + [1] * 8 + [2] * 16 + [3] * 31
"""By the bits of an integer that is not negative: which of the letters has room for it. Negative ones take the last."""


class _Packing:
    """A fixed number of integers, each as wide as it must be. Layouts are made when they are first met."""

    __slots__ = ("_by_classes", "_by_head", "_count", "_head_bytes")

    def __init__(self, count: int) -> None:
        self._count = count
        self._head_bytes = (2 * count + 7) >> 3
        self._by_classes: dict[tuple[int, ...], tuple[bytes, struct.Struct]] = {}
        self._by_head: dict[bytes, struct.Struct] = {}

    def pack(self, values: Sequence[int]) -> bytes:
        classes = tuple([_CLASS[value.bit_length()] if value >= 0 else 3 for value in values])
        layout = self._by_classes.get(classes)
        if layout is None:
            head = sum(width << (2 * index) for index, width in enumerate(classes)).to_bytes(self._head_bytes, "little")
            layout = self._by_classes[classes] = (head, self._struct(classes))
        return layout[0] + layout[1].pack(*values)

    def unpack(self, data: bytes, start: int) -> tuple[tuple[int, ...], int]:
        """Return the integers at ``start``, and where they end."""
        begin = start + self._head_bytes
        head = data[start:begin]
        layout = self._by_head.get(head)
        if layout is None:
            bits = int.from_bytes(head, "little")
            layout = self._by_head[head] = self._struct([(bits >> (2 * index)) & 3 for index in range(self._count)])
        return layout.unpack_from(data, begin), begin + layout.size

    def _struct(self, classes: Sequence[int]) -> struct.Struct:
        return struct.Struct("<" + "".join(_LETTERS[width] for width in classes))


class Codec:
    """The columns of a table behind its key, as bytes: integers, lengths of all texts but the last one, then the texts."""

    def __init__(self, table: Table) -> None:
        kinds = _kinds(table)
        self._make = table.row._make
        self._first = table.key_size
        self._size = len(kinds) - table.key_size
        self._ints = [index for index, kind in enumerate(kinds) if index >= table.key_size and kind is int]
        self._texts = [
            (index, kind is str) for index, kind in enumerate(kinds) if index >= table.key_size and kind is not int
        ]
        self._packing = _Packing(len(self._ints) + max(0, len(self._texts) - 1))

    def pack(self, row: Row) -> bytes:
        """Return the bytes of a row. One of NO_ROW for values that no row may have."""
        if not self._texts:
            return self._packing.pack(row[self._first :])
        ints = [row[index] for index in self._ints]
        texts = [row[index].encode() if is_str else row[index] for index, is_str in self._texts]
        return self._packing.pack(ints + [len(text) for text in texts[:-1]]) + b"".join(texts)

    def unpack(self, key: Key, data: bytes, start: int = 0) -> Row:
        """Return the row of a key from the bytes at ``start``. One of NO_ROW if they are none."""
        numbers, at = self._packing.unpack(data, start)
        if not self._texts:
            return self._make(key + numbers)  # type: ignore[no-any-return]
        values: list[Any] = [*key, *[None] * self._size]
        for index, value in zip(self._ints, numbers, strict=False):
            values[index] = value
        lengths = numbers[len(self._ints) :]
        for (index, is_str), length in zip(self._texts, (*lengths, len(data) - at - sum(lengths)), strict=True):
            text = data[at : at + length]
            values[index] = text.decode() if is_str else text
            at += length
        return self._make(values)  # type: ignore[no-any-return]


class _InodeCodec(Codec):
    """mtime and ctime as what they are more than atime: less than four seconds, as a rule, hence 4 bytes or 1 in place of 8."""

    _ATIME: Final = INODE.columns.index("atime_ns") - 1

    def pack(self, row: Row) -> bytes:
        at = self._ATIME
        values = list(row[1:])
        atime_ns = values[at]
        values[at + 1] = _wrapped(values[at + 1] - atime_ns)
        values[at + 2] = _wrapped(values[at + 2] - atime_ns)
        return self._packing.pack(values)

    def unpack(self, key: Key, data: bytes, start: int = 0) -> Row:
        numbers, _ = self._packing.unpack(data, start)
        values = [*key, *numbers]
        at = self._ATIME + 1
        atime_ns = values[at]
        values[at + 1] = _wrapped(values[at + 1] + atime_ns)
        values[at + 2] = _wrapped(values[at + 2] + atime_ns)
        return self._make(values)  # type: ignore[no-any-return]


class _DentryCodec(Codec):
    """The inode's number as its place in the inodes' keys, so that a script finds it without arithmetic (64 bits in a double).

    One byte, ino % 64; ordered_int(ino // 64); one byte, the file type's upper bits, or 255 and 8 bytes of any type.
    """

    _TYPE_SHIFT: Final = 12
    _OTHER: Final = 255

    def pack(self, row: Row) -> bytes:
        ino, kind = row[2], row[3]
        if not -_SIGN <= ino < _SIGN:
            raise OverflowError("an inode number of more than 64 bits")
        code = kind >> self._TYPE_SHIFT
        if code << self._TYPE_SHIFT == kind and 0 <= code < self._OTHER:
            last = bytes((code,))
        else:
            last = bytes((self._OTHER,)) + kind.to_bytes(8, "big", signed=True)
        return bytes((ino & IN_BUCKET,)) + ordered_int(ino >> BUCKET_BITS) + last

    def unpack(self, key: Key, data: bytes, start: int = 0) -> Row:
        bucket, at = read_int(data, start + 1)
        code = data[at]
        if code == self._OTHER:
            kind = int.from_bytes(data[at + 1 : at + 9], "big", signed=True)
        else:
            kind = code << self._TYPE_SHIFT
        return self._make((*key, (bucket << BUCKET_BITS) | data[start], kind))  # type: ignore[no-any-return]


def _wrapped(value: int) -> int:
    """Return the number of 64 bits with sign that is equal modulo 2**64."""
    return value if -_SIGN <= value < _SIGN else (value + _SIGN) % _WORD - _SIGN


def _kinds(table: Table) -> list[type]:
    """Return int, bytes or str for each column."""
    hints = typing.get_type_hints(table.row)
    return [getattr(hints[column], "__supertype__", hints[column]) for column in table.columns]


def _codec(table: Table) -> Codec:
    return {INODE: _InodeCodec, DENTRY: _DentryCodec}.get(table, Codec)(table)


codec_of: Final = {table: _codec(table) for table in TABLES}
"""For each table how its rows are packed."""
