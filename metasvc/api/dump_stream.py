"""A dump as bytes: how it is cut into pieces, compressed and digested, and what its first and last piece say.

Owns version 1 of the format but for the rows, which it carries as bytes (metasvc.store.packed). docs/format.md has every byte.
Must not know tables, stores or files: an owner makes a dump, a client writes it, and another store takes it, perhaps far away.

Every piece has a digest of all that came before it and of itself. So a piece that was changed, left out, repeated or moved is
found before anything of it is used, and the digest of the last one, the trailer, is that of the whole. What ends without a
trailer is truncated. Nothing is decompressed that was not verified.
"""

from __future__ import annotations

import errno
import json
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, Final

import zstandard
from blake3 import blake3

from chunkstore.errors import AtollError, FormatUnsupported
from metasvc.api.volume_format import dump_format, parse_format
from metasvc.model import VolumeFormat

__all__ = [
    "MAX_PIECE_BYTES",
    "PIECE_BYTES",
    "DumpDamaged",
    "Header",
    "Packer",
    "PieceKind",
    "RowCount",
    "Trailer",
    "Unpacker",
]

VERSION: Final = 1
PIECE_BYTES: Final = 1 << 20
"""What a writer puts into one piece, before compression, unless one row is longer."""
MAX_PIECE_BYTES: Final = 64 << 20
"""What a reader takes for one piece, before and after compression: memory is bounded whatever a file says."""
ZSTD_LEVEL: Final = 3

_MAGIC: Final = b"ATLD"
_FILE: Final = struct.Struct("<4sHH")
# kind, codec, reserved, stored length, raw length; then the digest
_PIECE: Final = struct.Struct("<BBHII")
_DIGEST_BYTES: Final = 16
_RAW: Final = 0
_ZSTD: Final = 1


class DumpDamaged(AtollError):
    """Say that a dump is not what was written: cut off, changed, or none at all."""

    code = "dump-damaged"
    errno = errno.EBADMSG


class PieceKind(IntEnum):
    """What a piece holds."""

    HEADER = 1
    """The first, and only that: Header as JSON."""
    ROWS = 2
    """A packed batch: puts and deletes, to be applied in order of the pieces."""
    TRAILER = 3
    """The last, and only that: Trailer as JSON."""


@dataclass(frozen=True, slots=True)
class Header:
    """What a dump begins with."""

    format: VolumeFormat
    """Of the volume when the dump began; the trailer has it as it was at its end."""
    made_ns: int
    """When the dump began, ns since 1970."""
    tables: Mapping[str, tuple[int, tuple[str, ...]]]
    """By name of the table: its number in packed batches, and its columns, in order."""

    def packed(self) -> bytes:
        """Return the raw bytes of the piece."""
        tables = {name: {"number": number, "columns": columns} for name, (number, columns) in self.tables.items()}
        return _json({"volume": json.loads(dump_format(self.format)), "made_ns": self.made_ns, "tables": tables})

    @classmethod
    def parse(cls, raw: bytes) -> Header:
        """Inverse of packed(). DumpDamaged, SchemaTooNew."""
        found = _parsed(raw)
        try:
            tables = {
                str(name): (int(table["number"]), tuple(map(str, table["columns"])))
                for name, table in found["tables"].items()
            }
            return cls(parse_format(json.dumps(found["volume"])), int(found["made_ns"]), tables)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise DumpDamaged(f"the header of the dump is none ({error!r}): {_REMEDY}") from error


@dataclass(slots=True)
class RowCount:
    """How many rows of a table a dump has."""

    puts: int = 0
    """Rows that are put: those of the pages and those that changed meanwhile, so a row may be counted more than once."""
    deletes: int = 0
    """Keys that are deleted."""


@dataclass(frozen=True, slots=True)
class Trailer:
    """What a dump ends with."""

    format: VolumeFormat
    last_batch: int
    """The dump is the volume as it was after this batch of its owner."""
    rows: Mapping[str, RowCount] = field(default_factory=dict)
    """By name of the table, what all pieces have together; what is not listed has none."""

    @property
    def row_count(self) -> int:
        """Return how many rows the pieces put."""
        return sum(count.puts for count in self.rows.values())

    def packed(self) -> bytes:
        """Return the raw bytes of the piece."""
        rows = {name: {"puts": count.puts, "deletes": count.deletes} for name, count in self.rows.items()}
        return _json({"volume": json.loads(dump_format(self.format)), "last_batch": self.last_batch, "rows": rows})

    @classmethod
    def parse(cls, raw: bytes) -> Trailer:
        """Inverse of packed(). DumpDamaged, SchemaTooNew."""
        found = _parsed(raw)
        try:
            rows = {
                str(name): RowCount(int(count["puts"]), int(count["deletes"])) for name, count in found["rows"].items()
            }
            return cls(parse_format(json.dumps(found["volume"])), int(found["last_batch"]), rows)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise DumpDamaged(f"the trailer of the dump is none ({error!r}): {_REMEDY}") from error


_REMEDY: Final = "take another dump"


def _json(document: Any) -> bytes:
    return json.dumps(document, sort_keys=True).encode("ascii")


def _parsed(raw: bytes) -> Any:
    try:
        return json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise DumpDamaged(f"a piece of the dump is no JSON: {_REMEDY}") from error


class Packer:
    """Makes the bytes of one dump, piece by piece, in order. Not for two threads at once; zstd releases the GIL."""

    def __init__(self) -> None:
        self._hash = blake3()
        self._compressor = zstandard.ZstdCompressor(level=ZSTD_LEVEL, write_checksum=False, write_content_size=True)
        self._is_begun = False

    def piece(self, kind: PieceKind, raw: bytes) -> bytes:
        """Return the bytes of the next piece; before the first one stands what a file begins with."""
        assert len(raw) <= MAX_PIECE_BYTES, "no row is that long"
        begin = b""
        if not self._is_begun:
            self._is_begun = True
            begin = _FILE.pack(_MAGIC, VERSION, 0)
            self._hash.update(begin)
        stored, codec = self._compressor.compress(raw), _ZSTD
        if len(stored) >= len(raw):
            stored, codec = raw, _RAW
        head = _PIECE.pack(kind, codec, 0, len(stored), len(raw))
        self._hash.update(head)
        self._hash.update(stored)
        return b"".join((begin, head, self._hash.digest(_DIGEST_BYTES), stored))


class Unpacker:
    """Reads the bytes of one dump, as they come, and verifies them. Not for two threads at once."""

    def __init__(self, *, rows: bool = True) -> None:
        """Without ``rows`` those pieces are verified and not decompressed: their raw bytes come as ``b""``."""
        self._with_rows = rows
        self._hash = blake3()
        self._decompressor = zstandard.ZstdDecompressor()
        self._buffer = bytearray()
        self._is_begun = False
        self._pieces = 0
        self.is_whole = False
        """Whether the trailer was read."""

    def feed(self, data: bytes) -> Iterator[tuple[PieceKind, bytes]]:
        """Take the next bytes, and yield kind and raw bytes of each piece that they complete. Exhaust it before the next call.

        DumpDamaged; FormatUnsupported for what a newer version wrote. Memory: one piece, and what was fed.
        """
        self._buffer += data
        at = self._begin()
        try:
            while (found := self._next(at)) is not None:
                kind, raw, at = found
                yield kind, raw
        finally:
            del self._buffer[:at]

    def end(self) -> None:
        """Say that no more bytes come. DumpDamaged if some are missing."""
        if not self.is_whole:
            raise DumpDamaged(f"the dump was cut off, its end is missing: {_REMEDY}")

    def _begin(self) -> int:
        """Check what a file begins with; return where the pieces begin."""
        if self._is_begun:
            return 0
        head = bytes(self._buffer[: _FILE.size])
        if not _MAGIC.startswith(head[: len(_MAGIC)]):
            raise DumpDamaged("this is no dump of AtollFS: give a file that `atoll dump` wrote")
        if len(head) < _FILE.size:
            return 0
        _, version, flags = _FILE.unpack(head)
        if version > VERSION or flags:
            raise FormatUnsupported(
                f"the dump has version {version}, this AtollFS knows up to {VERSION}: upgrade AtollFS"
            )
        self._hash.update(head)
        self._is_begun = True
        return _FILE.size

    def _next(self, at: int) -> tuple[PieceKind, bytes, int] | None:
        """Return the next piece and where it ends, None if it has not come wholly."""
        if not self._is_begun or len(self._buffer) == at:
            return None
        if self.is_whole:
            raise DumpDamaged(f"the dump goes on behind its end: {_REMEDY}")
        start = at + _PIECE.size + _DIGEST_BYTES
        if len(self._buffer) < start:
            return None
        head = bytes(self._buffer[at : at + _PIECE.size])
        number, codec, reserved, stored_length, raw_length = _PIECE.unpack(head)
        if max(stored_length, raw_length) > MAX_PIECE_BYTES:
            raise DumpDamaged(f"a piece of the dump has an impossible length: {_REMEDY}")
        end = start + stored_length
        if len(self._buffer) < end:
            return None
        stored = bytes(self._buffer[start:end])
        self._hash.update(head)
        self._hash.update(stored)
        if self._hash.digest(_DIGEST_BYTES) != bytes(self._buffer[at + _PIECE.size : start]):
            raise DumpDamaged(f"piece {self._pieces + 1} of the dump is not what was written: {_REMEDY}")
        if number not in list(PieceKind) or codec not in (_RAW, _ZSTD) or reserved:
            raise FormatUnsupported("the dump has pieces that this AtollFS does not know: upgrade AtollFS")
        kind = PieceKind(number)
        if (kind is PieceKind.HEADER) != (self._pieces == 0):
            raise DumpDamaged(f"the pieces of the dump are not in order: {_REMEDY}")
        self._pieces += 1
        self.is_whole = kind is PieceKind.TRAILER
        if kind is PieceKind.ROWS and not self._with_rows:
            return kind, b"", end
        return kind, self._raw(stored, raw_length, is_zstd=codec == _ZSTD), end

    def _raw(self, stored: bytes, raw_length: int, *, is_zstd: bool) -> bytes:
        """Return what was packed. The digest was right, so that it does not fit is the writer's fault."""
        try:
            if is_zstd and zstandard.frame_content_size(stored) != raw_length:
                raise DumpDamaged(f"a piece of the dump has another length than it says: {_REMEDY}")
            raw = self._decompressor.decompress(stored) if is_zstd else stored
        except zstandard.ZstdError as error:
            raise DumpDamaged(f"a piece of the dump cannot be decompressed: {_REMEDY}") from error
        if len(raw) != raw_length:
            raise DumpDamaged(f"a piece of the dump has another length than it says: {_REMEDY}")
        return raw
