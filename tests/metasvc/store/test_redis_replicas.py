"""Redis with a replica: what an acknowledgement means then, and a fail-over."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator

import pytest

from metasvc.errors import Fenced, StoreError
from metasvc.model import Counter
from metasvc.store import Ownership, VolumeStore
from metasvc.store.open import open_store
from metasvc.store.redis import RedisStore
from metasvc.store.redis.foreign_errors import Unavailable
from metasvc.store.tables import COUNTER
from tests.metasvc.store.contract import NOTHING, acquire
from tests.metasvc.store.rows_of import batch_of, volume_format
from tests.servers.redis import Redis


@pytest.fixture
def replica(own_redis: Redis) -> Iterator[Redis]:
    with own_redis.replica() as replica:
        yield replica


def both(server: Redis, replica: Redis) -> str:
    """Return the URL of both servers."""
    at = f"{server.host}:{server.port}"
    return server.url().replace(at, f"{at},{replica.host}:{replica.port}")


def until_the_same(server: Redis, replica: Redis) -> None:
    """Wait until the replica has what the server has."""
    assert server.command("WAIT", 1, 30_000) == 1
    assert replica.command("PING") == b"PONG"


async def last_batch_in_the_end(volume: VolumeStore, owner: Ownership) -> int:
    async with asyncio.timeout(60):
        while True:
            with contextlib.suppress(StoreError):
                return await volume.last_batch(owner)


async def test_a_replica_alone_is_refused(own_redis: Redis, replica: Redis) -> None:
    await (await open_store(own_redis.url(), create=True)).close()
    with pytest.raises(Unavailable, match=r"is a replica: name the master"):
        await open_store(replica.url())


async def test_of_a_master_and_a_replica_the_master_is_used_in_any_order(own_redis: Redis, replica: Redis) -> None:
    url = own_redis.url()
    at, other = f"{own_redis.host}:{own_redis.port}", f"{replica.host}:{replica.port}"
    for hosts in (f"{at},{other}", f"{other},{at}"):
        store = await open_store(url.replace(at, hosts), create=True)
        await store.add_tenant(hosts, created_ns=1)
        await store.close()


async def test_a_master_that_is_refused_is_told_and_not_its_replica(own_redis: Redis, replica: Redis) -> None:
    own_redis.command("CONFIG", "SET", "maxmemory", "1gb", "maxmemory-policy", "allkeys-lru")
    with pytest.raises(StoreError, match=r"set it to noeviction"):
        await open_store(both(own_redis, replica), create=True)


async def test_a_master_with_too_few_replicas_takes_no_changes_and_answers_reads(
    own_redis: Redis, replica: Redis
) -> None:
    store = await open_store(own_redis.url(), create=True)
    await store.create_volume(volume_format(), NOTHING)
    volume = await store.open_volume("tenant", "volume")
    owner = await volume.acquire(nonce="first", address="here", ttl_s=3600)
    await volume.commit(owner, 1, batch_of(Counter("n", 1)))
    own_redis.command("CONFIG", "SET", "min-replicas-to-write", 2)
    with pytest.raises(StoreError, match=r"has too few replicas \(min-replicas-to-write\)"):
        await volume.commit(owner, 2, batch_of(Counter("n", 2)))
    assert await volume.scan(COUNTER, after=None, limit=9) == [Counter("n", 1)]
    own_redis.command("CONFIG", "SET", "min-replicas-to-write", 1)
    assert await volume.last_batch(owner) == 1
    await volume.commit(owner, 2, NOTHING)
    await store.close()


async def test_an_owner_goes_on_after_a_fail_over_to_a_replica_that_has_everything(
    own_redis: Redis, replica: Redis
) -> None:
    store = await open_store(both(own_redis, replica), create=True)
    await store.create_volume(volume_format(), NOTHING)
    volume = await store.open_volume("tenant", "volume")
    owner = await volume.acquire(nonce="first", address="here", ttl_s=3600)
    for number in range(1, 50):
        await volume.commit(owner, number, batch_of(Counter(f"{number:06d}", 1)))
    await asyncio.to_thread(until_the_same, own_redis, replica)
    await asyncio.to_thread(own_redis.kill)
    replica.command("REPLICAOF", "NO", "ONE")
    with contextlib.suppress(StoreError):
        await volume.commit(owner, 50, batch_of(Counter("000050", 1)))
    if await last_batch_in_the_end(volume, owner) == 49:
        await volume.commit(owner, 50, batch_of(Counter("000050", 1)))
    rows = await volume.scan(COUNTER, after=None, limit=1_000)
    assert rows == [Counter(f"{number:06d}", 1) for number in range(1, 51)]
    await store.close()


async def test_an_owner_stops_after_a_fail_over_to_a_replica_that_lacks_a_batch(
    own_redis: Redis, replica: Redis
) -> None:
    """What the guide says of replicas: an acknowledged batch may be lost with the master, and no other is built upon it."""
    store = await open_store(both(own_redis, replica), create=True)
    await store.create_volume(volume_format(), NOTHING)
    volume = await store.open_volume("tenant", "volume")
    owner = await volume.acquire(nonce="first", address="here", ttl_s=3600)
    await volume.commit(owner, 1, batch_of(Counter("n", 1)))
    await asyncio.to_thread(until_the_same, own_redis, replica)
    with replica.paused():
        await volume.commit(owner, 2, batch_of(Counter("n", 2)))
        await asyncio.to_thread(own_redis.kill)
    # What the dead one had sent to its socket may have come through.
    replica.command("REPLICAOF", "NO", "ONE")
    last = int(replica.command("HGET", await _volume_key(replica), "last_batch"))
    if last == 1:
        with pytest.raises(Fenced, match=r"lacks batch 2, which it had"):
            await last_batch_in_the_end(volume, owner)
        with pytest.raises(Fenced):
            await volume.commit(owner, 3, batch_of(Counter("n", 3)))
    else:
        assert await last_batch_in_the_end(volume, owner) == 2
    again = await store.open_volume("tenant", "volume")
    assert await again.scan(COUNTER, after=None, limit=9) == [Counter("n", last)]
    # The same process takes it again, with what is there.
    taken = await again.acquire(nonce="first", address="here", ttl_s=3600)
    assert taken.last_batch == last
    await again.commit(taken, last + 1, batch_of(Counter("n", 3)))
    assert await again.scan(COUNTER, after=None, limit=9) == [Counter("n", 3)]
    await store.close()


async def test_a_master_that_became_a_replica_is_left_for_the_one_that_is_the_master_now(
    own_redis: Redis, replica: Redis
) -> None:
    store = await open_store(both(own_redis, replica), create=True)
    await store.create_volume(volume_format(), NOTHING)
    volume = await store.open_volume("tenant", "volume")
    owner = await volume.acquire(nonce="first", address="here", ttl_s=3600)
    await volume.commit(owner, 1, batch_of(Counter("n", 1)))
    assert await volume.scan(COUNTER, after=None, limit=9) == [Counter("n", 1)]
    await asyncio.to_thread(until_the_same, own_redis, replica)
    # The connections of both lanes stay; the new replica keeps its data, and gets no more, for a while: its master is paused.
    replica.command("REPLICAOF", "NO", "ONE")
    own_redis.command("REPLICAOF", "127.0.0.1", 1)
    with contextlib.suppress(StoreError):
        await volume.commit(owner, 2, batch_of(Counter("n", 2)))
    if await last_batch_in_the_end(volume, owner) == 1:
        await volume.commit(owner, 2, batch_of(Counter("n", 2)))
    assert int(replica.command("HGET", await _volume_key(replica), "last_batch")) == 2
    # A connection for reads still leads to the old one, which answers, and lacks batch 2.
    assert own_redis.command("HGET", await _volume_key(own_redis), "last_batch") == b"1"
    assert await volume.scan(COUNTER, after=None, limit=9) == [Counter("n", 2)]
    await store.close()


async def _volume_key(server: Redis) -> bytes:
    (key,) = [key for key in server.command("KEYS", "atoll:{*}:volume") if b"catalog" not in key]
    return bytes(key)


async def test_a_handle_that_owns_nothing_reads_what_there_is(own_redis: Redis) -> None:
    owning, reading = [await RedisStore.open(own_redis.url(), create=True) for _ in range(2)]
    await owning.create_volume(volume_format(), NOTHING)
    volume, reader = await owning.open_volume("tenant", "volume"), await reading.open_volume("tenant", "volume")
    owner = await acquire(volume)
    await volume.commit(owner, 1, batch_of(Counter("n", 1)))
    assert await reader.scan(COUNTER, after=None, limit=9) == [Counter("n", 1)]
    await owning.close()
    await reading.close()
