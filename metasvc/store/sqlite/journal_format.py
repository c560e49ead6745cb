"""The bytes of a journal: header, records, rows; and what a successor finds in them. docs/format.md has every byte.

Pure functions that know neither files nor SQL. metasvc.store.sqlite.journal says what a journal is for.

A file is a header of one block and two halves. Each half holds records from its beginning on, each in blocks of its own, so
that writing one never touches the bytes of another. Behind the last record of a half lies what was there before: zeros, or
records of an earlier turn. Every record has the number of its batch and a digest with the key in the header. So

- what was torn, or belongs to another file, is no record;
- what is left of an earlier turn has a lower number than what follows the last record: numbers never shrink in a file;
- bytes of a user in a row (names, contents) are no record, though he chose them: he does not know the key.

What a successor applies is the *chain*: the run of records, each numbered one above the one before, that ends with the highest
number. A record with a higher number anywhere else means that one before it was acknowledged and is damaged.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any, Final, get_type_hints

from blake3 import blake3

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

__all__ = [
    "BLOCK_BYTES",
    "KEY_BYTES",
    "Contents",
    "Header",
    "pack_batch",
    "pack_header",
    "pack_record",
    "read_journal",
    "unpack_batch",
]

BLOCK_BYTES: Final = 4096
"""What disks write whole or not at all, or at least without touching what is beside it."""
KEY_BYTES: Final = 32
_MAGIC: Final = b"ATLJ"
_VERSION: Final = 1
_DIGEST_BYTES: Final = 16
_MAX_UUID_BYTES: Final = 1024
_HEADER: Final = struct.Struct("<4sHHQQIHH32s")
_RECORD: Final = struct.Struct("<QII")
_SECTION: Final = struct.Struct("<BBHI")
_PUT: Final = 0
_DELETE: Final = 1

_CODES: Final = {
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
_TABLES: Final = {code: table for table, code in _CODES.items()}
assert set(_CODES) == set(TABLES)


@dataclass(frozen=True, slots=True)
class Header:
    """What the records of a file belong to."""

    volume_id: int
    epoch: int
    """Of the owner who wrote them."""
    half_bytes: int
    key: bytes
    """Chosen at random for this file."""
    uuid: str
    """Of the volume."""

    @property
    def file_bytes(self) -> int:
        """Length of the file."""
        return BLOCK_BYTES + 2 * self.half_bytes


@dataclass(frozen=True, slots=True)
class Contents:
    """What a successor finds in a journal."""

    header: Header
    records: list[tuple[int, bytes]]
    """The chain: numbers of batches, without a gap, and the packed batches."""


# -- header and records -----------------------------------------------------------------------------------------------


def pack_header(header: Header) -> bytes:
    """Return the first block of a file."""
    uuid = header.uuid.encode()
    if len(uuid) > _MAX_UUID_BYTES:
        raise StoreRefused(f"the uuid of the volume has {len(uuid)} bytes: it may have {_MAX_UUID_BYTES}")
    fields = (_MAGIC, _VERSION, 0, header.volume_id, header.epoch, header.half_bytes, len(uuid), 0, header.key)
    head = _HEADER.pack(*fields) + uuid
    return (head + blake3(head).digest(_DIGEST_BYTES)).ljust(BLOCK_BYTES, b"\0")


def pack_record(key: bytes, number: int, packed: bytes) -> bytes:
    """Return whole blocks that hold a packed batch."""
    body = _RECORD.pack(number, len(packed), 0) + packed
    record = blake3(body, key=key).digest(_DIGEST_BYTES) + body
    return record.ljust(-(-len(record) // BLOCK_BYTES) * BLOCK_BYTES, b"\0")


def read_journal(image: bytes, *, path: str) -> Contents:
    """Return what a file holds; ``path`` names it in errors. SchemaTooNew; StoreRefused for one that is damaged."""
    header = _unpack_header(image, path)
    first, second = (list(_run(image, header, half)) for half in (0, 1))
    older, newer = sorted((first, second), key=lambda run: run[-1][0] if run else 0)
    found = older + newer if older and newer and older[-1][0] + 1 == newer[0][0] else newer
    last = found[-1][0] if found else 0
    for offset in range(BLOCK_BYTES, header.file_bytes, BLOCK_BYTES):
        record = _record_at(image, header, offset, above=last)
        if record is not None:
            raise _damaged(path, f"there is a batch {record[0]} behind {last}, and it is not the next one")
    return Contents(header, found)


def _unpack_header(image: bytes, path: str) -> Header:
    if len(image) < BLOCK_BYTES or image[:4] != _MAGIC:
        raise _damaged(path, "it does not begin as one")
    _, version, flags, volume_id, epoch, half_bytes, uuid_bytes, reserved, key = _HEADER.unpack_from(image)
    if version > _VERSION:
        raise SchemaTooNew(f"{path} has version {version}, this AtollFS knows up to {_VERSION}: upgrade AtollFS")
    end = _HEADER.size + min(uuid_bytes, _MAX_UUID_BYTES)
    if blake3(image[:end]).digest(_DIGEST_BYTES) != image[end : end + _DIGEST_BYTES]:
        raise _damaged(path, "its header is not what was written")
    if version != _VERSION or flags or reserved:
        raise SchemaTooNew(f"{path} has what this AtollFS does not know: upgrade AtollFS")
    header = Header(volume_id, epoch, half_bytes, key, image[_HEADER.size : end].decode())
    if len(image) != header.file_bytes or half_bytes % BLOCK_BYTES:
        raise _damaged(path, f"it has {len(image)} bytes instead of {header.file_bytes}")
    return header


def _run(image: bytes, header: Header, half: int) -> Iterator[tuple[int, bytes]]:
    """Yield the records of a half from its beginning, as long as each is the next."""
    offset = BLOCK_BYTES + half * header.half_bytes
    end = offset + header.half_bytes
    number = None
    while offset < end:
        found = _record_at(image, header, offset, end=end)
        if found is None or (number is not None and found[0] != number + 1):
            return
        number, packed = found
        yield found
        offset += -(-(_DIGEST_BYTES + _RECORD.size + len(packed)) // BLOCK_BYTES) * BLOCK_BYTES


def _record_at(
    image: bytes, header: Header, offset: int, *, end: int | None = None, above: int = -1
) -> tuple[int, bytes] | None:
    """Return number and packed batch of the record at an offset; None if there is none, or none above a number."""
    body = offset + _DIGEST_BYTES
    number, length, reserved = _RECORD.unpack_from(image, body)
    body_end = body + _RECORD.size + length
    if reserved or number <= above or body_end > (len(image) if end is None else end):
        return None
    if blake3(image[body:body_end], key=header.key).digest(_DIGEST_BYTES) != image[offset:body]:
        return None
    return number, image[body + _RECORD.size : body_end]


def _damaged(path: str, detail: str) -> StoreRefused:
    return StoreRefused(
        f"{path} is a damaged journal, {detail}: it may hold the last changes of the volume. Restore the metadata from a "
        "backup, or move the file away to go on without them, then run atoll fsck"
    )


# -- batches ----------------------------------------------------------------------------------------------------------


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

    def unpack(self, packed: bytes, offset: int, count: int) -> tuple[list[list[Any]], int]:
        """Return rows, and where they end."""
        rows = []
        for _ in range(count):
            values = list(self.fixed.unpack_from(packed, offset))
            offset += self.fixed.size
            for index in self.sized:
                end = offset + values[index]
                values[index], offset = packed[offset:end], end
            for index in self.texts:
                values[index] = values[index].decode()
            rows.append(values)
        return rows, offset


def _kinds(table: Table) -> list[type]:
    hints = get_type_hints(table.row)
    return [getattr(hints[name], "__supertype__", hints[name]) for name in table.columns]


_KINDS: Final = {table: _kinds(table) for table in TABLES}
_ROWS: Final = {table: _Columns(kinds) for table, kinds in _KINDS.items()}
_KEYS: Final = {table: _Columns(_KINDS[table][: table.key_size]) for table in TABLES}
_UNFIT: Final = (struct.error, TypeError, AttributeError, UnicodeError)


def pack_batch(batch: Batch) -> bytes:
    """Return the bytes of a batch. StoreRefused for a row that SQLite would not take either. Cost: 1 us per row.

    What passes here must pass there: it is acknowledged before SQLite sees it.
    """
    parts: list[bytes] = []
    try:
        for table, rows in batch.puts.items():
            if rows:
                parts += [_SECTION.pack(_CODES[table], _PUT, len(table.columns), len(rows)), _ROWS[table].pack(rows)]
        for table, keys in batch.deletes.items():
            if keys:
                parts += [_SECTION.pack(_CODES[table], _DELETE, table.key_size, len(keys)), _KEYS[table].pack(keys)]
    except _UNFIT as exc:
        raise StoreRefused(f"a row does not fit the schema: this is a bug, please report it ({exc})") from exc
    return b"".join(parts)


def unpack_batch(packed: bytes) -> Batch:
    """Return the batch of some bytes that pack_batch() of this or an earlier version made. SchemaTooNew."""
    puts: dict[Table, list[Row]] = {}
    deletes: dict[Table, list[Key]] = {}
    offset = 0
    while offset < len(packed):
        code, kind, column_count, count = _SECTION.unpack_from(packed, offset)
        table = _TABLES.get(code)
        if table is None or kind not in (_PUT, _DELETE) or column_count > len(table.columns):
            raise SchemaTooNew("a journal has rows that this AtollFS does not know: upgrade AtollFS")
        offset += _SECTION.size
        columns = _ROWS[table] if column_count == len(table.columns) else _Columns(_KINDS[table][:column_count])
        if kind == _DELETE:
            values, offset = _KEYS[table].unpack(packed, offset, count)
            deletes[table] = [tuple(key) for key in values]
        else:
            values, offset = columns.unpack(packed, offset, count)
            # Columns that were added since have a default, and stand at the end.
            puts[table] = [table.row(*row) for row in values]
    return Batch(puts, deletes)
