"""A loss of power at any moment of puts and deletes into a directory, played from a record of what the store did.

The model of a disk is a hostile one: of a file that was not synced anything may be left, from nothing over zeros to all; of a
directory the entries as they were at its last sync, plus any number of the changes since, in their order, each directory by
itself. Whoever promises durability must have asked for it.
"""

from __future__ import annotations

import asyncio
import os
import random
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import pytest

from chunkstore.buckets.directory import DirectoryStore, Disk

_KEYS: Final = tuple(f"volume/{n % 3}/{n}.0" for n in range(9))
_TASKS: Final = 6
_CRASHES: Final = 120


@dataclass(slots=True)
class File:
    """Hold what a file has, and what of it is synced (None: nothing)."""

    content: bytes = b""
    synced: bytes | None = None


@dataclass(slots=True)
class Folder:
    """Hold the entries of a directory at its last sync, and the changes since: name and what it names, None for nothing."""

    durable: dict[str, File | Folder] = field(default_factory=dict)
    pending: list[dict[str, File | Folder | None]] = field(default_factory=list)

    def entries(self, changes: int | None = None) -> dict[str, File | Folder]:
        entries = dict(self.durable)
        for change in self.pending[:changes]:
            for name, node in change.items():
                if node is None:
                    entries.pop(name, None)
                else:
                    entries[name] = node
        return entries


class ModelDisk:
    """Play the record and be cut off: a tree as a hostile disk may have it."""

    def __init__(self, root: str) -> None:
        self._root = root
        self._top = Folder()
        self._open: dict[int, File] = {}

    def _split(self, path: str) -> tuple[Folder, str]:
        *parents, name = os.path.relpath(path, self._root).split("/")
        folder = self._top
        for parent in parents:
            found = folder.entries()[parent]
            assert isinstance(found, Folder)
            folder = found
        return folder, name

    def play(self, call: str, *arguments: object) -> None:
        match call, arguments:
            case "create", (str(path), int(number)):
                folder, name = self._split(path)
                folder.pending.append({name: File()})
                made = folder.entries()[name]
                assert isinstance(made, File)
                self._open[number] = made
            case "write", (int(number), bytes(data)):
                self._open[number].content += data
            case "sync_file", (int(number),):
                self._open[number].synced = self._open[number].content
            case "replace", (str(source), str(target)):
                folder, name = self._split(source)
                other, new = self._split(target)
                assert folder is other
                folder.pending.append({new: folder.entries()[name], name: None})
            case "link", (str(source), str(target)):
                folder, name = self._split(source)
                folder.pending.append({os.path.basename(target): folder.entries()[name]})
            case "unlink", (str(path),):
                folder, name = self._split(path)
                folder.pending.append({name: None})
            case "mkdir", (str(path),):
                folder, name = self._split(path)
                folder.pending.append({name: Folder()})
            case "sync_directory", (str(path),):
                folder = self._top
                if path != self._root:
                    parent, name = self._split(path)
                    found = parent.entries()[name]
                    assert isinstance(found, Folder)
                    folder = found
                folder.durable = folder.entries()
                folder.pending = []
            case _:
                raise AssertionError(call)

    def after_loss(self, place: Path, chance: random.Random) -> None:
        """Write what is left into an empty directory."""
        self._write(self._top, place, chance)

    def _write(self, folder: Folder, place: Path, chance: random.Random) -> None:
        for name, node in folder.entries(chance.randint(0, len(folder.pending))).items():
            if isinstance(node, Folder):
                (place / name).mkdir()
                self._write(node, place / name, chance)
            elif node.synced is not None:
                (place / name).write_bytes(node.synced)
            else:
                size = chance.randint(0, len(node.content))
                (place / name).write_bytes(chance.choice([b"", bytes(size), node.content[:size], node.content]))


class RecordingDisk(Disk):
    """Do what the real one does, one call at a time, and write it down."""

    def __init__(self) -> None:
        self.record: list[tuple[object, ...]] = []
        self.lock = threading.Lock()
        self._numbers: dict[int, int] = {}

    def create(self, path: str) -> int:
        with self.lock:
            descriptor = super().create(path)
            self._numbers[descriptor] = len(self.record)
            self.record.append(("create", path, self._numbers[descriptor]))
            return descriptor

    def write(self, descriptor: int, data: memoryview) -> None:
        # In two halves, so that the loss may come between them.
        for half in (data[: len(data) // 2], data[len(data) // 2 :]):
            with self.lock:
                super().write(descriptor, half)
                self.record.append(("write", self._numbers[descriptor], bytes(half)))

    def sync_file(self, descriptor: int) -> None:
        with self.lock:
            super().sync_file(descriptor)
            self.record.append(("sync_file", self._numbers[descriptor]))

    def replace(self, source: str, target: str) -> None:
        with self.lock:
            super().replace(source, target)
            self.record.append(("replace", source, target))

    def link(self, source: str, target: str) -> None:
        with self.lock:
            super().link(source, target)
            self.record.append(("link", source, target))

    def unlink(self, path: str) -> None:
        with self.lock:
            super().unlink(path)
            self.record.append(("unlink", path))

    def mkdir(self, path: str) -> None:
        with self.lock:
            super().mkdir(path)
            self.record.append(("mkdir", path))

    def sync_directory(self, path: str) -> None:
        # What happens between the two is not covered: a sync is played as of its begin, and known only at its end.
        with self.lock:
            super().sync_directory(path)
            self.record.append(("sync_directory", path))

    def note(self, event: str, key: str, content: bytes | None) -> None:
        with self.lock:
            self.record.append((event, key, content))


async def _work(store: DirectoryStore, disk: RecordingDisk, chance: random.Random) -> None:
    """Put and delete from several tasks, each with keys of its own, as blocks have one writer."""

    async def one(task: int) -> None:
        for step in range(8):
            key = chance.choice(_KEYS) + f"-{task}"
            if chance.random() < 0.2:
                disk.note("begin", key, None)
                await store.delete([key])
                disk.note("done", key, None)
            else:
                content = b"%s %d %d " % (key.encode(), task, step) * chance.randint(1, 40)
                disk.note("begin", key, content)
                is_new = chance.random() < 0.3 and key not in [info.key async for info in store.list()]
                await store.put(key, content, if_absent=is_new)
                disk.note("done", key, content)

    async with asyncio.TaskGroup() as group:
        for task in range(_TASKS):
            group.create_task(one(task))


def _allowed(record: list[tuple[object, ...]]) -> Callable[[str, bytes | None], bool]:
    """Return what may be found: for each key what was acknowledged last, or what was begun since."""
    acknowledged: dict[str, bytes | None] = {}
    begun: dict[str, list[bytes | None]] = {}
    for call, *arguments in record:
        if call in ("begin", "done"):
            key, content = arguments
            assert isinstance(key, str)
            assert content is None or isinstance(content, bytes)
            if call == "begin":
                begun.setdefault(key, []).append(content)
            else:
                acknowledged[key], begun[key] = content, []
    return lambda key, content: content == acknowledged.get(key) or content in begun.get(key, [])


def test_what_was_acknowledged_is_there_and_what_is_there_is_whole(tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    root = tmp_path / "bucket"
    root.mkdir()
    disk = RecordingDisk()

    async def fill() -> None:
        store = DirectoryStore(str(root), disk=disk)
        await _work(store, disk, chance)
        await store.close()

    asyncio.run(fill())
    record = disk.record
    keys = {key for call, key, *_ in record if call == "begin" and isinstance(key, str)}
    assert len(keys) > _TASKS

    async def look(place: Path, allowed: Callable[[str, bytes | None], bool]) -> None:
        store = DirectoryStore(str(place))
        found = {info.key: bytes(await store.get(info.key)) async for info in store.list()}
        await store.close()
        assert found.keys() <= keys
        for key in keys:
            assert allowed(key, found.get(key)), (key, found.get(key))

    for number in range(_CRASHES):
        moment = chance.randint(0, len(record))
        model = ModelDisk(str(root))
        for call, *arguments in record[:moment]:
            if call not in ("begin", "done"):
                model.play(str(call), *arguments)
        place = tmp_path / f"after-{number}"
        place.mkdir()
        model.after_loss(place, chance)
        asyncio.run(look(place, _allowed(record[:moment])))


class ForgetfulDisk(RecordingDisk):
    """Skip one kind of sync: the test above must notice, else it shows nothing."""

    def __init__(self, skipped: str) -> None:
        super().__init__()
        self._skipped = skipped

    def sync_file(self, descriptor: int) -> None:
        if self._skipped != "sync_file":
            super().sync_file(descriptor)

    def sync_directory(self, path: str) -> None:
        if self._skipped != "sync_directory":
            super().sync_directory(path)


@pytest.mark.parametrize("skipped", ["sync_file", "sync_directory"])
def test_the_model_notices_a_store_that_does_not_sync(skipped: str, tmp_path: Path, seed: int) -> None:
    root = tmp_path / "bucket"
    root.mkdir()
    disk = ForgetfulDisk(skipped)

    async def fill() -> None:
        store = DirectoryStore(str(root), disk=disk)
        await store.put("a/b", b"acknowledged")
        await store.close()

    asyncio.run(fill())
    results = set()
    for number in range(40):
        model = ModelDisk(str(root))
        for call, *arguments in disk.record:
            model.play(str(call), *arguments)
        place = tmp_path / f"after-{number}"
        place.mkdir()
        model.after_loss(place, random.Random(seed + number))
        path = place / "a/b"
        results.add(path.read_bytes() if path.exists() else None)
    assert results - {b"acknowledged"}
