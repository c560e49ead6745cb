"""The commands' side of the control socket.

Owns asking the holder of a volume one thing and reading its answer, with plain blocking calls: a command that goes
through a holder needs no event loop and starts sooner. Must not know what requests mean.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable
from contextlib import suppress
from typing import Final, Self

from client.control import endpoint
from client.control.messages import (
    MAX_REPLY_BYTES,
    SILENCE_S,
    ControlError,
    Items,
    JsonObject,
    Progress,
    RemoteError,
    Reply,
    Request,
    Result,
    decode_reply,
    encode_request,
)

CONNECT_S: Final = 5.0
ANSWER_S: Final = 3.0
"""A holder that is well says within this time who it is."""


class HolderLost(ControlError):
    """Say that the holder went away, or fell silent, before it answered."""

    code = "holder-lost"
    errno = errno.EPIPE
    retryable = True


class HolderDenied(ControlError):
    """Say that the volume is held by another user."""

    code = "holder-denied"
    errno = errno.EACCES


class HolderCall:
    """One request to a holder: send it, then read its replies. A context manager."""

    def __init__(self, connection: socket.socket, *, silence_s: float = SILENCE_S) -> None:
        connection.settimeout(silence_s)
        self._connection = connection
        self._file = connection.makefile("rb", buffering=64 << 10)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        with suppress(OSError):
            self._file.close()
        self._connection.close()

    @property
    def holder_pid(self) -> int:
        """Return the process id of the holder, as the kernel knows it."""
        return endpoint.peer(self._connection).pid

    def run(
        self,
        request: Request,
        *,
        show: Callable[[Progress], None] | None = None,
        take: Callable[[Items], None] | None = None,
    ) -> JsonObject:
        """Send the request and return its result, parts joined. RemoteError if the holder answers one; HolderLost.

        With ``take`` parts go there as they come, and are not joined. The holder waits while it has one, for up to 30 s.
        """
        self.send(request)
        return self.receive(show=show, take=take)

    def send(self, request: Request) -> None:
        """Send the request. HolderLost if the holder takes it not."""
        try:
            # A holder that refuses the connection answers before it reads; that answer counts more than the broken pipe.
            with suppress(BrokenPipeError, ConnectionResetError):
                self._connection.sendall(encode_request(request))
        except OSError as error:
            raise HolderLost("the holder of the volume takes no requests: try again") from error

    def receive(
        self, *, show: Callable[[Progress], None] | None = None, take: Callable[[Items], None] | None = None
    ) -> JsonObject:
        """Return the result of the request that was sent."""
        parts: dict[str, list[object]] = {}
        while True:
            reply = self._reply()
            if isinstance(reply, Progress):
                if show is not None and reply.text:
                    show(reply)
            elif isinstance(reply, Result):
                return {**reply.value, **parts}
            elif not isinstance(reply, Items):
                raise reply
            elif take is not None:
                take(reply)
            else:
                parts.setdefault(reply.key, []).extend(reply.rows)

    def _reply(self) -> Reply:
        """Read one reply. HolderLost."""
        try:
            line = self._file.readline(MAX_REPLY_BYTES + 1)
        except TimeoutError as error:
            raise HolderLost(
                f"the holder of the volume (pid {self.holder_pid}) is silent: look at its log, or end it with kill"
            ) from error
        except OSError as error:
            raise HolderLost(
                f"the holder of the volume went away ({os.strerror(error.errno or 0)}): try again"
            ) from error
        if not line:
            raise HolderLost("the holder of the volume ended before it answered: try again")
        return decode_reply(line)


def call_holder(directory: str, *, silence_s: float = SILENCE_S) -> HolderCall | None:
    """Return a call to the holder of the volume in a directory, or None if there is none. HolderDenied, HolderLost.

    ``silence_s``: how long the holder may say nothing. It answers at once, or tells every 5 s that it is still at work.
    """
    try:
        connection = endpoint.connect(directory, timeout_s=CONNECT_S)
    except TimeoutError as error:
        raise HolderLost(
            "the holder of the volume takes no connections: look at its log, or end it with kill"
        ) from error
    except PermissionError as error:
        raise HolderDenied(f"{directory} belongs to another user: ask as that user or as root") from error
    return None if connection is None else HolderCall(connection, silence_s=silence_s)


__all__ = ["HolderCall", "HolderDenied", "HolderLost", "RemoteError", "call_holder"]
