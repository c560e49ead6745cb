"""Where a service is, how it is reached, and what its refusals mean.

Owns the gRPC channel's settings and the one table from gRPC's statuses to errors of ours.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass
from typing import Final

import grpc
import grpc.aio

from chunkstore.errors import AtollError
from metasvc.errors import FsError, VolumeExists, VolumeMissing

MAX_MESSAGE_BYTES: Final = 16 * 1024 * 1024
"""Of what goes out; what comes in may be four times as large. The service has the same."""
_OPTIONS: Final = (
    ("grpc.max_receive_message_length", 4 * MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.min_reconnect_backoff_ms", 1_000),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.enable_retries", 0),
    # Each channel has connections of its own: sessions of one process do not wait for each other's windows.
    ("grpc.use_local_subchannel_pool", 1),
)
VOLUME_KEY: Final = "atoll-volume-bin"


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

    def channel(self) -> grpc.aio.Channel:
        """Return a channel; nothing is sent yet. Call on the event loop that is to use it."""
        return grpc.aio.insecure_channel(f"{self.host}:{self.port}", options=_OPTIONS)

    def metadata(self, volume: str | None) -> tuple[tuple[str, str | bytes], ...]:
        """Return what goes with each call: the token, and TENANT/NAME of the volume if it is about one."""
        found: tuple[tuple[str, str | bytes], ...] = (("authorization", f"Bearer {self.token}"),)
        return found if volume is None else (*found, (VOLUME_KEY, volume.encode()))

    def error(self, error: grpc.aio.AioRpcError) -> AtollError:
        """Return what a failed call means."""
        details = error.details() or ""
        status = error.code()
        if status is grpc.StatusCode.UNAUTHENTICATED or status is grpc.StatusCode.PERMISSION_DENIED:
            return AccessRefused(f"the service at {self} refuses: {details}")
        if status is grpc.StatusCode.NOT_FOUND:
            return VolumeMissing(details)
        if status is grpc.StatusCode.ALREADY_EXISTS:
            return VolumeExists(details)
        if status is grpc.StatusCode.FAILED_PRECONDITION and details == SessionEnded.code:
            return SessionEnded("the session has ended: the service did not hear of this client for too long")
        if status is grpc.StatusCode.INVALID_ARGUMENT:
            return ServiceRefused(f"the service at {self} refuses: {details}", errno=FsError(errno.EINVAL).errno)
        if status is grpc.StatusCode.UNIMPLEMENTED:
            return ServiceRefused(f"what answers at {self} is no metadata service of AtollFS: check the address")
        return ServiceUnavailable(f"the service at {self} is not reachable: {details or status.name}")
