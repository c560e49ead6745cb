"""Listing in pages while names come and go: what was scanned becomes known as a whole, and must be right."""

from __future__ import annotations

import asyncio
import errno as E
import random
import stat

import pytest

from metasvc.engine.memory import ROW_COST_BYTES, Rows
from metasvc.engine.memory_budget import MemoryBudget
from metasvc.errors import FsError
from metasvc.model import ROOT_INO, Dentry, Ino, Inode
from metasvc.store import Loaded, VolumeStore
from metasvc.store.memory import MemoryStore
from metasvc.store.tables import CHUNK, DENTRY, INODE, Key, Table
from tests.metasvc.engine.volumes import ROOT, Opened, format_volume, opened
from tests.metasvc.store.faulty import Faults, FaultyStore

NAMES = [b"%03d" % number for number in range(60)]


async def _create(volume: Opened, name: bytes, *, parent: Ino = ROOT_INO) -> Inode:
    """Make an empty file."""
    made = await volume.meta.create(ROOT, parent, name, mode=0o600, exclusive=True)
    await volume.meta.release(made.inode.ino)
    return made.inode


async def _list(volume: Opened, *, limit: int) -> list[bytes]:
    names: list[bytes] = []
    while True:
        page = await volume.meta.readdir(ROOT_INO, after=names[-1] if names else None, limit=limit)
        names += [entry.name for entry in page.entries]
        assert all(entry.inode.nlink == 1 for entry in page.entries)
        if page.end or not page.entries:
            return names


async def _change(volume: Opened, rand: random.Random, mine: list[bytes], there: set[bytes]) -> None:
    """Create and remove names that no other task touches; `there` is what must be there afterwards."""
    for _ in range(80):
        name = rand.choice(mine)
        if name in there:
            await volume.meta.unlink(ROOT, ROOT_INO, name)
            there.discard(name)
        else:
            await _create(volume, name)
            there.add(name)


@pytest.mark.parametrize("seed", range(24))
async def test_a_directory_scanned_page_by_page_while_it_changes_is_known_as_it_is(seed: int) -> None:
    rand = random.Random(seed)
    volume_store = await format_volume(FaultyStore(MemoryStore(), Faults(seed=seed, max_yields=6)))
    there: set[bytes] = set()
    always = NAMES[::3]
    async with opened(volume_store) as volume:
        for name in always:
            await _create(volume, name)
    # Opened again: nothing is in memory, every page comes from the store, slowly. Little memory forgets in between.
    async with opened(volume_store, memory_bytes=rand.choice([5_000, 30_000, 50_000_000])) as volume:
        changing = [name for name in NAMES if name not in always]

        async def list_again_and_again() -> None:
            for _ in range(12):
                # As seekdir(3) and lookups of neighbours do: pages from the middle make no directory complete.
                await volume.meta.readdir(ROOT_INO, after=rand.choice(NAMES), limit=100)
                seen = await _list(volume, limit=rand.choice([2, 3, 7, 100]))
                assert seen == sorted(set(seen))
                assert set(always) <= set(seen), "names that are there all the time are listed"

        async with asyncio.TaskGroup() as group:
            group.create_task(_change(volume, random.Random(seed + 100), changing[::2], there))
            group.create_task(_change(volume, random.Random(seed + 200), changing[1::2], there))
            group.create_task(list_again_and_again())
        assert await _list(volume, limit=7) == sorted({*always, *there})
        for name in NAMES:
            if name in there or name in always:
                await volume.meta.lookup(ROOT_INO, name)
            else:
                with pytest.raises(FsError) as caught:
                    await volume.meta.lookup(ROOT_INO, name)
                assert caught.value.errno == E.ENOENT
    async with opened(volume_store) as volume:
        assert await _list(volume, limit=5) == sorted({*always, *there})


async def test_the_second_listing_needs_no_store_however_many_pages_the_first_had() -> None:
    volume_store = await format_volume(MemoryStore())
    async with opened(volume_store) as volume:
        for name in NAMES:
            await _create(volume, name)
    async with opened(volume_store) as volume:
        assert await _list(volume, limit=7) == NAMES
        rows = volume.engine.rows
        assert rows.group(DENTRY, ROOT_INO) is not None
        loads = rows.loads_total
        assert await _list(volume, limit=7) == NAMES
        assert rows.loads_total == loads


async def test_a_change_that_only_its_pin_remembers_belongs_to_a_directory_that_was_scanned() -> None:
    volume_store = await format_volume(MemoryStore())
    async with opened(volume_store) as volume:
        await _create(volume, b"removed")
        inode = await _create(volume, b"kept")
    rows = Rows(volume_store, budget=MemoryBudget(10 * ROW_COST_BYTES))
    added = Dentry(ROOT_INO, b"added", inode.ino, stat.S_IFREG)
    rows.apply({DENTRY: {(ROOT_INO, b"added"): added, (ROOT_INO, b"removed"): None}}, 1)
    before = rows.evicted_generations_total
    for number in range(100, 130):
        rows.apply({INODE: {Ino(number): inode._replace(ino=Ino(number))}}, 1)
    assert rows.evicted_generations_total >= before + 2, "the directory is not in the cache any more"
    found, end = await rows.scan_dir(ROOT_INO, after=None, limit=10)
    assert end
    assert [dentry.name for dentry, _ in found] == [b"added", b"kept"]
    group = rows.group(DENTRY, ROOT_INO)
    assert group is not None
    assert sorted(group) == [b"added", b"kept"]


@pytest.mark.parametrize("limit", [1, 2, 10])
async def test_a_name_whose_commit_ends_between_two_pages_is_not_forgotten(limit: int) -> None:
    volume_store = await format_volume(MemoryStore())
    async with opened(volume_store) as volume:
        inode = await _create(volume, b"a")
        for name in (b"b", b"c"):
            await _create(volume, name)
    rows = Rows(volume_store, budget=MemoryBudget(10 * ROW_COST_BYTES))
    # The store has "a" and memory has it changed, in a commit under way; the directory was dropped from the cache since.
    changed = Dentry(ROOT_INO, b"a", inode.ino, stat.S_IFREG)
    rows.apply({DENTRY: {(ROOT_INO, b"a"): changed}}, 1)
    for number in range(100, 130):
        rows.apply({INODE: {Ino(number): inode._replace(ino=Ino(number))}}, 2)
    names: list[bytes] = []
    end = False
    while not end:
        found, end = await rows.scan_dir(ROOT_INO, after=names[-1] if names else None, limit=limit)
        names += [dentry.name for dentry, _ in found]
        rows.mark_durable(1, [(DENTRY, (ROOT_INO, b"a"))])
    assert names == [b"a", b"b", b"c"]
    group = rows.group(DENTRY, ROOT_INO)
    assert group is not None
    assert group[b"a"] == changed


async def test_a_page_whose_names_were_all_removed_is_not_the_end() -> None:
    volume_store = await format_volume(MemoryStore())
    async with opened(volume_store) as volume:
        for name in NAMES:
            await _create(volume, name)
    rows = Rows(volume_store, budget=MemoryBudget(50_000_000))
    rows.apply({DENTRY: {(ROOT_INO, name): None for name in NAMES[5:25]}}, 1)
    found, end = await rows.scan_dir(ROOT_INO, after=NAMES[4], limit=10)
    assert [dentry.name for dentry, _ in found] == NAMES[25:35]
    assert not end


async def test_memory_is_bounded_where_nothing_but_reading_is_done() -> None:
    volume_store = await format_volume(MemoryStore())
    async with opened(volume_store) as volume:
        directories = [
            (await volume.meta.mkdir(ROOT, ROOT_INO, b"d%d" % number, mode=0o755)).ino for number in range(20)
        ]
        for directory in directories:
            for name in NAMES:
                await _create(volume, name, parent=directory)
    limit_rows = 400
    async with opened(volume_store, memory_bytes=limit_rows * ROW_COST_BYTES) as volume:
        rows = volume.engine.rows
        for _ in range(3):
            for directory in directories:
                page = await volume.meta.readdir(directory, after=None, limit=100)
                for entry in page.entries:
                    await volume.meta.getattr(entry.inode.ino)
            for directory in directories[::-1]:
                for name in NAMES:
                    await volume.meta.open((await volume.meta.lookup(directory, name)).ino)
                    await volume.meta.release((await volume.meta.lookup(directory, name)).ino)
            cached = sum(len(flat.young) + len(flat.old) for flat in rows._flat.values())
            for grouped in rows._grouped.values():
                cached += sum(len(group.rows) for group in (*grouped.young.values(), *grouped.old.values()))
            # What one operation loads may come on top of each generation.
            assert cached <= limit_rows + 4 * len(NAMES)


class Loads:
    """A volume's store that counts the maps that are read."""

    def __init__(self, inner: VolumeStore) -> None:
        self._inner = inner
        self.maps = 0
        self.trips = 0

    def __getattr__(self, name: str) -> object:
        return getattr(self._inner, name)

    async def load(self, keys: dict[Table, list[Key]], groups: dict[Table, list[int]]) -> Loaded:
        self.maps += len(keys.get(CHUNK, ()))
        self.trips += CHUNK in keys
        return await self._inner.load(keys, groups)


@pytest.mark.parametrize("fits", [True, False])
async def test_opens_at_random_load_neighbours_only_while_these_are_there_when_their_turn_comes(*, fits: bool) -> None:
    volume_store = await format_volume(MemoryStore())
    files: list[tuple[Ino, bytes, bytes]] = []
    async with opened(volume_store) as volume:
        for directory in (b"a", b"b", b"c", b"d"):
            parent = (await volume.meta.mkdir(ROOT, ROOT_INO, directory, mode=0o755)).ino
            for number in range(200):
                name, content = b"%d" % number, bytes([number]) * 1000
                made = await volume.meta.create(ROOT, parent, name, mode=0o600, exclusive=True)
                await volume.write(made.inode.ino, 0, content)
                await volume.meta.release(made.inode.ino)
                files.append((parent, name, content))
    random.Random(3).shuffle(files)
    store = Loads(volume_store)
    # Of what is needed a half is the share of the contents; the other case has a tenth of that.
    needed_bytes = 2 * len(files) * (4 * ROW_COST_BYTES + 4096)
    # The stand-in hands on what it does not count, which mypy cannot see.
    async with opened(store, memory_bytes=needed_bytes if fits else needed_bytes // 10) as volume:  # type: ignore[arg-type]
        for parent, name, content in files:
            ino = (await volume.meta.lookup(parent, name)).ino
            answer = await volume.meta.open(ino)
            assert [found.data for found in answer.map.slices.values()] == [content]
            await volume.meta.release(ino)
        maps, trips = store.maps, store.trips
    if fits:
        assert maps < 2 * len(files)
        assert trips < len(files) / 10
    else:
        # Some neighbours come in vain before it is seen how much there is.
        assert maps < 2 * len(files)
