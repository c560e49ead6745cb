"""One file, changed at random through the vfs, against a bytearray: what fsx does, failures of the bucket included."""

from __future__ import annotations

import asyncio
import os
import random
from pathlib import Path

import pytest

from chunkstore.errors import AtollError
from chunkstore.geometry import KIB
from client.vfs.vfs import FALLOC_KEEP_SIZE, FALLOC_PUNCH_HOLE, FALLOC_ZERO_RANGE, Vfs
from metasvc.model import ROOT_INO, Ino, SetAttr
from tests.client.vfs.volumes import ROOT, Place, VfsVolume
from tests.metasvc.store.kinds import KINDS, new_store_of
from tests.servers.fixtures import Servers

FILE_MAX = 700 * KIB
OPERATIONS = 600


class Mirror:
    """A file of the vfs and the bytes that it must hold."""

    def __init__(self, volume: VfsVolume, rng: random.Random) -> None:
        self.volume = volume
        self.rng = rng
        self.bytes = bytearray()
        self.ino = Ino(0)
        self.fh = 0
        self.log: list[str] = []

    @property
    def vfs(self) -> Vfs:
        return self.volume.vfs

    async def create(self) -> None:
        handle = await self.vfs.create(ROOT, ROOT_INO, b"file", mode=0o644, flags=os.O_RDWR | os.O_EXCL)
        self.ino, self.fh = handle.inode.ino, handle.fh

    def _length(self) -> int:
        return self.rng.choice(
            (1, self.rng.randrange(1, 300), self.rng.randrange(1, 9000), self.rng.randrange(1, 150_000))
        )

    def _range(self) -> tuple[int, int]:
        start = self.rng.randrange(FILE_MAX if self.rng.random() < 0.2 else len(self.bytes) + 1)
        return start, min(FILE_MAX, start + self._length())

    def _cover(self, start: int, data: bytes) -> None:
        if len(self.bytes) < start:
            self.bytes.extend(bytes(start - len(self.bytes)))
        self.bytes[start : start + len(data)] = data

    async def step(self) -> None:
        """Do something at random, to both."""
        names = ["read"] * 6 + ["write"] * 6 + ["append"] * 2 + ["rewrite"] * 3
        names += [
            "truncate",
            "punch",
            "zero",
            "copy",
            "flush",
            "fsync",
            "reopen",
            "seek",
            "background",
            "outage",
            "stat",
        ]
        name = self.rng.choice(names)
        self.log.append(name)
        await getattr(self, f"do_{name}")()

    async def do_read(self) -> None:
        start, end = self._range()
        self.log[-1] += f" {start} {end}"
        assert bytes(await self.vfs.read(self.fh, start, end - start)) == self.bytes[start:end]

    async def do_write(self) -> None:
        start, end = self._range()
        if start == end:
            return
        data = self.rng.randbytes(end - start)
        self.log[-1] += f" {start} {end}"
        if await self._written(start, data):
            self._cover(start, data)

    async def _written(self, start: int | None, data: bytes) -> bool:
        """Write, or fail for a reason that is allowed: while the bucket is away, and memory is at its bound or too much
        waits for commit. Then nothing, or a part, is written, and the test goes on from what the file says.
        """
        try:
            assert await self.vfs.write(self.fh, start, data) == len(data)
        except AtollError:
            assert self.volume.bucket.puts_fail
            before = bytes(self.bytes)
            await self._adopt()
            start = len(before) if start is None else start
            assert len(before) <= len(self.bytes) <= max(len(before), start + len(data))
            for i, byte in enumerate(self.bytes):
                old = before[i] if i < len(before) else 0
                assert byte == old or byte == data[i - start]
            return False
        return True

    async def do_append(self) -> None:
        data = self.rng.randbytes(min(self._length(), FILE_MAX - len(self.bytes)))
        if await self._written(None, data):
            self.bytes += data

    async def do_rewrite(self) -> None:
        """Write again near the last place: what the slice being written may take in place."""
        start = max(0, len(self.bytes) - self.rng.randrange(1, 5000))
        data = self.rng.randbytes(min(self.rng.randrange(1, 8000), FILE_MAX - start))
        self.log[-1] += f" {start} {start + len(data)}"
        if await self._written(start, data):
            self._cover(start, data)

    async def _adopt(self) -> None:
        size = (await self.vfs.getattr(self.ino)).size_bytes
        self.bytes = bytearray(await self.vfs.read(self.fh, 0, size))

    async def do_truncate(self) -> None:
        size = self.rng.randrange(len(self.bytes) + 1) if self.rng.random() < 0.7 else self.rng.randrange(FILE_MAX)
        self.log[-1] += f" {size}"
        inode = await self.vfs.setattr(ROOT, self.ino, SetAttr(size_bytes=size))
        assert inode.size_bytes == size
        if size < len(self.bytes):
            del self.bytes[size:]
        else:
            self.bytes.extend(bytes(size - len(self.bytes)))

    async def do_punch(self) -> None:
        start, end = self._range()
        if start == end or self.volume.bucket.puts_fail:
            return
        self.log[-1] += f" {start} {end}"
        await self.vfs.fallocate(ROOT, self.fh, FALLOC_PUNCH_HOLE | FALLOC_KEEP_SIZE, start, end - start)
        end = min(end, len(self.bytes))
        if start < end:
            self.bytes[start:end] = bytes(end - start)

    async def do_zero(self) -> None:
        start, end = self._range()
        if start == end or self.volume.bucket.puts_fail:
            return
        self.log[-1] += f" {start} {end}"
        await self.vfs.fallocate(ROOT, self.fh, FALLOC_ZERO_RANGE, start, end - start)
        self._cover(start, bytes(end - start))

    async def do_copy(self) -> None:
        start, end = self._range()
        target = self.rng.randrange(FILE_MAX)
        length = min(end, len(self.bytes)) - start
        length = min(length, FILE_MAX - target)
        if length <= 0 or self.volume.bucket.puts_fail:
            return
        self.log[-1] += f" {start} {start + length} {target}"
        if target < start + length and start < target + length:
            with pytest.raises(AtollError):
                await self.vfs.copy_range(ROOT, self.fh, start, self.fh, target, length)
            return
        assert await self.vfs.copy_range(ROOT, self.fh, start, self.fh, target, length) == length
        self._cover(target, bytes(self.bytes[start : start + length]))

    async def do_flush(self) -> None:
        await self._may_fail(self.vfs.flush)

    async def do_fsync(self) -> None:
        await self._may_fail(self.vfs.fsync)

    async def _may_fail(self, flush: object) -> None:
        assert callable(flush)
        try:
            await flush(self.fh)
        except AtollError:
            assert self.volume.bucket.puts_fail
            return
        assert await self.vfs.getxattr(self.ino, b"user.atoll.durability") != b"dirty"

    async def do_reopen(self) -> None:
        await self.vfs.release(self.fh)
        self.fh = (await self.vfs.open(ROOT, self.ino, os.O_RDWR)).fh

    async def do_seek(self) -> None:
        """SEEK_DATA must not skip bytes that are not zero; SEEK_HOLE must find zeros (or the end)."""
        if not self.bytes:
            return
        start = self.rng.randrange(len(self.bytes))
        hole = await self.vfs.lseek(self.fh, start, os.SEEK_HOLE)
        assert start <= hole <= len(self.bytes)
        try:
            data = await self.vfs.lseek(self.fh, start, os.SEEK_DATA)
        except AtollError:
            data = len(self.bytes)
        assert not any(self.bytes[start:data])

    async def do_background(self) -> None:
        self.volume.clock.now_s += self.rng.choice((1.0, 10.0, 100.0))
        await self.vfs.flush_due()

    async def do_outage(self) -> None:
        self.volume.bucket.puts_fail = self.rng.random() < 0.3

    async def do_stat(self) -> None:
        assert (await self.vfs.getattr(self.ino)).size_bytes == len(self.bytes)

    async def check(self) -> None:
        size = (await self.vfs.getattr(self.ino)).size_bytes
        assert size == len(self.bytes)
        assert bytes(await self.vfs.read(self.fh, 0, size + 10)) == self.bytes


@pytest.mark.parametrize(
    ("kind", "run"), [*(("memory", run) for run in range(8)), *((kind, 8) for kind in KINDS if kind != "memory")]
)
def test_a_file_reads_as_it_was_written_whatever_else_happens(
    tmp_path: Path, servers: Servers, seed: int, kind: str, run: int
) -> None:
    rng = random.Random(seed * 1000 + run)

    async def scenario() -> None:
        store = await new_store_of(kind, tmp_path, servers)
        place = Place(tmp_path, store=store)
        log: list[str] = []
        try:
            async with place.opened() as volume:
                mirror = Mirror(volume, rng)
                mirror.log = log
                await mirror.create()
                try:
                    for number in range(OPERATIONS):
                        await mirror.step()
                        if number % 50 == 0:
                            await mirror.check()
                finally:
                    volume.bucket.puts_fail = False
                await mirror.check()
                await volume.vfs.release(mirror.fh)
            async with place.opened(fresh_cache=True) as volume:
                mirror.volume = volume
                mirror.fh = (await volume.vfs.open(ROOT, mirror.ino, os.O_RDWR)).fh
                await mirror.check()
                await volume.vfs.release(mirror.fh)
        except BaseException:
            print("last operations:", *log[-40:], sep="\n  ")  # noqa: T201 - what a failure needs
            raise
        await store.close()

    asyncio.run(scenario())
