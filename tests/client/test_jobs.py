"""The background work of a mount: compaction, garbage, trash, and what an earlier mount left staged."""

from __future__ import annotations

import asyncio
import os
import random
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import structlog

from chunkstore.errors import BucketUnavailable
from chunkstore.geometry import CHUNK_BYTES, Buffer, SliceId
from chunkstore.slices import ChunkStore, Durability, SliceInfo
from client.address import EmbeddedAddress
from client.admin.gc import delete_slices
from client.staged import settle_staged
from metasvc.api import MetaClient
from metasvc.jobs.compaction import compact
from metasvc.jobs.schedule import JobRates, Jobs
from metasvc.model import ROOT_INO
from tests.client.cli.commands import done
from tests.client.volumes import Opened, opened

MIB = 1 << 20


@pytest.fixture(scope="module")
def formatted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("formatted") / "volume"
    done("format", path, "--trash-days", "0")
    return path


@pytest.fixture
def directory(tmp_path: Path, formatted: Path) -> Path:
    shutil.copytree(formatted, tmp_path / "volume")
    return tmp_path / "volume"


class Log:
    """Keep what is logged."""

    def __init__(self) -> None:
        self.events: list[tuple[str, str]] = []

    def __getattr__(self, level: str) -> Callable[..., None]:
        return lambda event, **_values: self.events.append((level, event))


def jobs_of(volume: Opened, log: Log, rates: JobRates | None = None) -> Jobs:
    """Return the jobs of a volume as its mount runs them."""

    @asynccontextmanager
    async def writing() -> AsyncIterator[tuple[MetaClient, ChunkStore]]:
        yield volume.meta, volume.chunks

    inner = volume.volume
    return Jobs(inner.admin, lambda: inner.format, partial(delete_slices, inner), writing, log, rates or JobRates())


def on(directory: Path, test: Callable[[Opened], Awaitable[None]], **options: Any) -> None:
    """Run a test on the opened volume; afterwards it must be clean."""

    async def run() -> None:
        async with opened(directory, directory.parent / "cache", **options) as volume:
            await test(volume)
            problems = [problem async for problem in volume.volume.admin.check(repair=False)]
            assert problems == []

    asyncio.run(run())


async def slices_of(volume: Opened) -> set[SliceId]:
    return {row.slice_id for row in await volume.volume.admin.live_slices(after=None, limit=1000)}


# -- compaction -------------------------------------------------------------------------------------------------------------


def test_a_compacted_chunk_reads_the_same_and_is_one_slice(directory: Path, seed: int) -> None:
    rng = random.Random(seed)

    async def test(volume: Opened) -> None:
        ino = await volume.create(b"file")
        model = bytearray(8 * MIB)
        # Inline and block slices, overlaid at random, with holes between them.
        for _ in range(40):
            offset = rng.randrange(6 * MIB)
            data = rng.randbytes(rng.choice([100, 5000, 200_000]))
            await volume.write(ino, offset, data)
            model[offset : offset + len(data)] = data
        before = await volume.meta.getattr(ino)
        expected = bytes(model[: before.size_bytes])
        assert await volume.read(ino) == expected
        assert await compact(volume.meta, volume.volume.admin, volume.chunks, ino=ino, chunk=0)
        assert await volume.read(ino) == expected
        after = await volume.meta.getattr(ino)
        assert (after.size_bytes, after.mtime_ns, after.ctime_ns) == (
            before.size_bytes,
            before.mtime_ns,
            before.ctime_ns,
        )
        assert after.map_version == before.map_version + 1
        assert len(await slices_of(volume)) == 1
        # A second time there is nothing to gain.
        assert not await compact(volume.meta, volume.volume.admin, volume.chunks, ino=ino, chunk=0)

    on(directory, test)


def test_a_chunk_of_small_pieces_becomes_inline(directory: Path) -> None:
    async def test(volume: Opened) -> None:
        ino = await volume.create(b"file")
        for number in range(10):
            await volume.write(ino, 100 * number, bytes([number]) * 100)
        assert await compact(volume.meta, volume.volume.admin, volume.chunks, ino=ino, chunk=0)
        assert await volume.read(ino) == b"".join(bytes([number]) * 100 for number in range(10))
        assert volume.objects() == []

    on(directory, test)


def test_only_the_chunk_that_is_asked_for_is_compacted(directory: Path) -> None:
    async def test(volume: Opened) -> None:
        ino = await volume.create(b"file")
        for offset in (0, 100, CHUNK_BYTES - 50_000, CHUNK_BYTES, CHUNK_BYTES + 100):
            await volume.write(ino, offset, os.urandom(50_000))
        expected = await volume.read(ino)
        assert await compact(volume.meta, volume.volume.admin, volume.chunks, ino=ino, chunk=1)
        assert len(await slices_of(volume)) == 4
        assert await volume.read(ino) == expected

    on(directory, test)


def test_a_writer_that_comes_in_between_wins_and_the_new_slice_becomes_garbage(directory: Path) -> None:
    async def test(volume: Opened) -> None:
        ino = await volume.create(b"file")
        for number in range(4):
            await volume.write(ino, number * MIB, os.urandom(MIB))
        admin = volume.volume.admin
        replace = admin.replace_refs

        async def interrupted(*args: Any, **options: Any) -> bool:
            await volume.write(ino, 100, b"newer")
            return await replace(*args, **options)

        admin.replace_refs = interrupted  # type: ignore[method-assign]
        try:
            assert not await compact(volume.meta, admin, volume.chunks, ino=ino, chunk=0)
        finally:
            admin.replace_refs = replace  # type: ignore[method-assign]
        assert (await volume.read(ino))[100:105] == b"newer"
        jobs = jobs_of(volume, Log())
        objects = len(volume.objects())
        await jobs.collect()
        assert len(volume.objects()) == objects - 1  # 4 MiB in one block

    on(directory, test)


def test_compaction_that_cannot_read_changes_nothing(directory: Path) -> None:
    async def test(volume: Opened) -> None:
        ino = await volume.create(b"file")
        for number in range(3):
            await volume.write(ino, number * MIB, os.urandom(MIB))
        version = (await volume.meta.getattr(ino)).map_version
        read = volume.chunks.read

        async def unreachable(_info: SliceInfo, _start: int, _end: int) -> Buffer:
            raise BucketUnavailable("away")

        volume.chunks.read = unreachable  # type: ignore[assignment,method-assign]
        with pytest.raises(BucketUnavailable):
            await compact(volume.meta, volume.volume.admin, volume.chunks, ino=ino, chunk=0)
        volume.chunks.read = read  # type: ignore[method-assign]
        assert (await volume.meta.getattr(ino)).map_version == version
        assert len(await slices_of(volume)) == 3

    on(directory, test)


# -- the jobs ---------------------------------------------------------------------------------------------------------------


def test_the_jobs_compact_expire_and_collect_until_nothing_is_left(directory: Path) -> None:
    async def test(volume: Opened) -> None:
        ino = await volume.create(b"file")
        for number in range(200):
            await volume.write(ino, number * 50_000, os.urandom(50_000))
        expected = await volume.read(ino)
        gone = await volume.create(b"gone")
        await volume.write(gone, 0, os.urandom(MIB))
        await volume.meta.unlink(volume.caller(0, 0), ROOT_INO, b"gone")
        log = Log()
        rates = JobRates(garbage_s=0.05, trash_s=0.05, compaction_s=0.05, compaction_pause_s=0)
        working = asyncio.create_task(jobs_of(volume, log, rates).run())
        async with asyncio.timeout(60):
            # 200 pieces are 9.5 MiB: three blocks of one slice in the end.
            while len(volume.objects()) != 3:
                await asyncio.sleep(0.05)
        working.cancel()
        await asyncio.gather(working, return_exceptions=True)
        assert await volume.read(ino) == expected
        assert {event for _, event in log.events} == {"chunks compacted", "garbage deleted"}

    on(directory, test)


def test_a_job_that_fails_is_logged_and_tried_again(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("metasvc.jobs.schedule.FAILURE_REST_S", 0.0)

    async def test(volume: Opened) -> None:
        log = Log()
        rates = JobRates(garbage_s=0.01, trash_s=60, compaction_s=60)
        jobs = jobs_of(volume, log, rates)
        failures: list[Exception] = [BucketUnavailable("away"), ValueError("a bug")]
        done_again = asyncio.Event()

        async def delete(_rows: object) -> None:
            if failures:
                raise failures.pop(0)
            done_again.set()

        jobs.delete = delete
        gone = await volume.create(b"gone")
        await volume.write(gone, 0, os.urandom(MIB))
        await volume.meta.unlink(volume.caller(0, 0), ROOT_INO, b"gone")
        working = asyncio.create_task(jobs.run())
        async with asyncio.timeout(30):
            await done_again.wait()
        working.cancel()
        await asyncio.gather(working, return_exceptions=True)
        assert log.events[:2] == [
            ("warning", "a job failed and is tried again"),
            ("exception", "a job failed unexpectedly and is tried again"),
        ]
        assert jobs.states["garbage"].failures == 2

    on(directory, test)


def test_staged_slices_that_were_never_committed_are_given_up(directory: Path) -> None:
    """As after a kill between seal and commit, and between commit and upload."""
    kept: list[bytes] = []

    async def stage(volume: Opened) -> None:
        # Nothing can be uploaded: the bucket is not there.
        assert isinstance(volume.volume.address, EmbeddedAddress)
        Path(volume.volume.address.objects).rename(directory.parent / "away")
        ino = await volume.create(b"file")
        kept.append(os.urandom(MIB))
        await volume.write(ino, 0, kept[0])
        slice_id = SliceId((await volume.meta.allocate_slices(1))[0])
        writer = volume.chunks.writer(slice_id)
        writer.append(os.urandom(MIB))
        await writer.seal()
        assert volume.chunks.pending_bytes == 2 * MIB

    async def recover(volume: Opened) -> None:
        staged = await volume.chunks.recover()
        assert len(staged) == 2
        await settle_staged(
            volume.volume.admin, volume.chunks, dict.fromkeys(staged, MIB), staged, log=structlog.get_logger()
        )
        await volume.chunks.drain(timeout_s=30)
        assert volume.chunks.pending_bytes == 0
        assert len(volume.objects()) == 1
        (row,) = await volume.volume.admin.live_slices(after=None, limit=10)
        inode = await volume.meta.lookup(ROOT_INO, b"file")
        assert await volume.read(inode.ino) == kept[0]
        assert row.length == MIB

    on(directory, stage, durability=Durability.LOCAL)
    (directory.parent / "away").rename(directory / "objects")
    on(directory, recover, durability=Durability.LOCAL)
