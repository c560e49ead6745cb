"""Messages over one TCP connection: how they are cut, and how a connection begins and ends.

Owns the bytes on the wire. Must not know what messages mean, but for the two of its own: `Opening`, the client's first, says
who calls and what for; `Ended`, the service's last, says why no more comes.

Bytes. First, from either side, `MAGIC` (8 bytes, the last one its version). Then frames: a little-endian u32, whose highest bit
says "Ended" (a service's alone) and whose others are a length in bytes, and so many bytes of one protobuf message. A service
sends nothing before it has read an Opening, or found that what came is none.

Why not gRPC: its own thread hands every message to the event loop, on both sides (docs/adr/0042). Here they are callbacks of
the loop.

Ways to receive. `read` waits for the next message. After `deliver`, messages go to a callback as they come, several in one
turn of the loop. What the callback raises ends the connection (`closed`), and nothing more is delivered.

Sending never waits: whoever sends looks at `is_congested` and stops until `on_room` is called. A peer that takes nothing for
`STALLED_S` is given up, and so is one whose machine does not acknowledge what was sent for as long (the kernel sees to that).
"""

from __future__ import annotations

import asyncio
import socket
import struct
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Final, cast

from google.protobuf.message import DecodeError

from chunkstore.errors import AtollError
from metasvc.api import atoll_pb2 as pb
from metasvc.api.server import is_loopback

MAGIC: Final = b"atollfs\x01"
MAX_OPENING_BYTES: Final = 16 * 1024
"""Of what comes from somebody who has not said who they are: a token of some hundred bytes, and the name of a volume."""
MAX_REQUEST_BYTES: Final = 16 * 1024 * 1024
"""Of a message to the service: a commit has up to 16,384 pieces and 32 KiB inline for each slice."""
MAX_REPLY_BYTES: Final = 64 * 1024 * 1024
"""Of a message from the service: the map of a file with thousands of inline slices."""
STALLED_S: Final = 30.0
_HIGH_BYTES: Final = 1024 * 1024
_PART_BYTES: Final = 256 * 1024
"""What has come of a message is kept in parts when it is more: one buffer that grows is copied again and again, and leaves
holes behind it that nothing else fills (32 connections with 14 MiB each: 639 MiB)."""
_HEADER: Final = struct.Struct("<I")
_ENDED: Final = 1 << 31
_TLS_HELLO: Final = b"\x16\x03"
_TLS_ALERT: Final = b"\x15\x03"


class ConnectionLost(AtollError):
    """Say that the other side is gone, without a word."""

    code = "connection-lost"
    retryable = True


class Stalled(AtollError):
    """Say that the other side takes nothing."""

    code = "stalled"
    retryable = True


class NotOurs(AtollError):
    """Say that what came is no message of this protocol, or is too long."""

    code = "bad-frame"


class EndedByService(Exception):
    """Carry the reason that the service gave."""

    def __init__(self, reason: pb.Ended.Reason.ValueType, details: str, owner: str = "") -> None:
        """Take what Ended says."""
        super().__init__(details)
        self.reason = reason
        self.details = details
        self.owner = owner


class Frames(asyncio.Protocol):
    """One connection, either side of it. Made by the event loop's create_connection or create_server."""

    def __init__(
        self,
        *,
        max_bytes: int,
        on_made: Callable[[Frames], object] | None = None,
        on_unfinished: Callable[..., object] | None = None,
        is_client: bool = False,
    ) -> None:
        """``max_bytes``: the longest message that is taken; it may be changed at any time.

        ``on_unfinished`` is told when bytes came: how many are held of a message that is not whole, and whether it is
        another one than the last time.
        """
        self._is_client = is_client
        self.heard_s = time.monotonic()
        """When bytes came last, of a whole message or not."""
        self.max_bytes = max_bytes
        self.on_room: Callable[[], object] = _nothing
        """Called when sending may go on."""
        self.closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Done when the connection has ended: ConnectionLost, Stalled, NotOurs, EndedByService, or what `deliver` raised."""
        self.closed.add_done_callback(lambda done: done.cancelled() or done.exception())
        self.gone: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Done when the socket is closed."""
        self.peer = "?"
        self.is_congested = False
        self._on_made = on_made
        self._on_unfinished = on_unfinished
        self._transport: asyncio.Transport | None = None
        self._buffer = bytearray()
        """What has come and was not cut yet, but for what `_parts` has."""
        self._parts: list[bytearray] = []
        """A long message that has not come whole, from its header on. Then nothing is in the buffer."""
        self._missing_bytes = 0
        """Of the message in `_parts`."""
        self._parts_bytes = 0
        self._awaits_magic = True
        self._is_deaf = False
        """What comes now, or has come and was not read, counts no more."""
        self._is_greeted = False
        self._is_paused = self._is_held = False
        """Nothing is received while one of both is so."""
        self._received: deque[bytes] = deque()
        self._reader: asyncio.Future[None] | None = None
        self._deliver: Callable[[bytes], object] | None = None
        self._stalled: asyncio.TimerHandle | None = None

    @property
    def is_private(self) -> bool:
        """Return whether nobody else can read what passes: by TLS, or within this machine. Of a connection that stands."""
        assert self._transport is not None
        if self._transport.get_extra_info("ssl_object") is not None:
            return True
        name: Any = self._transport.get_extra_info("peername")
        return bool(name) and is_loopback(name[0])

    # -- sending ----------------------------------------------------------------------------------------------------------

    def greet(self) -> None:
        """Send the bytes that a connection begins with, if they were not sent yet. Before anything else."""
        if not self._is_greeted:
            self._is_greeted = True
            self._write(MAGIC)

    def send(self, message: bytes) -> None:
        """Send one message. Never blocks; nothing happens on a connection that has ended."""
        self._write(_HEADER.pack(len(message)) + message)

    def end(self, reason: pb.Ended.Reason.ValueType, details: str, *, owner: str = "") -> None:
        """Say why, after what was sent, and close. ``owner``: who owns the volume instead (metasvc.api.server.owner_text)."""
        self.greet()
        data = pb.Ended(reason=reason, details=details[:1000], owner=owner).SerializeToString()
        self._write(_HEADER.pack(len(data) | _ENDED) + data)
        self.close()

    def _write(self, data: bytes) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(data)

    def close(self) -> None:
        """Close when what was sent is on its way. Nothing more is received."""
        self._is_deaf = True
        if self._transport is not None and not self._transport.is_closing():
            self._transport.close()
            if self._transport.get_write_buffer_size():
                self._watch()
        self._fail(ConnectionLost("the connection was closed"))

    def abort(self) -> None:
        """Close at once; what was not sent yet is not sent."""
        self.close()
        if self._transport is not None:
            self._transport.abort()

    def pause_writing(self) -> None:
        """Take note that the other side lags (called by the transport)."""
        self.is_congested = True
        self._watch()

    def resume_writing(self) -> None:
        """Take note that the other side has caught up (called by the transport)."""
        self.is_congested = False
        if self._transport is not None and not self._transport.is_closing():
            self._unwatch()
        self.on_room()

    async def drain(self) -> None:
        """Wait until sending may go on; returns at once on a connection that has ended."""
        if self.is_congested and not self.closed.done():
            room = asyncio.Event()
            self.on_room = room.set
            waiting = asyncio.ensure_future(room.wait())
            waited: set[asyncio.Future[Any]] = {waiting, self.closed}
            try:
                await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
            finally:
                waiting.cancel()

    def _watch(self) -> None:
        """Give the connection up if nothing has been taken when `STALLED_S` are over."""
        assert self._transport is not None
        self._unwatch()
        waiting_bytes = self._transport.get_write_buffer_size()

        def look() -> None:
            assert self._transport is not None
            if self._transport.get_write_buffer_size() < waiting_bytes:
                self._watch()
            else:
                self._fail(Stalled(f"takes nothing for {STALLED_S:.0f} s"))
                self._transport.abort()

        self._stalled = asyncio.get_running_loop().call_later(STALLED_S, look)

    def _unwatch(self) -> None:
        if self._stalled is not None:
            self._stalled.cancel()
            self._stalled = None

    # -- receiving --------------------------------------------------------------------------------------------------------

    async def read(self) -> bytes:
        """Return the next message. Raises what `closed` does when there will be none. One reader at a time."""
        self._parse()
        while not self._received:
            if self.closed.done():
                await self.closed
                raise ConnectionLost("the connection has ended")
            self._reader = asyncio.get_running_loop().create_future()
            self.resume()
            try:
                await self._reader
            finally:
                self._reader = None
        return self._received.popleft()

    def deliver(self, callback: Callable[[bytes], object]) -> None:
        """Give messages to a callback from now on, those first that nobody has read."""
        self._deliver = callback
        while self._received and not self._is_deaf:
            self._hand_over(self._received.popleft())
        self._parse()
        self.resume()

    def pause(self) -> None:
        """Receive nothing until `resume`, but for what has come already."""
        self._is_paused = True
        self._receive_or_not()

    def resume(self) -> None:
        """Undo `pause`."""
        self._is_paused = False
        self._receive_or_not()

    def hold(self, *, is_held: bool) -> None:
        """Receive nothing while held: a pause for another reason."""
        self._is_held = is_held
        self._receive_or_not()

    def _receive_or_not(self) -> None:
        if self._transport is None or self._transport.is_closing():
            return
        if self._is_paused or self._is_held:
            self._transport.pause_reading()
        else:
            self._transport.resume_reading()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin (called by the event loop)."""
        # Not isinstance(): uvloop's are no subclasses.
        self._transport = whole = cast("asyncio.Transport", transport)
        whole.set_write_buffer_limits(high=_HIGH_BYTES)
        _keep_alive(whole.get_extra_info("socket"))
        name: Any = whole.get_extra_info("peername")
        self.peer = f"{name[0]}:{name[1]}" if name else "?"
        if self._on_made is not None:
            self._on_made(self)

    def data_received(self, data: bytes) -> None:
        """Take what came (called by the transport)."""
        self.heard_s = time.monotonic()
        if not self._parts:
            self._buffer += data
        elif len(data) < self._missing_bytes:
            self._keep_part(data)
            self._tell_unfinished(is_new=False)
            return
        else:
            self._buffer = bytearray().join([*self._parts, data])
            self._forget_parts()
        self._parse()

    def _keep_part(self, data: bytes | bytearray) -> None:
        # Not a part for each: whoever sends byte by byte would take forty for one.
        if self._parts and len(self._parts[-1]) < _PART_BYTES:
            self._parts[-1] += data
        else:
            self._parts.append(bytearray(data))
        self._parts_bytes += len(data)
        self._missing_bytes -= len(data)

    def _forget_parts(self) -> None:
        self._parts = []
        self._parts_bytes = self._missing_bytes = 0

    def _tell_unfinished(self, *, is_new: bool) -> None:
        if self._on_unfinished is not None:
            self._on_unfinished(self, len(self._buffer) + self._parts_bytes, is_new=is_new)

    def _parse(self) -> None:
        """Cut messages: all that came, or the next one where they are read one by one (its limits may depend on the last)."""
        buffer = self._buffer
        at = missing_bytes = 0
        if self._awaits_magic:
            if not MAGIC.startswith(bytes(buffer[: len(MAGIC)])):
                self._refuse(_no_magic(bytes(buffer[: len(MAGIC)])))
                return
            if len(buffer) < len(MAGIC):
                return
            self._awaits_magic = False
            at = len(MAGIC)
        while len(buffer) - at >= _HEADER.size and not self._received and not self._is_deaf:
            (header,) = _HEADER.unpack_from(buffer, at)
            length = header & ~_ENDED
            if length > self.max_bytes:
                self._refuse(f"a message of {length} bytes, {self.max_bytes} are the most")
                return
            past = at + _HEADER.size + length
            if len(buffer) < past:
                missing_bytes = past - len(buffer)
                break
            message = bytes(buffer[at + _HEADER.size : past])
            at = past
            if header & _ENDED:
                self._end(message)
            elif self._deliver is not None:
                self._hand_over(message)
            else:
                self._received.append(message)
                self.pause()
                self._wake()
        del buffer[:at]
        if missing_bytes and len(buffer) > _PART_BYTES:
            self._missing_bytes = missing_bytes + len(buffer)
            self._keep_part(buffer)
            self._buffer = bytearray()
        self._tell_unfinished(is_new=at > 0)

    def give_up(self, why: str) -> None:
        """Drop what has come of a message, and take no more. Stalled."""
        self._is_deaf = True
        self._buffer.clear()
        self._forget_parts()
        self._fail(Stalled(why))
        self.pause()

    def _hand_over(self, message: bytes) -> None:
        assert self._deliver is not None
        try:
            self._deliver(message)
        except Exception as error:  # noqa: BLE001 (told to whoever waits for the end)
            self._is_deaf = True
            self._fail(error)

    def _end(self, message: bytes) -> None:
        if not self._is_client:
            self._refuse("an end, from a client")
            return
        try:
            ended = pb.Ended.FromString(message)
        except DecodeError:
            self._refuse("a damaged end")
            return
        self._fail(EndedByService(ended.reason, ended.details, ended.owner))
        self.close()

    def _refuse(self, what: str) -> None:
        self._is_deaf = True
        self._fail(NotOurs(what))
        self.pause()

    def connection_lost(self, error: Exception | None) -> None:
        """Take note of the end (called by the transport)."""
        self.gone.set_result(None)
        self._unwatch()
        self._forget_parts()
        if self._on_unfinished is not None:
            self._on_unfinished(self, 0, is_new=True)
        self._fail(ConnectionLost("the connection was lost" if error is None else f"the connection was lost: {error}"))

    def _fail(self, error: Exception) -> None:
        if not self.closed.done():
            self.closed.set_exception(error)
            self._wake()

    def _wake(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)


def _keep_alive(connection: socket.socket) -> None:
    """Let the kernel find out that the other machine is gone, when nothing is said: within half a minute."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 10)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 4)
    # Probes are not sent while something is unacknowledged.
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(STALLED_S * 1000))


def _no_magic(found: bytes) -> str:
    if found[:-1] == MAGIC[:-1]:
        return f"wire version {found[-1]}, this side speaks {MAGIC[-1]}: upgrade the older one"
    if found[:2] in (_TLS_HELLO, _TLS_ALERT):
        return "TLS, where plain text was expected: the address is atolls:// where the service has a certificate, else atoll://"
    return "no message of AtollFS"


def _nothing() -> None:
    pass
