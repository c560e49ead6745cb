"""The bytes of a journal: header and records; and what a successor finds in them. docs/format.md has every byte.

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
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from blake3 import blake3

from metasvc.errors import SchemaTooNew, StoreRefused

__all__ = [
    "BLOCK_BYTES",
    "KEY_BYTES",
    "Contents",
    "Header",
    "pack_header",
    "pack_record",
    "read_journal",
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
