"""Batches as bytes, independent of any database: of a journal, of a dump. docs/format.md has every byte.

Owns the numbers that stand for tables, and how rows and keys are packed. Pure functions; must not know files or digests: who
keeps the bytes sees to it that they are those that were packed.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from itertools import chain
from typing import Any, Final, get_type_hints

from metasvc.errors import SchemaTooNew, StoreRefused
from metasvc.store.tables import (
    CHUNK,
    COUNTER,
    DENTRY,
    GARBAGE,
    INODE,
    LINK,
    PACK,
    PACKABLE,
    QUOTA,
    REPLIES,
    SESSION,
    SLICE,
    SLICE_RANGE,
    SUSTAINED,
    TABLES,
    TRASHED,
    XATTR,
    Batch,
    Key,
    Row,
    Table,
)

__all__ = ["TABLE_CODES", "column_kinds", "pack_batch", "unpack_batch"]

TABLE_CODES: Final = {
    INODE: 1,
    DENTRY: 2,
    CHUNK: 3,
    SLICE: 4,
    XATTR: 5,
    LINK: 6,
    SESSION: 7,
    SUSTAINED: 8,
    TRASHED: 9,
    GARBAGE: 10,
    QUOTA: 11,
    COUNTER: 12,
    SLICE_RANGE: 13,
    REPLIES: 14,
    PACKABLE: 15,
    PACK: 16,
}
"""What stands for a table. Never given to another one."""
_TABLES: Final = {code: table for table, code in TABLE_CODES.items()}
assert set(TABLE_CODES) == set(TABLES)

_SECTION: Final = struct.Struct("<BBHI")
_PUT: Final = 0
_DELETE: Final = 1


class _Columns:
    """How values of some columns are packed: fixed parts (integers, lengths), then the bytes that have lengths."""

    def __init__(self, kinds: list[type]) -> None:
        self.count = len(kinds)
        self.fixed = struct.Struct("<" + "".join("q" if kind is int else "I" for kind in kinds))
        self.texts = [index for index, kind in enumerate(kinds) if kind is str]
        self.sized = [index for index, kind in enumerate(kinds) if kind is not int]
        self.pack = self._choose()

    def _choose(self) -> Callable[[list[Any]], bytes]:
        if not self.sized:
            return self._pack_integers
        return self._pack_one_sized if len(self.sized) == 1 and not self.texts else self._pack_any

    def _pack_integers(self, rows: list[Any]) -> bytes:
        return struct.pack(f"<{len(rows) * self.count}q", *chain.from_iterable(rows))

    def _pack_one_sized(self, rows: list[Any]) -> bytes:
        pack, at = self.fixed.pack, self.sized[0]
        after = at + 1
        return b"".join([part for row in rows for part in (pack(*row[:at], len(row[at]), *row[after:]), row[at])])

    def _pack_any(self, rows: list[Any]) -> bytes:
        parts = []
        for row in rows:
            values = list(row)
            for index in self.texts:
                values[index] = values[index].encode()
            sized = [values[index] for index in self.sized]
            for index in self.sized:
                values[index] = len(values[index])
            parts += [self.fixed.pack(*values), *sized]
        return b"".join(parts)

    def unpack(self, packed: bytes, offset: int, count: int) -> tuple[list[Any], int]:
        """Return rows, and where they end. ValueError, struct.error or UnicodeError if they were not packed by this class."""
        if not self.sized:
            end = offset + count * self.fixed.size
            if end > len(packed):
                raise ValueError("rows end early")
            return list(self.fixed.iter_unpack(memoryview(packed)[offset:end])), end
        rows = []
        unpack_from, size = self.fixed.unpack_from, self.fixed.size
        for _ in range(count):
            values = list(unpack_from(packed, offset))
            offset += size
            for index in self.sized:
                end = offset + values[index]
                values[index], offset = packed[offset:end], end
            for index in self.texts:
                values[index] = values[index].decode()
            rows.append(values)
        if offset > len(packed):
            raise ValueError("the last row ends early")
        return rows, offset


def column_kinds(table: Table) -> list[type]:
    """Return int, bytes or str for each column of a table."""
    hints = get_type_hints(table.row)
    return [getattr(hints[name], "__supertype__", hints[name]) for name in table.columns]


_KINDS: Final = {table: column_kinds(table) for table in TABLES}
_ROWS: Final = {table: _Columns(kinds) for table, kinds in _KINDS.items()}
_KEYS: Final = {table: _Columns(_KINDS[table][: table.key_size]) for table in TABLES}
_UNFIT: Final = (struct.error, TypeError, AttributeError, UnicodeError)


def pack_batch(batch: Batch) -> bytes:
    """Return the bytes of a batch. StoreRefused for a row that no store would take either. Cost: 1 us per row."""
    parts: list[bytes] = []
    try:
        for table, rows in batch.puts.items():
            if rows:
                parts += [
                    _SECTION.pack(TABLE_CODES[table], _PUT, len(table.columns), len(rows)),
                    _ROWS[table].pack(rows),
                ]
        for table, keys in batch.deletes.items():
            if keys:
                parts += [
                    _SECTION.pack(TABLE_CODES[table], _DELETE, table.key_size, len(keys)),
                    _KEYS[table].pack(keys),
                ]
    except _UNFIT as exc:
        raise StoreRefused(f"a row does not fit the schema: this is a bug, please report it ({exc})") from exc
    return b"".join(parts)


def unpack_batch(packed: bytes) -> Batch:
    """Return the batch of some bytes that pack_batch() of this or an earlier version made. SchemaTooNew.

    ValueError (UnicodeError included), TypeError or struct.error for bytes that it did not make.
    """
    puts: dict[Table, list[Row]] = {}
    deletes: dict[Table, list[Key]] = {}
    offset = 0
    while offset < len(packed):
        code, kind, column_count, count = _SECTION.unpack_from(packed, offset)
        table = _TABLES.get(code)
        if table is None or kind not in (_PUT, _DELETE) or column_count > len(table.columns):
            raise SchemaTooNew("there are rows that this AtollFS does not know: upgrade AtollFS")
        if column_count < table.key_size:
            raise ValueError("rows without a key")
        offset += _SECTION.size
        if kind == _DELETE:
            values, offset = _KEYS[table].unpack(packed, offset, count)
            deletes[table] = [tuple(key) for key in values]
        elif column_count == len(table.columns):
            values, offset = _ROWS[table].unpack(packed, offset, count)
            puts[table] = list(map(table.row._make, values))
        else:
            # Columns that were added since have a default, and stand at the end.
            values, offset = _Columns(_KINDS[table][:column_count]).unpack(packed, offset, count)
            puts[table] = [table.row(*row) for row in values]
    return Batch(puts, deletes)
