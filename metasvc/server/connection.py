"""One stream: messages in, answers out, until either side ends it.

Owns the bounds of a stream: how long a client may take to say Hello and to read what it asked for, and how much may wait for
it. Must not know what requests mean. What a session does goes on without its stream.

What comes in starts requests at once (`_take`); what they answer goes out at the end of the turn of the loop, all of it in one
message (`_flush`). Nothing is taken in while more than `QUEUE_BYTES` wait to be sent, and what was taken in and has not begun
waits as well (`is_full`), so a client that does not read is not served either, and after frames.STALLED_S its connection ends.
All state is touched on the event loop only.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any, Final

from google.protobuf.message import DecodeError

from chunkstore.errors import AtollError
from metasvc.api import atoll_pb2 as pb
from metasvc.api.frames import Frames
from metasvc.api.volume_format import dump_format
from metasvc.engine.leases import HELD_S
from metasvc.model import Ino, SessionId
from metasvc.server.rights import Rights
from metasvc.server.session import MAX_NUMBER, MAX_OUTSTANDING, Misbehaved, ServedSession
from metasvc.server.volumes import SessionEnded, Volume

PROTOCOL: Final = 1
"""The newest protocol that this service speaks."""
OLDEST_PROTOCOL: Final = 1
KEEPALIVE_S: Final = 2.0
HELLO_S: Final = 10.0
"""A stream that has not said Hello by then is closed."""
QUEUE_BYTES: Final = 4 * 1024 * 1024
WAIT_S: Final = 0.02
"""Replies that nobody waits for wait so long for others to go with: by itself each wakes both processes, 80 us of a create."""
_WAITING_MOST: Final = 64
"""Well under what a client may have outstanding."""
JOINED_BYTES: Final = 1024 * 1024
"""Replies are joined into one message up to about so much."""
MAX_OPENS: Final = 1_000_000

log = logging.getLogger(__name__)


class Silent(AtollError):
    """A client, or the network to it, stands still: its stream ends, and it may come again."""

    retryable = True


class Connection:
    """One stream of one session: metasvc.server.session.Outlet."""

    def __init__(self, frames: Frames, rights: Rights) -> None:
        """Take a connection whose client is known to be allowed in, and what it may do."""
        self.rights = rights
        loop = asyncio.get_running_loop()
        self._frames = frames
        self._out: list[bytes] = []
        self._out_bytes = 0
        self._is_due = False
        self._later: asyncio.TimerHandle | None = None
        self._is_paused = False
        self._ended: asyncio.Future[bool] = loop.create_future()
        """The client said goodbye, or `fail` what it raises."""
        self._session: ServedSession | None = None
        self.messages_in = 0
        self.messages_out = 0

    @property
    def is_full(self) -> bool:
        return self._out_bytes > QUEUE_BYTES

    def send(self, message: bytes, *, may_wait: bool = False) -> None:
        self._out.append(message)
        self._out_bytes += len(message)
        if self._is_due:
            return
        loop = asyncio.get_running_loop()
        if not may_wait or len(self._out) >= _WAITING_MOST:
            self._is_due = True
            loop.call_soon(self._flush)
        elif self._later is None:
            self._later = loop.call_later(WAIT_S, self._flush)

    def fail(self, error: AtollError) -> None:
        if not self._ended.done():
            self._ended.set_exception(error)

    async def serve(self, volume: Volume) -> None:
        """Serve the stream to its end. Raises what ends it early; the caller tells the client."""
        self._ended.add_done_callback(lambda done: done.cancelled() or done.exception())
        serving = asyncio.create_task(self._serve(volume), name="stream")
        closed = self._frames.closed
        ends: set[asyncio.Future[Any]] = {serving, self._ended, closed}
        try:
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            if closed.done() and self._session is None and not serving.done():
                # One that has ended must not wait for its turn, nor take the session from the stream that came after it.
                await closed
            # What went wrong here rather than that a newer stream, or the end of the volume, made it go wrong.
            if self._ended.done() and not serving.done():
                await self._ended
            await serving
        finally:
            serving.cancel()
            await asyncio.gather(serving, return_exceptions=True)
            if self._later is not None:
                self._later.cancel()

    async def _serve(self, volume: Volume) -> None:
        first = await self._hello()
        # Nothing comes before Welcome but the end of the connection, which is noticed only by who receives.
        self._frames.resume()
        session = self._session = await self._attach(volume, first.hello, confirmed=first.confirmed)
        frames = self._frames
        try:
            frames.on_room = self._has_room
            frames.deliver(self._take)
            ends: set[asyncio.Future[Any]] = {frames.closed, self._ended}
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            await (self._ended if self._ended.done() else frames.closed)
            await volume.end(session)
        finally:
            if session.outlet is self:
                session.outlet = None

    async def _hello(self) -> pb.FromClient:
        try:
            async with asyncio.timeout(HELLO_S):
                message = self._parsed(await self._frames.read())
        except TimeoutError:
            raise Silent(f"said nothing for {HELLO_S:.0f} s") from None
        if not message.HasField("hello") or message.requests:
            raise Misbehaved("the first message of a stream is Hello, alone")
        hello = message.hello
        if not OLDEST_PROTOCOL <= hello.protocol <= PROTOCOL:
            upgrade = "the service" if hello.protocol > PROTOCOL else "the client"
            raise Misbehaved(
                f"the client speaks protocol {hello.protocol}, this service {OLDEST_PROTOCOL} to {PROTOCOL}: upgrade {upgrade}"
            )
        count = len(hello.open_inos)
        if message.confirmed >= MAX_NUMBER:
            raise Misbehaved("confirms replies that nobody can have asked for")
        if len(hello.open_counts) != count or len(hello.open_ends) not in (0, count) or count > MAX_OPENS:
            raise Misbehaved("Hello lists open files in columns of different lengths, or too many")
        return message

    async def _attach(self, volume: Volume, hello: pb.Hello, *, confirmed: int) -> ServedSession:
        """Begin a session, or go on with one whose connection, if it still has one, is cut."""
        if hello.session_id:
            session = volume.find(SessionId(hello.session_id), hello.secret)
            if hello.attempt:
                if hello.attempt <= session.attempt:
                    raise self._overtaken(session)
                session.attempt = hello.attempt
            async with session.attaching:
                if 0 < hello.attempt < session.attempt:
                    raise self._overtaken(session)
                former, session.outlet = session.outlet, None
                if former is not None:
                    former.fail(AtollError("the client has connected anew", retryable=True))
                await session.quiet()
                if volume.sessions.get(session.session_id) is not session:
                    raise SessionEnded(f"session {session.session_id} has ended")
                opens = dict(zip(map(Ino, hello.open_inos), hello.open_counts, strict=True))
                promised = {Ino(ino): end for ino, end in zip(hello.open_inos, hello.open_ends, strict=False) if end}
                session.allow(self.rights)
                await volume.resume(session, opens, promised, confirmed=confirmed, repeated=hello.repeated)
                session.outlet = self
                if volume.engine.failure is not None:
                    raise volume.engine.failure
        else:
            session = await volume.begin(
                host=hello.host[:255], pid=max(0, hello.pid), mountpoint=hello.mountpoint.replace("\0", "")[:4096]
            )
            session.attempt = hello.attempt
            session.allow(self.rights)
            session.outlet = self
        session.take_leases(listens=hello.leases)
        welcome = pb.Welcome(
            protocol=PROTOCOL,
            session_id=session.session_id,
            secret=session.secret,
            format=pb.VolumeFormat(json=dump_format(volume.format)),
            keepalive_s=KEEPALIVE_S,
            expiry_s=volume.expiry_s,
            max_outstanding=MAX_OUTSTANDING,
            lease_s=HELD_S,
            root=self.rights.root,
            read_only=self.rights.is_read_only,
        )
        self.send(pb.FromService(welcome=welcome).SerializeToString())
        return session

    def _overtaken(self, session: ServedSession) -> AtollError:
        return AtollError(f"session {session.session_id} goes on with a later connection", retryable=True)

    def _take(self, data: bytes) -> None:
        """Start what a message asks for."""
        session = self._session
        if session is None or self._ended.done():
            return
        message = self._parsed(data)
        if session.outlet is not self or session.is_ending:
            raise SessionEnded(f"session {session.session_id} goes on elsewhere, or has ended")
        if message.HasField("hello"):
            raise Misbehaved("Hello comes once in a stream")
        session.receive(message)
        if message.goodbye:
            session.drop_leases()
            self._ended.set_result(True)
        elif not message.requests and (not self._out or self._out[-1]):
            # A sign of life, answered by one: an empty message. One that waits is enough.
            self.send(b"")

    def _parsed(self, data: bytes) -> pb.FromClient:
        self.messages_in += 1
        try:
            return pb.FromClient.FromString(data)
        except DecodeError as error:
            raise Misbehaved("sent a message that is damaged") from error

    def _joined(self) -> bytes:
        """Take what goes out in one message."""
        size = count = 0
        while count < len(self._out) and size < JOINED_BYTES:
            size += len(self._out[count])
            count += 1
        taken = self._out[:count]
        del self._out[:count]
        return b"".join(taken)

    def _has_room(self) -> None:
        # It took something: it lives, though it may be too busy reading to say so.
        if self._session is not None:
            self._session.heard_s = max(self._session.heard_s, time.monotonic())
        self._flush()

    def _flush(self) -> None:
        """Send what waits, as far as there is room, and take in nothing while too much is left."""
        self._is_due = False
        if self._later is not None:
            self._later.cancel()
            self._later = None
        while self._out and not self._frames.is_congested:
            message = self._joined()
            self._out_bytes -= len(message)
            self._frames.send(message)
            self.messages_out += 1
        if (self._out_bytes > QUEUE_BYTES) is not self._is_paused:
            self._is_paused = not self._is_paused
            if self._is_paused:
                self._frames.pause()
            else:
                self._frames.resume()
        if self._session is not None and not self.is_full:
            self._session.has_room()
