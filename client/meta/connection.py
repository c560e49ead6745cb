"""One session over streams that come and go.

Owns the stream, the requests without a reply, and what the session has open. Must not know what operations mean, but for the
three that open and release.

While the service is away, requests wait; when it is back the session goes on there: Hello says what is open, and everything
without a reply is sent again under its old number, in order. The service applies it once. A request that waited for
`timeout_s` fails with EIO, as does everything new until the service is back. What became of it then nobody knows: if it was
sent it was applied, or is applied before anything that comes after it, or was lost with the service; it is not sent again.

A session that the service has ended (it heard nothing for too long, or lost its store) cannot go on. Another one is begun:
requests that change something and were sent fail, because nobody can know whether they were applied: with EIO, because the
kernel repeats a system call on a path that answers ESTALE; commits, which belong to descriptors, with ESTALE. All others are
asked in the new session; what was open is registered anew, as far as it still exists. Slice ids of the old session are
worthless then, which users of this see by the session's number.

Requests go out in the order of their numbers, none further than `SENT_WINDOW` ahead of the lowest without a reply: so whatever
waits is reached. That is why what waits for a new session gets new numbers there, behind the opens that are registered.

Interleavings. All state belongs to the event loop. One task (`_run`) connects and reconnects. While a stream stands, `_flush`
sends what waits, in one message, at the end of the turn of the loop in which it was asked (`_flush_soon`); `_message` takes
what comes, and is the only one that completes requests and counts opens, so that at any moment the opens are exactly those of
the replies that came; and one task asks for signs of life and looks for silence. A caller that is cancelled leaves its request
behind: its reply still comes, and if it opened something that is released.

Recalls are answered in their order, each when what has
to be said before that was said (`recalled` returns tasks that do).

Nobody waits for a release: it goes out with the next request, or after `RELEASE_S`.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from typing import Any, Final

from chunkstore.errors import AtollError
from chunkstore.geometry import MAX_FILE_BYTES
from client.meta.endpoint import AccessRefused, Endpoint, ServiceRefused, ServiceUnavailable, SessionEnded, Untrusted
from metasvc.api import atoll_pb2 as pb
from metasvc.api import wire
from metasvc.api.frames import ConnectionLost, EndedByService, Frames, NotOurs, Stalled
from metasvc.api.volume_format import parse_format
from metasvc.errors import FsError
from metasvc.model import ROOT_INO, Ino, SessionId, VolumeFormat

PROTOCOL: Final = 1
HELLO_S: Final = 20.0
"""How long the service may take to answer Hello: it may wait for requests of the session that are under way."""
SILENCE: Final = 5
"""A stream on which nothing came for so many signs of life is given up."""
SENT_WINDOW: Final = 1024
"""No request goes out so far ahead of the lowest without a reply: the service would end the stream."""
WINDOW: Final = 512
"""No request but a release runs so far ahead of the lowest without a reply: the service keeps, and writes with each batch, all
replies from there on (150 bytes each, 250 of a rename)."""
FIRST_DELAY_S: Final = 0.05
MAX_DELAY_S: Final = 1.0
_BATCH_BYTES: Final = 4 * 1024 * 1024
_GOODBYE_S: Final = 10.0
RELEASE_S: Final = 0.02
"""A release waits so long for a message that it can go with: by itself it would cost the service as much as an open."""
_CHANGING: Final = frozenset(
    {
        "mknod",
        "symlink",
        "link",
        "unlink",
        "rmdir",
        "rename",
        "setattr",
        "setxattr",
        "removexattr",
        "create",
        "commit",
        "punch",
        "copy_range",
        "allocate_slices",
    }
)
log = logging.getLogger(__name__)


class _Pending:
    """A request without a reply."""

    __slots__ = ("began_s", "future", "is_repeated", "is_sent", "name", "request", "settled", "was_sent")

    def __init__(self, request: pb.Request, name: str, settled: Callable[[], None] | None = None) -> None:
        self.request = request
        self.name = name
        self.settled = settled
        """Called once, when the service is done with the request, whoever waits for it."""
        self.is_sent = False
        """On this stream."""
        self.is_repeated = False
        """It was sent on an earlier stream."""
        self.was_sent = False
        """On any stream: it may have been applied."""
        self.began_s = time.monotonic()
        self.future: asyncio.Future[pb.Reply] = asyncio.get_running_loop().create_future()


class SessionConnection:
    """A session of one volume. Open it once, close it once."""

    def __init__(
        self,
        endpoint: Endpoint,
        volume: str,
        *,
        host: str,
        pid: int,
        mountpoint: str,
        timeout_s: float,
        lost: Callable[[], object] | None = None,
        takes_leases: bool = False,
    ) -> None:
        """``volume`` is TENANT/NAME. ``timeout_s``: how long requests wait for a service that is away.

        ``lost`` is called if the service refuses the session for good after it was open. ``takes_leases``: who uses the
        connection sets `recalled` before its first call.
        """
        self._lost = lost
        self._endpoint = endpoint
        self._volume = volume
        self._hello = pb.Hello(protocol=PROTOCOL, host=host, pid=pid, mountpoint=mountpoint, leases=takes_leases)
        self.recalled: Callable[[Ino | None], Sequence[asyncio.Task[None]]] | None = None
        """Called with each directory whose lease ends, None for all when there is another stream, before its Hello: at once,
        before anything else is received. Returns what has to be done before the recall is answered."""
        self._answering: deque[tuple[int, set[asyncio.Task[None]]]] = deque()
        """Recalls that are not answered yet, and what is done for them."""
        self._recalled = 0
        """The recall up to which all were answered."""
        self._timeout_s = timeout_s
        self._frames: Frames | None = None
        """The stream, while one stands."""
        self._welcome = pb.Welcome()
        self._format: VolumeFormat | None = None
        self._next = 1
        self._pending: dict[int, _Pending] = {}
        self._outgoing: list[pb.Request] = []
        self._opens: Counter[Ino] = Counter()
        self._promised: dict[Ino, int] = {}
        """Up to where files that are open may grow, in bytes, by the service's word."""
        self._sent = 0
        """Requests that went out on this stream and have no reply, those given up included: the service counts them."""
        self._given_up: dict[int, _Pending] = {}
        """Those whose time was up."""
        self._left: dict[int, _Pending] = {}
        """Those whose time was up while no stream stood, and which went out on an earlier one."""
        self._sign_is_due = False
        self._flush_is_due = False
        self._later: asyncio.TimerHandle | None = None
        self._room = asyncio.Event()
        self._heard_s = 0.0
        self._away_since_s: float | None = time.monotonic()
        self._is_ending = False
        self._failure: AtollError | None = None
        self._over: AtollError | None = None
        """Set for good when the session is closed or refused."""
        self._opened: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._task: asyncio.Task[None] | None = None
        self.messages_sent = 0
        self.messages_received = 0
        self.requests = 0
        self.reconnections = 0

    @property
    def session_id(self) -> SessionId:
        """Return the session's number: 0 after the service has ended the session, and another one when the next has begun."""
        return SessionId(self._hello.session_id)

    @property
    def format(self) -> VolumeFormat:
        """Return the volume's format, as the service said when it was last connected."""
        assert self._format is not None, "open() has not returned yet"
        return self._format

    @property
    def root(self) -> Ino:
        """Return the directory that the token reaches."""
        return Ino(self._welcome.root or ROOT_INO)

    @property
    def is_read_only(self) -> bool:
        """Return whether the token allows no changes."""
        return self._welcome.read_only

    @property
    def lease_s(self) -> float:
        """Return how long a lease is good, from before the request was sent whose reply has it."""
        return self._welcome.lease_s

    @property
    def is_connected(self) -> bool:
        """Return whether a stream stands now."""
        return self._away_since_s is None

    @property
    def failure(self) -> AtollError | None:
        """Return why the session is over, if it is."""
        return self._over

    async def open(self, *, timeout_s: float) -> None:
        """Connect and begin a session. ServiceUnavailable after so long; what the service refuses at once."""
        self._task = asyncio.create_task(self._run(), name=f"session at {self._endpoint}")
        try:
            async with asyncio.timeout(timeout_s):
                await asyncio.shield(self._opened)
        except TimeoutError:
            failure = self._failure or ServiceUnavailable(f"the service at {self._endpoint} does not answer")
            await self._end()
            raise failure from None
        except BaseException:
            await self._end()
            raise

    async def close(self) -> None:
        """End the session, if the service can be reached; else it ends by itself. Pending requests fail."""
        self._is_ending = True
        self._flush()
        if self._task is not None and self.is_connected:
            await asyncio.wait([self._task], timeout=_GOODBYE_S)
        await self._end()

    async def _end(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        if self._opened.done() and not self._opened.cancelled():
            self._opened.exception()
        if self._over is None:
            self._over = ServiceUnavailable("the session with the metadata service was closed", retryable=False)
        if self._later is not None:
            self._later.cancel()
        self._fail_all(self._over)

    # -- requests -----------------------------------------------------------------------------------------------------

    async def call(self, name: str, operation: Any, *, settled: Callable[[], None] | None = None) -> pb.Reply:
        """Send one operation and return its reply. Raises what the operation raised, or EIO when the time is up.

        ``settled`` is called once, when the request surely changes nothing any more: it may be after the caller has gone, if it
        was sent, and is called before this raises if it was not.
        """
        try:
            pending = await self._begin(name, operation, settled)
        except BaseException:
            if settled is not None:
                settled()
            raise
        try:
            reply = await pending.future
        except asyncio.CancelledError:
            if pending.future.done() and not pending.future.cancelled():
                # The reply came, and was counted, before the caller could wake.
                self._give_back(pending)
            raise
        if reply.HasField("failure"):
            raise wire.error_of(reply.failure)
        return reply

    async def _begin(self, name: str, operation: Any, settled: Callable[[], None] | None) -> _Pending:
        while len(self._pending) >= self._welcome.max_outstanding or self._next - self._confirmed() >= WINDOW:
            self._room.clear()
            await self._room.wait()
        if self._over is not None:
            raise self._over
        if self._is_away_too_long():
            raise self._too_long()
        request = pb.Request(number=self._next, **{name: operation})
        self._next += 1
        self.requests += 1
        pending = self._pending[request.number] = _Pending(request, name, settled)
        self._outgoing.append(request)
        self._flush_soon()
        return pending

    def release(self, ino: Ino) -> None:
        """Give back one open, soon. Nobody waits for it: what it frees is the service's matter."""
        if self._over is not None:
            return
        if self._is_away_too_long():
            # Said at the next Hello, by not being named any more.
            self._released(ino)
            return
        self._outgoing.append(self._ask("release", pb.Release(ino=ino)))
        self.requests += 1
        if self._later is None and not self._flush_is_due:
            self._later = asyncio.get_running_loop().call_later(RELEASE_S, self._flush)

    def _is_away_too_long(self) -> bool:
        return self._away_since_s is not None and time.monotonic() - self._away_since_s > self._timeout_s

    def _give_back(self, pending: _Pending) -> None:
        """Release what a request opened whose caller is gone."""
        if pending.future.exception() is None and (reply := pending.future.result()).opens and reply.inodes.ino:
            self.release(Ino(reply.inodes.ino[0]))

    def _too_long(self) -> AtollError:
        return ServiceUnavailable(
            f"the service at {self._endpoint} was away for more than {self._timeout_s:.0f} s", retryable=False
        )

    def _take(self, number: int) -> _Pending | None:
        pending = self._pending.pop(number, None)
        if pending is not None:
            self._room.set()
            if pending.is_sent:
                self._answered()
        return pending

    def _answered(self) -> None:
        """Take note that the service has one request less under way."""
        self._sent -= 1
        if self._outgoing:
            self._flush_soon()

    def _give_up(self, number: int, pending: _Pending) -> None:
        """Stop waiting for a reply whose time is up. The service may still be at it, so it still counts."""
        del self._pending[number]
        self._room.set()
        if pending.is_sent:
            self._given_up[number] = pending
        elif self._frames is not None or not pending.was_sent:
            _settle(pending)
        else:
            self._left[number] = pending
        if pending.future.done():
            return
        if pending.name == "release":
            # It is not sent again: what the session has open is said at the next Hello.
            self._released(Ino(pending.request.release.ino))
            pending.future.set_result(pb.Reply(number=number))
        else:
            pending.future.set_exception(self._too_long())

    def _fail_all(self, error: AtollError) -> None:
        for number in list(self._pending):
            self._fail(number, error)

    def _fail(self, number: int, error: AtollError) -> None:
        pending = self._take(number)
        if pending is not None:
            _settle(pending)
            if not pending.future.done():
                pending.future.set_exception(error)

    def _receive(self, reply: pb.Reply) -> None:
        """Complete a request. The one place that counts opens."""
        pending = self._take(reply.number)
        if pending is None:
            given_up = self._given_up.pop(reply.number, None)
            if given_up is not None:
                _settle(given_up)
                self._answered()
            if reply.opens:
                # An open or create that was given up: nobody will release it. Counted, as its release will be.
                ino = Ino(reply.inodes.ino[0])
                self._opens[ino] += 1
                self.release(ino)
            return
        _settle(pending)
        if pending.is_repeated:
            # They are what they were when it was applied, which may be long ago.
            reply.ClearField("directories")
        if not reply.HasField("failure"):
            if reply.opens:
                ino = Ino(reply.inodes.ino[0])
                self._opens[ino] += 1
                if pending.future.cancelled():
                    # Nobody will release it.
                    self.release(ino)
            elif pending.name == "release":
                self._released(Ino(pending.request.release.ino))
            elif pending.name == "reserve":
                ino = Ino(pending.request.reserve.ino)
                if self._opens[ino]:
                    self._promised[ino] = max(self._promised.get(ino, 0), reply.count)
        if not pending.future.done():
            pending.future.set_result(reply)

    def _released(self, ino: Ino) -> None:
        self._opens[ino] -= 1
        if self._opens[ino] <= 0:
            del self._opens[ino]
            self._promised.pop(ino, None)

    # -- the stream ---------------------------------------------------------------------------------------------------

    async def _run(self) -> None:
        """Keep a stream standing until the session is closed or the service refuses it for good."""
        delay_s = FIRST_DELAY_S
        sweeper = asyncio.create_task(self._sweep(), name="time limits of requests")
        try:
            while True:
                began_s = time.monotonic()
                is_sent_on = False
                try:
                    await self._stand()
                    return
                except (EndedByService, ConnectionLost, Stalled, NotOurs) as ended:
                    is_sent_on = self._endpoint.sent_on(ended)
                    error = self._endpoint.error(ended)
                    if isinstance(ended, NotOurs) and self._opened.done():
                        # A proxy, or somebody who has the port meanwhile: the service was there, and may be again.
                        error = ServiceUnavailable(error.message)
                except TimeoutError:
                    error = ServiceUnavailable(f"the service at {self._endpoint} says nothing")
                    self._endpoint.failed()
                except AtollError as told:
                    error = told
                    if isinstance(told, Untrusted) and self._opened.done():
                        # Certificates are replaced in time, and somebody else may have the port meanwhile.
                        error = ServiceUnavailable(told.message)
                    self._endpoint.failed()
                except Exception as unexpected:
                    log.exception("the session at %s failed unexpectedly", self._endpoint, exc_info=unexpected)
                    error = ServiceRefused(f"the session at {self._endpoint} failed unexpectedly: {unexpected!r}")
                if self._is_ending:
                    return
                if self._away_since_s is None:
                    self._away_since_s = time.monotonic()
                    self.reconnections += 1
                    log.warning("%s; trying again", error)
                self._failure = error
                if isinstance(error, SessionEnded):
                    self._begin_anew(error)
                elif not error.retryable and not (isinstance(error, AccessRefused) and self._endpoint.take_new_token()):
                    self._refused(error)
                    return
                if is_sent_on:
                    continue
                delay_s = FIRST_DELAY_S if time.monotonic() - began_s > MAX_DELAY_S else min(MAX_DELAY_S, delay_s * 2)
                await asyncio.sleep(delay_s)
        finally:
            sweeper.cancel()
            await asyncio.gather(sweeper, return_exceptions=True)

    def _refused(self, error: AtollError) -> None:
        """Fail for good."""
        self._over = error
        if not self._opened.done():
            self._opened.set_exception(error)
        else:
            log.error("%s: the session is over", error)
        self._fail_all(error)
        if self._opened.done() and self._opened.exception() is None and self._lost is not None:
            self._lost()

    def _begin_anew(self, error: AtollError) -> None:
        """Give up a session that the service has ended; the next stream begins another."""
        log.warning("session %d of volume %s: %s", self.session_id, self._volume, error)
        self._hello.session_id = 0
        self._hello.secret = b""
        for number, pending in list(self._pending.items()):
            if pending.name in _CHANGING and pending.was_sent:
                told = errno.ESTALE if pending.name == "commit" else errno.EIO
                self._fail(number, FsError(told, "the session with the metadata service had ended"))
        self._drop_releases()

    def _drop_releases(self) -> None:
        """Forget releases that a session which has ended did not hear: what they release is not opened again."""
        for number, pending in list(self._pending.items()):
            if pending.name == "release":
                self._take(number)
                self._released(Ino(pending.request.release.ino))
                if not pending.future.done():
                    pending.future.set_result(pb.Reply(number=number))

    async def _stand(self) -> None:
        """Open a stream and serve it to its end; returns if that was our goodbye."""
        began_s = time.monotonic()
        frames = await self._endpoint.connect(pb.Opening.SESSION, self._volume)
        try:
            self._heard_s = time.monotonic()
            async with asyncio.timeout(HELLO_S - (self._heard_s - began_s)):
                await self._greet(frames)
            frames.on_room = self._flush
            self._frames = frames
            frames.deliver(self._message)
            self._flush()
            living = asyncio.create_task(self._live(frames), name="signs of life")
            try:
                await asyncio.wait({living, frames.closed}, return_when=asyncio.FIRST_COMPLETED)
                await (frames.closed if frames.closed.done() else living)
            finally:
                living.cancel()
        except EndedByService as ended:
            if not (self._is_ending and ended.reason == pb.Ended.DONE):
                raise
        finally:
            self._frames = None
            frames.close()

    async def _greet(self, frames: Frames) -> None:
        hello = self._hello
        hello.attempt += 1
        self._recalled = 0
        self._answering.clear()
        if self.recalled is not None:
            self.recalled(None)
        del hello.open_inos[:]
        del hello.open_counts[:]
        del hello.open_ends[:]
        hello.open_inos.extend(self._opens)
        hello.open_counts.extend(self._opens.values())
        hello.open_ends.extend(self._promised.get(ino, 0) for ino in self._opens)
        del hello.repeated[:]
        hello.repeated.extend(number for number, pending in self._pending.items() if pending.was_sent)
        frames.send(pb.FromClient(hello=hello, confirmed=self._confirmed()).SerializeToString())
        welcome = pb.FromService.FromString(await frames.read()).welcome
        is_new = welcome.session_id != self._hello.session_id
        if is_new:
            self._drop_releases()
        before = self._welcome
        if self._opened.done() and (welcome.root, welcome.read_only) != (before.root, before.read_only):
            raise ServiceRefused("the token reaches something else than the one before: unmount, then mount with it")
        self._format = parse_format(welcome.format.json)
        self._welcome = welcome
        hello.session_id, hello.secret = welcome.session_id, welcome.secret
        if is_new and self._opens:
            self._register_opens()
        self._endpoint.let_in()
        self._away_since_s = None
        self._failure = None
        self._outgoing = [pending.request for pending in self._pending.values()]
        self._sent = 0
        # Whoever is welcome has nothing under way at the service any more.
        for pending in (*self._given_up.values(), *self._left.values()):
            _settle(pending)
        self._given_up.clear()
        self._left.clear()
        for pending in self._pending.values():
            pending.is_sent = False
            pending.is_repeated = pending.was_sent
        self._room.set()
        if self._opened.done():
            log.warning("connected to the service at %s again, session %d", self._endpoint, welcome.session_id)
        else:
            self._opened.set_result(None)

    def _register_opens(self) -> None:
        """Open again, in a new session, what was open in the one that ended; what is gone is gone."""
        opens, self._opens = self._opens, Counter()
        promised, self._promised = self._promised, {}
        waiting, self._pending = self._pending, {}
        for ino, count in opens.items():
            for _ in range(count):
                self._ask("open", pb.Open(ino=ino, again=True))
        for ino, end in promised.items():
            self._ask("reserve", pb.Reserve(ino=ino, end=min(end, MAX_FILE_BYTES)))
        # What was open is opened again before anything that needs it open. Under the lower number that it had, what waited
        # would hold back the window, and the opens in front of it that do not fit in the window would hold it back.
        for pending in waiting.values():
            pending.request.number = self._next
            self._pending[self._next] = pending
            self._next += 1

    def _ask(self, name: str, operation: Any) -> pb.Request:
        """Add a request whose answer nobody waits for."""
        request = pb.Request(number=self._next, **{name: operation})
        self._next += 1
        pending = self._pending[request.number] = _Pending(request, name)
        pending.future.add_done_callback(lambda done: done.cancelled() or done.exception())
        return request

    def _confirmed(self) -> int:
        return next(iter(self._pending), self._next)

    def _flush_soon(self) -> None:
        """Send at the end of this turn of the loop, with what else is asked in it."""
        if not self._flush_is_due:
            self._flush_is_due = True
            asyncio.get_running_loop().call_soon(self._flush)

    def _flush(self) -> None:
        """Send what waits, as far as there is room. The rest goes when there is."""
        self._flush_is_due = False
        if self._later is not None:
            self._later.cancel()
            self._later = None
        frames = self._frames
        if frames is None:
            return
        while not frames.is_congested and ((batch := self._batch()) or self._sign_is_due):
            self._sign_is_due = False
            message = pb.FromClient(requests=batch, confirmed=self._confirmed(), recalled=self._recalled)
            frames.send(message.SerializeToString())
            self.messages_sent += 1
        if self._is_ending and not self._pending:
            self._frames = None
            frames.send(pb.FromClient(confirmed=self._confirmed(), goodbye=True).SerializeToString())

    def _batch(self) -> list[pb.Request]:
        """Take requests that go out in one message: never more than the service takes at once, and none that was given up."""
        batch: list[pb.Request] = []
        size_bytes = taken = 0
        room = self._welcome.max_outstanding - self._sent
        past = self._confirmed() + SENT_WINDOW
        for request in self._outgoing:
            if len(batch) >= room or size_bytes >= _BATCH_BYTES or request.number >= past:
                break
            taken += 1
            pending = self._pending.get(request.number)
            if pending is not None:
                pending.is_sent = pending.was_sent = True
                size_bytes += request.ByteSize()
                batch.append(request)
        self._sent += len(batch)
        del self._outgoing[:taken]
        return batch

    def _message(self, data: bytes) -> None:
        self._heard_s = time.monotonic()
        self.messages_received += 1
        message = pb.FromService.FromString(data)
        for recall in message.recalls:
            self._call_back(Ino(recall.ino), recall.number)
        for reply in message.replies:
            self._receive(reply)
        if self._is_ending and not self._pending:
            self._flush_soon()

    def _call_back(self, ino: Ino, number: int) -> None:
        work = set(self.recalled(ino)) if self.recalled is not None else set()
        self._answering.append((number, work))
        for task in work:
            task.add_done_callback(self._answer_recalls)
        self._answer_recalls()

    def _answer_recalls(self, _: object = None) -> None:
        """Answer the recalls for which all was done."""
        answering, before = self._answering, self._recalled
        while answering and all(task.done() for task in answering[0][1]):
            self._recalled = answering.popleft()[0]
        if self._recalled != before:
            self._sign_is_due = True
            self._flush_soon()

    def adopt(self, ino: Ino, count: int) -> None:
        """Say at the next Hello that a file is open so often more than the service has heard of."""
        self._opens[ino] += count

    async def _live(self, frames: Frames) -> None:
        """Give signs of life, and look for silence."""
        interval_s = self._welcome.keepalive_s
        while True:
            await asyncio.sleep(interval_s)
            if time.monotonic() - max(self._heard_s, frames.heard_s) > SILENCE * interval_s:
                raise ServiceUnavailable(
                    f"nothing was heard of the service at {self._endpoint} for {SILENCE * interval_s:.0f} s"
                )
            self._sign_is_due = True
            self._flush()

    async def _sweep(self) -> None:
        """Fail requests whose time is up."""
        while True:
            await asyncio.sleep(min(1.0, self._timeout_s / 4))
            late_s = time.monotonic() - self._timeout_s
            for number, pending in list(self._pending.items()):
                # Not in order of their numbers, once what waited was numbered anew.
                if pending.began_s <= late_s:
                    self._give_up(number, pending)


def _settle(pending: _Pending) -> None:
    settled, pending.settled = pending.settled, None
    if settled is not None:
        settled()
