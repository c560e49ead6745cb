"""Where a service is, how it is reached, and what its refusals mean.

Owns the one table from the reasons for which a service ends a connection to errors of ours.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Final

from chunkstore.errors import AtollError
from metasvc.api import atoll_pb2 as pb
from metasvc.api.frames import MAX_REPLY_BYTES, ConnectionLost, EndedByService, Frames, NotOurs, Stalled
from metasvc.errors import FsError, VolumeExists, VolumeMissing

CONNECT_S: Final = 10.0
"""How long a connection may take to come about."""


class ServiceUnavailable(AtollError):
    """Say that the service cannot be reached now."""

    code = "service-unavailable"
    errno = errno.EIO
    retryable = True


class AccessRefused(AtollError):
    """Say that the service does not accept the token."""

    code = "access-refused"
    errno = errno.EACCES


class ServiceRefused(AtollError):
    """Say why the service does not want to speak with this client."""

    code = "service-refused"
    errno = errno.EPROTO


class SessionEnded(AtollError):
    """Say that the session has ended, so that what it had not committed cannot be committed any more."""

    code = "session-ended"
    errno = errno.ESTALE


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A service, and who asks it."""

    host: str
    port: int
    token: str

    def __str__(self) -> str:
        """Return it as it stands in messages."""
        return f"{self.host}:{self.port}"

    async def connect(self, method: pb.Opening.Method.ValueType, volume: str = "") -> Frames:
        """Connect, and say what for; the service has not answered yet. ServiceUnavailable. The caller closes it."""
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(CONNECT_S):
                _, frames = await loop.create_connection(
                    lambda: Frames(max_bytes=MAX_REPLY_BYTES, is_client=True), self.host.strip("[]"), self.port
                )
        except TimeoutError as error:
            raise ServiceUnavailable(f"the service at {self} does not answer") from error
        except (OSError, UnicodeError, OverflowError) as error:
            reason = (error.strerror if isinstance(error, OSError) else None) or error
            raise ServiceUnavailable(f"the service at {self} is not reachable: {reason}") from error
        frames.greet()
        frames.send(pb.Opening(method=method, token=self.token, volume=volume).SerializeToString())
        return frames

    async def ask(self, method: pb.Opening.Method.ValueType, request: bytes, *, volume: str = "") -> bytes:
        """Ask once and return the answer. One connection. Raises what `error` makes of a failure."""
        async with aclosing(self.answers(method, request, volume=volume)) as answers:
            async for answer in answers:
                return answer
        raise ServiceUnavailable(f"the service at {self} answered nothing")

    async def answers(
        self, method: pb.Opening.Method.ValueType, request: bytes, *, volume: str = ""
    ) -> AsyncGenerator[bytes, None]:
        """Ask, and yield every answer. One connection. Raises what `error` makes of a failure."""
        frames = await self.connect(method, volume)
        try:
            frames.send(request)
            while True:
                yield await frames.read()
        except EndedByService as ended:
            if ended.reason != pb.Ended.DONE:
                raise self.error(ended) from ended
        except (ConnectionLost, Stalled, NotOurs) as error:
            raise self.error(error) from error
        finally:
            frames.close()

    def error(self, error: Exception) -> AtollError:
        """Return what the end of a connection means."""
        if isinstance(error, NotOurs):
            return ServiceRefused(
                f"what answers at {self} is no metadata service of AtollFS: check the address ({error.message})"
            )
        if not isinstance(error, EndedByService):
            return ServiceUnavailable(f"the service at {self}: {error}")
        details = error.details
        match error.reason:
            case pb.Ended.SESSION_ENDED:
                return SessionEnded("the session has ended: the service did not hear of this client for too long")
            case pb.Ended.NO_ACCESS:
                return AccessRefused(f"the service at {self} refuses: {details}")
            case pb.Ended.NO_VOLUME:
                return VolumeMissing(details)
            case pb.Ended.VOLUME_EXISTS:
                return VolumeExists(details)
            case pb.Ended.INVALID:
                return ServiceRefused(f"the service at {self} refuses: {details}", errno=FsError(errno.EINVAL).errno)
            case pb.Ended.UNKNOWN_METHOD:
                return ServiceRefused(f"the service at {self} is older than this client: upgrade it")
        return ServiceUnavailable(f"the service at {self} is not available: {details}")
