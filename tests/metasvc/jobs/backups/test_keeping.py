"""Backups of an owner: when one is due, what garbage waits for them, and what becomes of tries that fail or are cut off."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import math
import os
import random
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import structlog
import structlog.testing

from chunkstore.buckets.directory import DirectoryStore
from chunkstore.errors import AtollError, BucketFull, BucketUnavailable
from chunkstore.geometry import KIB
from metasvc.engine.dump import DumpTooSlow, dump
from metasvc.engine.load import load
from metasvc.errors import NotOwner
from metasvc.jobs.backups import BackupPolicy, Backups, Manifest, Shelf, held_from_ns, read_backup
from metasvc.jobs.backups.making import PUTS_AT_ONCE, make_backup
from metasvc.jobs.backups.shelf import part_key
from metasvc.jobs.schedule import JobRates
from metasvc.jobs.served import ServedJobs
from metasvc.model import ROOT_INO, DumpPart
from metasvc.server.volumes import Volume
from tests.chunkstore.stores import FaultyBucket
from tests.metasvc.engine.volumes import ROOT, Opened, format_volume, new_store, opened
from tests.metasvc.jobs.backups.test_shelf import UUID, manifest
from tests.metasvc.jobs.places import FAST, NEVER, Place, write
from tests.metasvc.jobs.places import ROOT as CALLER
from tests.metasvc.server.served import connected

S = 1_000_000_000
HOURLY = BackupPolicy(every_s=3600.0, window_s=86400, clocks_apart_s=900.0)


def nobody_else() -> None:
    """Own it for ever."""


@dataclass
class Bench:
    """A volume, its bucket with faults, and the backups of its owner."""

    volume: Opened
    faults: FaultyBucket
    now_ns: int = field(default_factory=time.time_ns)
    now_s: float = 1000.0
    policy: BackupPolicy | None = HOURLY
    check_owned: Callable[[], None] = nobody_else
    dump: Callable[[], AsyncGenerator[DumpPart, None]] | None = None
    backups: Backups = field(init=False)

    def __post_init__(self) -> None:
        self.renew()

    def renew(self) -> None:
        """Be the next owner."""
        self.backups = Backups(
            self._own_shelf,
            lambda: (self.dump or self.volume.admin.dump)(),
            policy=self.policy,
            check_owned=lambda: self.check_owned(),
            log=structlog.get_logger(),
            clock_ns=lambda: self.now_ns,
            clock_s=lambda: self.now_s,
        )

    @property
    def shelf(self) -> Shelf:
        return Shelf(self.faults, UUID)

    async def _own_shelf(self) -> Shelf:
        return self.shelf

    async def names(self) -> list[str]:
        return [each.name for each in await self.shelf.manifests()]


@contextlib.asynccontextmanager
async def bench(tmp_path: Path, files: int = 30) -> AsyncIterator[Bench]:
    async with opened(await format_volume(await new_store())) as volume:
        for number in range(files):
            await volume.meta.mkdir(ROOT, ROOT_INO, b"%d" % number, mode=0o755)
        directory = DirectoryStore(str(tmp_path))
        yield Bench(volume, FaultyBucket(directory))
        await directory.close()


async def restored(bucket: FaultyBucket, made: Manifest) -> set[bytes]:
    """Return the names in the root of what a backup is loaded as."""
    store = await new_store()
    await load(store, read_backup(bucket, made), tenant="local", name="default", address="test")
    async with opened(await store.open_volume("local", "default")) as volume:
        return {entry.name for entry in (await volume.meta.readdir(ROOT_INO, after=None, limit=1000)).entries}


async def test_a_backup_in_many_parts_is_the_volume(tmp_path: Path) -> None:
    async with bench(tmp_path) as at:
        made = await make_backup(at.shelf, at.volume.admin.dump, window_s=60, check_owned=nobody_else, part_bytes=100)
        assert made.parts > 5
        assert made.inodes == 31
        assert made.size_bytes == sum(
            [len(await at.faults.get(part_key(UUID, made.name, n))) for n in range(made.parts)]
        )
        assert await at.shelf.manifests() == [made]
        assert await restored(at.faults, made) == {b"%d" % number for number in range(30)}


async def test_one_is_made_when_it_is_due_by_whom_owns_the_volume(tmp_path: Path) -> None:
    async with bench(tmp_path) as at:
        assert math.isinf(at.backups.gauges()["backup_age_seconds"])
        # The header has the real time of the dump; the clock of the job follows it.
        at.now_ns = time.time_ns()
        assert await at.backups.back_up() == 1
        assert await at.backups.back_up() == 0
        at.renew()
        assert await at.backups.back_up() == 0, "the next owner knows of it"
        at.now_ns += 3599 * S
        assert await at.backups.back_up() == 0
        assert at.backups.gauges()["backup_age_seconds"] == pytest.approx(3599, abs=60)
        at.now_ns += 60 * S
        assert await at.backups.back_up() == 1


@pytest.mark.parametrize("error", [BucketUnavailable("away"), BucketFull("full")])
async def test_a_try_that_fails_leaves_no_backup_and_the_next_begins_anew(tmp_path: Path, error: AtollError) -> None:
    async with bench(tmp_path) as at:
        at.faults.put_error = error
        with pytest.raises(type(error)):
            await at.backups.back_up()
        assert await at.names() == []
        assert await at.shelf.partial() == []
        assert await at.backups.back_up() == 0, "it rests"
        at.faults.put_error = None
        at.renew()
        assert await at.backups.back_up() == 1
        [made] = await at.shelf.manifests()
        assert len(await restored(at.faults, made)) == 30


async def test_rests_after_failures_grow_to_the_interval(tmp_path: Path) -> None:
    async with bench(tmp_path) as at:
        at.faults.put_error = BucketUnavailable("away")
        for rest_s in (60, 120, 240, 480, 960, 1920, 3600, 3600):
            with pytest.raises(BucketUnavailable):
                await at.backups.back_up()
            at.now_s += rest_s - 1
            assert await at.backups.back_up() == 0
            at.now_s += 1
        at.faults.put_error = None
        assert await at.backups.back_up() == 1


async def test_a_bucket_that_is_too_slow_ends_the_try_and_holds_nobody_back(tmp_path: Path) -> None:
    async with bench(tmp_path) as at:
        at.faults.open_puts.clear()
        slow = asyncio.create_task(
            make_backup(
                at.shelf,
                lambda: dump(at.volume.engine, tapped_bytes=2000, page_rows=2, wide_page_rows=2),
                window_s=60,
                check_owned=nobody_else,
                part_bytes=100,
            )
        )
        await at.faults.until(lambda: at.faults.waiting_puts == PUTS_AT_ONCE)
        for number in range(30):
            await at.volume.meta.mkdir(ROOT, ROOT_INO, b"more%d" % number, mode=0o755)
        assert at.faults.waiting_puts == PUTS_AT_ONCE, "no more than that is on its way"
        at.faults.open_puts.set()
        with pytest.raises(DumpTooSlow):
            await slow
        # Parts that were on their way may have come behind their removal: they go after a day.
        assert await at.names() == []


async def test_a_dump_that_is_cut_off_is_no_backup(tmp_path: Path) -> None:
    async with bench(tmp_path) as at:

        async def short() -> AsyncGenerator[DumpPart, None]:
            parts = [part async for part in at.volume.admin.dump()]
            for part in parts[:-1]:
                yield part

        at.dump = short
        with pytest.raises(AtollError, match="cut off"):
            await at.backups.back_up()
        assert await at.names() == []


async def test_one_who_was_succeeded_puts_no_manifest(tmp_path: Path) -> None:
    async with bench(tmp_path) as at:

        def succeeded() -> None:
            raise NotOwner("somebody else", 1.0)

        at.check_owned = succeeded
        with pytest.raises(NotOwner):
            await at.backups.back_up()
        assert await at.names() == []


async def test_a_bucket_that_takes_too_long_ends_the_try(tmp_path: Path) -> None:
    async with bench(tmp_path) as at:
        at.faults.open_puts.clear()
        with pytest.raises(AtollError, match="too slow"):
            await make_backup(at.shelf, at.volume.admin.dump, window_s=60, check_owned=nobody_else, longest_s=0.2)
        at.faults.open_puts.set()
        assert await at.names() == []


async def test_what_a_killed_writer_left_goes_after_a_day_and_what_is_young_or_whole_stays(tmp_path: Path) -> None:
    async with bench(tmp_path) as at:
        at.now_ns = time.time_ns()
        at.faults.open_puts.clear()
        killed = asyncio.create_task(at.backups.back_up())
        await at.faults.until(lambda: bool(at.faults.puts))
        at.faults.open_puts.set()
        await asyncio.sleep(0)
        killed.cancel()
        await asyncio.gather(killed, return_exceptions=True)
        await at.shelf.put_part("20260101t000000z-00000000", 0, b"old")
        old_s = (at.now_ns - 86401 * S) / S
        os.utime(tmp_path / part_key(UUID, "20260101t000000z-00000000", 0), (old_s, old_s))
        await at.shelf.put_part("20260101t000000z-11111111", 0, b"young")
        at.renew()
        assert await at.backups.back_up() == 1
        left = [name for name, _ in await at.shelf.partial()]
        assert "20260101t000000z-00000000" not in left
        assert "20260101t000000z-11111111" in left
        assert len(await at.names()) == 1


async def test_old_backups_go_by_the_ladder_and_a_failure_of_that_costs_no_backup(tmp_path: Path) -> None:
    async with bench(tmp_path) as at:
        at.now_ns = time.time_ns()
        hour = at.now_ns // (3600 * S) * 3600 * S - 50 * 3600 * S
        for number in range(3):
            name = f"20260101t000000z-0000000{number}"
            await at.shelf.put_part(name, 0, b"x")
            await at.shelf.put_manifest(manifest(name, made_ns=hour + number * 60 * S, parts=1))
        with structlog.testing.capture_logs() as logs:
            assert await at.backups.back_up() == 1
        names = await at.names()
        assert names[0] == "20260101t000000z-00000000"
        assert len(names) == 2
        assert await at.shelf.partial() == []
        assert [entry["event"] for entry in logs] == ["backup made"]


# -- garbage ----------------------------------------------------------------------------------------------------------------


def test_garbage_waits_for_the_oldest_backup_that_promises_it(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(500):
        now_ns = 10**6 * S
        made = [
            dataclasses.replace(manifest("x", made_ns=now_ns - rng.randrange(1000) * S), window_s=rng.randrange(1000))
            for _ in range(rng.randrange(8))
        ]
        goes_on = rng.random() < 0.5
        found = held_from_ns(made, now_ns=now_ns, goes_on=goes_on, clocks_apart_s=10)
        promised = [each.made_ns for each in made if now_ns <= each.made_ns + each.window_s * S]
        if goes_on and not made:
            assert found is not None
            assert found < 0, "all waits for the first one"
        elif not promised and not goes_on:
            assert found is None
        else:
            assert found is not None
            assert all(found <= each - 10 * S for each in promised)
            if goes_on:
                assert found <= max(each.made_ns for each in made) - 10 * S
                assert found == min([*promised, max(each.made_ns for each in made)]) - 10 * S


def blocks(place: Place, volume: Volume) -> int:
    """Count the objects of slices."""
    return sum(1 for path in (place.bucket / volume.format.uuid).rglob("*") if path.is_file())


@contextlib.asynccontextmanager
async def running(jobs: ServedJobs, volume: Volume) -> AsyncIterator[None]:
    task = asyncio.create_task(jobs.run(volume))
    await asyncio.sleep(0)
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_objects_stay_until_the_backups_that_name_them_have_had_their_time(tmp_path: Path) -> None:
    place = Place(tmp_path)
    policy = BackupPolicy(every_s=3600.0, window_s=1, clocks_apart_s=0.1)
    rates = JobRates(garbage_s=0.05, trash_s=3600, compaction_s=3600, packs_s=3600, backups_s=0.05)

    def jobs() -> ServedJobs:
        return ServedJobs(cache_dir=tmp_path / "work", env={}, log=structlog.get_logger(), rates=rates, backup=policy)

    async with (
        place.served(NEVER, trash_days=0.0) as service,
        place.mounted(service, "one") as vfs,
        asyncio.timeout(60),
    ):
        await write(vfs, b"kept", os.urandom(100 * KIB))
        await write(vfs, b"gone", os.urandom(300 * KIB))
        volume = await service.volume()
        store = DirectoryStore(str(place.bucket))
        shelf = Shelf(store, volume.format.uuid)
        async with running(jobs(), volume):
            while not await shelf.manifests():
                await asyncio.sleep(0.02)
            await vfs.unlink(CALLER, ROOT_INO, b"gone")
            # The only backup names it, and is protected as long as it is the newest, however old.
            runs = volume.jobs()["garbage"].runs
            await asyncio.sleep(1.5)
            while volume.jobs()["garbage"].runs < runs + 5:
                await asyncio.sleep(0.02)
            assert blocks(place, volume) == 7
            assert not volume.jobs()["garbage"].failures
        # The next one is made by somebody else; who owns the volume then finds it, and the first one's time is over.
        await make_backup(shelf, volume.admin.dump, window_s=1, check_owned=volume.engine.owner.check)
        async with running(jobs(), volume):
            while blocks(place, volume) != 2:
                await asyncio.sleep(0.02)
            assert volume.gauges()["backups"] >= 1
            assert volume.gauges()["backup_age_seconds"] < 3600
        await store.close()


async def test_where_no_backups_are_made_what_was_promised_is_kept_and_no_more(tmp_path: Path) -> None:
    async with bench(tmp_path) as at:
        assert await at.backups.back_up() == 1
        [made] = await at.shelf.manifests()
        at.policy = None
        at.renew()
        at.now_ns = made.made_ns + 86399 * S
        assert await at.backups.held_from_ns() == made.made_ns - 900 * S
        at.now_ns = made.made_ns + 86401 * S
        assert await at.backups.held_from_ns() is None
        # Another process makes one: it looks now and then.
        made = await make_backup(at.shelf, at.volume.admin.dump, window_s=86400, check_owned=nobody_else)
        at.now_ns = made.kept_until_ns
        gets = at.faults.requests["get"]
        at.now_s += 599
        assert await at.backups.held_from_ns() is None
        at.now_s += 2
        assert await at.backups.held_from_ns() == made.made_ns - 900 * S
        assert at.faults.requests["get"] == gets + 1, "what it has read it does not read again"


async def test_a_list_of_backups_that_cannot_be_read_holds_all_garbage(tmp_path: Path) -> None:
    place = Place(tmp_path)
    async with place.served(NEVER, trash_days=0.0) as service, place.mounted(service, "one") as vfs:
        volume = await service.volume()
        await write(vfs, b"gone", os.urandom(300 * KIB))
        await vfs.unlink(CALLER, ROOT_INO, b"gone")
        damaged = place.bucket / "backups" / "manifests" / volume.format.uuid / "x"
        damaged.parent.mkdir(parents=True)
        damaged.write_bytes(b"no manifest")
        jobs = ServedJobs(cache_dir=tmp_path / "work", env={}, log=structlog.get_logger(), rates=FAST)
        async with running(jobs, volume):
            async with asyncio.timeout(30):
                while (state := volume.jobs().get("garbage")) is None or not state.failures:
                    await asyncio.sleep(0.02)
            assert "remove that object" in state.last_error
        assert blocks(place, volume) == 5
        damaged.unlink()
        jobs = ServedJobs(cache_dir=tmp_path / "work", env={}, log=structlog.get_logger(), rates=FAST)
        async with running(jobs, volume), asyncio.timeout(30):
            while blocks(place, volume):
                await asyncio.sleep(0.02)


async def test_garbage_that_waits_is_told_from_what_nobody_knows(tmp_path: Path) -> None:
    place = Place(tmp_path)
    async with place.served(NEVER, trash_days=0.0) as service, place.mounted(service, "one") as vfs:
        await write(vfs, b"gone", os.urandom(300 * KIB))
        volume = await service.volume()
        [row] = await volume.admin.live_slices(after=None, limit=10)
        async with connected(service) as client:
            assert not await client.admin.is_garbage(row.slice_id)
            await vfs.unlink(CALLER, ROOT_INO, b"gone")
            assert await client.admin.is_garbage(row.slice_id)
            await client.admin.garbage_deleted([row.slice_id])
            assert not await client.admin.is_garbage(row.slice_id)
