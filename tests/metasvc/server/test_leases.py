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

from metasvc.engine import leases as leasing
from metasvc.errors import FsError
from metasvc.model import ROOT_INO, Caller, Ino, RenameFlags
from metasvc.store.memory import MemoryStore
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
            if one.meta._names.is_absent(directory, b"n"):
                assert not making.done()
        relay.cut()
        relay.open.set()
        assert await is_there(one, directory, b"n")


@pytest.mark.parametrize("by", ["another", "itself"])
async def test_a_name_that_is_added_before_the_maker_of_the_directory_was_answered_is_not_denied(by: str) -> None:
    async with clients(3) as (_, (one, two, silent), (_, _, relay)):
        top = (await silent.meta.mkdir(ROOT, ROOT_INO, b"top", mode=0o755)).ino
        relay.open.clear()
        # It has been made, and its maker waits for the lease on the directory above.
        making = asyncio.create_task(one.meta.mkdir(ROOT, top, b"d", mode=0o755))
        adder = two if by == "another" else one
        while not await is_there(adder, top, b"d"):
            await asyncio.sleep(0.001)
        directory = (await adder.meta.lookup(top, b"d")).ino
        await make(adder, directory, b"n")
        assert not making.done()
        relay.open.set()
        await making
        assert await is_there(one, directory, b"n")


async def test_what_an_administrator_restores_is_found() -> None:
    async with clients(1) as (_, (one,), _):
        directory = (await one.meta.mkdir(ROOT, ROOT_INO, b"d", mode=0o755)).ino
        await make(one, directory, b"n")
        await one.meta.mkdir(ROOT, ROOT_INO, b"e", mode=0o755)
        copy = (await one.meta.lookup(ROOT_INO, b"e")).ino
        assert not await is_there(one, copy, b"d")
        await one.admin.clone(ROOT, directory, copy, b"d")
        assert await is_there(one, copy, b"d")


@pytest.mark.parametrize("trouble", ["none", "cuts", "silence"])
async def test_no_name_is_denied_that_somebody_was_told_of(trouble: str, seed: int) -> None:
    """Let three sessions make, move, remove and look up names in the same directories, while connections suffer."""
    rand = random.Random(seed)
    async with clients(3) as (service, sessions, relays):
        directories: list[Ino] = [(await sessions[0].meta.mkdir(ROOT, ROOT_INO, b"first", mode=0o755)).ino]
        present: dict[tuple[Ino, bytes], int] = {}
        """Names that somebody was told of and nobody has begun to take away, and which life of theirs it is."""
        lives = count()
        serial = 0
        looked = denied = 0

        def fresh() -> bytes:
            nonlocal serial
            serial += 1
            return b"%d" % serial

        async def change(client: Client) -> None:
            where = rand.choice(directories[-6:])
            kind = rand.choice(["make", "make", "mkdir", "rename", "unlink", "look", "look", "look"])
            if kind == "make":
                name = fresh() if rand.random() < 0.7 else b"n%d" % rand.randrange(5)
                if (where, name) not in present:
                    try:
                        await make(client, where, name)
                    except FsError as error:
                        if error.errno != errno.EEXIST:
                            raise
                        return
                    present[where, name] = next(lives)
                return
            if kind == "mkdir":
                directories.append((await client.meta.mkdir(ROOT, where, fresh(), mode=0o755)).ino)
                return
            mine = [key for key in present if key[0] in directories[-6:]]
            if not mine:
                return
            parent, name = rand.choice(mine)
            life = present[parent, name]
            if kind == "look":
                nonlocal looked, denied
                looked += 1
                if not await is_there(client, parent, name):
                    denied += present.get((parent, name)) == life
                return
            del present[parent, name]
            if kind == "unlink":
                await client.meta.unlink(ROOT, parent, name)
            else:
                new = fresh()
                await client.meta.rename(ROOT, parent, name, where, new, flags=NOTHING)
                present[where, new] = next(lives)

        async def work(client: Client) -> None:
            for _ in range(150):
                await change(client)

        async def disturb() -> None:
            while True:
                await asyncio.sleep(0.05 * rand.random())
                relay = rand.choice(relays)
                if trouble == "cuts":
                    relay.cut()
                elif trouble == "silence":
                    relay.open.clear()
                    await asyncio.sleep(0.5 * rand.random())
                    relay.open.set()

        disturbing = asyncio.create_task(disturb())
        try:
            async with asyncio.timeout(240):
                await asyncio.gather(*(work(client) for client in sessions for _ in range(2)))
        finally:
            disturbing.cancel()
            await asyncio.gather(disturbing, return_exceptions=True)
        assert denied == 0
        assert looked > 100
        assert (await service.volume()).engine.leases.recalls_total > 0
