"""What breaks the protocol is refused with a clear line, and nobody else is disturbed."""

from __future__ import annotations

import asyncio
import errno
import logging
import struct
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, cast

import pytest

from client.meta.connection import SessionConnection
from client.meta.endpoint import AccessRefused, Endpoint, ServiceRefused
from metasvc.api import atoll_pb2 as pb
from metasvc.api import frames as wire_frames
from metasvc.api.frames import MAGIC, MAX_REQUEST_BYTES, EndedByService, Frames
from metasvc.api.server import Server
from metasvc.errors import FsError, VolumeMissing
from metasvc.model import ROOT_INO, Caller, Commit, Ino
from metasvc.server import connection as server_connection
from metasvc.server import crowds
from metasvc.server.session import LONG_AT_ONCE, MAX_OUTSTANDING
from metasvc.store.memory import MemoryStore
from tests.metasvc.engine.volumes import format_volume
from tests.metasvc.server.served import Client, Served, connected, served

ROOT = Caller()


@asynccontextmanager
async def running(**options: Any) -> AsyncIterator[Served]:
    async with served(await format_volume(MemoryStore()), **options) as service:
        yield service


def from_client(*requests: pb.Request, **fields: Any) -> bytes:
    return pb.FromClient(requests=requests, **fields).SerializeToString()


def hello(**fields: Any) -> bytes:
    return pb.FromClient(hello=pb.Hello(protocol=1, **fields)).SerializeToString()


def stat(number: int) -> pb.Request:
    return pb.Request(number=number, getattr=pb.GetAttr(inos=[1], one=True))


@asynccontextmanager
async def stream(service: Served) -> AsyncIterator[Frames]:
    """Connect for a session, and say nothing yet."""
    frames = await service.endpoint().connect(pb.Opening.SESSION, service.name)
    try:
        yield frames
    finally:
        frames.close()


async def end_of(frames: Frames) -> EndedByService:
    """Read until the service ends the connection; why it did."""
    with pytest.raises(EndedByService) as ended:
        async with asyncio.timeout(60):
            while True:
                await frames.read()
    return ended.value


async def refusal(service: Served, *messages: bytes) -> tuple[int, str]:
    """Send messages on a stream of its own, and return how the service ends it."""
    async with stream(service) as frames:
        for message in messages:
            frames.send(message)
        ended = await end_of(frames)
        return ended.reason, ended.details


CASES: dict[str, tuple[list[bytes], str]] = {
    "damaged from the start": ([b"\xff\xff\xff\xff"], "damaged"),
    "no hello": ([from_client(stat(1))], "first message"),
    "hello with requests": (
        [pb.FromClient(hello=pb.Hello(protocol=1), requests=[stat(1)]).SerializeToString()],
        "alone",
    ),
    "a second hello": ([hello(), hello()], "once"),
    "too new": ([pb.FromClient(hello=pb.Hello(protocol=99)).SerializeToString()], "upgrade the service"),
    "too old": ([pb.FromClient(hello=pb.Hello(protocol=0)).SerializeToString()], "upgrade the client"),
    "damaged later": ([hello(), b"\x0a\xff\xff\xff\xff\xff"], "damaged"),
    "number zero": ([hello(), from_client(stat(0))], "confirmation"),
    "a number below what was confirmed": ([hello(), from_client(stat(5), confirmed=7)], "confirmation"),
    "the same number twice at once": ([hello(), from_client(stat(3), stat(3))], "under way"),
    "a number beyond all": ([hello(), from_client(stat(1 << 63))], "is not confirmed"),
    "too many at once": ([hello(), from_client(*map(stat, range(1, MAX_OUTSTANDING + 2)))], "at once"),
    "opens in crooked columns": ([hello(open_inos=[1, 2], open_counts=[1])], "columns"),
}


@pytest.mark.parametrize("case", CASES)
async def test_who_breaks_the_protocol_is_cut_off_with_the_reason_and_others_go_on(
    case: str, caplog: pytest.LogCaptureFixture
) -> None:
    messages, reason = CASES[case]
    async with running() as service, connected(service) as bystander:
        with caplog.at_level(logging.WARNING):
            status, details = await refusal(service, *messages)
        assert status == pb.Ended.INVALID
        assert reason in details
        assert any(reason in record.getMessage() for record in caplog.records)
        assert (await bystander.meta.getattr(ROOT_INO)).is_dir
        assert bystander.connection.reconnections == 0


async def test_an_oversized_message_ends_its_stream_only() -> None:
    async with running() as service, connected(service) as bystander:
        async with stream(service) as frames:
            frames.send(hello())
            await frames.read()
            frames.send(bytes(MAX_REQUEST_BYTES + 1))
            assert (await end_of(frames)).reason == pb.Ended.INVALID
        assert (await bystander.meta.getattr(ROOT_INO)).is_dir


async def test_nobody_is_listened_to_for_long_before_they_have_said_who_they_are() -> None:
    async with running() as service, connected(service) as bystander:
        assert service.service is not None
        for start in (
            b"GET / HTTP/1.1\r\n\r\n",
            MAGIC[:-1] + b"\x63",
            MAGIC + struct.pack("<I", 1 << 20),
            MAGIC + b"\3\0\0\0xxx",
        ):
            reader, writer = await asyncio.open_connection("127.0.0.1", service.port)
            writer.write(start)
            async with asyncio.timeout(20):
                answer = await reader.read()
            writer.close()
            assert answer.startswith(MAGIC)
        assert (await bystander.meta.getattr(ROOT_INO)).is_dir


async def test_another_wire_version_is_told_to_upgrade() -> None:
    async def answer(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(MAGIC[:-1] + b"\x63")
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        connection = SessionConnection(
            Endpoint([Server("127.0.0.1", port)], "t"), "a/b", host="h", pid=1, mountpoint="", timeout_s=5
        )
        with pytest.raises(ServiceRefused, match="upgrade"):
            await connection.open(timeout_s=20)


async def test_who_says_nothing_is_closed(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(server_connection, "HELLO_S", 0.3)
    async with running() as service:
        with caplog.at_level(logging.WARNING):
            status, details = await refusal(service)
        assert status == pb.Ended.AGAIN
        assert "said nothing" in details
        assert service.service is not None
        async with asyncio.timeout(20):
            while service.service.connections:
                await asyncio.sleep(0.01)


async def test_of_many_who_do_not_say_who_they_are_the_oldest_go_and_who_does_is_let_in(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with running() as service, connected(service) as bystander:
        assert service.service is not None
        monkeypatch.setattr(service.service._doorway, "_most", 20)
        with caplog.at_level(logging.WARNING):
            crowd = [await asyncio.open_connection("127.0.0.1", service.port) for _ in range(60)]
            for reader, _ in crowd[:40]:
                async with asyncio.timeout(20):
                    answer = await reader.read()
                assert b"too many connections" in answer
            async with connected(service) as client:
                assert (await client.meta.getattr(ROOT_INO)).is_dir
            assert len(service.service._doorway._waiting) <= 20
            await asyncio.sleep(1.2)
        told = [record.getMessage() for record in caplog.records if "wait to be let in" in record.getMessage()]
        assert len(told) < 10
        assert "(and " in told[-1]
        for _, writer in crowd:
            writer.close()
        assert (await bystander.meta.getattr(ROOT_INO)).is_dir
        assert bystander.connection.reconnections == 0
        async with asyncio.timeout(20):
            while service.service._doorway._waiting:
                await asyncio.sleep(0.01)


async def test_messages_that_do_not_end_take_a_bounded_amount_and_the_oldest_go(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    part = MAX_REQUEST_BYTES // 4
    async with running() as service, connected(service) as bystander:
        assert service.service is not None
        unfinished = service.service._unfinished
        monkeypatch.setattr(unfinished, "_limit_bytes", 4 * part)
        parent = (await bystander.meta.mkdir(ROOT, ROOT_INO, b"d", mode=0o755)).ino
        async with AsyncExitStack() as stack:
            crowd = []
            for _ in range(12):
                frames = await stack.enter_async_context(stream(service))
                frames.send(hello())
                await frames.read()
                frames._write(struct.pack("<I", MAX_REQUEST_BYTES) + bytes(part))
                crowd.append(frames)
                await bystander.meta.getattr(ROOT_INO)
                assert unfinished.total_bytes <= 4 * part
            for frames in crowd[:8]:
                ended = await end_of(frames)
                assert (ended.reason, "too slowly" in ended.details) == (pb.Ended.AGAIN, True)
            # Large ones that come whole are taken as ever.
            value = bytes(60_000)
            for number in range(40):
                await bystander.meta.setxattr(ROOT, parent, b"user.%d" % number, value, flags=0)
        assert bystander.connection.reconnections == 0
        async with asyncio.timeout(20):
            while unfinished.total_bytes:
                await asyncio.sleep(0.01)


async def test_large_messages_come_in_pieces_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    async with running() as service, connected(service) as bystander, AsyncExitStack() as stack:
        assert service.service is not None
        unfinished = service.service._unfinished
        monkeypatch.setattr(crowds, "PIECE_S", 0.2)
        crowd = []
        for _ in range(4):
            frames = await stack.enter_async_context(stream(service))
            frames.send(hello())
            await frames.read()
            frames.send(from_client(pb.Request(number=1, lookup=pb.Lookup(parent=1, name=bytes(4 << 20)))))
            crowd.append(frames)
        most_bytes, began_s = 0, time.monotonic()
        while time.monotonic() < began_s + 0.5:
            await bystander.meta.getattr(ROOT_INO)
            most_bytes = max(most_bytes, unfinished.total_bytes)
        # By now three pieces beyond what comes at once, and of each what was read last before that.
        assert 4 * crowds.LARGE_BYTES < most_bytes <= 4 * (crowds.LARGE_BYTES + _READ_BYTES) + 3 * _READ_BYTES
        monkeypatch.setattr(crowds, "PIECE_S", 0.001)
        async with asyncio.timeout(20):
            for frames in crowd:
                (reply,) = pb.FromService.FromString(await frames.read()).replies
                assert reply.failure.errno == errno.ENAMETOOLONG
        assert not unfinished.total_bytes
        assert bystander.connection.reconnections == 0


_READ_BYTES = 256 * 1024
"""What the event loop reads at once."""


async def test_who_reads_nothing_is_cut_off_and_costs_a_bounded_amount_of_memory(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(wire_frames, "STALLED_S", 1.0)
    async with running() as service, connected(service) as writer:
        parent = (await writer.meta.mkdir(ROOT, ROOT_INO, b"d", mode=0o755)).ino
        await asyncio.gather(*(writer.meta.mknod(ROOT, parent, b"%0200d" % n, mode=0o100644) for n in range(1000)))
        async with stream(service) as frames:
            frames.send(hello())
            await frames.read()
            frames.pause()
            assert service.service is not None
            most = number = 0
            async with asyncio.timeout(60):
                while not any("takes nothing" in record.getMessage() for record in caplog.records):
                    if not frames.is_congested:
                        number += 1
                        page = pb.Request(number=number, readdir=pb.ReadDir(ino=parent, limit=1000))
                        frames.send(from_client(page, confirmed=number))
                    await asyncio.sleep(0.005)
                    most = max([most, *(one._out_bytes for one in service.service.connections)])
            page_bytes = 1000 * 300
            assert most < server_connection.QUEUE_BYTES + MAX_OUTSTANDING * page_bytes
        assert (await writer.meta.getattr(ROOT_INO)).is_dir


async def _long_directory(client: Client) -> Ino:
    parent = (await client.meta.mkdir(ROOT, ROOT_INO, b"d", mode=0o755)).ino
    await asyncio.gather(*(client.meta.mknod(ROOT, parent, b"%0200d" % n, mode=0o100644) for n in range(1000)))
    return parent


async def test_who_asks_for_many_pages_in_one_message_and_reads_none_costs_no_more_than_a_few(caplog: Any) -> None:
    async with running() as service, connected(service) as bystander:
        parent = await _long_directory(bystander)
        page_bytes = 1000 * 300
        async with stream(service) as frames:
            frames.send(hello())
            await frames.read()
            frames.pause()
            pages = [pb.Request(number=n, readdir=pb.ReadDir(ino=parent, limit=1000)) for n in range(1, 201)]
            frames.send(from_client(*pages))
            assert service.service is not None
            (asker,) = (one for one in service.service.connections if one.messages_in < 3)
            async with asyncio.timeout(60):
                while not asker.is_full:
                    await asyncio.sleep(0.005)
            for _ in range(20):
                assert asker._out_bytes < server_connection.QUEUE_BYTES + LONG_AT_ONCE * page_bytes
                await bystander.meta.getattr(ROOT_INO)
            # Nothing is lost for who reads late.
            numbers: list[int] = []
            async with asyncio.timeout(60):
                while len(numbers) < len(pages):
                    numbers += [reply.number for reply in pb.FromService.FromString(await frames.read()).replies]
            assert sorted(numbers) == list(range(1, 201))
        assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


async def test_who_comes_back_having_read_nothing_is_let_in_and_asks_again() -> None:
    async with running() as service, connected(service) as bystander:
        parent = await _long_directory(bystander)
        pages = [pb.Request(number=n, readdir=pb.ReadDir(ino=parent, limit=1000)) for n in range(1, 201)]
        async with stream(service) as frames:
            frames.send(hello())
            welcome = pb.FromService.FromString(await frames.read()).welcome
            frames.pause()
            frames.send(from_client(*pages))
            assert service.service is not None
            (asker,) = (one for one in service.service.connections if one.messages_in < 3)
            async with asyncio.timeout(60):
                while not asker.is_full:
                    await asyncio.sleep(0.005)
            async with stream(service) as later:
                later.send(hello(session_id=welcome.session_id, secret=welcome.secret))
                async with asyncio.timeout(20):
                    assert pb.FromService.FromString(await later.read()).welcome.session_id == welcome.session_id
                    later.send(from_client(pages[-1]))
                    (reply,) = pb.FromService.FromString(await later.read()).replies
                assert (reply.number, len(reply.names)) == (200, 1000)


@pytest.mark.parametrize("token", ["", "nonsense", "eyJhbGciOiJub25lIn0.eyJpc3MiOiJhdG9sbCIsImFkbWluIjp0cnVlfQ."])
async def test_nobody_gets_in_without_the_token(token: str) -> None:
    async with running() as service:
        endpoint = Endpoint([Server("127.0.0.1", service.port)], token)
        connection = SessionConnection(endpoint, service.name, host="h", pid=1, mountpoint="", timeout_s=5)
        with pytest.raises(AccessRefused):
            await connection.open(timeout_s=20)
        for method in pb.Opening.Method.values():
            with pytest.raises(AccessRefused):
                await endpoint.ask(method, b"", volume=service.name)


async def test_a_method_that_the_service_does_not_know_says_so() -> None:
    async with running() as service:
        with pytest.raises(ServiceRefused, match="upgrade"):
            await service.endpoint().ask(cast("pb.Opening.Method.ValueType", 99), b"")


async def test_another_session_s_number_is_worth_nothing_without_its_secret() -> None:
    async with running() as service, connected(service) as client:
        status, details = await refusal(service, hello(session_id=client.connection.session_id, secret=b"guess"))
        assert (status, details) == (pb.Ended.SESSION_ENDED, details)
        assert (await client.meta.getattr(ROOT_INO)).is_dir


@pytest.mark.parametrize("name", ["local/absent", "local", "a/b/c", "/", "../x", "local/\u00e9"])
async def test_a_volume_that_is_none_is_refused(name: str) -> None:
    async with served(MemoryStore()) as service:
        connection = SessionConnection(service.endpoint(), name, host="h", pid=1, mountpoint="", timeout_s=5)
        with pytest.raises((VolumeMissing, ServiceRefused)):
            await connection.open(timeout_s=20)


async def test_an_operation_that_the_service_does_not_know_is_answered_enosys() -> None:
    async with running() as service, connected(service) as client:
        with pytest.raises(FsError, match="upgrade"):
            # An empty request is what an older service sees of a new operation: a field that it does not know.
            pending = client.connection.call("getattr", pb.GetAttr(inos=[1], one=True))
            client.connection._next = 1000
            task = asyncio.ensure_future(pending)
            await asyncio.sleep(0)
            client.connection._pending[1000].request.ClearField("getattr")
            await task
        assert (await client.meta.getattr(ROOT_INO)).is_dir


WRONG_COMMITS: dict[str, Callable[[int], pb.Commit]] = {
    "digests that do not fit": lambda i: pb.Commit(
        slices=[pb.WrittenSlice(slice_id=i, length=9 << 20, kind=1, data=bytes(16))]
    ),
    "bytes that do not fit": lambda i: pb.Commit(slices=[pb.WrittenSlice(slice_id=i, length=5, kind=0, data=b"abc")]),
    "inline beyond the limit": lambda i: pb.Commit(
        slices=[pb.WrittenSlice(slice_id=i, length=40_000, kind=0, data=bytes(40_000))]
    ),
    "a kind of the future": lambda i: pb.Commit(slices=[pb.WrittenSlice(slice_id=i, length=3, kind=9, data=b"abc")]),
    "an empty slice": lambda i: pb.Commit(slices=[pb.WrittenSlice(slice_id=i, length=0, kind=0)]),
    "a piece beyond the slice": lambda i: pb.Commit(
        slices=[pb.WrittenSlice(slice_id=i, length=3, kind=0, data=b"abc", refs=_ref(0, i, 1, 3))]
    ),
    "a piece of another slice": lambda i: pb.Commit(
        slices=[pb.WrittenSlice(slice_id=i, length=3, kind=0, data=b"abc", refs=_ref(0, i + 1, 0, 3))]
    ),
    "a piece beyond all files": lambda i: pb.Commit(
        slices=[pb.WrittenSlice(slice_id=i, length=3, kind=0, data=b"abc", refs=_ref(1 << 62, i, 0, 3))]
    ),
    "torn pieces": lambda i: pb.Commit(
        slices=[pb.WrittenSlice(slice_id=i, length=3, kind=0, data=b"abc", refs=_ref(0, i, 0, 3)[:-1])]
    ),
    "an end before the beginning": lambda i: pb.Commit(end=-1),
    "an end beyond all files": lambda i: pb.Commit(end=1 << 62),
}


def _ref(offset: int, slice_id: int, skip: int, length: int) -> bytes:
    return struct.pack("<QQII", offset, slice_id, skip, length)


@pytest.mark.parametrize("case", WRONG_COMMITS)
async def test_a_commit_that_cannot_be_is_refused_and_harms_nothing(case: str) -> None:
    async with running() as service, connected(service) as client:
        made = await client.meta.create(ROOT, ROOT_INO, b"f", mode=0o600, exclusive=True)
        message = WRONG_COMMITS[case]((await client.meta.allocate_slices(1))[0])
        message.ino = made.inode.ino
        with pytest.raises(Exception, match=r"Invalid|ends within"):
            await client.connection.call("commit", message)
        good = Commit((), 10, 0)
        assert (await client.meta.commit(ROOT, made.inode.ino, good)).size_bytes == 10
        assert [problem async for problem in client.admin.check(repair=False)] == []


@pytest.mark.parametrize("number", [0, 1 << 63, (1 << 64) - 1, 1 << 62])
async def test_inode_numbers_may_be_anything(number: int) -> None:
    async with running() as service, connected(service) as client:
        for call in (
            client.meta.getattr(Ino(number)),
            client.meta.lookup(Ino(number), b"x"),
            client.meta.open(Ino(number)),
            client.meta.readdir(Ino(number), after=None, limit=10),
            client.meta.unlink(ROOT, Ino(number), b"x"),
            client.meta.reserve(Ino(number), end=5),
        ):
            with pytest.raises(FsError):
                await call
        await client.meta.release(Ino(1 << 62))
