"""Messages arrive whole and in order however the bytes are cut, and every way in which a connection ends is told apart."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metasvc.api import atoll_pb2 as pb
from metasvc.api import frames as wire_frames
from metasvc.api.frames import MAGIC, ConnectionLost, EndedByService, Frames, NotOurs, Stalled

LIMIT = 1 << 20


@asynccontextmanager
async def pair(**limits: Any) -> AsyncIterator[tuple[Frames, Frames]]:
    """Connect two sides over loopback."""
    loop = asyncio.get_running_loop()
    accepted: asyncio.Future[Frames] = loop.create_future()
    server = await loop.create_server(lambda: Frames(max_bytes=LIMIT, on_made=accepted.set_result), "127.0.0.1", 0)
    address = server.sockets[0].getsockname()
    _, here = await loop.create_connection(lambda: Frames(max_bytes=LIMIT, is_client=True, **limits), *address[:2])
    there = await accepted
    try:
        yield here, there
    finally:
        here.close()
        there.close()
        server.close()


class Wire:
    """A transport that takes everything."""

    def __init__(self) -> None:
        self.written = b""
        self.is_paused = False

    def write(self, data: bytes) -> None:
        self.written += data

    def is_closing(self) -> bool:
        return False

    def get_extra_info(self, name: str) -> Any:
        return _Socket() if name == "socket" else None

    def set_write_buffer_limits(self, *, high: int) -> None:
        pass

    def pause_reading(self) -> None:
        self.is_paused = True

    def resume_reading(self) -> None:
        self.is_paused = False


class _Socket:
    def setsockopt(self, *_: int) -> None:
        pass


@pytest.mark.parametrize("part_bytes", [wire_frames._PART_BYTES, 40])
@given(st.lists(st.binary(max_size=300), max_size=20), st.data())
def test_messages_arrive_whole_however_the_bytes_are_cut(
    part_bytes: int, messages: list[bytes], data: st.DataObject
) -> None:
    async def check() -> None:
        held_bytes = 0

        def note(_: Frames, size_bytes: int, *, is_new: bool) -> None:
            nonlocal held_bytes
            held_bytes = size_bytes

        sender, receiver = Frames(max_bytes=LIMIT), Frames(max_bytes=LIMIT, on_unfinished=note)
        wire, other = Wire(), Wire()
        sender.connection_made(wire)  # type: ignore[arg-type]
        receiver.connection_made(other)  # type: ignore[arg-type]
        sender.greet()
        for message in messages:
            sender.send(message)
        got: list[bytes] = []
        read_first = data.draw(st.integers(0, len(messages)))
        position, is_delivering = 0, False
        while position < len(wire.written) or len(got) < len(messages):
            if position < len(wire.written):
                step = data.draw(st.integers(1, 400))
                receiver.data_received(wire.written[position : position + step])
                position += step
            if not is_delivering and len(got) < read_first:
                try:
                    async with asyncio.timeout(0):
                        got.append(await receiver.read())
                except TimeoutError:
                    pass
            elif not is_delivering:
                is_delivering = True
                receiver.deliver(got.append)
            sent_bytes = min(position, len(wire.written))
            taken_bytes = len(MAGIC) + sum(4 + len(message) for message in [*got, *receiver._received])
            assert sent_bytes < len(MAGIC) or held_bytes == sent_bytes - taken_bytes
        assert got == messages

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wire_frames, "_PART_BYTES", part_bytes)
        asyncio.run(check())


async def test_the_other_side_hears_why_after_all_that_was_sent() -> None:
    async with pair() as (here, there):
        there.greet()
        for number in range(100):
            there.send(b"%d" % number)
        there.end(pb.Ended.NO_VOLUME, "no such volume")
        assert [await here.read() for _ in range(100)] == [b"%d" % number for number in range(100)]
        with pytest.raises(EndedByService, match="no such volume") as ended:
            await here.read()
        assert ended.value.reason == pb.Ended.NO_VOLUME


async def test_a_side_that_vanishes_is_lost() -> None:
    async with pair() as (here, there):
        there.greet()
        there.send(b"first")
        there.close()
        assert await here.read() == b"first"
        with pytest.raises(ConnectionLost):
            await here.read()
        with pytest.raises(ConnectionLost):
            await here.closed
        here.send(b"to nobody")


@pytest.mark.parametrize("start", [b"HTTP/1.1 400 Bad", MAGIC + b"\xff\xff\xff\x7f", MAGIC[:-1] + b"\x63"])
async def test_what_is_no_message_is_refused(start: bytes) -> None:
    async with pair() as (here, there):
        there._write(start)
        with pytest.raises(NotOurs):
            await here.read()


async def test_what_a_callback_raises_ends_the_connection_and_nothing_more_is_delivered() -> None:
    async with pair() as (here, there):
        got: list[bytes] = []

        def take(message: bytes) -> None:
            got.append(message)
            if message == b"2":
                raise KeyError(message)

        here.deliver(take)
        there.greet()
        for number in range(5):
            there.send(b"%d" % number)
        with pytest.raises(KeyError):
            await here.closed
        assert got == [b"0", b"1", b"2"]


async def test_who_is_read_one_by_one_can_send_only_a_bounded_amount_ahead() -> None:
    async with pair() as (here, there):
        there.greet()
        async with asyncio.timeout(20):
            while not there.is_congested:
                there.send(bytes(LIMIT // 2))
                await asyncio.sleep(0)
        await asyncio.sleep(0.05)
        assert len(here._buffer) + here._parts_bytes + sum(map(len, here._received)) < 2 * LIMIT
        assert await here.read() == bytes(LIMIT // 2)


async def test_a_side_that_takes_nothing_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire_frames, "STALLED_S", 0.2)
    async with pair() as (here, there):
        here.pause()
        there.greet()
        while not there.is_congested:
            there.send(bytes(LIMIT))
            await asyncio.sleep(0)
        async with asyncio.timeout(20):
            await there.drain()
        with pytest.raises(Stalled):
            await there.closed


async def test_a_side_that_takes_nothing_does_not_keep_a_closed_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire_frames, "STALLED_S", 0.2)
    async with pair() as (here, there):
        here.pause()
        there.greet()
        while not there.is_congested:
            there.send(bytes(300_000))
            await asyncio.sleep(0)
        there.close()
        async with asyncio.timeout(20):
            await there.gone


async def test_a_client_cannot_say_that_it_is_ended() -> None:
    async with pair() as (here, there):
        here.end(pb.Ended.DONE, "")
        with pytest.raises(NotOurs):
            await there.read()


async def test_a_side_that_is_slow_is_not_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire_frames, "STALLED_S", 2.0)
    async with pair() as (here, there):
        there.greet()
        sent = 0
        while sent < 8:
            there.send(bytes(LIMIT))
            sent += 1
        for _ in range(sent):
            await asyncio.sleep(0.1)
            assert len(await here.read()) == LIMIT
        async with asyncio.timeout(20):
            await there.drain()
        assert not there.closed.done()
