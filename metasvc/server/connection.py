"""One stream: messages in, answers out, until either side ends it.

Owns the bounds of a stream: how long a client may take to say Hello and to read what it asked for, and how much may wait for
it. Must not know what requests mean. What a session does goes on without its stream.

Two tasks: the reader (the handler itself) starts requests, the writer sends what they answered, all that is there in one
message. The reader takes nothing more while more than `QUEUE_BYTES` wait to be sent, so a client that does not read is not
served either, and after `WRITE_S` its stream ends. All state is touched on the event loop only.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any, Final

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from chunkstore.errors import AtollError
from metasvc.api import atoll_pb2 as pb
from metasvc.api.volume_format import dump_format
from metasvc.model import Ino, SessionId
from metasvc.server.session import MAX_NUMBER, MAX_OUTSTANDING, Misbehaved, ServedSession
from metasvc.server.volumes import SessionEnded, Volume

PROTOCOL: Final = 1
"""The newest protocol that this service speaks."""
OLDEST_PROTOCOL: Final = 1
KEEPALIVE_S: Final = 2.0
HELLO_S: Final = 10.0
"""A stream that has not said Hello by then is closed."""
WRITE_S: Final = 30.0
"""A client that does not take a message for so long is cut off."""
QUEUE_BYTES: Final = 4 * 1024 * 1024
JOINED_BYTES: Final = 1024 * 1024
"""Replies are joined into one message up to about so much."""
MAX_OPENS: Final = 1_000_000

Context = grpc.aio.ServicerContext[bytes, bytes]

log = logging.getLogger(__name__)


class Silent(Exception):
    """A client, or the network to it, stands still: its stream ends, and it may come again."""


class Connection:
    """One stream of one session: metasvc.server.session.Outlet."""

    def __init__(self, context: Context, *, peer: str) -> None:
        """Take a stream whose client is known to be allowed in."""
        self._context = context
        self._peer = peer
        self._out: list[bytes] = []
        self._out_bytes = 0
        self._wake = asyncio.Event()
        self._room = asyncio.Event()
        self._room.set()
        self._failed: asyncio.Future[AtollError] = asyncio.get_running_loop().create_future()
        self._is_ending = False
        self._session: ServedSession | None = None
        self.messages_in = 0
        self.messages_out = 0

    def send(self, message: bytes) -> None:
        self._out.append(message)
        self._out_bytes += len(message)
        if self._out_bytes > QUEUE_BYTES:
            self._room.clear()
        self._wake.set()

    def fail(self, error: AtollError) -> None:
        if not self._failed.done():
            self._failed.set_result(error)

    async def serve(self, volume: Volume) -> None:
        """Serve the stream to its end. What ends it early is told to the client by the status of the stream."""
        work = asyncio.create_task(self._serve(volume), name="stream")
        waited: set[asyncio.Future[Any]] = {work, self._failed}
        try:
            await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                await work
            else:
                await self._abort(self._failed.result())
        except Silent as error:
            log.warning("client %s: %s: its stream is closed", self._peer, error)
            await self._context.abort(grpc.StatusCode.UNAVAILABLE, str(error))
        except Misbehaved as error:
            log.warning("client %s: %s: its stream is closed", self._peer, error)
            await self._context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        except AtollError as error:
            await self._abort(error)
        finally:
            work.cancel()
            await asyncio.gather(work, return_exceptions=True)

    async def _abort(self, error: AtollError) -> None:
        if isinstance(error, SessionEnded):
            await self._context.abort(grpc.StatusCode.FAILED_PRECONDITION, error.code)
        await self._context.abort(grpc.StatusCode.UNAVAILABLE, error.message)

    async def _serve(self, volume: Volume) -> None:
        first = await self._hello()
        session = self._session = await self._attach(volume, first.hello, confirmed=first.confirmed)
        writer = asyncio.create_task(self._write(), name="writer of a stream")
        try:
            reader = asyncio.create_task(self._read(session), name="reader of a stream")
            try:
                await asyncio.wait({reader, writer}, return_when=asyncio.FIRST_COMPLETED)
                if not reader.done():
                    await writer
                elif reader.result():
                    await volume.end(session)
                    self._is_ending = True
                    self._wake.set()
                    await writer
            finally:
                reader.cancel()
                await asyncio.gather(reader, return_exceptions=True)
        finally:
            if session.outlet is self:
                session.outlet = None
            writer.cancel()
            await asyncio.gather(writer, return_exceptions=True)

    async def _hello(self) -> pb.FromClient:
        try:
            async with asyncio.timeout(HELLO_S):
                message = await self._receive()
        except TimeoutError:
            raise Silent(f"said nothing for {HELLO_S:.0f} s") from None
        if message is None or not message.HasField("hello") or message.requests:
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
            async with session.attaching:
                former, session.outlet = session.outlet, None
                if former is not None:
                    former.fail(AtollError("the client has connected anew", retryable=True))
                await session.quiet()
                if volume.sessions.get(session.session_id) is not session:
                    raise SessionEnded(f"session {session.session_id} has ended")
                opens = dict(zip(map(Ino, hello.open_inos), hello.open_counts, strict=True))
                promised = {Ino(ino): end for ino, end in zip(hello.open_inos, hello.open_ends, strict=False) if end}
                await volume.resume(session, opens, promised, confirmed=confirmed, repeated=hello.repeated)
                session.outlet = self
                if volume.engine.failure is not None:
                    raise volume.engine.failure
        else:
            session = await volume.begin(
                host=hello.host[:255], pid=max(0, hello.pid), mountpoint=hello.mountpoint.replace("\0", "")[:4096]
            )
            session.outlet = self
        welcome = pb.Welcome(
            protocol=PROTOCOL,
            session_id=session.session_id,
            secret=session.secret,
            format=pb.VolumeFormat(json=dump_format(volume.format)),
            keepalive_s=KEEPALIVE_S,
            expiry_s=volume.expiry_s,
            max_outstanding=MAX_OUTSTANDING,
        )
        self.send(pb.FromService(welcome=welcome).SerializeToString())
        return session

    async def _read(self, session: ServedSession) -> bool:
        """Start what comes in until the client ends the stream; True if it said goodbye."""
        while (message := await self._receive()) is not None:
            if session.outlet is not self or session.is_ending:
                raise SessionEnded(f"session {session.session_id} goes on elsewhere, or has ended")
            if message.HasField("hello"):
                raise Misbehaved("Hello comes once in a stream")
            session.receive(message)
            if message.goodbye:
                return True
            if not message.requests:
                # A sign of life, answered by one: an empty message.
                self.send(b"")
            await self._room.wait()
        return False

    async def _receive(self) -> pb.FromClient | None:
        data: Any = await self._context.read()
        if data is grpc.aio.EOF:
            return None
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

    async def _write(self) -> None:
        while not self._is_ending:
            await self._wake.wait()
            self._wake.clear()
            while self._out:
                message = self._joined()
                try:
                    async with asyncio.timeout(WRITE_S):
                        await self._context.write(message)
                except TimeoutError:
                    raise Silent(f"reads nothing for {WRITE_S:.0f} s") from None
                self.messages_out += 1
                if self._session is not None:
                    # It took something: it lives, though it may be too busy reading to say so.
                    self._session.heard_s = max(self._session.heard_s, time.monotonic())
                self._out_bytes -= len(message)
                if self._out_bytes <= QUEUE_BYTES:
                    self._room.set()
