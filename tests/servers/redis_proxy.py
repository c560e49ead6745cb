"""A proxy in front of a Redis server that cuts connections where a test says, to the byte.

Owns one listening port on loopback; runs on the event loop of the test. It knows the framing of the protocol (RESP2) and
EVALSHA and EVAL, which run a script that it recognizes by digest or text. All else passes as it is.

A `Fault` happens to the next run of a script, once.
"""

from __future__ import annotations

import asyncio
import enum
import hashlib
from dataclasses import dataclass
from types import TracebackType
from typing import Final, Self

from tests.servers.ports import HOST

_DEADLINE_S: Final = 30.0


class Fault(enum.Enum):
    """What happens to the script."""

    NOT_SENT = enum.auto()
    """The connection breaks before the server has anything of it."""
    HALF_SENT = enum.auto()
    """The server gets the first bytes of it, half of them unless the plan says how many, then the connection breaks."""
    ANSWER_LOST = enum.auto()
    """The server runs it; not a byte of its answer arrives."""
    HALF_ANSWER = enum.auto()
    """The server runs it; its answer breaks off after the first bytes, half of them unless the plan says how many."""
    LATE = enum.auto()
    """The client's connection breaks; the server gets the script when the test calls `let_go`."""
    SWALLOWED = enum.auto()
    """Nothing happens: the server does not get it, the connection stays."""


APPLIED: Final = frozenset({Fault.ANSWER_LOST, Fault.HALF_ANSWER})
"""After these the script was run."""
NOT_APPLIED: Final = frozenset({Fault.NOT_SENT, Fault.HALF_SENT})


@dataclass
class _Plan:
    source: bytes
    fault: Fault
    at: int | None
    skip: int

    def is_for(self, arguments: list[bytes]) -> bool:
        digest = hashlib.sha1(self.source, usedforsecurity=False).hexdigest().encode()
        return len(arguments) > 1 and arguments[0] in (b"EVALSHA", b"EVAL") and arguments[1] in (digest, self.source)


class RedisProxy:
    """Forward to a port through faults; an async context manager."""

    def __init__(self, upstream_port: int) -> None:
        """Nothing listens yet."""
        self._upstream_port = upstream_port
        self._planned: list[_Plan] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._late: list[tuple[asyncio.StreamReader, asyncio.StreamWriter, bytes]] = []
        self.port = 0
        self.trips = 0
        """How many commands were sent."""
        self.happened: list[Fault] = []
        self.last_bytes = 0
        """Length of the last script that a fault happened to."""

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
        for _, writer, _ in self._late:
            writer.transport.abort()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def plan(self, source: bytes, fault: Fault, *, at: int | None = None, skip: int = 0) -> None:
        """Make a fault happen to the next run of a script; plans happen in order.

        ``at``: behind so many bytes; ``skip``: after so many runs.
        """
        self._planned.append(_Plan(source, fault, at, skip))

    async def let_go(self) -> None:
        """Let the servers have what is LATE; returns when it was carried out or refused."""
        late, self._late = self._late, []
        for reader, writer, data in late:
            async with asyncio.timeout(_DEADLINE_S):
                writer.write(data)
                await _message(reader)
            writer.transport.abort()

    def _plan_for(self, arguments: list[bytes]) -> _Plan | None:
        if not self._planned or not self._planned[0].is_for(arguments):
            return None
        if self._planned[0].skip:
            self._planned[0].skip -= 1
            return None
        return self._planned.pop(0)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        server_reader, server_writer = await asyncio.open_connection(HOST, self._upstream_port)
        is_late = False
        try:
            is_late = await self._serve(reader, writer, server_reader, server_writer)
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.transport.abort()
            if not is_late:
                server_writer.transport.abort()

    async def _serve(
        self,
        client: asyncio.StreamReader,
        to_client: asyncio.StreamWriter,
        server: asyncio.StreamReader,
        to_server: asyncio.StreamWriter,
    ) -> bool:
        """Pass commands and answers in turn; True when the server's connection is kept for `let_go`."""
        while True:
            data, arguments = await _message(client)
            plan = self._plan_for(arguments)
            if plan is not None:
                self.happened.append(plan.fault)
                self.last_bytes = len(data)
                return await self._happen(plan, data, client, to_client, server, to_server)
            self.trips += 1
            to_server.write(data)
            answer, _ = await _message(server)
            to_client.write(answer)
            await to_client.drain()

    async def _happen(
        self,
        plan: _Plan,
        data: bytes,
        client: asyncio.StreamReader,
        to_client: asyncio.StreamWriter,
        server: asyncio.StreamReader,
        to_server: asyncio.StreamWriter,
    ) -> bool:
        match plan.fault:
            case Fault.NOT_SENT:
                pass
            case Fault.HALF_SENT:
                to_server.write(data[: len(data) // 2 if plan.at is None else plan.at])
                await to_server.drain()
                to_server.close()
                await to_server.wait_closed()
            case Fault.ANSWER_LOST | Fault.HALF_ANSWER:
                to_server.write(data)
                answer, _ = await _message(server)
                if plan.fault is Fault.HALF_ANSWER:
                    to_client.write(answer[: len(answer) // 2 if plan.at is None else plan.at])
                    await to_client.drain()
                    to_client.close()
                    await to_client.wait_closed()
            case Fault.LATE:
                self._late.append((server, to_server, data))
                return True
            case Fault.SWALLOWED:
                await client.read()
        return False


async def _message(reader: asyncio.StreamReader) -> tuple[bytes, list[bytes]]:
    """Read one value of the protocol; its bytes, and the texts directly in it if it is an array."""
    line = await reader.readuntil(b"\r\n")
    count = int(line[1:]) if line[:1] in b"*$" else 0
    if line[:1] == b"$" and count >= 0:
        return line + await reader.readexactly(count + 2), []
    if line[:1] != b"*":
        return line, []
    parts = [line]
    texts: list[bytes] = []
    for _ in range(count):
        part, _ = await _message(reader)
        parts.append(part)
        texts.append(part[part.index(b"\n") + 1 : -2] if part[:1] == b"$" else b"")
    return b"".join(parts), texts
