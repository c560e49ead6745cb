"""Commits on Redis that break off: cut connections, two owners at every point, killed servers and owners.

What is asked each time: is the batch there wholly or not at all, does last_batch() say which, for good, and is nobody else's
change undone.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from chunkstore.geometry import SliceId
from metasvc.errors import Fenced, NotOwner, StoreError
from metasvc.model import Counter, Slice
from metasvc.store import Ownership, VolumeStore
from metasvc.store.redis import ownership as owning
from metasvc.store.redis.rows import _SCAN
from metasvc.store.tables import COUNTER, SLICE, Batch
from tests.metasvc.store.contract import NOTHING, acquire
from tests.metasvc.store.redis_world import RedisWorld
from tests.metasvc.store.rows_of import batch_of, volume_format
from tests.metasvc.store.sqlite_world import Program
from tests.servers.redis import Redis, RedisAt
from tests.servers.redis_proxy import APPLIED, NOT_APPLIED, Fault, RedisProxy

COMMIT = owning._COMMIT._source
SETTLE = owning._SETTLE._source
ACQUIRE = owning._ACQUIRE._source
RENEW = owning._RENEW._source
PUT_FORMAT = owning._REPLACE_FORMAT._source
CUTS = [fault for fault in Fault if fault in APPLIED | NOT_APPLIED]
ROWS = 30


@pytest.fixture
def world(redis: RedisAt) -> RedisWorld:
    return RedisWorld(redis)


@asynccontextmanager
async def far_volume(world: RedisWorld) -> AsyncIterator[tuple[RedisProxy, VolumeStore, Ownership]]:
    """Open a volume through a proxy, take it, and commit batch 1."""
    for source in (COMMIT, SETTLE, ACQUIRE, RENEW, PUT_FORMAT):
        # So that what happens to a script's next run does not happen to a question for it.
        await world.command("SCRIPT", "LOAD", source)
    async with RedisProxy(world.server.port) as proxy, world.running():
        world.port = proxy.port
        volume = await world.volume()
        world.port = None
        owner = await acquire(volume, nonce="far")
        await volume.commit(owner, 1, batch(1))
        yield proxy, volume, owner


def batch(number: int) -> Batch:
    """Return the batch that makes every row say its number, and removes what the batch before added."""
    rows = [Slice(SliceId(n), number, 1, 0, b"%d" % number * 100) for n in range(ROWS)]
    return batch_of(*rows, Counter(f"batch-{number}", number), deletes={COUNTER: [(f"batch-{number - 1}",)]})


async def is_whole(volume: VolumeStore, number: int) -> None:
    """Check that the rows are those that batch `number` leaves."""
    rows = await volume.scan(SLICE, after=None, limit=1000)
    assert rows == [Slice(SliceId(n), number, 1, 0, b"%d" % number * 100) for n in range(ROWS)]
    assert await volume.scan(COUNTER, after=None, limit=1000) == [Counter(f"batch-{number}", number)]


# -- cut connections --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", CUTS, ids=str)
async def test_what_became_of_a_commit_that_was_cut_is_known_afterwards(world: RedisWorld, fault: Fault) -> None:
    async with far_volume(world) as (proxy, volume, owner):
        proxy.plan(COMMIT, fault)
        with pytest.raises(StoreError):
            await volume.commit(owner, 2, batch(2))
        assert proxy.happened == [fault]
        last = await volume.last_batch(owner)
        assert last == (2 if fault in APPLIED else 1)
        await is_whole(volume, last)
        for number in range(last + 1, 5):
            await volume.commit(owner, number, batch(number))
            await is_whole(volume, number)


@pytest.mark.parametrize("fault", CUTS, ids=str)
async def test_a_commit_that_is_repeated_without_asking_is_applied_once(world: RedisWorld, fault: Fault) -> None:
    async with far_volume(world) as (proxy, volume, owner):
        proxy.plan(COMMIT, fault)
        with pytest.raises(StoreError):
            await volume.commit(owner, 2, batch(2))
        if fault in APPLIED:
            with pytest.raises(Fenced, match="batch 2 does not follow the stored batch 2"):
                await volume.commit(owner, 2, batch(2))
        else:
            await volume.commit(owner, 2, batch(2))
        await is_whole(volume, 2)
        await volume.commit(owner, 3, batch(3))


async def test_a_commit_that_arrives_after_its_fate_was_told_is_not_applied(world: RedisWorld) -> None:
    async with far_volume(world) as (proxy, volume, owner):
        proxy.plan(COMMIT, Fault.LATE)
        with pytest.raises(StoreError):
            await volume.commit(owner, 2, batch(2))
        assert await volume.last_batch(owner) == 1
        await proxy.let_go()
        assert await volume.last_batch(owner) == 1
        await is_whole(volume, 1)
        await volume.commit(owner, 2, batch(2))
        await is_whole(volume, 2)


async def test_a_commit_that_arrives_after_it_was_repeated_is_not_applied_again(world: RedisWorld) -> None:
    async with far_volume(world) as (proxy, volume, owner):
        proxy.plan(COMMIT, Fault.LATE)
        with pytest.raises(StoreError):
            await volume.commit(owner, 2, batch(2))
        await volume.commit(owner, 2, batch(2))
        await volume.commit(owner, 3, batch(3))
        await proxy.let_go()
        await is_whole(volume, 3)
        assert await volume.last_batch(owner) == 3


async def test_a_commit_that_arrives_after_a_takeover_is_not_applied(world: RedisWorld) -> None:
    async with far_volume(world) as (proxy, volume, owner):
        successor = await world.volume()
        proxy.plan(COMMIT, Fault.LATE)
        with pytest.raises(StoreError):
            await volume.commit(owner, 2, batch(2))
        await world.lapse()
        new = await acquire(successor, nonce="successor")
        assert new.last_batch == 1
        await proxy.let_go()
        await is_whole(successor, 1)
        await successor.commit(new, 2, batch_of(Counter("successor", 2)))
        with pytest.raises(Fenced):
            await volume.last_batch(owner)
        assert await successor.last_batch(new) == 2


async def test_a_question_that_arrives_late_does_not_stop_the_owner(world: RedisWorld) -> None:
    async with far_volume(world) as (proxy, volume, owner):
        proxy.plan(COMMIT, Fault.NOT_SENT)
        proxy.plan(SETTLE, Fault.LATE)
        with pytest.raises(StoreError):
            await volume.commit(owner, 2, batch(2))
        assert await volume.last_batch(owner) == 1  # asked again on another connection
        assert proxy.happened == [Fault.NOT_SENT, Fault.LATE]
        await volume.commit(owner, 2, batch(2))
        await proxy.let_go()
        await volume.commit(owner, 3, batch(3))
        await is_whole(volume, 3)


async def test_an_acquisition_that_arrives_late_does_not_end_the_one_that_followed_it(world: RedisWorld) -> None:
    async with far_volume(world) as (proxy, volume, owner):
        proxy.plan(ACQUIRE, Fault.LATE, skip=1)
        taken = await acquire(volume, nonce="far")
        assert taken.epoch == owner.epoch + 1
        await proxy.let_go()
        await volume.commit(taken, 2, batch(2))
        await is_whole(volume, 2)


async def test_a_format_that_arrives_late_does_not_undo_the_next_one(world: RedisWorld) -> None:
    async with far_volume(world) as (proxy, volume, owner):
        proxy.plan(PUT_FORMAT, Fault.LATE)
        with pytest.raises(StoreError):
            await volume.put_format(owner, volume_format(capacity_bytes=1))
        await volume.put_format(owner, volume_format(capacity_bytes=2))
        await proxy.let_go()
        other = await world.volume()
        assert other.format == volume.format == volume_format(capacity_bytes=2)
        await volume.commit(owner, 2, batch(2))


@pytest.mark.parametrize("marker", [SETTLE, ACQUIRE, RENEW], ids=["settle", "acquire", "renew"])
@pytest.mark.parametrize("fault", CUTS, ids=str)
async def test_what_may_be_done_twice_is_done_again_without_an_error(
    world: RedisWorld, fault: Fault, marker: bytes
) -> None:
    async with far_volume(world) as (proxy, volume, owner):
        # An acquisition asks for the epoch first.
        proxy.plan(marker, fault, skip=int(marker == ACQUIRE))
        if marker == SETTLE:
            assert await volume.last_batch(owner) == 1
        elif marker == RENEW:
            await volume.renew(owner, ttl_s=30)
        else:
            taken = await acquire(volume, nonce="far")
            assert taken.epoch == owner.epoch + (2 if fault in APPLIED else 1)
            owner = taken
        assert proxy.happened == [fault]
        await volume.commit(owner, 2, batch(2))
        await is_whole(volume, 2)


async def test_a_read_whose_connection_breaks_is_done_again(world: RedisWorld) -> None:
    async with far_volume(world) as (proxy, volume, _):
        for fault in (Fault.NOT_SENT, Fault.ANSWER_LOST, Fault.HALF_ANSWER):
            proxy.plan(_SCAN._source, fault)
            await is_whole(volume, 1)
        assert len(proxy.happened) == 3


async def test_a_commit_is_one_trip(world: RedisWorld) -> None:
    async with far_volume(world) as (proxy, volume, owner):
        await volume.commit(owner, 2, batch(2))
        before = proxy.trips
        for number in range(3, 23):
            await volume.commit(owner, number, batch(number))
        assert proxy.trips - before == 20
        await volume.load({SLICE: [(1,)]}, {})
        before = proxy.trips
        for number in range(20):
            await volume.load({SLICE: [(number,), (number + 1,)]}, {})
        assert proxy.trips - before == 20


async def test_commits_through_a_network_that_breaks_at_random_are_all_there_once(world: RedisWorld, seed: int) -> None:
    rand = random.Random(seed)
    async with far_volume(world) as (proxy, volume, owner):
        number = 2
        faults = [*CUTS, Fault.LATE]
        while number <= 60:
            if rand.random() < 0.5:
                proxy.plan(COMMIT, rand.choice(faults))
                for _ in range(rand.randrange(3)):
                    proxy.plan(SETTLE, rand.choice(faults))
            try:
                await volume.commit(owner, number, batch(number))
            except StoreError:
                last = await volume.last_batch(owner)
                assert last in (number - 1, number)
                if last < number:
                    continue
            if rand.random() < 0.3:
                await proxy.let_go()
            await is_whole(volume, number)
            number += 1
        assert len(proxy.happened) > 10


# -- cancelled callers ------------------------------------------------------------------------------------------------


async def test_a_commit_that_is_cancelled_is_applied_wholly_or_not_at_all(world: RedisWorld) -> None:
    async with far_volume(world) as (_, volume, owner):
        number = 2
        for turns in range(25):
            committing = asyncio.create_task(volume.commit(owner, number, batch(number)))
            for _ in range(turns):
                await asyncio.sleep(0)
            committing.cancel()
            await asyncio.gather(committing, return_exceptions=True)
            applied = await volume.last_batch(owner)
            assert applied in (number - 1, number)
            await is_whole(volume, applied)
            number = applied + 1


async def test_a_commit_whose_caller_goes_while_the_server_stands_still_is_there_or_void(own_redis: Redis) -> None:
    world = RedisWorld(own_redis)
    async with world.running():
        volume = await world.volume()
        owner = await acquire(volume)
        await volume.commit(owner, 1, batch(1))
        await volume.last_batch(owner)
        number = 2
        for _ in range(10):
            with own_redis.paused():
                committing = asyncio.create_task(volume.commit(owner, number, batch(number)))
                await asyncio.sleep(0.01)  # it is in the server's socket
                committing.cancel()
                await asyncio.gather(committing, return_exceptions=True)
                asking = asyncio.create_task(volume.last_batch(owner))
                await asyncio.sleep(0.01)
                assert not asking.done()
            last = await asking
            assert last in (number - 1, number)
            await is_whole(volume, last)
            number = last + 1
            await volume.commit(owner, number, batch(number))
            await is_whole(volume, number)
            number += 1


# -- every byte -------------------------------------------------------------------------------------------------------


async def test_a_commit_that_is_cut_at_any_byte_is_not_applied(world: RedisWorld) -> None:
    small = batch_of(Counter("n", 2), Slice(SliceId(7), 9, 1, 0, b"data"), deletes={COUNTER: [("batch-1",)]})
    async with far_volume(world) as (proxy, volume, owner):
        at, total = 0, 1
        while at < total:
            proxy.plan(COMMIT, Fault.HALF_SENT, at=at)
            with pytest.raises(StoreError):
                await volume.commit(owner, 2, small)
            assert await volume.last_batch(owner) == 1
            total = proxy.last_bytes
            at += 1
        assert total > 300
        await is_whole(volume, 1)
        await volume.commit(owner, 2, small)
        assert await volume.scan(COUNTER, after=None, limit=9) == [Counter("n", 2)]


async def test_a_commit_whose_answer_is_cut_at_any_byte_is_applied_once(world: RedisWorld) -> None:
    async with far_volume(world) as (proxy, volume, owner):
        for number, at in enumerate(range(len(b":0\r\n")), start=2):
            proxy.plan(COMMIT, Fault.HALF_ANSWER, at=at)
            with pytest.raises(StoreError):
                await volume.commit(owner, number, batch(number))
            assert await volume.last_batch(owner) == number
            await is_whole(volume, number)


# -- two owners at every point ----------------------------------------------------------------------------------------


async def test_a_takeover_beside_a_commit_is_before_or_after_it(own_redis: Redis) -> None:
    world = RedisWorld(own_redis)
    async with world.running():
        volume, successor = await world.volume(), await world.volume()
        number = 0
        for turn in range(20):
            owner = await acquire(volume, nonce=f"first-{turn}")
            await volume.commit(owner, number + 1, batch(number + 1))
            number += 1
            await world.lapse()
            with own_redis.paused():
                taking = asyncio.create_task(acquire(successor, nonce=f"successor-{turn}"))
                await asyncio.sleep(0.01 * (turn % 2))
                committing = asyncio.create_task(volume.commit(owner, number + 1, batch(number + 1)))
                await asyncio.sleep(0.01)
            answers = await asyncio.gather(committing, return_exceptions=True)
            new = await taking
            # What the successor was told is what there is, and what the other one was told.
            assert new.last_batch == (number if isinstance(answers[0], Fenced) else number + 1)
            number = new.last_batch
            await is_whole(successor, number)
            with pytest.raises(Fenced):
                await volume.commit(owner, number + 1, batch(number + 1))
            await successor.release(new)


@pytest.mark.parametrize("fault", [None, *CUTS], ids=str)
@pytest.mark.parametrize("when", ["before", "after"])
async def test_a_takeover_beside_a_commit_that_breaks_leaves_one_history(
    world: RedisWorld, fault: Fault | None, when: str
) -> None:
    async with far_volume(world) as (proxy, volume, owner):
        successor = await world.volume()
        if fault is not None:
            proxy.plan(COMMIT, fault)
        await world.lapse()
        if when == "before":
            new = await acquire(successor, nonce="successor")
            with pytest.raises((Fenced, StoreError)):
                await volume.commit(owner, 2, batch(2))
            assert new.last_batch == 1
        else:
            with contextlib.suppress(StoreError):
                await volume.commit(owner, 2, batch(2))
            new = await acquire(successor, nonce="successor")
            assert new.last_batch == (2 if fault is None or fault in APPLIED else 1)
        await is_whole(successor, new.last_batch)
        with pytest.raises(Fenced):
            await volume.last_batch(owner)
        await successor.commit(new, new.last_batch + 1, batch(new.last_batch + 1))
        for number in (2, 3, 4):
            with pytest.raises(Fenced):
                await volume.commit(owner, number, batch(9))
        await is_whole(successor, new.last_batch + 1)


async def test_owners_that_follow_each_other_at_random_moments_leave_one_history(world: RedisWorld, seed: int) -> None:
    """Each batch adds a row with its number and its owner: the rows are those that were acknowledged, each once."""
    rand = random.Random(seed)
    acknowledged: dict[int, str] = {}
    async with world.running():
        over = asyncio.Event()

        async def own(name: str) -> None:
            volume = await world.volume()
            while not over.is_set():
                try:
                    owner = await acquire(volume, nonce=name, address=name)
                    number = owner.last_batch
                    while not over.is_set():
                        number += 1
                        await volume.commit(owner, number, batch_of(Counter(f"{number:06d} {name}", number)))
                        assert number not in acknowledged
                        acknowledged[number] = name
                except NotOwner:
                    await asyncio.sleep(0.001 * rand.random())
                except Fenced:
                    pass

        async with asyncio.TaskGroup() as tasks:
            for name in ("a", "b", "c"):
                tasks.create_task(own(name))
            while not acknowledged:
                await asyncio.sleep(0.01)
            for _ in range(25):
                await asyncio.sleep(0.02 * rand.random())
                await world.lapse()
            over.set()
        volume = await world.volume()
        rows = [(row[0], row[1]) for row in await volume.scan(COUNTER, after=None, limit=1_000_000)]
        # Three owners end, of whom each may have a batch that was fenced; none is in the rows and not acknowledged.
        assert rows == [(f"{number:06d} {name}", number) for number, name in sorted(acknowledged.items())]
        assert sorted(acknowledged) == list(range(1, len(acknowledged) + 1))
        assert len(set(acknowledged.values())) > 1


# -- processes that die or stand still --------------------------------------------------------------------------------


async def acquire_when_expired(volume: VolumeStore, *, nonce: str) -> Ownership:
    """Take the ownership as soon as the other owner's time is over by the server's clock."""
    async with asyncio.timeout(30):
        while True:
            with contextlib.suppress(NotOwner):
                return await acquire(volume, nonce=nonce)
            await asyncio.sleep(0.05)


async def test_an_owner_that_stood_still_through_a_takeover_cannot_write_when_it_wakes(world: RedisWorld) -> None:
    async with world.running():
        volume = await world.volume()
        async with Program("commit_to_url.py", world.url, "0.5") as program:
            await program.line()
            os.kill(program.pid, signal.SIGSTOP)
            new = await acquire_when_expired(volume, nonce="successor")
            await volume.commit(new, new.last_batch + 1, batch_of(Counter("successor", 1)))
            os.kill(program.pid, signal.SIGCONT)
            lines = [line := await program.line()]
            while line:
                lines.append(line := await program.line())
            assert lines[-2:] == ["fenced", ""]
        rows = await volume.scan(COUNTER, after=None, limit=100_000)
        assert len(rows) == new.last_batch + 1
        assert await volume.last_batch(new) == new.last_batch + 1


async def test_after_kill_9_of_owners_acknowledged_batches_are_there_and_none_is_half_there(
    world: RedisWorld, seed: int
) -> None:
    chosen = random.Random(seed)
    async with world.running():
        volume = await world.volume()
        acknowledged = 0
        for _ in range(6):
            async with Program("commit_to_url.py", world.url, "3600") as program:
                for _ in range(chosen.randint(1, 40)):
                    acknowledged = int(await program.line())
                acknowledged = int(([str(acknowledged)] + await program.kill())[-1])
            await world.lapse()
            owner = await acquire(volume)
            assert owner.last_batch in (acknowledged, acknowledged + 1)
            slices = await volume.scan(SLICE, after=None, limit=1000)
            assert {row[1] for row in slices} == {owner.last_batch}
            counters = await volume.scan(COUNTER, after=None, limit=100_000)
            assert sorted(row[1] for row in counters) == list(range(1, owner.last_batch + 1))
            await volume.release(owner)


async def test_a_server_that_is_killed_during_commits_loses_nothing_and_reads_only_wait(
    own_redis: Redis, seed: int
) -> None:
    chosen = random.Random(seed)
    world = RedisWorld(own_redis)
    async with world.running():
        volume, reader = await world.volume(), await world.volume()
        owner = await volume.acquire(nonce="first", address="here", ttl_s=3600)
        await volume.commit(owner, 1, batch(1))
        number = 1
        over = False

        async def read() -> None:
            while not over:
                before = number
                rows = await reader.scan(SLICE, after=None, limit=1000)
                assert len({row[1] for row in rows}) == 1
                assert rows[0][1] >= before

        async def write() -> None:
            nonlocal number
            while not over:
                try:
                    await volume.commit(owner, number + 1, batch(number + 1))
                except StoreError:
                    last = await settled()
                    assert last in (number, number + 1)
                    await is_whole(volume, last)
                    number = last
                else:
                    number += 1

        async def settled() -> int:
            """Ask until the server is back."""
            async with asyncio.timeout(60):
                while True:
                    with contextlib.suppress(StoreError):
                        return await volume.last_batch(owner)

        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(write())
            readers = [tasks.create_task(read()) for _ in range(2)]
            for _ in range(6):
                before = number
                while number < before + chosen.randint(5, 60):
                    await asyncio.sleep(0.001)
                await asyncio.to_thread(own_redis.kill)
                await asyncio.to_thread(own_redis.start)
            over = True
            await asyncio.gather(*readers)
        await is_whole(volume, number)
        assert await volume.last_batch(owner) == number


async def test_a_file_that_ends_anywhere_has_each_batch_wholly_or_not_at_all(own_redis: Redis, seed: int) -> None:
    """As after a loss of power, which leaves some first bytes of what was written since the last sync."""
    chosen = random.Random(seed)
    world = RedisWorld(own_redis)
    async with world.running():
        volume = await world.volume()
        owner = await volume.acquire(nonce="first", address="here", ttl_s=3600)
        await volume.commit(owner, 1, batch(1))
        (path,) = (own_redis.directory / "appendonlydir").glob("*.incr.aof")
        before = path.stat().st_size
        await volume.commit(owner, 2, batch(2))
        own_redis.kill()
        data = path.read_bytes()
        assert len(data) - before > 30 * 100
        found = set()
        for size in [
            before,
            before + 1,
            *sorted(chosen.sample(range(before, len(data)), 12)),
            len(data) - 1,
            len(data),
        ]:
            path.write_bytes(data[:size])
            own_redis.start()
            # Another process: one that had seen batch 2 would read nothing less.
            reader = await world.volume()
            last = 2 if size == len(data) else 1
            assert int(await world.command("HGET", await world.volume_key(), "last_batch")) == last
            await is_whole(reader, last)
            found.add(last)
            own_redis.kill()
        assert found == {1, 2}
        own_redis.start()


@pytest.fixture
def small_disk(own_redis: Redis) -> Iterator[Path]:
    """Have the server write to 2 MiB of memory (needs root)."""
    own_redis.stop()
    place = own_redis.directory / "small"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(place)], check=True)
    try:
        own_redis.start(dir=str(place))
        yield place
    finally:
        # The server, which ends later, has files open there.
        subprocess.run(["umount", "-l", str(place)], check=True)


async def test_a_full_disk_ends_the_server_and_loses_nothing(own_redis: Redis, small_disk: Path) -> None:
    world = RedisWorld(own_redis)
    async with world.running():
        volume = await world.volume()
        owner = await volume.acquire(nonce="first", address="here", ttl_s=3600)
        number = 0

        def large(number: int) -> Batch:
            return batch_of(*(Slice(SliceId(n), number, 1, 0, random.randbytes(10_000)) for n in range(10)))

        with pytest.raises(StoreError):
            while number < 1000:
                await volume.commit(owner, number + 1, large(number + 1))
                number += 1
        assert 5 < number < 1000
        await asyncio.to_thread(own_redis.wait_for_end)
        assert "Can't recover from AOF write error" in own_redis.log()
        subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
        await asyncio.to_thread(own_redis.start)
        last = await volume.last_batch(owner)
        assert last in (number, number + 1)
        assert {row[1] for row in await volume.scan(SLICE, after=None, limit=99)} == {last}
        await volume.commit(owner, last + 1, large(last + 1))


async def test_a_server_that_shuts_down_and_starts_again_is_a_pause(own_redis: Redis) -> None:
    world = RedisWorld(own_redis)
    async with world.running():
        volume = await world.volume()
        owner = await volume.acquire(nonce="first", address="here", ttl_s=3600)
        await volume.commit(owner, 1, batch(1))
        await asyncio.to_thread(own_redis.stop)
        renewing = asyncio.create_task(volume.renew(owner, ttl_s=3600))
        reading = asyncio.create_task(volume.scan(SLICE, after=None, limit=1000))
        committing = asyncio.create_task(volume.commit(owner, 2, batch(2)))
        await asyncio.sleep(0.2)
        assert not reading.done()
        await asyncio.to_thread(own_redis.start)
        await renewing
        assert len({row[1] for row in await reading}) == 1
        with contextlib.suppress(StoreError):  # if it was sent on a connection that had not yet seen the end
            await committing
        assert await volume.last_batch(owner) in (1, 2)
        store = await world.process()
        await store.create_volume(volume_format(name="other"), NOTHING)
