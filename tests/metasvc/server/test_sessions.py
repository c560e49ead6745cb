"""A session survives its connections and its service: nothing is lost, nothing is applied twice, nobody sees an error."""

from __future__ import annotations

import asyncio
import errno
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from chunkstore.errors import AtollError
from chunkstore.geometry import SliceId
from client.meta.connection import SessionConnection
from client.meta.endpoint import ServiceUnavailable
from metasvc.api import atoll_pb2 as pb
from metasvc.api.frames import EndedByService, Frames
from metasvc.engine import first_rows
from metasvc.errors import FsError
from metasvc.model import ROOT_INO, Caller, Commit, Ino, RenameFlags, SliceKind, SliceRef, WrittenSlice
from metasvc.server.session import MAX_OUTSTANDING
from metasvc.store import Store
from metasvc.store.memory import MemoryStore
from tests.metasvc.engine.volumes import volume_format
from tests.metasvc.server.served import Client, Cutter, Served, connected, served
from tests.metasvc.store.kinds import KINDS, new_store_of
from tests.servers.fixtures import Servers

ROOT = Caller()


@asynccontextmanager
async def stored(kind: str, directory: Path, servers: Servers | None = None) -> AsyncIterator[Store]:
    store = await new_store_of(kind, directory, servers)
    form = volume_format()
    await store.create_volume(form, first_rows(form))
    try:
        yield store
    finally:
        await store.close()


@asynccontextmanager
async def stored_in_memory() -> AsyncIterator[Store]:
    store = MemoryStore()
    form = volume_format()
    await store.create_volume(form, first_rows(form))
    yield store


async def change_until(
    stop: asyncio.Event, client: Client, name: str, rand: random.Random
) -> tuple[dict[bytes, Ino], int]:
    """Create, link, rename and unlink, one after the other; what must be there then, and how many links the file has."""
    meta = client.meta
    parent = (await meta.mkdir(ROOT, ROOT_INO, name.encode(), mode=0o755)).ino
    there: dict[bytes, Ino] = {}
    first = (await meta.mknod(ROOT, parent, b"first", mode=0o100644)).ino
    there[b"first"] = first
    links = 1
    number = 0
    while not stop.is_set():
        number += 1
        fresh = b"%d" % number
        what = rand.randrange(5)
        if what == 0:
            made = await meta.create(ROOT, parent, fresh, mode=0o600, exclusive=True)
            await meta.release(made.inode.ino)
            there[fresh] = made.inode.ino
        elif what == 1:
            await meta.link(ROOT, first, parent, fresh)
            there[fresh] = first
            links += 1
        elif what == 2:
            await meta.symlink(ROOT, parent, fresh, b"somewhere")
            there[fresh] = Ino(0)
        else:
            old = rand.choice(sorted(there))
            if what == 3:
                await meta.rename(ROOT, parent, old, parent, fresh, flags=RenameFlags.NOREPLACE)
                there[fresh] = there.pop(old)
            elif old != b"first" and len(there) > 1 and (there[old] != first or links > 1):
                await meta.unlink(ROOT, parent, old)
                links -= there.pop(old) == first
    return there, links


async def check(client: Client, name: str, there: dict[bytes, Ino], links: int) -> None:
    parent = (await client.meta.lookup(ROOT_INO, name.encode())).ino
    page = await client.meta.readdir(parent, after=None, limit=5000)
    assert {entry.name for entry in page.entries} == there.keys()
    for entry in page.entries:
        if there[entry.name]:
            assert entry.inode.ino == there[entry.name]
        if entry.inode.nlink > 1:
            assert entry.inode.nlink == links
    assert [problem async for problem in client.admin.check(repair=False)] == []


async def connected_again(*clients: Client, times: int) -> None:
    """Wait until all have noticed so many breaks and are connected again."""
    async with asyncio.timeout(60):
        for client in clients:
            connection = client.connection
            while connection.reconnections < times or not connection.is_connected:
                await asyncio.sleep(0.005)


@pytest.mark.parametrize("kind", KINDS)
async def test_connections_cut_at_random_lose_and_repeat_nothing(
    kind: str, tmp_path: Path, servers: Servers, seed: int
) -> None:
    rand = random.Random(seed)
    async with stored(kind, tmp_path, servers) as store, served(store) as service, Cutter(service.port) as cutter:
        async with connected(service, port=cutter.port) as client:
            stop = asyncio.Event()
            work = [asyncio.create_task(change_until(stop, client, f"d{n}", random.Random(seed + n))) for n in range(4)]
            for number in range(1, 13):
                await asyncio.sleep(rand.choice([0.0, 0.01, 0.1]) * rand.random())
                cutter.cut()
                await connected_again(client, times=number)
            stop.set()
            for number, task in enumerate(work):
                there, links = await task
                await check(client, f"d{number}", there, links)
        assert (await service.volume()).sessions == {}


@pytest.mark.parametrize("kind", KINDS)
async def test_restarts_of_the_service_lose_and_repeat_nothing(
    kind: str, tmp_path: Path, servers: Servers, seed: int
) -> None:
    rand = random.Random(seed)
    async with (
        stored(kind, tmp_path, servers) as store,
        served(store) as service,
        connected(service) as one,
        connected(service) as other,
    ):
        stop = asyncio.Event()
        work = [
            asyncio.create_task(change_until(stop, client, f"d{n}", random.Random(seed + n)))
            for n, client in enumerate((one, other, one, other))
        ]
        for number in range(1, 5):
            await asyncio.sleep(0.2 * rand.random())
            await service.stop()
            await service.start()
            await connected_again(one, other, times=number)
        stop.set()
        for number, task in enumerate(work):
            there, links = await task
            await check(one, f"d{number}", there, links)
        assert one.connection.session_id != other.connection.session_id
        assert (await service.volume()).expired_total == 0


async def test_what_one_has_open_survives_the_restart_although_another_removes_it(tmp_path: Path) -> None:
    async with (
        stored("sqlite", tmp_path) as store,
        served(store, return_s=20.0) as service,
        connected(service) as reader,
        connected(service) as remover,
    ):
        made = await reader.meta.create(ROOT, ROOT_INO, b"file", mode=0o600, exclusive=True)
        ino = made.inode.ino
        await service.stop()
        # The remover comes first, and waits until the reader has said what it has open.
        removal = asyncio.create_task(remover.meta.unlink(ROOT, ROOT_INO, b"file"))
        await service.start()
        await removal
        assert (await reader.meta.getattr(ino)).nlink == 0
        await service.stop()
        await service.start()
        assert (await reader.meta.getattr(ino)).nlink == 0, "sustained through another restart"
        await reader.released(ino)
        with pytest.raises(FsError) as refusal:
            await reader.meta.getattr(ino)
        assert refusal.value.errno == errno.ENOENT


async def test_a_session_that_is_not_heard_of_ends_and_its_client_begins_another() -> None:
    async with stored("memory", Path()) as store, served(store, expiry_s=1.5) as service:
        async with (
            Cutter(service.port) as cutter,
            connected(service, port=cutter.port) as client,
            connected(service) as other,
        ):
            made = await client.meta.create(ROOT, ROOT_INO, b"kept", mode=0o600, exclusive=True)
            gone = await client.meta.create(ROOT, ROOT_INO, b"gone", mode=0o600, exclusive=True)
            ids = await client.meta.allocate_slices(4)
            first = client.connection.session_id
            cutter.open.clear()
            await other.meta.unlink(ROOT, ROOT_INO, b"gone")
            change = asyncio.create_task(client.meta.mkdir(ROOT, ROOT_INO, b"never", mode=0o755))
            volume = await service.volume()
            async with asyncio.timeout(20):
                while first in volume.sessions:
                    await other.meta.getattr(ROOT_INO)
                    await asyncio.sleep(0.05)
            cutter.cut()
            cutter.open.set()
            with pytest.raises(FsError) as refusal:
                await change
            assert refusal.value.errno == errno.EIO
            # Reading goes on, in another session, which has open what still exists.
            assert (await client.meta.getattr(made.inode.ino)).nlink == 1
            assert client.connection.session_id != first
            with pytest.raises(FsError):
                await client.meta.getattr(gone.inode.ino)
            await other.meta.unlink(ROOT, ROOT_INO, b"kept")
            assert (await client.meta.getattr(made.inode.ino)).nlink == 0
            assert not await client.admin.is_pending(SliceId(ids[0]))
        assert [problem async for problem in volume.admin.check(repair=False)] == []


async def test_requests_wait_while_the_service_is_away_and_fail_when_their_time_is_up(tmp_path: Path) -> None:
    async with (
        stored("sqlite", tmp_path) as store,
        served(store) as service,
        connected(service, timeout_s=2.0) as client,
    ):
        await service.stop()
        call = asyncio.create_task(client.meta.getattr(ROOT_INO))
        await asyncio.sleep(0.5)
        assert not call.done()
        with pytest.raises(ServiceUnavailable) as failure:
            await call
        assert failure.value.errno == errno.EIO
        with pytest.raises(ServiceUnavailable):
            await client.meta.getattr(ROOT_INO)
        await service.start()
        async with asyncio.timeout(20):
            while not client.connection.is_connected:
                await asyncio.sleep(0.02)
        assert (await client.meta.getattr(ROOT_INO)).is_dir


async def test_the_reply_to_a_release_goes_with_the_next_one_and_soon_by_itself(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with stored_in_memory() as store, served(store) as service, connected(service) as client:
        connection = client.connection

        async def create_and_release(number: int) -> None:
            made = await client.meta.create(ROOT, ROOT_INO, b"f%d" % number, mode=0o644, exclusive=True)
            await client.meta.release(made.inode.ino)

        await create_and_release(0)
        await client.released()
        with monkeypatch.context() as patch:
            patch.setattr("metasvc.server.connection.WAIT_S", 3600.0)
            before = connection.messages_received
            for number in range(1, 21):
                await create_and_release(number)
            # Of twenty creates and nineteen releases; besides a sign of life, should it take seconds.
            assert connection.messages_received - before < 20 + 5
            await client.meta.getattr(ROOT_INO)
        # The last one went out with something else, or was not heard yet.
        await client.released()
        await create_and_release(21)
        await client.released()


async def test_many_replies_to_releases_do_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("metasvc.server.connection.WAIT_S", 3600.0)
    async with stored_in_memory() as store, served(store) as service, connected(service) as client:
        opened = [
            await client.meta.create(ROOT, ROOT_INO, b"f%d" % number, mode=0o644, exclusive=True)
            for number in range(MAX_OUTSTANDING)
        ]
        for each in opened:
            await client.meta.release(each.inode.ino)
        # The client may ask for more only when it has replies.
        async with asyncio.timeout(30):
            assert (await client.meta.mkdir(ROOT, ROOT_INO, b"d", mode=0o755)).is_dir


async def test_an_open_whose_caller_has_gone_is_released() -> None:
    async with (
        stored("memory", Path()) as store,
        served(store) as service,
        Cutter(service.port) as cutter,
        connected(service, port=cutter.port) as client,
    ):
        ino = (await client.meta.mknod(ROOT, ROOT_INO, b"file", mode=0o100644)).ino
        cutter.open.clear()
        opening = asyncio.create_task(client.meta.open(ino))
        await asyncio.sleep(0.05)
        opening.cancel()
        await asyncio.gather(opening, return_exceptions=True)
        cutter.open.set()
        await client.meta.unlink(ROOT, ROOT_INO, b"file")
        async with asyncio.timeout(20):
            while True:
                try:
                    await client.meta.getattr(ino)
                except FsError:
                    break
        assert not client.connection._opens


async def test_an_open_whose_caller_was_cancelled_while_the_reply_lay_there_is_released() -> None:
    async with stored("memory", Path()) as store, served(store) as service, connected(service) as client:
        ino = (await client.meta.mknod(ROOT, ROOT_INO, b"file", mode=0o100644)).ino
        receive = client.connection._receive

        def received(reply: pb.Reply) -> None:
            receive(reply)
            # The caller has its answer and has not woken yet.
            if reply.opens:
                opening.cancel()

        client.connection._receive = received  # type: ignore[method-assign]
        opening = asyncio.create_task(client.meta.open(ino))
        await asyncio.gather(opening, return_exceptions=True)
        assert opening.cancelled()
        async with asyncio.timeout(20):
            while client.connection._opens:
                await asyncio.sleep(0.01)
        await client.meta.unlink(ROOT, ROOT_INO, b"file")
        with pytest.raises(FsError):
            await client.meta.getattr(ino)


async def test_room_that_was_promised_is_kept_over_a_restart(tmp_path: Path) -> None:
    room = 64 * 1024 * 1024
    async with (
        stored("sqlite", tmp_path) as store,
        served(store) as service,
        connected(service) as writer,
        connected(service) as other,
    ):
        await writer.admin.configure(capacity_bytes=room, max_inodes=None, trash_days=None)
        made = await writer.meta.create(ROOT, ROOT_INO, b"file", mode=0o600, exclusive=True)
        promised = await writer.meta.reserve(made.inode.ino, end=60 * 1024 * 1024)
        greedy = await other.meta.create(ROOT, ROOT_INO, b"greedy", mode=0o600, exclusive=True)
        for _ in range(2):
            with pytest.raises(FsError) as refusal:
                await other.meta.reserve(greedy.inode.ino, end=8 * 1024 * 1024)
            assert refusal.value.errno == errno.ENOSPC
            await service.stop()
            await service.start()
        ids = await writer.meta.allocate_slices(1)
        written = WrittenSlice(
            SliceId(ids[0]), promised, SliceKind.BLOCKS, bytes(16 * -(-promised // writer.meta.format.block_bytes)),
            (SliceRef(0, SliceId(ids[0]), 0, promised),),
        )  # fmt: skip
        change = Commit(slices=(written,), end=promised, size_epoch=made.inode.size_epoch, mtime_ns=1)
        assert (await writer.meta.commit(ROOT, made.inode.ino, change)).size_bytes == promised
        # And who asks for more than there is gets no more than there is.
        hello = writer.connection._promised
        hello[made.inode.ino] = 1 << 40
        await service.stop()
        await service.start()
        with pytest.raises(FsError):
            await writer.meta.reserve(made.inode.ino, end=room + 1)
        await writer.released(made.inode.ino)
        await other.released(greedy.inode.ino)


async def test_fsck_and_a_session_that_returns_wait_for_each_other(tmp_path: Path) -> None:
    async with (
        stored("sqlite", tmp_path) as store,
        served(store, return_s=20.0) as service,
        connected(service) as client,
        connected(service) as other,
    ):
        made = await client.meta.create(ROOT, ROOT_INO, b"file", mode=0o600, exclusive=True)
        await other.meta.unlink(ROOT, ROOT_INO, b"file")
        volume = await service.volume()
        async with volume.engine.changes_held() as hold:
            # Its release is a change, which waits; reading goes on.
            release = asyncio.create_task(client.released(made.inode.ino))
            assert (await other.meta.getattr(made.inode.ino)).nlink == 0
            await volume.engine.run(lambda tx: tx.count("fsck", 1), hold=hold)
            another = asyncio.create_task(anext(aiter(volume.admin.check(repair=True)), None))
            await asyncio.sleep(0.1)
            assert not release.done()
        await release
        assert await another is None
        with pytest.raises(FsError):
            await other.meta.getattr(made.inode.ino)


async def test_a_stored_reply_answers_a_create_that_is_asked_again_and_counts_its_open() -> None:
    async with stored("memory", Path()) as store, served(store) as service, Cutter(service.port) as cutter:
        async with connected(service, port=cutter.port) as client:
            volume = await service.volume()
            # The request arrives; its reply does not.
            session = volume.sessions[client.connection.session_id]
            cutter.open.clear()
            creation = asyncio.create_task(client.meta.create(ROOT, ROOT_INO, b"f", mode=0o600, exclusive=True))
            await asyncio.sleep(0.05)
            async with asyncio.timeout(20):
                # What is under way in the relay still arrives: let the request through, then lose the reply.
                cutter.open.set()
                while session.requests_total == 0:
                    await asyncio.sleep(0)
                cutter.cut()
            made = await creation
            await client.meta.unlink(ROOT, ROOT_INO, b"f")
            assert (await client.meta.getattr(made.inode.ino)).nlink == 0, "it is open, hence sustained"
            await client.released(made.inode.ino)
        assert [problem async for problem in volume.admin.check(repair=False)] == []


async def test_slice_ids_of_another_session_cannot_be_committed() -> None:
    async with (
        stored("memory", Path()) as store,
        served(store) as service,
        connected(service) as one,
        connected(service) as other,
    ):
        ids = await one.meta.allocate_slices(1)
        ino = (await other.meta.mknod(ROOT, ROOT_INO, b"f", mode=0o100644)).ino
        message = pb.Commit(
            caller=pb.Caller(),
            ino=ino,
            end=3,
            slices=[pb.WrittenSlice(slice_id=ids[0], length=3, kind=0, data=b"abc")],
        )
        with pytest.raises(FsError) as refusal:
            await other.connection.call("commit", message)
        assert refusal.value.errno == errno.ESTALE


async def test_closing_while_the_service_is_away_does_not_hang() -> None:
    async with stored("memory", Path()) as store, served(store) as service:
        connection = SessionConnection(service.endpoint(), service.name, host="h", pid=1, mountpoint="", timeout_s=60)
        await connection.open(timeout_s=20)
        await service.stop()
        call = asyncio.create_task(connection.call("getattr", pb.GetAttr(inos=[1], one=True)))
        await asyncio.sleep(0.1)
        async with asyncio.timeout(20):
            await connection.close()
        with pytest.raises(AtollError):
            await call


async def test_a_service_that_is_not_there_is_told_in_time() -> None:
    async with stored("memory", Path()) as store, served(store) as service:
        await service.stop()
        connection = SessionConnection(service.endpoint(), service.name, host="h", pid=1, mountpoint="", timeout_s=60)
        with pytest.raises(ServiceUnavailable, match="not reachable"):
            await connection.open(timeout_s=1.0)


async def test_more_files_than_may_be_asked_for_at_once_are_open_again_in_the_next_session() -> None:
    async with stored("memory", Path()) as store, served(store, expiry_s=1.5) as service:
        async with (
            Cutter(service.port) as cutter,
            connected(service, port=cutter.port) as client,
            connected(service) as other,
        ):
            inos = []
            for number in range(MAX_OUTSTANDING + 50):
                made = await client.meta.create(ROOT, ROOT_INO, b"%d" % number, mode=0o600, exclusive=True)
                inos.append(made.inode.ino)
            first = client.connection.session_id
            cutter.open.clear()
            volume = await service.volume()
            async with asyncio.timeout(20):
                while first in volume.sessions:
                    await other.meta.getattr(ROOT_INO)
                    await asyncio.sleep(0.05)
            cutter.cut()
            cutter.open.set()
            await client.meta.getattr(ROOT_INO)
            async with asyncio.timeout(20):
                while sum(client.connection._opens.values()) < len(inos):
                    await asyncio.sleep(0.01)
            await client.released(*inos)
            assert not client.connection._opens
        assert [problem async for problem in volume.admin.check(repair=False)] == []


async def test_what_an_absent_session_sustains_outlives_the_close_of_another() -> None:
    async with (
        stored("memory", Path()) as store,
        served(store, return_s=0.3) as service,
        Cutter(service.port) as cutter,
        connected(service, port=cutter.port) as absent,
        connected(service) as present,
    ):
        ino = (await absent.meta.create(ROOT, ROOT_INO, b"f", mode=0o600, exclusive=True)).inode.ino
        await present.meta.open(ino)
        await present.meta.unlink(ROOT, ROOT_INO, b"f")
        cutter.open.clear()
        cutter.cut()
        await service.stop()
        await service.start()
        cutter.target = service.port
        await asyncio.sleep(0.5)
        await present.released(ino)
        assert (await present.meta.getattr(ino)).nlink == 0
        cutter.open.set()
        assert (await absent.meta.getattr(ino)).nlink == 0
        await absent.released(ino)
        with pytest.raises(FsError):
            await present.meta.getattr(ino)


async def say_hello(service: Served, client: Client, *, attempt: int) -> Frames:
    """Say what a client would on another stream, with what it has open now."""
    hello = pb.Hello()
    hello.CopyFrom(client.connection._hello)
    hello.attempt = attempt
    frames = await service.endpoint().connect(pb.Opening.SESSION, service.name)
    frames.send(pb.FromClient(hello=hello, confirmed=client.connection._confirmed()).SerializeToString())
    return frames


async def test_a_hello_that_comes_after_a_later_one_takes_nothing_over() -> None:
    async with stored("memory", Path()) as store, served(store) as service, connected(service) as client:
        made = await client.meta.create(ROOT, ROOT_INO, b"file", mode=0o600, exclusive=True)
        await client.meta.unlink(ROOT, ROOT_INO, b"file")
        # It says that nothing is open, which was so when it was sent.
        frames = await say_hello(service, client, attempt=client.connection._hello.attempt)
        with pytest.raises(EndedByService) as ended:
            await frames.read()
        frames.close()
        assert ended.value.reason == pb.Ended.AGAIN
        assert (await client.meta.getattr(made.inode.ino)).nlink == 0, "it is open, hence sustained"
        assert client.connection.reconnections == 0
        await client.released(made.inode.ino)


@pytest.mark.parametrize("attempt", [0, 2])
async def test_the_hello_of_a_later_stream_and_of_a_client_that_does_not_count_take_the_session_over(
    attempt: int,
) -> None:
    async with stored("memory", Path()) as store, served(store) as service, connected(service) as client:
        frames = await say_hello(service, client, attempt=attempt)
        welcome = pb.FromService.FromString(await frames.read()).welcome
        assert welcome.session_id == client.connection.session_id
        frames.close()
        await connected_again(client, times=1)
        if attempt:
            # What the client itself says next is its second stream, too: the test is a stranger to its count.
            client.connection._hello.attempt = attempt
        assert (await client.meta.getattr(ROOT_INO)).is_dir


async def test_streams_that_wait_for_their_turn_go_when_they_end_or_a_later_one_comes() -> None:
    async with stored("memory", Path()) as store, served(store) as service, connected(service) as client:
        session = (await service.volume()).sessions[client.connection.session_id]
        assert service.service is not None
        connections = service.service.connections
        async with asyncio.timeout(20):
            async with session.attaching:
                gone = [await say_hello(service, client, attempt=0) for _ in range(3)]
                overtaken = await say_hello(service, client, attempt=10)
                while len(connections) < 5 or session.attempt < 10:
                    await asyncio.sleep(0.01)
                later = await say_hello(service, client, attempt=11)
                while session.attempt < 11:
                    await asyncio.sleep(0.01)
                for frames in gone:
                    frames.close()
                while len(connections) > 3:
                    await asyncio.sleep(0.01)
            with pytest.raises(EndedByService):
                await overtaken.read()
            assert pb.FromService.FromString(await later.read()).HasField("welcome")
        client.connection._hello.attempt = 11
        overtaken.close()
        later.close()
        assert (await client.meta.getattr(ROOT_INO)).is_dir
