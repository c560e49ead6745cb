"""The engine against a reference tree: random operations, slow stores, tiny memory, deaths in the middle."""

from __future__ import annotations

import asyncio
import errno as E
import random
from collections.abc import Callable
from typing import Any

import pytest

from chunkstore.errors import AtollError
from metasvc.errors import FsError
from metasvc.model import ROOT_INO, Ino, RenameFlags, SetAttr
from metasvc.store import VolumeStore
from metasvc.store.memory import MemoryStore
from tests.metasvc.engine.reference import Node, Reference, Refused
from tests.metasvc.engine.volumes import ROOT, Opened, format_volume, new_store, opened
from tests.metasvc.store.faulty import Faults, FaultyStore

Path = tuple[bytes, ...]
NAMES = [b"a", b"b", b"c", b"d"]
STEPS = 400
OPERATIONS = [
    *("mkdir", "create", "create", "write", "write", "truncate", "punch", "copy"),
    *("unlink", "rmdir", "rename", "rename", "link", "sustain"),
]


class Walker:
    """Does the same random operations to the engine and to the reference, below a top directory."""

    def __init__(self, volume: Opened, reference: Reference, rand: random.Random, top: Path = ()) -> None:
        self.volume = volume
        self.reference = reference
        self.rand = rand
        self.top = top

    def path(self) -> Path:
        depth = self.rand.choice((1, 1, 2, 2, 3))
        return (*self.top, *(self.rand.choice(NAMES) for _ in range(depth)))

    async def ino(self, path: Path) -> Ino:
        found = await self.volume.meta.resolve(ROOT_INO, path)
        return found[-1].ino if found else ROOT_INO

    async def directory(self, path: Path) -> Ino:
        """Return the directory of a path, as the kernel would find it before the operation."""
        ino = await self.ino(path)
        if not (await self.volume.meta.getattr(ino)).is_dir:
            raise FsError(E.ENOTDIR)
        return ino

    async def step(self) -> None:
        operation = self.rand.choice(OPERATIONS)
        arguments = self._arguments(operation)
        expected: int | None = None
        try:
            self._refer(operation, *arguments)
        except Refused as exc:
            expected = exc.errno
        actual: int | None = None
        try:
            await self._engine(operation, *arguments)
        except AtollError as exc:
            if exc.code not in ("posix", "out-of-space"):
                raise
            actual = exc.errno
        assert actual == expected, f"{operation}{arguments}: engine {actual}, reference {expected}"

    def _arguments(self, operation: str) -> tuple[Any, ...]:
        rand = self.rand
        if operation in ("rename", "link"):
            flags = rand.choice([RenameFlags.NONE, RenameFlags.NONE, RenameFlags.NOREPLACE, RenameFlags.EXCHANGE])
            return (self.path(), self.path(), flags)
        if operation == "write":
            return (self.path(), rand.choice([0, 10, 100, 5000, (64 << 20) - 3]), rand.randbytes(rand.randint(1, 50)))
        if operation == "truncate":
            return (self.path(), rand.choice([0, 5, 60, 4096, (64 << 20) + 1]))
        if operation == "punch":
            start = rand.randint(0, 100)
            return (self.path(), start, start + rand.randint(0, 5000))
        if operation == "copy":
            return (self.path(), rand.randint(0, 50), self.path(), rand.randint(0, 200), rand.randint(0, 5000))
        return (self.path(),)

    def _refer(self, operation: str, *arguments: Any) -> None:
        reference = self.reference
        match operation:
            case "mkdir":
                reference.make(arguments[0], directory=True)
            case "create":
                reference.make(arguments[0], directory=False)
            case "link":
                reference.link(arguments[0], arguments[1])
            case "sustain":
                reference.file(arguments[0])
            case _:
                getattr(reference, operation)(*arguments)

    async def _engine(self, operation: str, *arguments: Any) -> None:
        meta, volume = self.volume.meta, self.volume
        path: Path = arguments[0]
        if operation in ("mkdir", "create", "unlink", "rmdir"):
            parent = await self.directory(path[:-1])
            match operation:
                case "mkdir":
                    await meta.mkdir(ROOT, parent, path[-1], mode=0o755)
                case "create":
                    made = await meta.create(ROOT, parent, path[-1], mode=0o644, exclusive=True)
                    await meta.release(made.inode.ino)
                case "unlink":
                    await meta.unlink(ROOT, parent, path[-1])
                case _:
                    await meta.rmdir(ROOT, parent, path[-1])
            return
        if operation == "rename":
            _, new_path, flags = arguments
            parent, new_parent = await self.directory(path[:-1]), await self.ino(new_path[:-1])
            await meta.rename(ROOT, parent, path[-1], new_parent, new_path[-1], flags=flags)
            return
        ino = await self.ino(path)
        match operation:
            case "link":
                await meta.link(ROOT, ino, await self.directory(arguments[1][:-1]), arguments[1][-1])
            case "write":
                await volume.write(ino, arguments[1], arguments[2])
            case "truncate":
                await meta.setattr(ROOT, ino, SetAttr(size_bytes=arguments[1]))
            case "punch":
                await meta.punch(ROOT, ino, start=arguments[1], end=arguments[2])
            case "copy":
                _, start, target, at, length = arguments
                if (await meta.getattr(ino)).is_dir:
                    raise FsError(E.EISDIR)
                await meta.copy_range(ROOT, ino, start, await self.ino(target), at, length)
            case _:
                await self._sustain(ino)

    async def _sustain(self, ino: Ino) -> None:
        """Open a file, lose all its names for a moment, and find it unharmed."""
        inode = await self.volume.meta.getattr(ino)
        if inode.is_dir:
            raise FsError(E.EISDIR)
        await self.volume.meta.open(ino)
        if inode.parent:
            name = b"sustained-%d" % self.rand.randrange(10**9)
            await self.volume.meta.link(ROOT, ino, inode.parent, name)
            await self.volume.meta.unlink(ROOT, inode.parent, name)
        assert (await self.volume.meta.getattr(ino)).size_bytes == inode.size_bytes
        await self.volume.meta.release(ino)


async def compare(volume: Opened, node: Node, ino: Ino) -> None:
    """Hold a whole tree against the reference: names, link counts, contents."""
    names: dict[bytes, Ino] = {}
    after: bytes | None = None
    end = False
    while not end:
        page = await volume.meta.readdir(ino, after=after, limit=3)
        names.update({entry.name: entry.inode.ino for entry in page.entries})
        after = page.entries[-1].name if page.entries else None
        end = page.end
    assert sorted(names) == sorted(node.children())
    for name, child in node.children().items():
        inode = await volume.meta.getattr(names[name])
        assert inode.is_dir == child.is_dir
        if child.is_dir:
            await compare(volume, child, names[name])
        else:
            assert inode.nlink == child.names
            assert await volume.read(names[name]) == bytes(child.content), name


@pytest.mark.parametrize("trash_days", [0.0, 1.0])
@pytest.mark.parametrize("seed", range(6))
async def test_random_operations_leave_the_tree_the_reference_has(seed: int, trash_days: float) -> None:
    rand = random.Random(seed)
    faults = Faults(seed=seed, max_yields=4)
    store = FaultyStore(await new_store(), faults)
    volume_store = await format_volume(store, trash_days=trash_days)
    reference = Reference()
    memory_bytes = rand.choice([20_000, 200_000, 50_000_000])
    async with opened(volume_store, memory_bytes=memory_bytes) as volume:
        walker = Walker(volume, reference, rand)
        for _ in range(STEPS):
            await walker.step()
        await compare(volume, reference.root, ROOT_INO)
    async with opened(volume_store) as volume:  # and from the store alone
        await compare(volume, reference.root, ROOT_INO)


@pytest.mark.parametrize("seed", range(4))
async def test_tasks_at_once_each_find_their_own_tree(seed: int) -> None:
    faults = Faults(seed=seed, max_yields=6)
    volume_store = await format_volume(FaultyStore(await new_store(), faults))
    reference = Reference()
    async with opened(volume_store, memory_bytes=30_000) as volume:

        async def work(number: int) -> None:
            top = (b"task-%d" % number,)
            await volume.meta.mkdir(ROOT, ROOT_INO, top[0], mode=0o755)
            reference.make(top, directory=True)
            walker = Walker(volume, reference, random.Random(seed * 100 + number), top)
            for _ in range(STEPS // 4):
                await walker.step()

        async with asyncio.TaskGroup() as group:
            for number in range(6):
                group.create_task(work(number))
        await compare(volume, reference.root, ROOT_INO)


@pytest.mark.parametrize("seed", range(12))
async def test_what_was_acknowledged_before_the_store_died_is_there_afterwards(seed: int) -> None:
    rand = random.Random(seed)
    faults = Faults(seed=seed, max_yields=3)
    clock = [0.0]

    def clock_s() -> float:
        """Run slowly, and far ahead once the store is dead, so that nobody waits for an expiry."""
        clock[0] += 0.001
        return clock[0] + (1000 if faults.dead else 0)

    inner = MemoryStore(clock=clock_s)
    volume_store = await format_volume(FaultyStore(inner, faults))
    acknowledged: dict[bytes, bytes] = {}
    attempted: dict[bytes, set[bytes]] = {}
    faults.die(nth=rand.randint(5, 150), when=rand.choice(["before", "after"]))
    with pytest.raises((BaseExceptionGroup, AtollError)):
        await _write_until_death(volume_store, clock_s, acknowledged, attempted)
    assert faults.dead
    async with opened(await inner.open_volume("local", "default"), clock_s=clock_s) as volume:
        for name, content in acknowledged.items():
            inode = await volume.meta.lookup(ROOT_INO, name)
            assert await volume.read(inode.ino) in attempted[name], (name, content)


async def _write_until_death(
    store: VolumeStore,
    clock_s: Callable[[], float],
    acknowledged: dict[bytes, bytes],
    attempted: dict[bytes, set[bytes]],
) -> None:
    async with opened(store, clock_s=clock_s) as volume, asyncio.TaskGroup() as group:
        for number in range(4):
            group.create_task(_write_for_ever(volume, number, acknowledged, attempted))


async def _write_for_ever(
    volume: Opened, number: int, acknowledged: dict[bytes, bytes], attempted: dict[bytes, set[bytes]]
) -> None:
    for count in range(100_000):
        name = b"%d-%d" % (number, count)
        made = await volume.meta.create(ROOT, ROOT_INO, name, mode=0o600, exclusive=True)
        content = b"content of " + name
        attempted[name] = {b"", content}
        acknowledged[name] = b""
        await volume.write(made.inode.ino, 0, content)
        attempted[name] = {content}
        acknowledged[name] = content
        await volume.meta.release(made.inode.ino)


@pytest.mark.parametrize("seed", range(4))
async def test_commits_that_fail_or_only_seem_to_are_applied_once(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("metasvc.engine.committer.RETRY_FIRST_S", 0.0)
    faults = Faults(seed=seed, max_yields=2)
    volume_store = await format_volume(FaultyStore(await new_store(), faults))
    reference = Reference()
    faults.chances(before=0.2, after=0.2)
    async with opened(volume_store) as volume:
        walker = Walker(volume, reference, random.Random(seed))
        for _ in range(STEPS // 2):
            await walker.step()
        await compare(volume, reference.root, ROOT_INO)
        faults.chances()


async def test_a_clone_of_a_tree_in_which_a_directory_moves_names_nothing_twice() -> None:
    faults = Faults()
    async with opened(await format_volume(FaultyStore(await new_store(), faults))) as volume:
        meta = volume.meta
        source = await meta.mkdir(ROOT, ROOT_INO, b"source", mode=0o755)
        moved = await meta.mkdir(ROOT, source.ino, b"moved", mode=0o755)
        await meta.mkdir(ROOT, moved.ino, b"below", mode=0o755)
        other = await meta.mkdir(ROOT, source.ino, b"other", mode=0o755)
        second_directory = faults.hold("scan_dir", nth=2)
        cloning = asyncio.create_task(volume.admin.clone(ROOT, source.ino, ROOT_INO, b"clone"))
        await second_directory.reached()
        await meta.rename(ROOT, source.ino, b"moved", other.ino, b"moved", flags=RenameFlags.NONE)
        second_directory.release()
        await cloning
