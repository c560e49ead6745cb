"""A proxy in front of a PostgreSQL server that cuts connections where a test says, to the message.

Owns one listening port on loopback; runs on the event loop of the test. It knows the framing of the protocol (version 3) and
four messages: Parse names a statement, Bind runs it, Sync and Flush end what the client sends at once, and the server answers.
Passwords and rows pass as they are.

A `Fault` happens to the next Bind of a statement whose SQL has a marker in it, once.
"""

from __future__ import annotations

import asyncio
import enum
import struct
from types import TracebackType
from typing import Final, Self

from tests.servers.ports import HOST

_LENGTH: Final = struct.Struct("!I")
_PROTOCOL_3: Final = 196_608
_DEADLINE_S: Final = 30.0
_WAS_RUN: Final = (b"C", b"s")
"""CommandComplete, and PortalSuspended where the client asked for one row."""


class Fault(enum.Enum):
    """What happens to the statement."""

    NOT_SENT = enum.auto()
    """The connection breaks before the server has anything of it."""
    HALF_SENT = enum.auto()
    """The server gets half of its parameters, then the connection breaks."""
    NOT_COMMITTED = enum.auto()
    """The server runs it, and loses the connection before it is told to commit."""
    ANSWER_LOST = enum.auto()
    """The server commits; not a byte of its answer arrives."""
    HALF_ANSWER = enum.auto()
    """The server commits; its answer breaks off after the first bytes."""
    LATE = enum.auto()
    """The client's connection breaks; the server gets the statement when the test calls `let_go`."""
    SWALLOWED = enum.auto()
    """Nothing happens: the server does not get it, the connection stays."""


APPLIED: Final = frozenset({Fault.ANSWER_LOST, Fault.HALF_ANSWER})
"""After these the statement was committed."""
NOT_APPLIED: Final = frozenset({Fault.NOT_SENT, Fault.HALF_SENT, Fault.NOT_COMMITTED})


class PostgresqlProxy:
    """Forward to a port through faults; an async context manager."""

    def __init__(self, upstream_port: int) -> None:
        """Nothing listens yet."""
        self._upstream_port = upstream_port
        self._planned: list[tuple[str, Fault]] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._late: list[tuple[asyncio.StreamWriter, asyncio.StreamReader, bytes]] = []
        self.port = 0
        self.trips = 0
        """How often a client sent something and waits for the answer, logins aside."""
        self.happened: list[Fault] = []

    async def __aenter__(self) -> Self:
        """Listen."""
        self._server = await asyncio.start_server(self._accept, HOST, 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Break all connections and stop listening."""
        self._server.close()
        for writer, _, _ in self._late:
            writer.transport.abort()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def plan(self, marker: str, fault: Fault) -> None:
        """Make a fault happen to the next statement whose SQL contains the marker; plans happen in order."""
        self._planned.append((marker, fault))

    async def let_go(self) -> None:
        """Let the servers have what is LATE; returns when it was carried out or refused."""
        late, self._late = self._late, []
        for writer, reader, data in late:
            async with asyncio.timeout(_DEADLINE_S):
                writer.write(data)
                while (await _message(reader))[:1] != b"Z":
                    pass
            writer.transport.abort()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        server_reader, server_writer = await asyncio.open_connection(HOST, self._upstream_port)
        link = _Link(self, reader, writer, server_reader, server_writer)
        try:
            await link.run()
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.transport.abort()
            if not link.is_late:
                server_writer.transport.abort()


class _Link:
    """One client's connection and the server's that belongs to it."""

    def __init__(
        self,
        proxy: PostgresqlProxy,
        client: asyncio.StreamReader,
        to_client: asyncio.StreamWriter,
        server: asyncio.StreamReader,
        to_server: asyncio.StreamWriter,
    ) -> None:
        self._proxy = proxy
        self._client = client
        self._to_client = to_client
        self._server = server
        self._to_server = to_server
        self._statements: dict[bytes, bytes] = {}
        self._answers: asyncio.Task[None] | None = None
        self.is_late = False

    async def run(self) -> None:
        await self._log_in()
        self._answers = asyncio.create_task(self._forward_answers())
        try:
            while True:
                message = await _message(self._client)
                fault = self._fault(message)
                if fault is not None:
                    self._proxy.happened.append(fault)
                    await self._happen(fault, message)
                    return
                self._proxy.trips += message[:1] in b"SHQ"
                self._to_server.write(message)
                await self._to_server.drain()
        finally:
            self._answers.cancel()

    async def _log_in(self) -> None:
        """Pass the messages without a type: a request for encryption, which gets one byte, and the login."""
        while True:
            head = await self._client.readexactly(8)
            length, code = struct.unpack("!II", head)
            self._to_server.write(head + await self._client.readexactly(length - 8))
            if code == _PROTOCOL_3:
                return
            self._to_client.write(await self._server.readexactly(1))

    def _fault(self, message: bytes) -> Fault | None:
        """Learn of a statement, or look up what happens to it."""
        if message[:1] == b"P":
            name, sql, _ = message[5:].split(b"\0", 2)
            self._statements[name] = sql
        elif message[:1] == b"B" and self._proxy._planned:
            _, name, _ = message[5:].split(b"\0", 2)
            marker, fault = self._proxy._planned[0]
            if marker.encode() in self._statements.get(name, b""):
                del self._proxy._planned[0]
                return fault
        return None

    async def _happen(self, fault: Fault, bind: bytes) -> None:
        rest = b""
        while rest[-5:-4] != b"S":
            rest += await _message(self._client)
        match fault:
            case Fault.NOT_SENT:
                return
            case Fault.HALF_SENT:
                self._to_server.write(bind[: len(bind) // 2])
                await self._to_server.drain()
            case Fault.NOT_COMMITTED:
                # A Flush in place of the Sync: the server answers that it was run, so it was.
                await self._stop_answers()
                self._to_server.write(bind + rest[:-5] + b"H" + _LENGTH.pack(4))
                while (await _message(self._server))[:1] not in _WAS_RUN:
                    pass
            case Fault.ANSWER_LOST | Fault.HALF_ANSWER:
                await self._stop_answers()
                self._to_server.write(bind + rest)
                answer = b""
                while answer[-6:-5] != b"Z":
                    answer += await _message(self._server)
                if fault is Fault.HALF_ANSWER:
                    self._to_client.write(answer[: len(answer) // 2])
                    await self._to_client.drain()
                    self._to_client.close()
                    await self._to_client.wait_closed()
            case Fault.LATE:
                await self._stop_answers()
                self.is_late = True
                self._proxy._late.append((self._to_server, self._server, bind + rest))
            case Fault.SWALLOWED:
                await self._client.read()

    async def _stop_answers(self) -> None:
        assert self._answers is not None
        self._answers.cancel()
        await asyncio.gather(self._answers, return_exceptions=True)

    async def _forward_answers(self) -> None:
        while data := await self._server.read(1 << 16):
            self._to_client.write(data)
            await self._to_client.drain()
        self._to_client.close()


async def _message(reader: asyncio.StreamReader) -> bytes:
    """Read one message with its type."""
    head = await reader.readexactly(5)
    (length,) = _LENGTH.unpack(head[1:])
    return head + await reader.readexactly(length - 4)
