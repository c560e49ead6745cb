"""Loading a volume into a service: bytes of a dump over one connection, no faster than rows become durable.

The service reads no more while it commits, so sending waits: neither side's memory depends on the size of a dump. While there
is nothing to send a sign of life goes every few seconds.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any, Final

from client.meta.endpoint import Endpoint, ServiceUnavailable
from metasvc.api import atoll_pb2 as pb
from metasvc.api import wire
from metasvc.api.frames import ConnectionLost, EndedByService, Frames, NotOurs, Stalled
from metasvc.api.volume_format import parse_format
from metasvc.model import VolumeFormat

__all__ = ["load_volume"]

MESSAGE_BYTES: Final = 1 << 20
_LIFE_S: Final = 10.0

Told = Callable[[int, int], None]
"""Takes how many rows and keys, and bytes of the dump, are durable."""


async def load_volume(
    endpoint: Endpoint,
    volume: str,
    data: AsyncIterator[bytes],
    *,
    bucket_url: str | None,
    told: Told,
    least_slice_id: int = 0,
) -> tuple[VolumeFormat, int]:
    """Make a volume of a service, TENANT/NAME, of the bytes of a dump; its format, and the rows and keys that were in it.

    It can be opened when this returns, and not before. Errors are those of metasvc.engine.load, VolumeExists as such and
    others as StoreErrors with their text; ServiceUnavailable if the service goes away: nobody can open it then, and the next
    load replaces it.
    """
    frames = await endpoint.connect(pb.Opening.LOAD, volume)
    try:
        request = pb.LoadRequest(bucket_url=bucket_url or "", least_slice_id=least_slice_id)
        frames.send(request.SerializeToString())
        sending = asyncio.create_task(_send(frames, data), name="sending of a dump")
        try:
            return await _follow(frames, told, sending)
        finally:
            sending.cancel()
            await asyncio.gather(sending, return_exceptions=True)
    except EndedByService as ended:
        if ended.reason == pb.Ended.DONE:
            raise ServiceUnavailable(f"the service at {endpoint} ended before it said what became of it") from ended
        raise endpoint.error(ended) from ended
    except (ConnectionLost, Stalled, NotOurs) as error:
        raise endpoint.error(error) from error
    finally:
        frames.close()


async def _send(frames: Frames, data: AsyncIterator[bytes]) -> None:
    async for whole in _alive(frames, data):
        for start in range(0, len(whole), MESSAGE_BYTES):
            frames.send(pb.LoadData(data=whole[start : start + MESSAGE_BYTES]).SerializeToString())
            await frames.drain()
    frames.send(pb.LoadData(end=True).SerializeToString())


async def _alive(frames: Frames, data: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Yield what there is to send, with a sign of life now and then while there is nothing."""
    while True:
        coming = asyncio.ensure_future(anext(data, None))
        try:
            while not (await asyncio.wait({coming}, timeout=_LIFE_S))[0]:
                frames.send(pb.LoadData().SerializeToString())
        except asyncio.CancelledError:
            coming.cancel()
            await asyncio.gather(coming, return_exceptions=True)
            raise
        found = coming.result()
        if found is None:
            return
        yield found


async def _follow(frames: Frames, told: Told, sending: asyncio.Task[None]) -> tuple[VolumeFormat, int]:
    """Read what the service says until it is the last; raise what makes sending fail, too."""
    while True:
        reading = asyncio.ensure_future(frames.read())
        waited: set[asyncio.Future[Any]] = {reading, sending}
        try:
            if not sending.done():
                await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
            if sending.done() and not reading.done():
                sending.result()
            state = pb.LoadState.FromString(await reading)
        finally:
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)
        if state.HasField("failure"):
            raise wire.error_of(state.failure)
        if state.HasField("format"):
            return parse_format(state.format.json), state.rows
        told(state.rows, state.taken_bytes)
