"""A proxy in front of an S3 server that makes the faults of networks and providers happen on purpose.

Owns one listening port on loopback and a thread with an event loop. Forwards requests and answers as they are, the Host
header included, so that signatures stay valid; what it changes is what a `Fault` tells it to. Must not know S3 beyond
`/bucket/key` in a path.

Rules are looked through in the order in which they were injected; the first that matches a request and is not used up
decides. Tests call from any thread; one lock guards rules and records.
"""

from __future__ import annotations

import asyncio
import random
import re
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Final, Self
from urllib.parse import unquote, urlsplit

import aiohttp
from aiohttp import web
from multidict import CIMultiDict, CIMultiDictProxy
from yarl import URL

from tests.servers.ports import HOST, free_ports

_DEADLINE_S: Final = 30.0
_PIECE_BYTES: Final = 64 * 1024
# What belongs to one connection and not to the message (RFC 9110, 7.6.1); the libraries write their own.
_HOP_BY_HOP: Final = ("Connection", "Keep-Alive", "Transfer-Encoding", "Expect", "TE", "Trailer", "Upgrade")


@dataclass(frozen=True, slots=True)
class Status:
    """Answer with this status at once; the server never sees the request."""

    code: int


@dataclass(frozen=True, slots=True)
class Delay:
    """Forward after so many seconds."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Slow:
    """Pass the answer's body on at this rate."""

    bytes_per_s: int


@dataclass(frozen=True, slots=True)
class Torn:
    """Break the connection after so many bytes of the answer's body; its Content-Length promises all of them."""

    after_bytes: int


@dataclass(frozen=True, slots=True)
class Altered:
    """Flip all bits of one byte of the answer's body; negative offsets count from the end, as in a sequence."""

    offset: int


@dataclass(frozen=True, slots=True)
class LostAnswer:
    """Let the server carry out the request, then break the connection without an answer."""


@dataclass(frozen=True, slots=True)
class Dropped:
    """Break the connection; the server never sees the request."""


@dataclass(frozen=True, slots=True)
class Hang:
    """Answer nothing until the client gives up or the rules are cleared; then break the connection."""


Fault = Status | Delay | Slow | Torn | Altered | LostAnswer | Dropped | Hang


@dataclass(slots=True)
class Request:
    """Record one request: `key` is decoded, empty for the bucket itself; `status` None where none was sent."""

    method: str
    bucket: str
    key: str
    query: str
    status: int | None
    fault: Fault | None


@dataclass(slots=True, eq=False)
class Rule:
    """Make a fault happen to the requests that match; `hits` counts them."""

    fault: Fault
    method: str | None
    key: re.Pattern[str]
    times: int | None
    fraction: float
    hits: int = field(default=0)


class FaultProxy:
    """Forward to `upstream` through faults; a context manager. `seed` decides which requests a fraction picks."""

    def __init__(self, upstream: str, *, seed: int) -> None:
        """Choose a port; nothing listens yet."""
        self._upstream = upstream
        self._random = random.Random(seed)
        self._port = free_ports(1)[0]
        self._lock = threading.Lock()
        self._rules: list[Rule] = []
        self._records: list[Request] = []
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="fault-proxy", daemon=True)
        self._session: aiohttp.ClientSession
        self._runner: web.ServerRunner
        self._site: web.TCPSite | None = None
        self._hanging: asyncio.Event

    def __enter__(self) -> Self:
        """Listen."""
        self._thread.start()
        try:
            self._call(self._open())
        except BaseException:
            self._end_thread()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Break all connections, stop listening, end the thread."""
        try:
            self._call(self._close())
        finally:
            self._end_thread()

    @property
    def endpoint(self) -> str:
        """Return the address to use in place of the server's."""
        return f"http://{HOST}:{self._port}"

    def inject(
        self, fault: Fault, *, method: str | None = None, key: str = "", times: int | None = None, fraction: float = 1.0
    ) -> Rule:
        """Make a fault happen to requests of `method` whose key matches the regular expression `key` somewhere.

        It ends after `times` requests. `fraction` is the part of matching requests that it happens to.
        """
        rule = Rule(fault=fault, method=method, key=re.compile(key), times=times, fraction=fraction)
        with self._lock:
            self._rules.append(rule)
        return rule

    def clear(self) -> None:
        """Forget all rules; connections that hang are broken."""
        with self._lock:
            self._rules.clear()
        self._call(self._release())

    @contextmanager
    def refusing(self) -> Iterator[None]:
        """Break all connections and refuse new ones, as a server that is down, until the block ends."""
        self._call(self._stop_listening())
        try:
            yield
        finally:
            self._call(self._listen())

    @property
    def requests(self) -> list[Request]:
        """Return all requests so far in the order of their arrival.

        A request and its status are recorded before a byte of the answer leaves: who has an answer finds both here.
        """
        with self._lock:
            return [replace(record) for record in self._records]

    def count(self, *, method: str | None = None, key: str = "") -> int:
        """Count the requests of `method` whose key matches the regular expression `key` somewhere."""
        pattern = re.compile(key)
        return sum(1 for r in self.requests if method in (None, r.method) and pattern.search(r.key))

    def forget_requests(self) -> None:
        """Start counting anew."""
        with self._lock:
            self._records.clear()

    def _call(self, coroutine: object) -> None:
        assert asyncio.iscoroutine(coroutine)
        asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(_DEADLINE_S)

    def _end_thread(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_DEADLINE_S)
        self._loop.close()

    async def _open(self) -> None:
        self._hanging = asyncio.Event()
        await self._listen()
        self._session = aiohttp.ClientSession(
            auto_decompress=False,
            connector=aiohttp.TCPConnector(limit=0),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=5, sock_read=120),
        )

    async def _listen(self) -> None:
        self._runner = web.ServerRunner(web.Server(self._handle), shutdown_timeout=0)
        await self._runner.setup()
        self._site = web.TCPSite(self._runner, HOST, self._port, reuse_address=True)
        await self._site.start()

    async def _stop_listening(self) -> None:
        await self._release()
        await self._runner.cleanup()

    async def _release(self) -> None:
        self._hanging.set()
        self._hanging = asyncio.Event()

    async def _close(self) -> None:
        await self._stop_listening()
        await self._session.close()

    def _decide(self, method: str, key: str) -> Fault | None:
        with self._lock:
            for rule in self._rules:
                if rule.method not in (None, method) or not rule.key.search(key):
                    continue
                if rule.times is not None and rule.hits >= rule.times:
                    continue
                if self._random.random() >= rule.fraction:
                    continue
                rule.hits += 1
                return rule.fault
        return None

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        target = urlsplit(request.raw_path)
        bucket, _, key = target.path.lstrip("/").partition("/")
        key = unquote(key)
        record = Request(request.method, bucket, key, target.query, None, self._decide(request.method, key))
        with self._lock:
            self._records.append(record)
        try:
            return await self._answer(request, record)
        except (ConnectionError, aiohttp.ClientError, TimeoutError):
            # Either side broke off, or a fault asks for it: the client sees a connection that ends.
            if request.transport is not None:
                request.transport.abort()
            raise asyncio.CancelledError from None

    async def _answer(self, request: web.BaseRequest, record: Request) -> web.StreamResponse:
        match record.fault:
            case Status(code):
                # The body is read, as a server does that wants to keep the connection; read() would refuse one over 1 MiB.
                while await request.content.readany():
                    pass
                record.status = code
                return web.Response(status=code, body=b"")
            case Delay(seconds):
                await asyncio.sleep(seconds)
            case Dropped():
                raise ConnectionResetError("dropped")
            case Hang():
                await self._hanging.wait()
                raise ConnectionResetError("hung")
            case _:
                pass
        return await self._forward(request, record)

    async def _forward(self, request: web.BaseRequest, record: Request) -> web.StreamResponse:
        fault = record.fault
        url = URL(self._upstream + request.raw_path, encoded=True)
        async with self._session.request(
            request.method,
            url,
            headers=_end_to_end(request.headers),
            data=_body(request),
            allow_redirects=False,
            skip_auto_headers=("Accept", "Accept-Encoding", "Content-Type", "User-Agent"),
        ) as answer:
            if isinstance(fault, LostAnswer):
                await answer.read()
                raise ConnectionResetError("answer lost")
            response = web.StreamResponse(
                status=answer.status, reason=answer.reason, headers=_end_to_end(answer.headers)
            )
            record.status = answer.status
            await response.prepare(request)
            offset = 0
            async for piece in answer.content.iter_chunked(_PIECE_BYTES):
                changed = piece
                match fault:
                    case Torn(after_bytes) if offset + len(piece) > after_bytes:
                        await response.write(piece[: after_bytes - offset])
                        raise ConnectionResetError("torn")
                    case Altered(at):
                        changed = _flipped(piece, (at if at >= 0 else at + (answer.content_length or 0)) - offset)
                    case Slow(bytes_per_s):
                        await asyncio.sleep(len(piece) / bytes_per_s)
                    case _:
                        pass
                await response.write(changed)
                offset += len(piece)
            await response.write_eof()
            return response


def _end_to_end(headers: CIMultiDictProxy[str]) -> CIMultiDict[str]:
    """Copy the headers that belong to the message."""
    copy = headers.copy()
    for name in _HOP_BY_HOP:
        copy.popall(name, None)
    return copy


def _body(request: web.BaseRequest) -> AsyncIterator[bytes] | None:
    """Stream the request's body; None where it has none. Its Content-Length is among the headers."""
    if not request.can_read_body:
        return None
    return request.content.iter_chunked(_PIECE_BYTES)


def _flipped(piece: bytes, index: int) -> bytes:
    """Flip the byte at `index` if it lies in this piece."""
    if not 0 <= index < len(piece):
        return piece
    return piece[:index] + bytes([piece[index] ^ 0xFF]) + piece[index + 1 :]
