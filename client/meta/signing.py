"""URLs from the service: of blocks, on the stream of the session; of any object, for administrators, by calls of their own."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from typing import Final

from chunkstore.buckets.signed import Verb
from chunkstore.errors import ObjectMissing
from chunkstore.geometry import CHUNK_BYTES, SliceId
from chunkstore.model import SliceInfo
from chunkstore.presigned import Signed
from client.meta.connection import SessionConnection
from client.meta.endpoint import Endpoint
from metasvc.api import atoll_pb2 as pb
from metasvc.api import wire
from metasvc.errors import FsError

__all__ = ["ObjectSigning", "RemoteSigning", "signs_urls"]

_VERBS: Final[dict[Verb, pb.SignObjects.Verb.ValueType]] = {
    "list": pb.SignObjects.LIST,
    "head": pb.SignObjects.HEAD,
    "get": pb.SignObjects.GET,
    "delete": pb.SignObjects.DELETE,
}


async def signs_urls(connection: SessionConnection) -> bool:
    """Return whether the service signs URLs for this volume; else clients need keys. One round trip."""
    try:
        return (await connection.call("block_access", pb.Nothing())).urls.life_s > 0
    except FsError as error:
        if error.errno != errno.ENOSYS:
            raise
        return False


class RemoteSigning:
    """Have URLs signed."""

    def __init__(self, connection: SessionConnection, *, block_bytes: int) -> None:
        self._call = connection.call
        self._block_bytes = block_bytes

    async def sign_get(self, info: SliceInfo, blocks: Sequence[int]) -> Signed:
        """Sign URLs that read. ObjectMissing for what the file has no more, so that whoever reads looks at its map again."""
        try:
            if info.place is None:
                own = pb.SignOwn(slice_id=info.slice_id, blocks=blocks)
                reply = await self._call("sign_own", own)
            else:
                asked = pb.SignGet(
                    ino=info.place.ino, slice_id=info.slice_id, blocks=blocks, chunks=self._chunks(info, blocks)
                )
                reply = await self._call("sign_get", asked)
        except FsError as error:
            if error.errno in (errno.ENOENT, errno.ESTALE):
                raise ObjectMissing(f"slice {info.slice_id}: {error.message}") from error
            raise
        return Signed(list(reply.urls.urls), reply.urls.life_s)

    def _chunks(self, info: SliceInfo, blocks: Sequence[int]) -> list[int]:
        """Return in which chunks of the file these blocks should lie."""
        assert info.place is not None
        found: dict[int, None] = {}
        for index in blocks:
            start = info.place.offset + index * self._block_bytes
            last = min(start + self._block_bytes, info.place.offset + info.length) - 1
            for offset in (max(0, start), last):
                if offset >= 0:
                    found[offset // CHUNK_BYTES] = None
        return list(found)

    async def sign_put(self, slice_id: SliceId, blocks: Sequence[int], sha256: Sequence[bytes]) -> Signed:
        """Sign URLs that put. ESTALE for a slice of a session that has ended."""
        reply = await self._call("sign_put", pb.SignPut(slice_id=slice_id, blocks=blocks, sha256=sha256))
        headers = [dict(each.values) for each in reply.urls.headers]
        return Signed(list(reply.urls.urls), reply.urls.life_s, headers)


class ObjectSigning:
    """Have URLs of objects of a volume signed, by a token that administers it: chunkstore.buckets.signed.ObjectSigning.

    None is repeated here: ServiceUnavailable is retryable, and whoever asks repeats. AccessRefused for other tokens.
    """

    def __init__(self, endpoint: Endpoint, volume: str, *, deleted_uuid: str = "") -> None:
        """``volume`` is TENANT/NAME; ``deleted_uuid`` means the one of that name that was deleted."""
        self._endpoint = endpoint
        self._volume = volume
        self._deleted_uuid = deleted_uuid
        self._command = os.urandom(16)

    async def sign(self, verb: Verb, keys: Sequence[str], *, start_after: str = "") -> Sequence[str]:
        """Sign a URL for each key. One connection."""
        asked = pb.SignObjects(
            verb=_VERBS[verb],
            keys=keys,
            start_after=start_after,
            deleted_uuid=self._deleted_uuid,
            command=self._command,
        )
        request = pb.AdminRequest(sign_objects=asked).SerializeToString()
        answer = await self._endpoint.ask(pb.Opening.ADMINISTER, request, volume=self._volume)
        reply = pb.AdminReply.FromString(answer)
        if reply.HasField("failure"):
            raise wire.error_of(reply.failure)
        return list(reply.urls.urls)
