"""Absent names that clients answer by lease: quick for who works alone, and never wrong, whoever else adds a name."""

from __future__ import annotations

import asyncio
import errno
import random
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from itertools import count
from typing import Any

import pytest

from client.meta.endpoint import ServiceUnavailable
from metasvc.engine import Engine
from metasvc.engine import leases as leasing
from metasvc.engine.memory import ABSENT
from metasvc.errors import FsError
from metasvc.model import ROOT_INO, Caller, Ino, Inode, RenameFlags, SetAttr
from metasvc.server import connection as serving
from metasvc.server.connection import Connection
from metasvc.server.volumes import SessionEnded
from metasvc.store.memory import MemoryStore
from metasvc.store.tables import DENTRY, INODE
from tests.metasvc.engine.volumes import format_volume
from tests.metasvc.server.served import Client, Cutter, Served, connected, served

ROOT = Caller()
NOTHING = RenameFlags(0)


@asynccontextmanager
async def clients(many: int, **options: Any) -> AsyncIterator[tuple[Served, list[Client], list[Cutter]]]:
    """Serve a volume to some clients, each through a relay of its own."""
    async with AsyncExitStack() as stack:
        service = await stack.enter_async_context(served(await format_volume(MemoryStore()), **options))
        relays = [await stack.enter_async_context(Cutter(service.port)) for _ in range(many)]
        found = [await stack.enter_async_context(connected(service, port=relay.port)) for relay in relays]
        yield service, found, relays


async def make(client: Client, parent: Ino, name: bytes) -> Ino:
    """Make a file and close it."""
    opened = await client.meta.create(ROOT, parent, name, mode=0o644, exclusive=True)
    await client.meta.release(opened.inode.ino)
    return opened.inode.ino


async def is_there(client: Client, parent: Ino, name: bytes) -> bool:
    try:
        await client.meta.lookup(parent, name)
    except FsError as error:
        if error.errno != errno.ENOENT:
            raise
        return False
    return True


async def test_in_a_directory_of_its_own_a_session_asks_for_no_absent_name() -> None:
    async with clients(1) as (_, (one,), _):
        directory = (await one.meta.mkdir(ROOT, ROOT_INO, b"d", mode=0o755)).ino
        before = one.connection.requests
        for number in range(20):
            name = b"%d" % number
            assert not await is_there(one, directory, name + b".new")
            await one.meta.symlink(ROOT, directory, name + b".new", b"somewhere")
            assert not await is_there(one, directory, name)
            await one.meta.rename(ROOT, directory, name + b".new", directory, name, flags=NOTHING)
        assert one.connection.requests - before == 40
        assert await is_there(one, directory, b"0")
        assert one.connection.requests - before == 41


async def test_a_name_is_found_by_the_holder_as_soon_as_who_added_it_was_answered() -> None:
    async with clients(2) as (service, (one, two), _):
        directory = (await one.meta.mkdir(ROOT, ROOT_INO, b"d", mode=0o755)).ino
        assert not await is_there(one, directory, b"n")
        began_s = asyncio.get_running_loop().time()
        await make(two, directory, b"n")
        assert await is_there(one, directory, b"n")
        assert asyncio.get_running_loop().time() - began_s < leasing.TERM_S / 2, "it was asked for, not waited for"
        leases = (await service.volume()).engine.leases
        assert (leases.recalls_total, leases.expired_total, len(leases)) == (1, 0, 0)
        await make(two, directory, b"m")
        assert await is_there(one, directory, b"m")
        assert leases.recalls_total == 1, "from now on both ask"


async def test_a_holder_that_says_nothing_delays_others_until_its_lease_has_run_out_and_then_is_not_wrong() -> None:
    async with clients(2) as (service, (one, two), (relay, _)):
        directory = (await one.meta.mkdir(ROOT, ROOT_INO, b"d", mode=0o755)).ino
        relay.open.clear()
        assert not await is_there(one, directory, b"n"), "by its lease"
        await asyncio.wait_for(make(two, directory, b"n"), 10)
        assert (await service.volume()).engine.leases.expired_total == 1
        looking = asyncio.create_task(is_there(one, directory, b"n"))
        await asyncio.sleep(0.05)
        assert not looking.done(), "it has to ask"
        relay.open.set()
        assert await looking


async def test_after_a_restart_of_the_service_nobody_is_told_of_a_name_that_an_old_lease_denies() -> None:
    async with clients(2, return_s=0.05) as (service, (one, two), (relay, _)):
        directory = (await one.meta.mkdir(ROOT, ROOT_INO, b"d", mode=0o755)).ino
        relay.open.clear()
        await service.stop()
        await service.start()
        assert not await is_there(one, directory, b"n"), "it does not know yet that the service was away"
        making = asyncio.create_task(make(two, directory, b"n"))
        while not making.done():
            await asyncio.sleep(0.01)
            if one.meta._leased.is_absent(directory, b"n"):
                assert not making.done()
        relay.cut()
        relay.open.set()
        assert await is_there(one, directory, b"n")


@pytest.mark.parametrize("how", ["cancelled", "timeout"])
async def test_a_change_that_nobody_waits_for_any_more_is_seen_when_it_comes_into_force(how: str) -> None:
    options: dict[str, Any] = {"timeout_s": 0.5} if how == "timeout" else {}
    async with (
        served(await format_volume(MemoryStore())) as service,
        connected(service, **options) as one,
        connected(service) as two,
    ):
        directory = (await one.meta.mkdir(ROOT, ROOT_INO, b"d", mode=0o755)).ino
        file = await make(one, directory, b"f")
        async with (await service.volume()).engine.changes_held():
            changing = [
                asyncio.create_task(one.meta.symlink(ROOT, directory, b"n", b"x")),
                asyncio.create_task(one.meta.setattr(ROOT, file, SetAttr(mode=0o600))),
            ]
            await asyncio.sleep(0.05)
            if how == "cancelled":
                for task in changing:
                    task.cancel()
            results = await asyncio.gather(*changing, return_exceptions=True)
            expected = asyncio.CancelledError if how == "cancelled" else ServiceUnavailable
            assert [type(result) for result in results] == [expected, expected]
            page = await one.meta.readdir(directory, after=None, limit=100)
            assert [entry.name for entry in page.entries] == [b"f"]
        while not await is_there(two, directory, b"n"):
            await asyncio.sleep(0.01)
        while (await two.meta.getattr(file)).mode & 0o777 != 0o600:
            await asyncio.sleep(0.01)
        await make(one, directory, b"other")  # its lease is extended
        assert await is_there(one, directory, b"n")
        assert (await one.meta.lookup(directory, b"f")).mode & 0o777 == 0o600


async def test_a_file_that_is_being_removed_is_not_opened_by_lease() -> None:
    async with clients(1) as (service, (one,), _):
        directory = (await one.meta.mkdir(ROOT, ROOT_INO, b"d", mode=0o755)).ino
        first, second = [await make(one, directory, name) for name in (b"first", b"second")]
        await known(one, directory, first, second)
        await one.meta.open(first, reading=True)
        removing = asyncio.create_task(one.meta.unlink(ROOT, directory, b"second"))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert not removing.done(), "the service is told what is open in the directory, before the removal is sent"
        await one.meta.open(second, reading=True)
        await removing
        assert (await service.volume()).engine.sessions_holding(second), "what is open is kept"
        assert (await one.meta.getattr(second)).nlink == 0


async def test_listings_are_kept_where_more_directories_are_leased_than_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leasing, "MAX_DIRECTORIES", 20)
    async with clients(2) as (_, (one, two), _):
        inos = [(await two.meta.mkdir(ROOT, ROOT_INO, b"%02d" % number, mode=0o755)).ino for number in range(60)]
        # Each lease that is given takes one away that has run out, which its holder is told in the message with the page.
        for some in (inos[:30], inos[30:]):
            await asyncio.sleep(leasing.TERM_S)
            await asyncio.gather(*(one.meta.readdir(ino, after=None, limit=100) for ino in some))
            assert sum(one.meta._leased._live(ino) is not None for ino in some) == 20


async def test_a_recall_right_behind_the_reply_that_brought_the_lease_is_heeded() -> None:
    async with clients(2) as (_, (one, two), _):
        frames = one.connection._frames
        assert frames is not None
        making = asyncio.create_task(one.meta.mkdir(ROOT, ROOT_INO, b"d", mode=0o755))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        frames.pause()
        directory = await found_by(two, ROOT_INO, b"d")
        adding = asyncio.create_task(make(two, directory, b"n"))
        await asyncio.sleep(0.1)
        assert not making.done()
        assert not adding.done()
        frames.resume()
        await asyncio.wait_for(adding, 0.5)
        await making
        assert await is_there(one, directory, b"n")


async def known(client: Client, directory: Ino, *inos: Ino) -> None:
    """Let a client know a directory and the contents of files there, so that it need not ask when it opens them."""
    await client.meta.readdir(directory, after=None, limit=1000)
    for ino in inos:
        await client.meta.open(ino, reading=True)
    await client.released(*inos)


async def found_by(client: Client, parent: Ino, name: bytes) -> Ino:
    """Wait until a name is there."""
    async with asyncio.timeout(20):
        while not await is_there(client, parent, name):
            await asyncio.sleep(0.001)
    return (await client.meta.lookup(parent, name)).ino


async def test_whoever_comes_while_a_lease_is_called_back_waits_as_well() -> None:
    async with clients(3) as (_, (one, two, three), (relay, _, _)):
        directory = (await one.meta.mkdir(ROOT, ROOT_INO, b"d", mode=0o755)).ino
        relay.open.clear()
        adding = [asyncio.create_task(make(client, directory, name)) for client, name in ((two, b"n"), (three, b"m"))]
        adding[0].cancel()
        while not adding[1].done():
            assert not one.meta._leased.is_absent(directory, b"m") or not adding[1].done()
            await asyncio.sleep(0.01)
        await asyncio.gather(*adding, return_exceptions=True)
        assert not one.meta._leased.is_absent(directory, b"m")


async def test_what_an_administrator_restores_is_found() -> None:
    async with clients(1) as (_, (one,), _):
        directory = (await one.meta.mkdir(ROOT, ROOT_INO, b"d", mode=0o755)).ino
        await make(one, directory, b"n")
        await one.meta.mkdir(ROOT, ROOT_INO, b"e", mode=0o755)
        copy = (await one.meta.lookup(ROOT_INO, b"e")).ino
        assert not await is_there(one, copy, b"d")
        await one.admin.clone(ROOT, directory, copy, b"d")
        assert await is_there(one, copy, b"d")


async def test_small_files_are_opened_again_without_asking_and_what_stays_open_is_told() -> None:
    async with clients(1) as (service, (one,), _):
        directory = (await one.meta.mkdir(ROOT, ROOT_INO, b"d", mode=0o755)).ino
        inos = [await make(one, directory, b"%03d" % number) for number in range(100)]
        await one.released()
        await one.meta.readdir(directory, after=None, limit=1000)
        before = one.connection.messages_sent
        for _ in range(3):
            for ino in inos:
                opened = await one.meta.open(ino, reading=True)
                assert opened.inode.ino == ino
                await one.meta.release(ino)
        assert one.connection.messages_sent - before < 20
        await one.meta.open(inos[0], reading=True)
        engine = (await service.volume()).engine
        async with asyncio.timeout(20):
            while not engine.sessions_holding(inos[0]):
                await asyncio.sleep(0.005)
        await one.meta.unlink(ROOT, directory, b"000")
        assert (await one.meta.read_map(inos[0], start=0, end=10)).refs == []
        await one.released(inos[0])
        with pytest.raises(FsError):
            await one.meta.read_map(inos[0], start=0, end=10)


@pytest.mark.parametrize("by", ["another", "itself"])
async def test_a_file_that_is_open_by_lease_is_kept_when_its_name_goes(by: str) -> None:
    async with clients(2) as (service, (one, two), _):
        directory = (await one.meta.mkdir(ROOT, ROOT_INO, b"d", mode=0o755)).ino
        ino = await make(one, directory, b"n")
        await known(one, directory, ino)
        await one.meta.open(ino, reading=True)
        await one.meta.open(ino, reading=True)
        assert one.meta._opens.local() == [ino]
        await (two if by == "another" else one).meta.unlink(ROOT, directory, b"n")
        engine = (await service.volume()).engine
        assert engine.sessions_holding(ino) == [one.connection.session_id]
        assert (await one.meta.getattr(ino)).nlink == 0
        await one.released(ino)
        assert (await one.meta.getattr(ino)).nlink == 0
        await one.released(ino)
        with pytest.raises(FsError):
            await one.meta.getattr(ino)


async def test_what_is_open_by_lease_when_a_connection_breaks_is_kept_by_the_next_one() -> None:
    async with clients(2) as (service, (one, two), (relay, _)):
        directory = (await one.meta.mkdir(ROOT, ROOT_INO, b"d", mode=0o755)).ino
        inos = [await make(one, directory, name) for name in (b"n", b"m")]
        await known(one, directory, *inos)
        relay.open.clear()
        for ino in inos:
            await one.meta.open(ino, reading=True)
            await asyncio.sleep(0.03)
        removing = [asyncio.create_task(two.meta.unlink(ROOT, directory, name)) for name in (b"n", b"m")]
        await asyncio.sleep(0.05)
        relay.cut()
        relay.open.set()
        await asyncio.gather(*removing)
        assert (await service.volume()).engine.leases.expired_total == 0
        for ino in inos:
            assert (await one.meta.getattr(ino)).nlink == 0
            await one.released(ino)
        async with asyncio.timeout(20):
            for ino in inos:
                while (await one.meta.getattr_many([ino])) != [None]:
                    await asyncio.sleep(0.01)


@pytest.mark.parametrize("trouble", ["none", "short", "cuts", "silence", "pauses", "restarts", "ends", "leaves"])
async def test_what_is_known_by_lease_is_so_at_any_moment(
    trouble: str, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Let three sessions change and read the same directories while connections suffer.

    All run in one process: whatever each knows is compared with the rows of the engine, many times a second.
    """
    monkeypatch.setattr(leasing, "SHARED_S", 0.01)
    if trouble == "short":
        # Those of directories that nobody has changed for a moment run out.
        monkeypatch.setattr(leasing, "TERM_S", 0.1)
        monkeypatch.setattr(serving, "HELD_S", 0.05)
    rand = random.Random(seed)
    async with clients(3, return_s=0.05) as (service, sessions, relays):
        first = await sessions[0].meta.mkdir(ROOT, ROOT_INO, b"first", mode=0o755)
        directories = [first.ino]
        names: list[tuple[Ino, bytes]] = []
        serial = count()
        compared = 0
        loop = asyncio.get_running_loop()
        end_s = loop.time() + 4

        def compare() -> None:
            nonlocal compared
            volume = next(iter(service.volumes or ()), None)
            if volume is None or volume.engine.failure is not None:
                return
            for client in sessions:
                compared += known_is_so(client, volume.engine)

        async def change(client: Client) -> None:
            where = rand.choice(directories[-4:])
            name = b"%d" % next(serial)
            mine = [key for key in names if key[0] in directories[-4:]] or [(first.ino, b"none")]
            parent, old = rand.choice(mine)
            meta = client.meta
            match rand.choice(
                ["make", "mkdir", "rename", "over", "swap", "link", "unlink", "chmod", "cut", *["read"] * 8]
            ):
                case "make":
                    await make(client, where, name)
                case "mkdir":
                    directories.append((await meta.mkdir(ROOT, where, name, mode=0o755)).ino)
                case "rename":
                    await meta.rename(ROOT, parent, old, where, name, flags=NOTHING)
                case "over":
                    await meta.rename(ROOT, parent, old, *rand.choice(mine), flags=NOTHING)
                    return
                case "swap":
                    await meta.rename(ROOT, parent, old, *rand.choice(mine), flags=RenameFlags.EXCHANGE)
                    return
                case "link":
                    await meta.link(ROOT, (await meta.lookup(parent, old)).ino, where, name)
                case "unlink":
                    await meta.unlink(ROOT, parent, old)
                    return
                case "chmod" | "cut" as kind:
                    ino = (await meta.lookup(parent, old)).ino
                    changes = (
                        SetAttr(mode=rand.randrange(512)) if kind == "chmod" else SetAttr(size_bytes=rand.randrange(9))
                    )
                    await meta.setattr(ROOT, ino, changes)
                    return
                case _:
                    await read(client, where, parent, old)
                    return
            names.append((where, name))

        async def read(client: Client, where: Ino, parent: Ino, name: bytes) -> None:
            match rand.randrange(4):
                case 0:
                    limit = rand.choice([1, 2, 5, 1000])
                    page = await client.meta.readdir(where, after=None, limit=limit)
                    while not page.end and rand.random() < 0.9:
                        await asyncio.sleep(0.01 * rand.random())
                        page = await client.meta.readdir(where, after=page.entries[-1].name, limit=limit)
                case 1:
                    await client.meta.getattr(where)
                case _:
                    ino = (await client.meta.lookup(parent, name)).ino
                    await client.meta.open(ino, reading=True)
                    await asyncio.sleep(0.03 * rand.random())
                    await client.meta.release(ino)

        async def work(client: Client) -> None:
            while loop.time() < end_s:
                try:
                    # Who leaves gives up waiting: a program that was interrupted.
                    patience_s = rand.choice([0.0005, 0.001, 0.002, 0.004, 0.02]) if trouble == "leaves" else None
                    async with asyncio.timeout(patience_s):
                        await change(client)
                except TimeoutError:
                    pass
                except FsError as error:
                    # The session may have ended meanwhile; and what was chosen may be gone, or of another kind.
                    if error.errno == errno.EIO and trouble != "ends":
                        raise
                compare()
                if trouble == "short":
                    await asyncio.sleep(0.1 * rand.random())

        async def watch() -> None:
            while True:
                await asyncio.sleep(0.002)
                compare()

        disturbing = [
            asyncio.create_task(disturb(trouble, rand, service, sessions, relays)),
            asyncio.create_task(watch()),
        ]
        try:
            async with asyncio.timeout(60):
                await asyncio.gather(*(work(client) for client in sessions for _ in range(3)))
        finally:
            for each in disturbing:
                each.cancel()
            ended = await asyncio.gather(*disturbing, return_exceptions=True)
            for relay in relays:
                relay.open.set()
        assert [each for each in ended if not isinstance(each, asyncio.CancelledError)] == []
        assert compared > 0


def known_is_so(client: Client, engine: Engine) -> int:
    """Compare what a client knows by lease with the rows; return how much that is."""
    leased, rows, compared = client.meta._leased, engine.rows, 0

    def is_so(known: Inode) -> bool:
        found = rows.get(INODE, known.ino)
        return found is ABSENT or (found is not None and found._replace(child_bytes=0) == known._replace(child_bytes=0))

    for ino, directory in leased._directories.items():
        if leased._live(ino) is None:
            continue
        if directory.inode is not None:
            assert is_so(directory.inode)
        for name, known in directory.names.items():
            if known is not None:
                compared += 1
                dentry = rows.get(DENTRY, (ino, name))
                assert dentry is ABSENT or dentry.ino == known.ino
                assert is_so(known)
        for name, known in directory.entries or ():
            dentry = rows.get(DENTRY, (ino, name))
            assert dentry is ABSENT or dentry.ino == known.ino
            assert is_so(known) or known.nlink > 1
        if directory.is_listed:
            assert [name for name, _ in directory.entries or ()] == sorted(directory.names)
        if directory.is_whole:
            there = rows.group(DENTRY, ino) or {}  # of another owner: not in memory
            assert {name for name, row in there.items() if row is not None} <= directory.names.keys()
    for ino in client.meta._opens.local():
        assert rows.get(INODE, ino) is not None, "what is open is kept"
        compared += 1
    return compared


async def disturb(
    trouble: str, rand: random.Random, service: Served, sessions: list[Client], relays: list[Cutter]
) -> None:
    while True:
        await asyncio.sleep(0.06 * rand.random())
        which = rand.randrange(3)
        relay, connection = relays[which], sessions[which].connection
        if trouble == "cuts":
            relay.cut()
        elif trouble == "silence":
            relay.open.clear()
            await asyncio.sleep(0.5 * rand.random())
            relay.open.set()
        elif trouble == "pauses" and (frames := connection._frames) is not None:
            frames.pause()
            await asyncio.sleep(0.1 * rand.random())
            frames.resume()
        elif trouble == "restarts":
            await asyncio.sleep(0.3 * rand.random())
            relay.open.clear()
            await service.stop()
            await service.start()
            await asyncio.sleep(0.9 * rand.random())
            relay.cut()
            relay.open.set()
            await asyncio.sleep(0.5)
        elif trouble == "ends":
            await asyncio.sleep(0.2)
            volume = await service.volume()
            session = volume.sessions.get(connection.session_id)
            if session is not None and (outlet := session.outlet) is not None:
                relay.open.clear()
                ending = asyncio.create_task(volume.end(session))
                assert isinstance(outlet, Connection)
                outlet.fail(SessionEnded("a test says so"))
                await ending
                await asyncio.sleep(0.3 * rand.random())
                relay.open.set()


@pytest.mark.parametrize("how", ["read on", "looked up", "begun anew"])
async def test_what_was_known_by_a_lease_that_ran_out_does_not_come_back_with_the_next_one(
    monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    monkeypatch.setattr(leasing, "SHARED_S", 0.2)
    async with clients(2) as (service, (one, two), _):
        directory = (await two.meta.mkdir(ROOT, ROOT_INO, b"d", mode=0o755)).ino
        files = [await make(two, directory, b"%03d" % number) for number in range(40)]
        leases = (await service.volume()).engine.leases
        leases.drop(two.connection.session_id)
        page = await one.meta.readdir(directory, after=None, limit=4)
        assert one.meta._leased.lookup(directory, b"001") is not None
        await asyncio.sleep(leasing.TERM_S + 0.1)
        await two.meta.setattr(ROOT, files[1], SetAttr(mode=0o600))
        await asyncio.sleep(0.3)
        if how == "read on":
            await one.meta.readdir(directory, after=page.entries[-1].name, limit=4)
        elif how == "begun anew":
            await one.meta.readdir(directory, after=None, limit=1)
        else:
            for number in range(10, 30):
                await one.meta.lookup(directory, b"%03d" % number)
        assert (await one.meta.lookup(directory, b"001")).mode & 0o777 == 0o600
