"""Loading a volume over a connection: bytes of a dump in, how far it is out.

Owns the messages of that method and the checks of what a client sends; metasvc.engine.load does the work. The client sends as
fast as rows become durable: nothing is read from the connection while a commit waits for the one before, and what waits in the
buffers of the kernel and of this process is some megabytes.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Final, TypeVar

from google.protobuf.message import DecodeError, Message

from chunkstore.errors import AtollError
from chunkstore.geometry import is_block_size
from metasvc.api import atoll_pb2 as pb
from metasvc.api import wire
from metasvc.api.frames import ConnectionLost, Frames, Stalled
from metasvc.api.volume_format import dump_format
from metasvc.engine.load import load
from metasvc.errors import FsError
from metasvc.model import VolumeFormat
from metasvc.server.connection import Silent
from metasvc.server.deleted import check_not_in
from metasvc.server.session import Misbehaved
from metasvc.server.volumes import EMBEDDED_BUCKET, Volumes

MAX_INLINE_BYTES: Final = 64 * 1024
MAX_SLICE_ID: Final = 1 << 53
SILENCE_S: Final = 60.0
"""A client that has nothing to send says so every few seconds."""

_Message = TypeVar("_Message", bound=Message)

log = logging.getLogger(__name__)


def check_format(volume_format: VolumeFormat) -> None:
    """Refuse a format that no volume of a service can have. FsError EINVAL."""
    try:
        uuid.UUID(volume_format.uuid)
    except ValueError as error:
        raise FsError(errno.EINVAL, f"{volume_format.uuid[:80]!r} is no uuid") from error
    if not is_block_size(volume_format.block_bytes) or not 0 <= volume_format.inline_limit_bytes <= MAX_INLINE_BYTES:
        raise FsError(errno.EINVAL, "a block size or inline limit that no volume can have")


async def load_volume(volumes: Volumes, tenant: str, name: str, frames: Frames) -> None:
    """Make a volume of what comes over a connection, and say how far it is. Errors of the load are its last message."""
    request = await _read(pb.LoadRequest, frames)
    if request.least_slice_id >= MAX_SLICE_ID:
        raise Misbehaved("asked for slice ids that no volume has")

    deleted = await volumes.deleted.uuids()

    def check(volume_format: VolumeFormat) -> None:
        _check(volume_format)
        check_not_in(deleted, volume_format.uuid)

    def told(rows: int, taken_bytes: int) -> None:
        frames.send(pb.LoadState(rows=rows, taken_bytes=taken_bytes).SerializeToString())

    try:
        async with aclosing(_data(frames)) as data:
            loaded = await load(
                volumes.store,
                data,
                tenant=tenant,
                name=name,
                address=volumes.address,
                bucket_url=request.bucket_url or None,
                least_slice_id=request.least_slice_id,
                check=check,
                told=told,
            )
        await volumes.store.add_tenant(tenant, created_ns=time.time_ns())
    except (ConnectionLost, Stalled, Silent, Misbehaved):
        raise
    except AtollError as error:
        log.warning("volume %s/%s was not loaded: %s", tenant, name, error)
        failed = pb.LoadState()
        wire.put_failure(error, failed.failure)
        frames.send(failed.SerializeToString())
        return
    log.info("volume %s/%s was loaded, %d rows", tenant, name, loaded.rows)
    form = pb.VolumeFormat(json=dump_format(loaded.format))
    frames.send(pb.LoadState(rows=loaded.rows, format=form).SerializeToString())


def _check(volume_format: VolumeFormat) -> None:
    check_format(volume_format)
    if volume_format.bucket_url == EMBEDDED_BUCKET:
        raise FsError(
            errno.EINVAL, "the dump is of a volume whose objects lie beside it: say with --bucket where they are now"
        )


async def _data(frames: Frames) -> AsyncGenerator[bytes, None]:
    while True:
        message = await _read(pb.LoadData, frames)
        if message.data:
            yield message.data
        if message.end:
            return


async def _read(kind: type[_Message], frames: Frames) -> _Message:
    try:
        async with asyncio.timeout(SILENCE_S):
            return kind.FromString(await frames.read())
    except TimeoutError:
        raise Silent(f"said nothing for {SILENCE_S:.0f} s") from None
    except DecodeError:
        raise Misbehaved("sent a message that is damaged") from None
