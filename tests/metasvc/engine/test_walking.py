"""A walk finds the next directory in memory; what is no walk loads nothing ahead."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from metasvc.engine import Engine, EngineSession, walking
from metasvc.model import ROOT_INO, Dentry, Ino, Inode
from metasvc.store import VolumeStore
from metasvc.store.memory import MemoryStore
from metasvc.store.tables import INODE, Batch
from tests.metasvc.engine.volumes import ROOT, Opened, format_volume, opened


class Scans:
    """A volume's store that notes which directories are scanned."""

    def __init__(self, inner: VolumeStore) -> None:
        self._inner = inner
        self.of: list[int] = []

    def __getattr__(self, name: str) -> object:
        return getattr(self._inner, name)

    async def scan_dir(self, parent: int, *, after: bytes | None, limit: int) -> list[tuple[Dentry, Inode | None]]:
        self.of.append(parent)
        await asyncio.sleep(0)
        return await self._inner.scan_dir(parent, after=after, limit=limit)


async def grown(names: dict[str, int]) -> VolumeStore:
    """Make a volume with these directories, parents first, and so many empty files in each."""
    store = await format_volume(MemoryStore())
    async with opened(store) as volume:
        inos = {"": ROOT_INO}
        for path, files in names.items():
            above, _, name = path.rpartition("/")
            inos[path] = (await volume.meta.mkdir(ROOT, inos[above], name.encode(), mode=0o755)).ino
            for number in range(files):
                await volume.meta.mknod(ROOT, inos[path], b"f%05d" % number, mode=0o100644)
    return store


@asynccontextmanager
async def cold(store: VolumeStore) -> AsyncIterator[tuple[Opened, Scans]]:
    scans = Scans(store)
    # The stand-in hands on what it does not note, which mypy cannot see.
    async with opened(scans) as volume:  # type: ignore[arg-type]
        yield volume, scans
        # Beyond this fsck scans.
        scans.of = []


async def listed(volume: Opened, ino: Ino) -> list[tuple[bytes, Inode]]:
    found: list[tuple[bytes, Inode]] = []
    while True:
        page = await volume.meta.readdir(ino, after=found[-1][0] if found else None, limit=100)
        found += page.entries
        if page.end:
            return found


async def settle() -> None:
    for _ in range(200):
        await asyncio.sleep(0)


TREE = {"a": 3, "a/x": 2, "a/y": 2, "b": 20, "c": 5, "c/z": 1, "d": 4}


@pytest.mark.parametrize("backwards", [False, True])
async def test_a_walk_waits_for_its_first_directories_only(*, backwards: bool) -> None:
    store = await grown(TREE)
    async with cold(store) as (volume, scans):
        waited = 0
        pending, seen = [ROOT_INO], 0
        while pending:
            ino = pending.pop()
            before = len(scans.of)
            entries = await listed(volume, ino)
            waited += len(scans.of) > before and ino in scans.of[before:]
            seen += len(entries)
            await settle()
            below = [inode.ino for _, inode in entries if inode.is_dir]
            pending += below if backwards else below[::-1]
        assert seen == len(TREE) + sum(TREE.values())
        # The root, the first two steps, and one more where the order of the walk is not known yet.
        assert waited <= 4
        assert len(scans.of) == len(set(scans.of)), "nothing was loaded twice"


async def test_listing_directories_that_are_no_walk_loads_nothing_ahead() -> None:
    store = await grown(
        {f"{top}": 0 for top in "abcdefgh"} | {f"{top}/{sub}": 3 for top in "abcdefgh" for sub in "xyz"}
    )
    async with cold(store) as (volume, scans):
        inos = []
        for top in "abcdefgh":
            above = (await volume.meta.lookup(ROOT_INO, top.encode())).ino
            inos += [(await volume.meta.lookup(above, sub)).ino for sub in (b"x", b"y", b"z")]
        random.Random(7).shuffle(inos)
        inos = inos[:6]
        scans.of = []
        for ino in inos:
            if len({*scans.of} | {ino}) <= 6:
                await listed(volume, ino)
                await settle()
        assert set(scans.of) <= set(inos)


async def test_a_directory_that_is_being_loaded_is_waited_for_and_not_loaded_twice() -> None:
    store = await grown({"a": 2, "b": 2, "c": 2, "d": 2})
    async with cold(store) as (volume, scans):
        for name in (b"a", b"b", b"c", b"d"):
            # No turn of the loop between two directories: each is on its way when it is asked for.
            await listed(volume, (await volume.meta.lookup(ROOT_INO, name)).ino)
        below = [ino for ino in scans.of if ino != ROOT_INO]
        assert len(below) == len(set(below)) == 4


@pytest.mark.parametrize(
    ("ahead", "largest", "loaded"), [(100, 100, "cde"), (100, 10, ""), (25, 100, "c"), (1, 100, "c")]
)
async def test_what_is_loaded_ahead_is_bounded(
    ahead: int, largest: int, loaded: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(walking, "AHEAD_ENTRIES", ahead)
    monkeypatch.setattr(walking, "LARGEST_ENTRIES", largest)
    store = await grown({"a": 1, "b": 1, "c": 20, "d": 9, "e": 3})
    async with cold(store) as (volume, scans):
        inos = {name.decode(): inode.ino for name, inode in await listed(volume, ROOT_INO)}
        await listed(volume, inos["a"])
        scans.of = []
        await listed(volume, inos["b"])
        await settle()
        assert [name for name in "cde" if inos[name] in scans.of] == list(loaded)


async def test_a_changed_tree_is_listed_as_it_is_although_it_was_loaded_ahead() -> None:
    store = await grown(TREE)
    async with cold(store) as (volume, _):
        top = await listed(volume, ROOT_INO)
        inos = {name: inode.ino for name, inode in top}
        await listed(volume, inos[b"a"])
        await listed(volume, inos[b"b"])
        # c is on its way.
        await volume.meta.mknod(ROOT, inos[b"c"], b"new", mode=0o100644)
        await volume.meta.unlink(ROOT, inos[b"c"], b"f00001")
        names = [name for name, _ in await listed(volume, inos[b"c"])]
        assert names == [b"f00000", b"f00002", b"f00003", b"f00004", b"new", b"z"]


async def test_the_top_of_a_mounted_tree_is_in_memory_before_it_is_asked_for() -> None:
    store = await grown({"a": 3, "a/x": 2, "b": 4})
    async with cold(store) as (volume, scans):
        session = volume.meta
        assert isinstance(session, EngineSession)
        await session.expect_walk(ROOT_INO)
        await settle()
        assert len(scans.of) == 4
        for ino in list(scans.of):
            await listed(volume, Ino(ino))
        assert len(scans.of) == 4
        # A second time nothing is missing.
        await session.expect_walk(ROOT_INO)
        await settle()
        assert len(scans.of) == 4


async def test_removing_a_tree_sorts_the_parent_s_names_now_and_then_only(monkeypatch: pytest.MonkeyPatch) -> None:
    count = 300
    store = await grown({"top": 0} | {f"top/{number:04d}": 1 for number in range(count)})
    sorts = 0

    def counted(*args: Any, **kwargs: Any) -> list[Any]:
        nonlocal sorts
        sorts += 1
        return sorted(*args, **kwargs)

    monkeypatch.setattr(walking, "sorted", counted, raising=False)
    async with cold(store) as (volume, _):
        top = (await volume.meta.lookup(ROOT_INO, b"top")).ino
        for name, inode in await listed(volume, top):
            for file, _ in await listed(volume, inode.ino):
                await volume.meta.unlink(ROOT, inode.ino, file)
            await volume.meta.rmdir(ROOT, top, name)
        assert await listed(volume, top) == []
    # Sorting for each directory would be 300 times and more.
    assert 0 < sorts < count / 5


async def test_a_loop_of_directories_hangs_nobody() -> None:
    store = await grown({"a": 1, "a/b": 1, "a/b/c": 1})
    async with opened(store) as volume:
        found = await volume.meta.resolve(ROOT_INO, [b"a", b"b", b"c"])
    owner = await store.acquire(nonce="test", address="test", ttl_s=60)
    # Damaged: a says that it lies in c, which lies below it.
    loop = found[0]._replace(parent=found[2].ino)
    await store.commit(owner, owner.last_batch + 1, Batch({INODE: [loop]}, {}))
    await store.release(owner)
    try:
        async with (
            await Engine.open(store, address="test") as engine,
            await EngineSession.begin(engine, host="test", pid=1) as session,
        ):
            for _ in range(3):
                for inode in found:
                    page = await session.readdir(inode.ino, after=None, limit=100)
                    assert page.end
                    await settle()
    finally:
        owner = await store.acquire(nonce="test", address="test", ttl_s=60)
        await store.commit(owner, owner.last_batch + 1, Batch({INODE: [found[0]]}, {}))
        await store.release(owner)
