"""One session of a client elsewhere: its requests are run here, whether or not its connection still stands.

Owns the requests under way, the replies that may be asked for again, and when the client was last heard of. Must not know
how messages travel: answers go to whoever is the session's `Outlet` at the moment.

Interleavings. Each request is a task. When a connection breaks its requests run to their ends: what they changed is durable
or not, and their replies are kept (metasvc.server.replies). A client that comes back is let in when nothing of it runs any
more (`quiet`), says what it has open, and repeats what it has no reply to. So a request never runs twice at a time, and opens
are never counted twice. A repeated request that was applied is answered from what was kept; `create` then counts its open,
which the client could not know of.

Requests that change nothing begin only when there is room for what they answer, and of those with long answers
`LONG_AT_ONCE` run at a time (`_turn`). So what waits for a client that does not read is bounded by `QUEUE_BYTES` of its
connection and the answers under way, and not by how much it asked for in one message. Between the room and the answer there is
no room looked for: answers go out in the order in which they became true.

What a client may do is said by the token of the connection that it has now (metasvc.server.rights). Every inode that a request
of a confined session names, and every one that it is answered, is looked at in the same step as what the request does
(`_run_confined`); requests that take several steps are looked at before and after.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, nullcontext
from contextvars import ContextVar
from typing import Any, Final, NamedTuple, Protocol

from chunkstore.errors import AtollError
from chunkstore.geometry import SliceId
from metasvc.api import atoll_pb2 as pb
from metasvc.api import wire
from metasvc.engine import Engine, EngineSession
from metasvc.engine.engine import LOAD_AT_ONCE
from metasvc.engine.scope import Scope
from metasvc.engine.tx import Tx
from metasvc.errors import Fenced, FsError
from metasvc.model import Caller, Ino, Inode, Replies, SessionId
from metasvc.server.access import VolumeAccess
from metasvc.server.confined import ConfinedMaps
from metasvc.server.metrics import ServiceMetrics
from metasvc.server.operations import OPERATIONS, Operation
from metasvc.server.replies import ReplyLog, framed
from metasvc.server.rights import EVERYTHING, Rights

MAX_OUTSTANDING: Final = 256
"""Most requests of a session at a time."""
WINDOW: Final = 1024
"""Numbers above the lowest that is not confirmed by which requests may run ahead: it bounds the replies that are kept."""

LONG_AT_ONCE: Final = 4
"""Requests of a session with long answers that run at a time. A page of 1,024 names is 0.1 to 0.3 MB, twice that on its way."""

MAX_NUMBER: Final = 1 << 62
"""No request has a number like this: a thousand in a microsecond would take 146 years."""
QUIET_LOOK_S: Final = 0.2
SLOW_S: Final = 5.0
"""Requests that take longer are logged."""
MAX_REPLY_BYTES: Final = 60 * 1024 * 1024
"""Clients take messages of 64 MiB. Only the map of a file with thousands of small slices could be larger."""

log = logging.getLogger(__name__)


class _Asked(NamedTuple):
    """What the guard of a confined session must know of a request under way."""

    inos: Sequence[Ino] = ()
    """That it names."""
    finds: bool = False
    """Its result are inodes."""


_NOTHING_ASKED: Final = _Asked()
_AT_ONCE: Final = nullcontext()
_asked: ContextVar[_Asked] = ContextVar("the request under way", default=_NOTHING_ASKED)


class Misbehaved(Exception):
    """A client broke the protocol: its stream ends, with the reason."""


class Outlet(Protocol):
    """Where the answers of a session go."""

    @property
    def is_full(self) -> bool:
        """Return whether as much waits to be sent as may. When it is no longer so, `ServedSession.has_room` is called."""
        ...

    def send(self, message: bytes, *, may_wait: bool = False) -> None:
        """Send an encoded FromService when there is room; one that ``may_wait`` with the next one. Never blocks."""

    def fail(self, error: AtollError) -> None:
        """End: the engine failed."""


class ServedSession(EngineSession):
    """A session whose client is reached by messages."""

    def __init__(
        self,
        engine: Engine,
        session_id: SessionId,
        *,
        secret: bytes,
        stored: Replies | None = None,
        metrics: ServiceMetrics | None = None,
        access: VolumeAccess | None = None,
    ) -> None:
        """Take over a session that is in the store."""
        super().__init__(engine, session_id)
        self._metrics = metrics
        self.secret = secret
        self.attaching = asyncio.Lock()
        """Held while a connection takes the session over."""
        self.attempt = 0
        """The latest stream of the client that said Hello, by the client's count."""
        self.access = access or VolumeAccess(None, lambda: engine.format)
        self.outlet: Outlet | None = None
        self.is_ending = False
        self.heard_s = time.monotonic()
        self.requests_total = 0
        self.rights = EVERYTHING
        self._scope: Scope | None = None
        self.confined_maps: ConfinedMaps | None = None
        self._run_free = self._run
        self._replies = ReplyLog(session_id, stored)
        self._running: dict[int, asyncio.Task[None]] = {}
        self._long = asyncio.Semaphore(LONG_AT_ONCE)
        self._room = asyncio.Event()
        """Set when an outlet that was full has room again."""
        self._before: set[asyncio.Task[Any]] = set()
        """Requests under way that wait for their turn: they have done nothing."""
        self._puts: dict[int, tuple[Callable[[Any, pb.Reply], None], set[Ino]]] = {}
        """How the results of requests under way are written, and of which directories the reply is to tell."""

    def may_commit(self, slice_id: SliceId) -> bool:
        """Return whether a slice id was handed out to this session, which lives."""
        return not self.is_ending and self._engine.may_commit(self._session_id, slice_id)

    @property
    def outstanding(self) -> int:
        """Return how many requests are under way."""
        return len(self._running)

    def allow(self, rights: Rights) -> None:
        """Let the client do from now on what a token allows, and no more. Call while nothing of the session is under way."""
        self.rights = rights
        self._scope = Scope(rights.root, self._has_open) if rights.is_confined else None
        self._run = self._run_free if self._scope is None else self._run_confined
        self.confined_maps = None if self._scope is None else ConfinedMaps(self._run_free, self.access)

    def _has_open(self, ino: Ino) -> bool:
        return self._session_id in self._engine.sessions_holding(ino)

    async def _run_confined(self, rule: Callable[..., Any], *args: Any, **further: Any) -> Any:
        """Run a rule if all inodes that the request names are within reach, and so are those of the result. ENOENT."""
        scope, asked = self._scope, _asked.get()
        assert scope is not None

        def confined(tx: Tx) -> Any:
            scope.require(tx, asked.inos)
            result = rule(tx, *args)
            if asked.finds and rule is not _nothing:
                found: list[Inode] = result if isinstance(result, list) else [result]
                scope.require(tx, [inode.ino for inode in found])
            return result

        return await self._run_free(confined, **further)

    async def _reached(self, inos: Sequence[Ino]) -> list[Ino]:
        """Return those inodes that the client may touch."""
        scope = self._scope
        if scope is None:
            return list(inos)
        reached: list[Ino] = []
        for first in range(0, len(inos), LOAD_AT_ONCE):
            part = inos[first : first + LOAD_AT_ONCE]
            reached += await self._run_free(lambda tx, part=part: [ino for ino in part if scope.reaches(tx, ino)])
        return reached

    async def quiet(self) -> None:
        """Wait until none of the requests so far is under way. Those that wait for a hold to end, or for room, are given up.

        They have done nothing, and the client asks again for what it has no reply to: else it could not come back for as long
        as the hold lasts, or what nobody reads any more would be made all the same.
        """
        while waited := list(self._running.values()):
            for task in waited:
                if task in self._engine.held_back or task in self._before:
                    task.cancel()
            # Others may come to wait for a hold meanwhile.
            await asyncio.wait(waited, timeout=QUIET_LOOK_S)

    async def resume(
        self, opens: Mapping[Ino, int], promised: Mapping[Ino, int], *, confirmed: int, repeated: Collection[int]
    ) -> None:
        """Go on with what the client has open, and may grow to so many bytes. Call when it is quiet.

        To that belongs what was opened by a create whose reply got lost: the client is about to ask for it again.
        """
        self._replies.confirm(confirmed)
        reached = await self._reached(list(opens))
        counts = Counter({ino: opens[ino] for ino in reached})
        counts.update(self._replies.opened(repeated))
        promised = {ino: end for ino, end in promised.items() if ino in counts}
        await self._engine.resume_session(self._session_id, counts, promised)

    def take_leases(self, *, listens: bool) -> None:
        """Give leases to the client, if it listens to recalls on the stream that has just begun. It has none now."""
        if listens:
            self._engine.leases.listen(self._session_id, self._call_back)
        else:
            self._engine.leases.forget(self._session_id)

    def drop_leases(self) -> None:
        """Take note that the client holds nothing any more: it has said goodbye."""
        self._engine.leases.drop(self._session_id)

    def _call_back(self, ino: Ino, number: int) -> None:
        self._send(pb.FromService(recalls=[pb.Recall(ino=ino, number=number)]).SerializeToString())

    def receive(self, message: pb.FromClient) -> None:
        """Take a message: start its requests. Raises Misbehaved, and then has started those before the wrong one."""
        self.heard_s = time.monotonic()
        if message.confirmed >= MAX_NUMBER:
            raise Misbehaved("confirms replies that nobody can have asked for")
        self._replies.confirm(message.confirmed)
        if message.recalled:
            self._engine.leases.given_back(self._session_id, message.recalled)
        for request in message.requests:
            self._start(request)

    def _start(self, request: pb.Request) -> None:
        number = request.number
        if number < self._replies.confirmed:
            raise Misbehaved(f"request {number} comes after the confirmation of its reply")
        if number >= self._replies.confirmed + WINDOW:
            raise Misbehaved(f"request {number} comes, and the reply to {self._replies.confirmed} is not confirmed")
        if number in self._running:
            raise Misbehaved(f"request {number} is under way already")
        if len(self._running) >= MAX_OUTSTANDING:
            raise Misbehaved(f"more than {MAX_OUTSTANDING} requests at once")
        if self._engine.failure is not None:
            # What is kept may not be durable: ask again, there or here.
            if self.outlet is not None:
                self.outlet.fail(self._engine.failure)
            return
        self.requests_total += 1
        name = request.WhichOneof("operation")
        kept = self._replies.get(number)
        if kept is not None:
            if self._metrics is not None:
                self._metrics.observe_repeated()
            self._send(kept)
            return
        operation = None if name is None else OPERATIONS.get(name)
        if operation is None:
            failure = FsError(errno.ENOSYS, "this service does not know the operation: upgrade it")
            self._send(framed(_failed(number, failure)))
            return
        work = self._run_request(number, str(name), operation, getattr(request, str(name)))
        task = asyncio.get_running_loop().create_task(work, name=f"{name} of session {self._session_id}")
        self._running[number] = task
        task.add_done_callback(lambda _: self._running.pop(number, None))

    async def _run_request(self, number: int, name: str, operation: Operation, message: Any) -> None:
        began_s, failed = time.monotonic(), True
        metrics = self._metrics
        if metrics is not None:
            metrics.running += 1
        caller = wire.caller_of(message.caller, number) if hasattr(message, "caller") else Caller(request_id=number)
        directories = {Ino(getattr(message, field)) for field in operation.directories}
        self._puts[number] = (operation.keep or operation.put, directories)
        try:
            waits = not operation.changes and (operation.is_long or self._is_full)
            async with self._turn(operation) if waits else _AT_ONCE:
                began_s = time.monotonic()
                result = await self._call(operation, message, caller)
                kept = self._replies.get(number) if operation.keep is None else None
                answer = await self._sendable(framed(_done(number, operation.put, result)) if kept is None else kept)
            failed = False
        except AtollError as error:
            if self._engine.failure is not None or isinstance(error, Fenced):
                # Nobody knows what became of it: the client asks again, there or here.
                if self.outlet is not None:
                    self.outlet.fail(error)
                return
            answer = framed(_failed(number, error))
        except Exception as error:
            log.exception(
                "request %d (%s) of session %d failed unexpectedly", number, name, self._session_id, exc_info=error
            )
            answer = framed(_failed(number, AtollError(f"the metadata service failed unexpectedly: {error!r}")))
        finally:
            del self._puts[number]
            if metrics is not None:
                metrics.running -= 1
        duration_s = time.monotonic() - began_s
        if metrics is not None:
            metrics.observe_request(name, duration_s, failed=failed)
        if duration_s > SLOW_S:
            log.warning("request %d (%s) of session %d took %.1f s", number, name, self._session_id, duration_s)
        # Before the answer goes out: by it the client knows that it may ask for one more.
        self._running.pop(number, None)
        # Nobody waits for the reply to a release: it opens the window for more, and goes out with the next reply.
        self._send(answer, may_wait=name == "release")

    def has_room(self) -> None:
        """Take note that the outlet is no longer full."""
        self._room.set()

    @asynccontextmanager
    async def _turn(self, operation: Operation) -> AsyncIterator[None]:
        """Wait until an operation may begin, and hold its turn until its answer is ready."""
        task = asyncio.current_task()
        assert task is not None
        self._before.add(task)
        try:
            async with AsyncExitStack() as stack:
                if operation.is_long:
                    await stack.enter_async_context(self._long)
                while self._is_full:
                    self._room.clear()
                    await self._room.wait()
                self._before.discard(task)
                yield
        finally:
            self._before.discard(task)

    @property
    def _is_full(self) -> bool:
        return self.outlet is not None and self.outlet.is_full

    async def _call(self, operation: Operation, message: Any, caller: Caller) -> Any:
        """Run an operation, if the client may. EROFS, ENOENT."""
        if operation.changes and self.rights.is_read_only:
            raise FsError(errno.EROFS, "the token is read-only")
        if self._scope is None:
            return await operation.call(self, message, caller)
        if operation.may_miss:
            (field,) = operation.inos
            named = getattr(message, field)
            if len(named) > 1:
                # One that is out of reach is refused as if it did not exist, many are left out.
                kept = await self._reached(named)
                message.ClearField(field)
                named = getattr(message, field)
                named.extend(kept)
            _asked.set(_Asked(list(named)))
        else:
            _asked.set(_Asked([Ino(getattr(message, field)) for field in operation.inos], operation.finds))
        if operation.has_steps:
            await self._run_confined(_nothing)
        result = await operation.call(self, message, caller)
        if operation.confine is not None:
            assert self.confined_maps is not None
            result = await operation.confine(self.confined_maps, result)
        if operation.has_steps:
            await self._run_confined(_nothing)
        return result

    def _recorder(self, caller: Caller) -> Callable[[Any, Tx], Replies] | None:
        number = caller.request_id
        if number not in self._puts:
            return None
        put, directories = self._puts[number]

        def record(result: Any, tx: Tx) -> Replies:
            reply = _done(number, put, result)
            wire.put_inodes(tx.changed_inodes(directories), reply.directories)
            made = [inode.ino for inode in tx.changed_inodes(tx.fresh) if inode.is_dir]
            leases = self._engine.leases
            reply.leased.extend(leases.extend(self._session_id, directories, made=made))
            return self._replies.keep(number, framed(reply))

        return record

    async def _sendable(self, message: bytes) -> bytes:
        """Return a framed reply, or the failure that is sent in the place of one that is too large.

        Sent, it would end the stream, and be asked for again on the next one, for ever.
        """
        if len(message) <= MAX_REPLY_BYTES:
            return message
        reply = pb.FromService.FromString(message).replies[0]
        log.error("session %d: a reply of %d bytes is too large to be sent", self._session_id, len(message))
        if reply.opens:
            # The client counts what the replies that came have opened.
            await self.release(Ino(reply.inodes.ino[0]))
        return framed(
            _failed(reply.number, AtollError("the answer is too large; files are compacted in the background"))
        )

    def _send(self, message: bytes, *, may_wait: bool = False) -> None:
        if self.outlet is not None:
            self.outlet.send(message, may_wait=may_wait)


def _nothing(_: Tx) -> None:
    """Do nothing: a rule of which only what is looked at before counts."""


def _done(number: int, put: Callable[[Any, pb.Reply], None], result: Any) -> pb.Reply:
    reply = pb.Reply(number=number)
    put(result, reply)
    return reply


def _failed(number: int, error: AtollError) -> pb.Reply:
    reply = pb.Reply(number=number)
    wire.put_failure(error, reply.failure)
    return reply
