"""The event loop as pyfuse3 sees it, on a socket pair in the place of /dev/fuse."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import pytest
import uvloop

from client.transport.event_loop import Closed, EventLoop


@pytest.fixture(params=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Callable[[Coroutine[Any, Any, None]], None]:
    """Run a coroutine on each kind of event loop."""
    return uvloop.run if request.param == "uvloop" else asyncio.run


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Yield two connected sockets: the file system's side and the kernel's."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        yield ours, theirs


Pair = tuple[socket.socket, socket.socket]
Run = Callable[[Coroutine[Any, Any, None]], None]


def test_waiting_ends_when_a_request_comes(run: Run, pair: Pair) -> None:
    async def scenario() -> None:
        ours, theirs = pair
        loop = EventLoop()
        for _ in range(3):
            waiting = asyncio.ensure_future(loop.wait_readable(ours.fileno()))
            await asyncio.sleep(0)
            assert not waiting.done()
            theirs.send(b"x")
            await waiting
            assert ours.recv(1) == b"x"
        loop.stop_reading()

    run(scenario())


def test_requests_that_are_there_already_are_taken_without_turning_the_loop_except_now_and_then(
    run: Run, pair: Pair
) -> None:
    async def scenario() -> None:
        ours, theirs = pair
        loop = EventLoop()
        theirs.send(b"x")
        turns = 0

        def turn() -> None:
            nonlocal turns
            turns += 1
            asyncio.get_running_loop().call_soon(turn)

        asyncio.get_running_loop().call_soon(turn)
        for _ in range(100):
            await loop.wait_readable(ours.fileno())
        assert 3 <= turns <= 10, "other tasks are not starved, and seldom disturb"
        ours.recv(1)
        loop.stop_reading()

    run(scenario())


def test_closing_wakes_who_waits_and_refuses_who_comes_later(run: Run, pair: Pair) -> None:
    async def scenario() -> None:
        ours, _theirs = pair
        loop = EventLoop()
        waiting = asyncio.ensure_future(loop.wait_readable(ours.fileno()))
        await asyncio.sleep(0)
        loop.notify_closing(ours.fileno())
        loop.notify_closing(ours.fileno())
        with pytest.raises(Closed):
            await waiting
        with pytest.raises(Closed):
            await loop.wait_readable(ours.fileno())
        loop.stop_reading()

    run(scenario())


def test_closing_in_the_tick_of_a_ready_request_raises_nothing(run: Run, pair: Pair) -> None:
    """pyfuse3's own shim raises InvalidStateError here, and leaves the mount behind."""

    async def scenario() -> None:
        ours, theirs = pair
        loop = EventLoop()
        waiting = asyncio.ensure_future(loop.wait_readable(ours.fileno()))
        await asyncio.sleep(0)
        assert loop._sleeper is not None
        # The reader has been called; the task that waited has not run yet.
        loop._readable()
        loop.notify_closing(ours.fileno())
        await waiting
        theirs.close()
        loop.stop_reading()

    run(scenario())


def test_a_descriptor_that_nobody_waits_for_does_not_keep_the_loop_busy(run: Run, pair: Pair) -> None:
    async def scenario() -> None:
        ours, theirs = pair
        loop = EventLoop()
        waiting = asyncio.ensure_future(loop.wait_readable(ours.fileno()))
        await asyncio.sleep(0)
        theirs.send(b"x")
        await waiting
        for _ in range(20):
            await asyncio.sleep(0)  # each turn the loop looks at its descriptors
        assert not loop._is_reader, "the first look without anybody waiting takes the reader away"
        await loop.wait_readable(ours.fileno())
        ours.recv(1)
        loop.stop_reading()

    run(scenario())


def test_the_lock_lets_one_in_and_the_others_follow_each_in_turn(run: Run) -> None:
    async def scenario() -> None:
        lock = EventLoop().Lock()
        inside = entered = 0

        async def use() -> None:
            nonlocal inside, entered
            for _ in range(5):
                async with lock:
                    inside += 1
                    assert inside == 1
                    await asyncio.sleep(0)
                    inside -= 1
                entered += 1
                await asyncio.sleep(0)

        async with asyncio.TaskGroup() as group:
            for _ in range(4):
                group.create_task(use())
        assert entered == 20

    run(scenario())


def test_who_gives_the_lock_back_may_take_it_again_before_the_others(run: Run) -> None:
    async def scenario() -> None:
        lock = EventLoop().Lock()
        order: list[str] = []

        async def other() -> None:
            async with lock:
                order.append("other")

        async with lock:
            waiting = asyncio.ensure_future(other())
            await asyncio.sleep(0)
        async with lock:
            order.append("same")
        await waiting
        assert order == ["same", "other"]

    run(scenario())


class CountingPoll:
    """A poll object that counts how often the kernel was asked."""

    def __init__(self, loop: EventLoop) -> None:
        self._poll = loop._poll
        self.asked = 0
        # In the place of a select.poll object, whose class cannot be inherited from.
        loop._poll = self  # type: ignore[assignment]

    def register(self, descriptor: int, events: int) -> None:
        self._poll.register(descriptor, events)

    def poll(self, timeout: int) -> list[tuple[int, int]]:
        self.asked += 1
        return self._poll.poll(timeout)


async def _receive_late(loop: EventLoop, pair: Pair) -> None:
    """Wait for a request that comes only when the waiting task sleeps."""
    ours, theirs = pair
    waiting = asyncio.ensure_future(loop.wait_readable(ours.fileno()))
    await asyncio.sleep(0)
    theirs.send(b"x")
    await waiting
    ours.recv(1)


def test_the_kernel_is_asked_again_before_sleeping_unless_that_was_in_vain_or_requests_are_in_work(
    run: Run, pair: Pair
) -> None:
    async def scenario() -> None:
        loop = EventLoop()
        poll = CountingPoll(loop)
        loop.requests_in_work = 1
        await _receive_late(loop, pair)
        assert poll.asked == 1, "the CPU is needed elsewhere"
        loop.requests_in_work = 0
        asked: list[int] = []
        for _ in range(20):
            before = poll.asked
            await _receive_late(loop, pair)
            asked.append(poll.asked - before)
        spins = [times > 1 for times in asked]
        assert spins[:4] == [True] * 4
        assert spins[4:].count(True) == 1, "what brings nothing is tried now and then only"
        loop.stop_reading()

    run(scenario())


def test_a_request_that_comes_while_the_kernel_is_asked_needs_no_sleep(run: Run, pair: Pair) -> None:
    async def scenario() -> None:
        ours, theirs = pair
        loop = EventLoop()

        class Answering(CountingPoll):
            def poll(self, timeout: int) -> list[tuple[int, int]]:
                if self.asked == 1:
                    theirs.send(b"x")
                return super().poll(timeout)

        poll = Answering(loop)
        await loop.wait_readable(ours.fileno())
        assert poll.asked == 2
        assert ours.recv(1) == b"x"

    run(scenario())
