"""URLs of blocks for clients without keys: who may have which.

Owns the operations `block_access`, `sign_get`, `sign_own` and `sign_put` of a session. A URL that reads a block is signed if a
piece of the named file lies in that block at this moment, which is looked up in the map of the file: block by block, as a file
may share a part of a slice with another one that is out of the client's reach. A pack is one block with the bytes of many small
files: whoever is confined to a directory gets no URL for it, and has the bytes with the map (metasvc.server.confined). A URL
that puts is signed for ids that were handed out to this very session, which lives. Whoever has a URL may use it
until it expires, also when the file has changed or the session has ended: so objects are deleted later than that
(`metasvc.jobs.served`).
"""

from __future__ import annotations

import errno as E
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Final, NamedTuple, Protocol, cast

from chunkstore.geometry import CHUNK_BYTES, MAX_FILE_BYTES, SliceId, block_key
from metasvc.api import atoll_pb2 as pb
from metasvc.errors import FsError
from metasvc.model import MAP_PAGE_CHUNKS, Caller, FileMap, Ino, SliceRef, VolumeFormat
from metasvc.server.access import URL_LIFE_S, VolumeAccess
from metasvc.server.confined import ConfinedMaps

__all__ = ["block_access", "put_urls", "sign_get", "sign_own", "sign_put"]

MAX_BLOCKS: Final = 256
"""Of one request: 3 ms."""
_MAX_CHUNKS: Final = 64
_MAX_BLOCK: Final = 1 << 16
_SHA256_BYTES: Final = 32
_PAGE_BYTES: Final = MAP_PAGE_CHUNKS * CHUNK_BYTES


class Urls(NamedTuple):
    """What a request is answered."""

    life_s: float = 0.0
    urls: Sequence[str] = ()
    headers: Sequence[Mapping[str, str]] = ()


class _Session(Protocol):
    access: VolumeAccess
    confined_maps: ConfinedMaps | None

    @property
    def format(self) -> VolumeFormat: ...

    async def read_map(self, ino: Ino, *, start: int, end: int) -> FileMap: ...

    def may_commit(self, slice_id: SliceId) -> bool: ...


async def block_access(session: Any, _: pb.Nothing, __: Caller) -> Urls:
    """Answer whether URLs are signed."""
    return Urls(URL_LIFE_S if await cast("_Session", session).access.signer() is not None else 0.0)


async def sign_get(session: Any, message: pb.SignGet, _: Caller) -> Urls:
    """Sign URLs for blocks that a file has, "" for others behind the first. ENOENT if it has not the first one."""
    own = cast("_Session", session)
    blocks = _checked(message.slice_id, message.blocks)
    if len(message.chunks) > _MAX_CHUNKS or any(chunk >= MAX_FILE_BYTES // CHUNK_BYTES for chunk in message.chunks):
        raise FsError(E.EINVAL, "no file has these chunks")
    if not 0 < message.ino < 1 << 63:
        raise FsError(E.ENOENT, "no inode has that number")
    slice_id = SliceId(message.slice_id)
    used, is_whole = await _used(own, Ino(message.ino), slice_id, blocks, list(message.chunks))
    if blocks[0] not in used:
        raise FsError(
            E.ENOENT, f"block {blocks[0]} of slice {message.slice_id} is not in inode {message.ino} (any more)"
        )
    if own.confined_maps is not None and not is_whole and not await own.confined_maps.may_sign(slice_id):
        raise FsError(E.ENOENT, f"slice {slice_id} has bytes of other files, or is gone: read the map again")
    return await _signed_get(own, message.slice_id, blocks, used)


async def sign_own(session: Any, message: pb.SignOwn, _: Caller) -> Urls:
    """Sign URLs that read blocks of a slice that the session is writing. ESTALE."""
    own = cast("_Session", session)
    blocks = _checked(message.slice_id, message.blocks)
    _require_own(own, message.slice_id)
    return await _signed_get(own, message.slice_id, blocks, blocks)


async def sign_put(session: Any, message: pb.SignPut, _: Caller) -> Urls:
    """Sign URLs that put blocks of a slice that the session is writing. ESTALE."""
    own = cast("_Session", session)
    blocks = _checked(message.slice_id, message.blocks)
    if len(message.sha256) != len(blocks) or any(len(each) != _SHA256_BYTES for each in message.sha256):
        raise FsError(E.EINVAL, "each block has one SHA-256")
    signer = await own.access.require_signer()
    _require_own(own, message.slice_id)
    uuid, slice_id = own.format.uuid, SliceId(message.slice_id)
    signed = [
        signer.put(block_key(uuid, slice_id, index), sha256=sha256, life_s=URL_LIFE_S)
        for index, sha256 in zip(blocks, message.sha256, strict=True)
    ]
    return Urls(URL_LIFE_S, [each.url for each in signed], [each.headers for each in signed])


def put_urls(found: Any, into: pb.Reply) -> None:
    """Write an answer."""
    into.urls.life_s = found.life_s
    into.urls.urls.extend(found.urls)
    for each in found.headers:
        into.urls.headers.add(values=each)


async def _signed_get(own: _Session, slice_id: int, blocks: Sequence[int], used: Collection[int]) -> Urls:
    signer = await own.access.require_signer()
    uuid = own.format.uuid
    signed = [
        signer.get(block_key(uuid, SliceId(slice_id), index), life_s=URL_LIFE_S) if index in used else ""
        for index in blocks
    ]
    return Urls(URL_LIFE_S, signed)


def _checked(slice_id: int, blocks: Sequence[int]) -> list[int]:
    if not 0 < len(blocks) <= MAX_BLOCKS or any(index >= _MAX_BLOCK for index in blocks) or not 0 < slice_id < 1 << 63:
        raise FsError(E.EINVAL, f"URLs are signed for 1 to {MAX_BLOCKS} blocks of a slice")
    return list(blocks)


def _require_own(own: _Session, slice_id: int) -> None:
    if not own.may_commit(SliceId(slice_id)):
        raise FsError(E.ESTALE, f"slice {slice_id} is not of this session, or its session has ended")


async def _used(
    own: _Session, ino: Ino, slice_id: SliceId, blocks: Sequence[int], chunks: Sequence[int]
) -> tuple[set[int], bool]:
    """Return in which of these blocks pieces of the file lie, by the chunks where they should be; if one is the whole slice.

    If the first one is not found there it is looked for in all of the file, page by page: a slice may be used several times.
    """
    used: set[int] = set()
    is_whole = False

    async def look(start: int, end: int) -> int:
        nonlocal is_whole
        found = await own.read_map(ino, start=start, end=end)
        refs = [ref for ref in found.refs if ref.slice_id == slice_id]
        is_whole |= any(ref.length == found.slices[slice_id].length for ref in refs)
        used.update(_blocks_of(refs, own.format.block_bytes))
        return found.end

    for chunk in dict.fromkeys(chunks):
        await look(chunk * CHUNK_BYTES, (chunk + 1) * CHUNK_BYTES)
    start = 0
    while blocks[0] not in used and start < MAX_FILE_BYTES:
        end = await look(start, min(start + _PAGE_BYTES, MAX_FILE_BYTES))
        start = max(end, start + _PAGE_BYTES)
    return used, is_whole


def _blocks_of(refs: Iterable[SliceRef], block_bytes: int) -> set[int]:
    found: set[int] = set()
    for ref in refs:
        found.update(range(ref.slice_offset // block_bytes, -(-(ref.slice_offset + ref.length) // block_bytes)))
    return found
