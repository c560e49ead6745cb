"""The jobs of a service: what clients leave behind goes from the bucket, and what they have open stays readable."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import structlog
import structlog.testing

from chunkstore.geometry import KIB
from metasvc.engine.accounts import USED_BYTES
from metasvc.jobs.schedule import JobRates
from metasvc.jobs.served import MOUNTPOINT, ServedJobs
from metasvc.model import ROOT_INO
from tests.metasvc.jobs.places import FAST, NEVER, ROOT, Place, read, write
from tests.metasvc.server.served import connected


async def test_what_was_removed_goes_from_the_bucket(tmp_path: Path) -> None:
    place = Place(tmp_path)
    async with place.served(trash_days=0.0) as service, place.mounted(service, "one") as vfs:
        await write(vfs, b"kept", os.urandom(100 * KIB))
        await write(vfs, b"gone", os.urandom(300 * KIB))
        assert place.objects() == 7
        await vfs.unlink(ROOT, ROOT_INO, b"gone")
        await place.until_objects(2)
        async with connected(service) as client:
            assert (await client.admin.status()).counters["job_garbage_done_total"] == 5


async def test_trash_goes_when_its_time_is_up(tmp_path: Path) -> None:
    place = Place(tmp_path)
    async with place.served(trash_days=0.3 / 86400) as service, place.mounted(service, "one") as vfs:
        await write(vfs, b"gone", os.urandom(300 * KIB))
        await vfs.unlink(ROOT, ROOT_INO, b"gone")
        assert place.objects() == 5
        await place.until_objects(0)


async def test_what_is_open_elsewhere_is_readable_until_it_is_closed(tmp_path: Path) -> None:
    place = Place(tmp_path)
    data = os.urandom(300 * KIB)
    async with (
        place.served(trash_days=0.0) as service,
        place.mounted(service, "one") as writer,
        place.mounted(service, "two") as reader,
    ):
        await write(writer, b"file", data)
        inode = await reader.lookup(ROOT_INO, b"file")
        handle = await reader.open(ROOT, inode.ino, os.O_RDONLY)
        await writer.unlink(ROOT, ROOT_INO, b"file")
        await asyncio.sleep(0.5)
        assert await read(reader, handle.fh) == data
        await reader.release(handle.fh)
        await place.until_objects(0)


async def test_chunks_are_compacted_under_readers_that_hold_the_map_of_before(tmp_path: Path) -> None:
    place = Place(tmp_path)
    pieces = [os.urandom(5 * KIB) for _ in range(60)]
    async with (
        place.served(JobRates(garbage_s=3600, trash_s=3600, compaction_s=3600, compaction_pause_s=0)) as service,
        place.mounted(service, "one") as writer,
        place.mounted(service, "two") as reader,
    ):
        await write(writer, b"file", *pieces)
        handle = await reader.open(ROOT, (await reader.lookup(ROOT_INO, b"file")).ino, os.O_RDONLY)
        volume = await service.volume()
        assert place.objects() == 60
        jobs = ServedJobs(cache_dir=tmp_path / "work", env={}, log=structlog.get_logger(), rates=FAST)
        working = asyncio.create_task(jobs.run(volume))
        await place.until_objects(5)
        working.cancel()
        await asyncio.gather(working, return_exceptions=True)
        assert await read(reader, handle.fh) == b"".join(pieces)
        await reader.release(handle.fh)
        assert [session.mountpoint for session in volume.engine.sessions()] == ["/test", "/test"]


async def test_jobs_without_a_bucket_say_so_and_clients_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("metasvc.jobs.schedule.FAILURE_REST_S", 0.1)
    place = Place(tmp_path)
    async with place.served(trash_days=0.0) as service, place.mounted(service, "one") as vfs:
        await write(vfs, b"gone", os.urandom(300 * KIB))
        place.bucket.rename(tmp_path / "away")
        await vfs.unlink(ROOT, ROOT_INO, b"gone")
        volume = await service.volume()
        async with asyncio.timeout(60):
            while not volume.jobs()["garbage"].failures:
                await asyncio.sleep(0.02)
        await vfs.mkdir(ROOT, ROOT_INO, b"works", mode=0o755)
        (tmp_path / "away").rename(place.bucket)
        await place.until_objects(0)


async def test_a_counter_that_is_wrong_is_repaired_and_said(tmp_path: Path) -> None:
    place = Place(tmp_path)
    rates = JobRates(garbage_s=3600, trash_s=3600, counters_first_s=0.05, counters_s=0.05, counters_pause_s=0)
    async with place.served(rates) as service, place.mounted(service, "one") as vfs:
        await write(vfs, b"file", os.urandom(100 * KIB))
        volume = await service.volume()
        with structlog.testing.capture_logs() as logs:
            await volume.engine.run(lambda tx: tx.count(USED_BYTES, 12345))
            async with asyncio.timeout(30):
                while not volume.jobs()["counters"].done:
                    await asyncio.sleep(0.02)
        [said] = [entry for entry in logs if entry["log_level"] == "error"]
        assert (said["counter"], said["found"], said["expected"]) == (USED_BYTES, 100 * KIB + 12345, 100 * KIB)
        assert volume.engine.counter(USED_BYTES) == 100 * KIB
        async with connected(service) as client:
            assert (await client.admin.status()).counters["job_counters_done_total"] == 1


async def test_jobs_that_write_at_the_same_time_do_not_lock_each_other_out(tmp_path: Path) -> None:
    place = Place(tmp_path)
    # Compaction rests after its first chunk for as long as the test lasts; packs are made beside it.
    resting = JobRates(
        garbage_s=3600,
        trash_s=3600,
        compaction_s=0.05,
        compaction_pause_s=3600,
        packs_s=0.05,
        packs_age_s=0,
        packs_pause_s=0,
    )
    pieces = [os.urandom(5 * KIB) for _ in range(60)]
    async with place.served(NEVER) as service, place.mounted(service, "one") as vfs, asyncio.timeout(60):
        volume = await service.volume()

        def writers() -> int:
            return sum(session.mountpoint == MOUNTPOINT for session in volume.engine.sessions())

        async def until(job: str, done: int) -> None:
            while (state := volume.jobs().get(job)) is None or state.done < done:
                await asyncio.sleep(0.02)

        @asynccontextmanager
        async def working(rates: JobRates) -> AsyncIterator[None]:
            jobs = ServedJobs(cache_dir=tmp_path / "work", env={}, log=structlog.get_logger(), rates=rates)
            task = asyncio.create_task(jobs.run(volume))
            await asyncio.sleep(0)
            try:
                yield
            finally:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
            assert not any(state.failures for state in volume.jobs().values())

        await write(vfs, b"one", *pieces)
        await write(vfs, b"two", *pieces)
        async with working(resting):
            while not writers():
                await asyncio.sleep(0.02)
            for number in range(600):
                await write(vfs, b"small%d" % number, os.urandom(2 * KIB))
            await until("packs", 512)
            assert writers() == 1
            assert volume.jobs()["compaction"].runs == 0, "it has the chunk store still"
        assert not writers()
        # Each time that the last one has ended they are closed, and opened when there is work again.
        async with working(FAST):
            await until("compaction", 1)
            for done in (2, 3):
                while writers():
                    await asyncio.sleep(0.02)
                await write(vfs, b"more%d" % done, *pieces)
                await until("compaction", done)
        async with place.mounted(service, "two") as other:
            for name in (b"one", b"two", b"more2", b"more3"):
                handle = await other.open(ROOT, (await other.lookup(ROOT_INO, name)).ino, os.O_RDONLY)
                assert await read(other, handle.fh) == b"".join(pieces)
                await other.release(handle.fh)
