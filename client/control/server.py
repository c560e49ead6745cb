"""The holder's side of the control socket.

Owns connections and their limits: how many at once, how long a peer may take to ask and to read, and that a request ends
with exactly one result or error. Must not know what requests do: they come as a handler.

One task per connection, children of the server's TaskGroup. A connection's requests run as long as their command stays
connected: a hang-up cancels the handler. Stopping the server first stops accepting, then lets handlers that were told to
end (``drain_s``) finish, then cancels them.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import Final, Protocol, Self

from chunkstore.errors import AtollError
from client.control import endpoint
from client.control.endpoint import Peer
from client.control.messages import (
    HEARTBEAT_S,
    MAX_REQUEST_BYTES,
    ControlError,
    Items,
    JsonObject,
    Progress,
    Request,
    decode_request,
    encode_error,
    encode_items,
    encode_progress,
    encode_result,
    internal_error,
)

MAX_CONNECTIONS: Final = 64
ASK_S: Final = 10.0
"""A peer must have sent its request by then."""
READ_S: Final = 30.0
"""A peer that takes nothing for this long is dropped."""
_ACCEPT_TURNS: Final = 8
PROGRESS_S: Final = 0.2
"""Progress is sent at most this often; the newest counts."""


class _PeerGone(Exception):
    """The command hung up, or takes nothing."""


class Report(Protocol):
    """How an operation tells what it does while it does it."""

    def progress(self, progress: Progress) -> None:
        """Show how far it is. Never blocks; the newest counts."""

    async def items(self, items: Items) -> None:
        """Hand over rows of the result. Waits for a slow reader."""


Handler = Callable[[Request, Peer, Report], Awaitable[JsonObject]]
"""Runs a request of a peer and returns its result; AtollErrors are answered as they are."""

Unexpected = Callable[[Request, BaseException], None]
"""Logs an exception that no handler should raise."""


class ControlServer:
    """Answer requests at a volume's control socket: an async context manager."""

    def __init__(
        self, directory: str, handler: Handler, *, unexpected: Unexpected, ask_s: float = ASK_S, read_s: float = READ_S
    ) -> None:
        self._directory = directory
        self._handler = handler
        self._unexpected = unexpected
        self._ask_s = ask_s
        self._read_s = read_s
        self._listener: socket.socket | None = None
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        """Start listening. The caller owns the volume, and does until after __aexit__."""
        self._listener = endpoint.listen(self._directory)
        try:
            self._server = await asyncio.start_unix_server(self._accept, sock=self._listener, limit=MAX_REQUEST_BYTES)
        except BaseException:
            self._listener.close()
            endpoint.remove(self._directory)
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close(drain_s=5.0)

    async def close(self, *, drain_s: float) -> None:
        """Take no more requests, wait for running ones up to a time, withdraw the rest. May be called again."""
        server, self._server = self._server, None
        if server is None:
            return
        endpoint.remove(self._directory)
        # Nobody finds the socket any more. A connection that was just accepted reaches _accept() some turns of the loop
        # later; asyncio 3.11 loses it, unclosed, if its server is closed in between.
        for _ in range(_ACCEPT_TURNS):
            await asyncio.sleep(0)
        server.close()
        if self._connections:
            await asyncio.wait(self._connections, timeout=drain_s)
        for task in self._connections:
            task.cancel()
        if self._connections:
            await asyncio.wait(self._connections, timeout=drain_s)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.get_running_loop().create_task(self._serve(reader, writer), name="control connection")
        self._connections.add(task)

        def ended(task: asyncio.Task[None]) -> None:
            # Here, not in the task: one that is cancelled before it began runs nothing of its own.
            writer.transport.abort()
            self._connections.discard(task)

        task.add_done_callback(ended)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer one connection; whatever a peer does, nothing but this connection ends."""
        writer.transport.set_write_buffer_limits(high=256 << 10)
        try:
            await self._answer(reader, writer)
            writer.close()
            async with asyncio.timeout(self._read_s):
                await writer.wait_closed()
        except (_PeerGone, OSError):
            # A peer that went away or reads nothing: there is nobody to tell.
            pass

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        request: Request | None = None
        try:
            sock: socket.socket = writer.get_extra_info("socket")
            peer = endpoint.admit(sock)
            if len(self._connections) > MAX_CONNECTIONS:
                raise ControlError("too many commands at once: try again later", retryable=True)
            request = decode_request(await self._read_line(reader))
            result = await self._run(request, peer, reader, writer)
            reply = encode_result(result)
        except AtollError as error:
            reply = encode_error(error)
        except _PeerGone:
            raise
        except Exception as error:  # noqa: BLE001 - the edge: logged, and answered in one line
            if request is not None:
                self._unexpected(request, error)
            reply = encode_error(internal_error(error))
        writer.write(reply)

    async def _read_line(self, reader: asyncio.StreamReader) -> bytes:
        try:
            async with asyncio.timeout(self._ask_s):
                return await reader.readuntil(b"\n")
        except asyncio.LimitOverrunError as error:
            raise ControlError(f"a control message is over the limit of {MAX_REQUEST_BYTES} bytes") from error
        except asyncio.IncompleteReadError as error:
            raise ControlError("a control message ends within its line") from error
        except TimeoutError as error:
            raise ControlError(f"no request within {self._ask_s:g} s") from error

    async def _run(
        self, request: Request, peer: Peer, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> JsonObject:
        """Run a request with its heartbeat, until it ends or its command hangs up: then cancel it, and _PeerGone."""
        report = _ConnectionReport(writer, self._read_s)
        work = asyncio.ensure_future(self._handler(request, peer, report))
        hangup = asyncio.ensure_future(reader.read(1))
        beat = asyncio.ensure_future(report.beat())
        try:
            await asyncio.wait({work, hangup, beat}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                raise _PeerGone
            return work.result()
        finally:
            for task in (work, hangup, beat):
                task.cancel()
            await asyncio.gather(work, hangup, beat, return_exceptions=True)


class _ConnectionReport:
    """A Report that writes to a connection."""

    def __init__(self, writer: asyncio.StreamWriter, read_s: float) -> None:
        self._writer = writer
        self._read_s = read_s
        self._newest = Progress("")
        self._sent: Progress | None = None
        # One writer at a time in drain(); beat() and items() both write whole lines.
        self._lock = asyncio.Lock()

    def progress(self, progress: Progress) -> None:
        self._newest = progress

    async def items(self, items: Items) -> None:
        await self._write(encode_items(items))

    async def beat(self) -> None:
        """Send progress when it changed, and now and then anyway, until the connection fails."""
        quiet_s = 0.0
        while True:
            await asyncio.sleep(PROGRESS_S)
            quiet_s += PROGRESS_S
            if self._newest == self._sent and quiet_s < HEARTBEAT_S:
                continue
            self._sent = self._newest
            quiet_s = 0.0
            await self._write(encode_progress(self._newest))

    async def _write(self, line: bytes) -> None:
        try:
            async with self._lock, asyncio.timeout(self._read_s):
                self._writer.write(line)
                await self._writer.drain()
        except OSError as error:
            raise _PeerGone from error
