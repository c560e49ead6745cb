"""Time limits, many opens, and what both sides believe is open: after anything, client and service agree."""

from __future__ import annotations

import asyncio
import errno
from pathlib import Path
from typing import Any

import pytest

from chunkstore.errors import AtollError
from chunkstore.geometry import SliceId
from client.meta.connection import SENT_WINDOW
from client.meta.endpoint import Endpoint, ServiceUnavailable
from metasvc.api import atoll_pb2 as pb
from metasvc.api.frames import EndedByService
from metasvc.api.server import Server
from metasvc.errors import FsError
from metasvc.model import (
    ROOT_INO,
    Commit,
    Garbage,
    Ino,
    SessionId,
    SetAttr,
    SliceKind,
    SliceRange,
    SliceRef,
    Sustained,
    WrittenSlice,
)
from metasvc.server.session import MAX_NUMBER, MAX_OUTSTANDING
from metasvc.store.tables import GARBAGE, SLICE_RANGE, SUSTAINED
from tests.metasvc.server.served import Client, Cutter, Served, connected, served
from tests.metasvc.server.test_sessions import ROOT, stored
from tests.metasvc.store.kinds import KINDS
from tests.servers.fixtures import Servers


async def believed(service: Served, client: Client) -> dict[Ino, int]:
    """Return what the service believes that a client has open."""
    volume = await service.volume()
    number = client.connection.session_id
    return {ino: holders[number] for ino, holders in volume.engine._opens.items() if number in holders}


async def agree(service: Served, client: Client) -> None:
    """Wait until nothing is under way and both believe the same."""
    connection = client.connection
    async with asyncio.timeout(15):
        while connection._pending or connection._given_up or await believed(service, client) != dict(connection._opens):
            await asyncio.sleep(0.01)


async def test_more_requests_than_the_service_takes_at_once_may_run_out_of_time() -> None:
    async with stored("memory", Path()) as store, served(store) as service, connected(service, timeout_s=0.4) as client:
        volume = await service.volume()
        async with volume.engine.changes_held():
            for number in range(3):
                made = [
                    client.meta.mknod(ROOT, ROOT_INO, b"%d-%d" % (number, each), mode=0o100644) for each in range(120)
                ]
                answers = await asyncio.gather(*made, return_exceptions=True)
                assert all(isinstance(answer, ServiceUnavailable) for answer in answers)
            assert volume.sessions[client.connection.session_id].outstanding == MAX_OUTSTANDING
        # The stream stood all the time, and stands now.
        assert client.connection.failure is None
        assert client.connection.reconnections == 0
        assert (await client.meta.mknod(ROOT, ROOT_INO, b"after", mode=0o100644)).nlink == 1
        assert not client.connection._given_up
        assert client.connection._sent == 0


async def test_an_open_that_was_given_up_takes_nothing_from_another() -> None:
    async with (
        stored("memory", Path()) as store,
        served(store) as service,
        Cutter(service.port) as cutter,
        connected(service, port=cutter.port, timeout_s=0.5) as client,
        connected(service) as other,
    ):
        ino = (await client.meta.create(ROOT, ROOT_INO, b"file", mode=0o600, exclusive=True)).inode.ino
        cutter.open.clear()
        with pytest.raises(AtollError):
            await client.meta.open(ino)
        cutter.open.set()
        await agree(service, client)
        assert dict(client.connection._opens) == {ino: 1}
        cutter.cut()
        await other.meta.unlink(ROOT, ROOT_INO, b"file")
        await agree(service, client)
        assert (await client.meta.getattr(ino)).nlink == 0, "open, hence there"


async def test_creates_whose_replies_came_are_counted_once_after_a_break() -> None:
    async with (
        stored("memory", Path()) as store,
        served(store) as service,
        Cutter(service.port) as cutter,
        connected(service, port=cutter.port) as client,
    ):
        # The lowest request waits for a hold, so the replies above it are not confirmed.
        volume = await service.volume()
        released = (await client.meta.create(ROOT, ROOT_INO, b"first", mode=0o600, exclusive=True)).inode.ino
        run = volume.engine.run
        goes = asyncio.Event()

        async def slow(rule: Any, *args: Any, **options: Any) -> Any:
            if args == (ROOT_INO,):
                await goes.wait()
            return await run(rule, *args, **options)

        session = volume.sessions[client.connection.session_id]
        session._run = slow
        waiting = asyncio.create_task(client.meta.getattr(ROOT_INO))
        await asyncio.sleep(0.05)
        kept = (await client.meta.create(ROOT, ROOT_INO, b"kept", mode=0o600, exclusive=True)).inode.ino
        gone = (await client.meta.create(ROOT, ROOT_INO, b"gone", mode=0o600, exclusive=True)).inode.ino
        await client.meta.release(gone)
        await client.meta.release(released)
        goes.set()
        cutter.cut()
        await waiting
        await agree(service, client)
        assert dict(client.connection._opens) == {kept: 1}


async def test_a_file_closed_while_the_service_is_away_too_long_is_closed(tmp_path: Path) -> None:
    async with (
        stored("sqlite", tmp_path) as store,
        served(store) as service,
        connected(service, timeout_s=0.5) as client,
        connected(service) as other,
    ):
        inos = [
            (await client.meta.create(ROOT, ROOT_INO, b"f%d" % n, mode=0o600, exclusive=True)).inode.ino
            for n in range(3)
        ]
        await service.stop()
        await client.meta.release(inos[0])  # goes on waiting, and is given up
        with pytest.raises(ServiceUnavailable):
            await client.meta.getattr(inos[2])
        await client.meta.release(inos[1])  # given up at once
        await service.start()
        async with asyncio.timeout(20):
            while not client.connection.is_connected:
                await asyncio.sleep(0.01)
        await agree(service, client)
        assert dict(client.connection._opens) == {inos[2]: 1}
        for number in range(3):
            await other.meta.unlink(ROOT, ROOT_INO, b"f%d" % number)
        assert [inode is not None for inode in await other.meta.getattr_many(inos)] == [False, False, True]


async def test_more_opens_than_the_window_are_registered_again_behind_a_slow_one() -> None:
    count = SENT_WINDOW + 300
    async with (
        stored("memory", Path()) as store,
        served(store) as service,
        Cutter(service.port) as cutter,
        connected(service, port=cutter.port) as client,
        connected(service) as other,
    ):
        inos = [(await client.meta.mknod(ROOT, ROOT_INO, b"%d" % number, mode=0o100644)).ino for number in range(count)]
        await asyncio.gather(*(client.meta.open(ino) for ino in inos))
        volume = await service.volume()
        before = client.connection.session_id
        # What opens first in the new session writes a row, which waits while changes are held.
        await other.meta.open(inos[0])
        await other.meta.unlink(ROOT, ROOT_INO, b"0")
        await volume.end(volume.sessions[before])
        async with volume.engine.changes_held():
            cutter.cut()
            await asyncio.sleep(1.0)
            assert client.connection.session_id not in (0, before)
            assert len(client.connection._pending) > 200
        await agree(service, client)
        assert client.connection.failure is None
        assert sorted(client.connection._opens) == sorted(inos)


async def test_what_waits_for_a_new_session_goes_out_although_more_opens_than_the_window_go_before_it() -> None:
    count = SENT_WINDOW + 300
    async with (
        stored("memory", Path()) as store,
        served(store) as service,
        Cutter(service.port) as cutter,
        connected(service, port=cutter.port) as client,
    ):
        inos = [(await client.meta.mknod(ROOT, ROOT_INO, b"%d" % number, mode=0o100644)).ino for number in range(count)]
        await asyncio.gather(*(client.meta.open(ino) for ino in inos))
        volume = await service.volume()
        cutter.open.clear()
        waiting = [
            asyncio.create_task(client.meta.getattr(inos[0])),
            asyncio.create_task(client.meta.mkdir(ROOT, ROOT_INO, b"waited", mode=0o755)),
        ]
        await volume.end(volume.sessions[client.connection.session_id])
        cutter.cut()
        # Asked while there is no stream: it was never sent.
        async with asyncio.timeout(20):
            while client.connection.is_connected:
                await asyncio.sleep(0.005)
        waiting.append(asyncio.create_task(client.meta.mknod(ROOT, ROOT_INO, b"unsent", mode=0o100644)))
        await asyncio.sleep(0)
        cutter.open.set()
        async with asyncio.timeout(40):
            read, sent, unsent = await asyncio.gather(*waiting, return_exceptions=True)
        assert isinstance(sent, FsError), "nobody knows whether the session that ended applied it"
        assert read == await client.meta.getattr(inos[0])
        assert unsent == await client.meta.lookup(ROOT_INO, b"unsent")
        await agree(service, client)
        assert sorted(client.connection._opens) == sorted(inos)
        assert client.connection.failure is None


async def test_an_open_whose_answer_is_too_large_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("metasvc.server.session.MAX_REPLY_BYTES", 1000)
    async with (
        stored("memory", Path()) as store,
        served(store) as service,
        connected(service) as client,
    ):
        ino = (await client.meta.mknod(ROOT, ROOT_INO, b"file", mode=0o100644)).ino
        ids = await client.meta.allocate_slices(20)
        slices = tuple(
            WrittenSlice(SliceId(each), 100, SliceKind.INLINE, bytes(100), (SliceRef(100 * n, SliceId(each), 0, 100),))
            for n, each in enumerate(ids)
        )
        await client.meta.commit(ROOT, ino, Commit(slices=slices, end=2000, size_epoch=0, mtime_ns=1))
        with pytest.raises(AtollError, match="too large"):
            await client.meta.open(ino)
        with pytest.raises(AtollError, match="too large"):
            await client.meta.create(ROOT, ROOT_INO, b"file", mode=0o644, exclusive=False)
        assert await believed(service, client) == {} == dict(client.connection._opens)
        await client.meta.unlink(ROOT, ROOT_INO, b"file")
        assert await client.meta.getattr_many([ino]) == [None], "nobody has it open"


@pytest.mark.parametrize("kind", KINDS)
async def test_numbers_that_nobody_can_have_end_the_stream_and_not_the_volume(
    kind: str, tmp_path: Path, servers: Servers
) -> None:
    async with (
        stored(kind, tmp_path, servers) as store,
        served(store) as service,
        connected(service) as bystander,
        connected(service) as client,
    ):
        mknod = pb.MakeNode(caller=pb.Caller(), parent=ROOT_INO, name=b"x", mode=0o100644)
        request = pb.Request(number=1 << 63, mknod=mknod)
        assert MAX_NUMBER < 1 << 63
        frames = await service.endpoint().connect(pb.Opening.SESSION, service.name)
        try:
            frames.send(pb.FromClient(hello=pb.Hello(protocol=1, host="hostile", pid=1)).SerializeToString())
            await frames.read()
            frames.send(pb.FromClient(confirmed=1 << 63, requests=[request]).SerializeToString())
            with pytest.raises(EndedByService) as ended:
                while True:
                    await frames.read()
            assert ended.value.reason == pb.Ended.INVALID
        finally:
            frames.close()
        await client.meta.getattr(ROOT_INO)
        assert bystander.connection.reconnections == client.connection.reconnections == 0


async def test_a_commit_of_too_many_pieces_and_promises_without_an_open_are_refused() -> None:
    async with stored("memory", Path()) as store, served(store) as service, connected(service) as client:
        made = await client.meta.create(ROOT, ROOT_INO, b"f", mode=0o600, exclusive=True)
        ids = await client.meta.allocate_slices(1)
        slice_id = SliceId(ids[0])
        refs = tuple(SliceRef(2 * number, slice_id, 0, 1) for number in range(20_000))
        change = Commit(slices=(WrittenSlice(slice_id, 1, SliceKind.INLINE, b"x", refs),), end=40_000, size_epoch=0)
        with pytest.raises(FsError) as refusal:
            await client.meta.commit(ROOT, made.inode.ino, change)
        assert refusal.value.errno == errno.EINVAL
        await client.released(made.inode.ino)
        with pytest.raises(FsError) as refusal:
            await client.meta.reserve(made.inode.ino, end=10)
        assert refusal.value.errno == errno.EBADF
        with pytest.raises(FsError):
            for _ in range(40):
                await client.meta.allocate_slices(65_536)


async def test_what_an_operation_left_for_a_session_that_has_ended_goes_with_the_next_start(tmp_path: Path) -> None:
    async with stored("sqlite", tmp_path) as store, served(store) as service:
        async with connected(service) as client:
            made = await client.meta.create(ROOT, ROOT_INO, b"f", mode=0o600, exclusive=True)
            await client.meta.unlink(ROOT, ROOT_INO, b"f")
            engine = (await service.volume()).engine
            ghost = SessionId(4711)
            await engine.run(lambda tx: tx.put(SUSTAINED, Sustained(ghost, made.inode.ino)))
            await engine.run(lambda tx: tx.put(SLICE_RANGE, SliceRange(ghost, 1 << 40, 5)))
            await client.released(made.inode.ino)
            assert (await client.meta.getattr(made.inode.ino)).nlink == 0
        await service.stop()
        await service.start()
        async with connected(service) as client:
            with pytest.raises(FsError):
                await client.meta.getattr(made.inode.ino)
            engine = (await service.volume()).engine
            assert await engine.store.scan(SLICE_RANGE, after=None, limit=10) == []
            assert [problem async for problem in (await service.volume()).admin.check(repair=False)] == []


async def test_old_garbage_is_found_behind_any_number_of_young_rows() -> None:
    async with stored("memory", Path()) as store, served(store) as service, connected(service) as client:
        engine = (await service.volume()).engine
        rows = [Garbage(SliceId(number), 1, 1000 if number < 5000 else 10) for number in range(1, 5101)]
        for first in range(0, len(rows), 1000):

            def put(tx: object, part: list[Garbage] = rows[first : first + 1000]) -> None:
                for row in part:
                    tx.put(GARBAGE, row)  # type: ignore[attr-defined]

            await engine.run(put)
        found = await client.admin.garbage(before_ns=500, limit=50)
        assert [row.slice_id for row in found] == list(range(5000, 5050))
        assert len(await client.admin.garbage(before_ns=2000, limit=5000)) == 5000


async def test_a_client_comes_back_while_its_change_is_held_back() -> None:
    async with (
        stored("memory", Path()) as store,
        served(store) as service,
        Cutter(service.port) as cutter,
        connected(service, port=cutter.port) as client,
    ):
        engine = (await service.volume()).engine
        opened = (await client.meta.create(ROOT, ROOT_INO, b"open", mode=0o600, exclusive=True)).inode.ino
        async with engine.changes_held():
            changes = [
                asyncio.create_task(client.meta.mkdir(ROOT, ROOT_INO, b"d%d" % number, mode=0o755))
                for number in range(5)
            ]
            while len(engine.held_back) < 5:
                await asyncio.sleep(0.01)
            cutter.cut()
            async with asyncio.timeout(15):
                assert (await client.meta.getattr(opened)).nlink == 1
            assert client.connection.reconnections >= 1
            assert not any(change.done() for change in changes)
        made = await asyncio.gather(*changes)
        page = await client.meta.readdir(ROOT_INO, after=None, limit=100)
        assert {entry.inode.ino for entry in page.entries} == {opened, *(inode.ino for inode in made)}
        await agree(service, client)


async def test_holds_exclude_each_other_and_wait_for_sessions_that_return() -> None:
    async with stored("memory", Path()) as store, served(store) as service, connected(service) as client:
        engine = (await service.volume()).engine
        order: list[str] = []

        async def hold(name: str) -> None:
            async with engine.changes_held() as mine:
                order.append(f"{name} in")
                await engine.run(lambda tx: tx.count("x", 1), hold=mine)
                await asyncio.sleep(0.05)
                order.append(f"{name} out")

        with engine.sessions_awaited():
            first = asyncio.create_task(hold("first"))
            change = asyncio.create_task(client.meta.mkdir(ROOT, ROOT_INO, b"d", mode=0o755))
            await asyncio.sleep(0.1)
            assert order == []
            assert not change.done()
            await engine.begin_session(host="another", pid=1, mountpoint="")
        second = asyncio.create_task(hold("second"))
        await asyncio.gather(first, second, change)
        assert order == ["first in", "first out", "second in", "second out"]
        cancelled = asyncio.create_task(hold("third"))
        await asyncio.sleep(0.01)
        cancelled.cancel()
        await asyncio.gather(cancelled, return_exceptions=True)
        await client.meta.rmdir(ROOT, ROOT_INO, b"d")


async def test_what_was_closed_between_two_sessions_is_open_in_neither() -> None:
    async with (
        stored("memory", Path()) as store,
        served(store, expiry_s=1.5) as service,
        Cutter(service.port) as cutter,
        connected(service, port=cutter.port) as client,
        connected(service) as other,
    ):
        inos = [
            (await client.meta.create(ROOT, ROOT_INO, b"f%d" % n, mode=0o600, exclusive=True)).inode.ino
            for n in range(3)
        ]
        first = client.connection.session_id
        cutter.open.clear()
        volume = await service.volume()
        async with asyncio.timeout(20):
            while first in volume.sessions:
                await other.meta.getattr(inos[0])
                await asyncio.sleep(0.05)
        await client.meta.release(inos[0])
        await asyncio.sleep(0.1)
        writing = asyncio.create_task(client.meta.reserve(inos[1], end=1000))
        await asyncio.sleep(0.1)
        cutter.cut()
        cutter.open.set()
        await client.meta.release(inos[2])
        # Asked while no session stood: the file is open again before this is asked.
        assert await writing >= 1000
        await agree(service, client)
        assert client.connection.session_id != first
        assert dict(client.connection._opens) == {inos[1]: 1}


async def test_somebody_else_at_the_address_is_waited_out() -> None:
    async def answer(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 503 Service Unavailable\r\n\r\n")
        writer.close()

    async with stored("memory", Path()) as store, served(store) as service, connected(service) as client:
        await service.stop()
        async with await asyncio.start_server(answer, "127.0.0.1", service.port):
            asking = asyncio.create_task(client.meta.getattr(ROOT_INO))
            await asyncio.sleep(0.5)
            assert not asking.done()
        await service.start()
        assert (await asking).is_dir


async def test_what_a_client_that_is_gone_had_asked_for_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    began, ended = asyncio.Event(), asyncio.Event()

    async def problems(*_: Any) -> Any:
        began.set()
        try:
            await asyncio.sleep(60)
        finally:
            ended.set()
        yield

    monkeypatch.setattr("metasvc.server.service.problems", problems)
    async with stored("memory", Path()) as store, served(store) as service, connected(service) as client:

        async def check() -> None:
            async for _ in client.admin.check(repair=False):
                pass

        checking = asyncio.create_task(check())
        await began.wait()
        checking.cancel()
        async with asyncio.timeout(20):
            await ended.wait()


async def test_a_name_s_former_inode_in_the_trash_is_not_opened_but_one_that_is_open_is() -> None:
    async with stored("memory", Path()) as store, served(store) as service, connected(service) as client:
        made = (await client.meta.create(ROOT, ROOT_INO, b"f", mode=0o600, exclusive=True)).inode.ino
        async with connected(service) as other:
            await other.meta.unlink(ROOT, ROOT_INO, b"f")
            with pytest.raises(FsError) as refusal:
                await other.meta.open(made)
            assert refusal.value.errno == errno.ENOENT
        assert (await client.meta.open(made)).inode.ino == made


async def test_a_change_that_nobody_waits_for_any_more_leaves_nothing_known() -> None:
    async with stored("memory", Path()) as store, served(store) as service, connected(service) as client:
        directory = (await client.meta.mkdir(ROOT, ROOT_INO, b"d", mode=0o755)).ino
        await client.meta.mknod(ROOT, directory, b"f", mode=0o100644)
        volume = await service.volume()
        async with volume.engine.changes_held():
            before = await client.meta.getattr(directory)
            changing = asyncio.create_task(client.meta.setattr(ROOT, directory, SetAttr(mode=0o700)))
            await asyncio.sleep(0.01)
            changing.cancel()
            await asyncio.gather(changing, return_exceptions=True)
        async with asyncio.timeout(20):
            # Applied all the same: what was remembered of the directory would say otherwise for a moment.
            while client.connection._pending:
                await asyncio.sleep(0.001)
        assert before.mode & 0o777 == 0o755
        assert (await client.meta.getattr(directory)).mode & 0o777 == 0o700


@pytest.mark.parametrize("host", ["a..b", "x" * 300, "192.0.2.1.example.invalid"])
async def test_a_host_that_cannot_be_one_is_told_as_any_that_is_not_there(host: str) -> None:
    with pytest.raises(ServiceUnavailable):
        await Endpoint([Server(host, 1)], "token", is_plain_allowed=True).ask(pb.Opening.LIST_VOLUMES, b"")
