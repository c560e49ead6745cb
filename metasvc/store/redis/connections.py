"""Connections to the servers of one address: a bounded number, made when they are needed and made again when they break.

Owns the life of connections, the deadlines, which calls are tried again, and where in a cluster a volume lies. Knows no keys.
(Why not the driver's pool and its cluster client: they send a command again by themselves when a connection breaks, which a
commit must not be, and they have deadlines for a read or a write of the socket, not for a call.)

Two lanes, so that changes never wait for reads: a renewal that came too late behind a thousand loads would cost the volume.
In each lane the connection that was used last is used first.

Interleavings:

- A call runs as a task of this object, not of its caller. A caller that is cancelled leaves the call under way: it ends by
  itself, within its deadline, and its connection is used again.
- Past its deadline a call's connection is cut. What the server does with what it got is unknown then, as after any lost
  connection: callers must be able to find out (metasvc.store.redis.volume).
- A call that is marked ``again`` does the same done twice: when the connection breaks it is done again on another one, after
  a pause that doubles, until its deadline. Others fail at once with Unavailable. To connect is tried again for all of them,
  and so is a call that a server of a cluster answers with MOVED or ASK, for it has not begun it. Two servers name each other
  for a moment while a slot changes hands and only one of them knows: after a few answers of this kind there is a pause too.
- ``_idle``, ``_open`` and the routes are changed between awaits only. ``_open`` has every connection that was not dropped, and
  never more than ``limit``: a call that needs another server closes one that nobody uses.

Routes: a *tag* is what the slot depends on. Nothing is known of one at first, and any server is asked. In a cluster it says
MOVED, which is remembered for the tag until a call on it finds nobody there.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Final, TypeVar

from redis.exceptions import AskError, MovedError

from chunkstore.errors import AtollError
from metasvc.errors import StoreError
from metasvc.store.redis.address import Address, Node
from metasvc.store.redis.foreign_errors import FOREIGN, Unavailable, is_usable_after, translate
from metasvc.store.redis.link import Link, open_link
from metasvc.store.redis.server import check_server

__all__ = ["CHANGE_DEADLINE_S", "READ_DEADLINE_S", "Lane", "connect"]

CHANGE_DEADLINE_S: Final = 8.0
"""Less than an ownership lasts, so that its owner has time to ask what became of a change."""
READ_DEADLINE_S: Final = 30.0
"""A read is idempotent: this includes the repeats, with which a restart of the server is a pause and no error."""
ATTEMPT_DEADLINE_S: Final = 10.0
"""Of one attempt of a call that may be repeated: a connection that swallows what it gets costs no more."""
CONNECT_DEADLINE_S: Final = 5.0
RETRY_FIRST_S: Final = 0.05
RETRY_MAX_S: Final = 1.0
CLOSE_S: Final = 5.0
"""What is under way when the store is closed may end within this."""
_REDIRECTIONS: Final = 5
"""So often a call follows MOVED and ASK at once: then it waits, for servers that name each other agree soon."""


class _Unbegun(Unavailable):
    """Nobody took the call: it is as if it had not been sent."""


T = TypeVar("T")
Work = Callable[[Link], Awaitable[T]]


async def connect(address: Address, node: Node | None = None, *, deadline_s: float = CONNECT_DEADLINE_S) -> Link:
    """Connect to a server, or to the first one of the address that answers and is a master. StoreError, Unavailable.

    A replica of a cluster will do: it names the master. Cost: four to six trips for each server that is asked.
    """
    ends_s = asyncio.get_running_loop().time() + deadline_s
    nodes = address.nodes if node is None else (node,)
    for left, candidate in zip(range(len(nodes), 0, -1), nodes, strict=True):
        # Each gets its share of the time that is left.
        share_s = max(0.0, ends_s - asyncio.get_running_loop().time()) / left
        try:
            return await _connect(address, candidate, deadline_s=share_s)
        except Unavailable:
            # What another one refuses for good is told at once: the next one may be its replica.
            if left == 1:
                raise
    raise AssertionError("an address names at least one server")


async def _connect(address: Address, node: Node, *, deadline_s: float) -> Link:
    link = None
    try:
        async with asyncio.timeout(deadline_s):
            link = await open_link(address, node, deadline_s=deadline_s)
            if link.hello.is_replica and not link.hello.is_cluster:
                raise Unavailable(f"{address.at} is a replica: name the master in the store's URL")
            await check_server(link, address.at)
    except FOREIGN as exc:
        if link is not None:
            link.abort()
        raise translate(exc, address.at) from exc
    except BaseException:
        if link is not None:
            link.abort()
        raise
    return link


class Routes:
    """Which server of a cluster has a tag, as far as that was told. Both lanes of a store share it."""

    def __init__(self) -> None:
        self._by_tag: dict[str, Node] = {}

    def node(self, tag: str) -> Node | None:
        """Return the server of a tag; None: ask any."""
        return self._by_tag.get(tag)

    def learn(self, tag: str, node: Node) -> None:
        """Remember what MOVED said."""
        self._by_tag[tag] = node

    def forget(self, tag: str) -> None:
        """Ask any server next time."""
        self._by_tag.pop(tag, None)


class Lane:
    """Up to ``limit`` connections for calls of one kind."""

    def __init__(self, address: Address, routes: Routes, *, limit: int) -> None:
        self._address = address
        self._routes = routes
        self._limit = limit
        self._turns = asyncio.Semaphore(limit)
        self._idle: list[Link] = []
        self._open: set[Link] = set()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._closed = False

    @property
    def at(self) -> str:
        """The name of the server, for messages."""
        return self._address.at

    async def call(self, work: Work[T], *, tag: str, deadline_s: float, again: bool = False) -> T:
        """Run ``await work(link)`` while nobody else uses the link; ``work`` sends one script or command to the tag's keys.

        StoreError for foreign errors, and where no connection was to be had within ``deadline_s``; Unavailable where it is
        unknown what the server did, and for ``again`` only when that lasted until the deadline. Other errors of ``work`` as
        they are.
        """
        if self._closed:
            raise StoreError(f"{self.at} is closed")
        return await asyncio.shield(self._begin(self._call(work, tag, deadline_s, again=again)))

    def _begin(self, call: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.get_running_loop().create_task(self._ended_by_close(call))
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            # Whoever waited may have been cancelled, and nobody else asks how it ended.
            task.exception()

    async def _ended_by_close(self, call: Coroutine[Any, Any, T]) -> T:
        """Run a call; nobody but close() cancels it, and who waits for it was not cancelled."""
        try:
            return await call
        except asyncio.CancelledError:
            raise StoreError(f"{self.at} is closed") from None

    async def _call(self, work: Work[T], tag: str, deadline_s: float, *, again: bool) -> T:
        ends_s = asyncio.get_running_loop().time() + deadline_s
        try:
            async with asyncio.timeout_at(ends_s):
                await self._turns.acquire()
        except TimeoutError as exc:
            raise StoreError(f"all {self._limit} connections to {self.at} were busy for {deadline_s:.0f} s") from exc
        try:
            return await self._attempts(work, tag, ends_s, again=again)
        finally:
            self._turns.release()

    async def _attempts(self, work: Work[T], tag: str, ends_s: float, *, again: bool) -> T:
        loop = asyncio.get_running_loop()
        delay_s = RETRY_FIRST_S
        while True:
            attempt_ends_s = min(ends_s, loop.time() + ATTEMPT_DEADLINE_S) if again else ends_s
            try:
                return await self._redirected(work, tag, attempt_ends_s)
            except Unavailable as exc:
                self._routes.forget(tag)
                is_free = again or isinstance(exc, _Unbegun)
                if not is_free or self._closed or loop.time() + delay_s >= ends_s:
                    raise
            await asyncio.sleep(delay_s)
            delay_s = min(RETRY_MAX_S, delay_s * 2)

    async def _redirected(self, work: Work[T], tag: str, ends_s: float) -> T:
        """Run a call on the server that has its tag, and on those that it is sent to instead. StoreError, Unavailable."""
        node, is_asking = self._routes.node(tag), False
        for _ in range(_REDIRECTIONS):
            try:
                link = await self._take(node, ends_s)
            except Unavailable as exc:
                raise _Unbegun(str(exc)) from exc
            link.is_asking = is_asking
            try:
                return await self._attempt(work, link, ends_s)
            except AskError as exc:
                node = Node(exc.host or link.node.host, exc.port)
                is_asking = not isinstance(exc, MovedError)
            if not is_asking:
                self._routes.learn(tag, node)
        raise _Unbegun(f"the servers of {self.at} send each other calls: see CLUSTER NODES there")

    async def _take(self, node: Node | None, ends_s: float) -> Link:
        """Return a link that nobody uses, to a server or to any. StoreError."""
        for link in reversed(self._idle):
            if node is None or link.node == node:
                self._idle.remove(link)
                if not link.is_closed:
                    return link
                self._drop(link)
        if self._idle and len(self._open) >= self._limit:
            self._drop(self._idle.pop(0))
        left_s = max(0.0, ends_s - asyncio.get_running_loop().time())
        link = await connect(self._address, node, deadline_s=min(CONNECT_DEADLINE_S, left_s))
        self._open.add(link)
        return link

    async def _attempt(self, work: Work[T], link: Link, ends_s: float) -> T:
        is_usable = False
        try:
            async with asyncio.timeout_at(ends_s):
                result = await work(link)
            is_usable = True
            return result
        except (AskError, AtollError):
            is_usable = True
            raise
        except FOREIGN as exc:
            is_usable = is_usable_after(exc)
            raise translate(exc, self.at) from exc
        finally:
            link.is_asking = False
            if is_usable and not self._closed:
                self._idle.append(link)
            else:
                self._drop(link)

    def _drop(self, link: Link) -> None:
        self._open.discard(link)
        link.abort()

    async def close(self) -> None:
        """Let calls end that are under way, for CLOSE_S, then cut their connections; close the others. May be called twice."""
        self._closed = True
        if self._tasks:
            await asyncio.wait(list(self._tasks), timeout=CLOSE_S)
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        idle, self._idle = self._idle, []
        await asyncio.gather(*(link.close() for link in idle))
        for link in self._open.difference(idle):
            link.abort()
        self._open.clear()
