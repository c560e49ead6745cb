"""A record of what was done to a disk, and the disks that a loss of power may leave of it.

The model is hostile: of a file, what its last sync covered is there, and of every page written since, the old bytes, the new
ones or zeros; of a directory the entries at its last sync and any number of the changes since, in their order, each directory
by itself. A sync covers what had returned before the sync began.
"""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from chunkstore.geometry import Buffer
from chunkstore.images.disk import Disk

PAGE_BYTES = 4096


@dataclass(slots=True)
class File:
    """Hold what a file has, and what of it is durable (None: nothing)."""

    content: bytearray = field(default_factory=bytearray)
    durable: bytes | None = None


Change = tuple[str, File | None]


@dataclass(slots=True)
class Folder:
    """Hold durable entries and the changes since."""

    durable: dict[str, File] = field(default_factory=dict)
    changes: list[Change] = field(default_factory=list)

    def entries(self, count: int | None = None) -> dict[str, File]:
        entries = dict(self.durable)
        for name, file in self.changes[:count]:
            if file is None:
                entries.pop(name, None)
            else:
                entries[name] = file
        return entries


Step = Callable[["LostDisk"], None]


class LostDisk:
    """Play a record up to some point, and be written out as a disk may be after it."""

    def __init__(self) -> None:
        self.folders: dict[str, Folder] = {}
        self.open: dict[int, File] = {}
        self.begun: dict[int, tuple[File, bytes] | tuple[Folder, int]] = {}

    def folder(self, path: str) -> tuple[Folder, str]:
        directory, name = os.path.split(path)
        return self.folders.setdefault(directory, Folder()), name

    def open_file(self, path: str, descriptor: int, *, truncates: bool) -> None:
        folder, name = self.folder(path)
        file = folder.entries().get(name)
        if file is None:
            file = File()
            folder.changes.append((name, file))
        if truncates:
            file.content = bytearray()
        self.open[descriptor] = file

    def duplicate(self, descriptor: int, copy: int) -> None:
        self.open[copy] = self.open[descriptor]

    def write(self, descriptor: int, data: bytes, offset: int) -> None:
        content = self.open[descriptor].content
        if len(content) < offset:
            content += bytes(offset - len(content))
        content[offset : offset + len(data)] = data

    def truncate(self, descriptor: int, size: int) -> None:
        content = self.open[descriptor].content
        del content[size:]
        content += bytes(size - len(content))

    def rename(self, source: str, target: str) -> None:
        folder, name = self.folder(source)
        file = folder.entries()[name]
        folder.changes.append((name, None))
        folder, name = self.folder(target)
        folder.changes.append((name, file))

    def unlink(self, path: str) -> None:
        folder, name = self.folder(path)
        folder.changes.append((name, None))

    def begin_sync(self, number: int, what: int | str) -> None:
        if isinstance(what, int):
            file = self.open[what]
            self.begun[number] = (file, bytes(file.content))
        else:
            folder = self.folders.setdefault(what, Folder())
            self.begun[number] = (folder, len(folder.changes))

    def end_sync(self, number: int) -> None:
        thing, state = self.begun.pop(number)
        if isinstance(thing, File):
            assert isinstance(state, bytes)
            thing.durable = state
        else:
            assert isinstance(state, int)
            # Others may have synced it meanwhile; counting is then on the safe side.
            count = min(state, len(thing.changes))
            thing.durable = thing.entries(count)
            del thing.changes[:count]

    def write_out(self, old_root: str, root: Path, choose: random.Random) -> None:
        """Write one of the disks that may be left."""
        for path, folder in self.folders.items():
            directory = root / os.path.relpath(path, old_root)
            directory.mkdir(parents=True, exist_ok=True)
            for name, file in folder.entries(choose.randint(0, len(folder.changes))).items():
                (directory / name).write_bytes(_left(file, choose))


def _left(file: File, choose: random.Random) -> bytes:
    old, new = file.durable or b"", bytes(file.content)
    if old == new:
        return new
    size = choose.choice([len(old), len(new)])
    pages = []
    for start in range(0, size, PAGE_BYTES):
        before, after = old[start : start + PAGE_BYTES], new[start : start + PAGE_BYTES]
        page = before if before == after else choose.choice([before, after, bytes(PAGE_BYTES)])
        pages.append(page.ljust(PAGE_BYTES, b"\0"))
    return b"".join(pages)[:size]


class RecordingDisk(Disk):
    """Make the calls for real, and record them in the order in which they returned."""

    def __init__(self) -> None:
        self.record: list[Step] = []
        self._lock = threading.Lock()
        self._syncs = 0

    def open(self, path: str, flags: int) -> int:
        # Under the lock, as descriptors are reused and a directory's changes have an order.
        with self._lock:
            descriptor = super().open(path, flags)
            truncates = bool(flags & os.O_TRUNC)
            self.record.append(lambda disk: disk.open_file(path, descriptor, truncates=truncates))
        return descriptor

    def duplicate(self, descriptor: int) -> int:
        with self._lock:
            copy = super().duplicate(descriptor)
            self.record.append(lambda disk: disk.duplicate(descriptor, copy))
        return copy

    def pwrite(self, descriptor: int, data: Buffer, offset: int) -> None:
        kept = bytes(data)
        with self._lock:
            super().pwrite(descriptor, data, offset)
            self.record.append(lambda disk: disk.write(descriptor, kept, offset))

    def truncate(self, descriptor: int, size_bytes: int) -> None:
        with self._lock:
            super().truncate(descriptor, size_bytes)
            self.record.append(lambda disk: disk.truncate(descriptor, size_bytes))

    def punch(self, descriptor: int, offset: int, size_bytes: int) -> None:
        with self._lock:
            super().punch(descriptor, offset, size_bytes)
            self.record.append(lambda disk: disk.write(descriptor, bytes(size_bytes), offset))

    def rename(self, source: str, target: str) -> None:
        with self._lock:
            super().rename(source, target)
            self.record.append(lambda disk: disk.rename(source, target))

    def unlink(self, path: str) -> None:
        with self._lock:
            super().unlink(path)
            self.record.append(lambda disk: disk.unlink(path))

    def datasync(self, descriptor: int) -> None:
        number = self._begin(descriptor)
        super().datasync(descriptor)
        self._end(number)

    def sync_directory(self, path: str) -> None:
        number = self._begin(path)
        super().sync_directory(path)
        self._end(number)

    def _begin(self, what: int | str) -> int:
        with self._lock:
            self._syncs += 1
            number = self._syncs
            self.record.append(lambda disk: disk.begin_sync(number, what))
        return number

    def _end(self, number: int) -> None:
        with self._lock:
            self.record.append(lambda disk: disk.end_sync(number))

    def play(self, count: int) -> LostDisk:
        """Return the disk as it was after so many steps."""
        disk = LostDisk()
        for step in self.record[:count]:
            step(disk)
        return disk
