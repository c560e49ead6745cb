"""The store on a Redis Cluster of three masters: each volume on one of them, wherever that is."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator

import pytest

from metasvc.errors import StoreError
from metasvc.model import Counter
from metasvc.store.open import open_store
from metasvc.store.tables import COUNTER, INODE
from tests.metasvc.store.contract import NOTHING, StoreContract, acquire
from tests.metasvc.store.redis_world import RedisWorld
from tests.metasvc.store.rows_of import batch_of, example_row, volume_format
from tests.servers.redis import Redis, RedisAt, redis_cluster


@pytest.fixture(scope="module")
def cluster() -> Iterator[list[Redis]]:
    with redis_cluster() as nodes:
        yield nodes


@pytest.fixture
def own_cluster() -> Iterator[list[Redis]]:
    with redis_cluster() as nodes:
        yield nodes


class ClusterAt(RedisAt):
    """A cluster behind its first server: commands go where their key is."""

    def __init__(self, nodes: list[Redis]) -> None:
        super().__init__(nodes[0].host, nodes[0].port, user=nodes[0].user, password=nodes[0].password)
        self.nodes = nodes

    def command(self, *arguments: object) -> object:
        from redis.exceptions import MovedError

        for node in self.nodes:
            with contextlib.suppress(MovedError):
                return node.command(*arguments)
        raise AssertionError("no server has the slot")


@pytest.fixture
def world(cluster: list[Redis]) -> RedisWorld:
    return RedisWorld(ClusterAt(cluster))


class TestRedisStoreOnACluster(StoreContract):
    """The contract."""


async def test_volumes_are_spread_over_the_servers(world: RedisWorld, cluster: list[Redis]) -> None:
    async with world.running():
        store = await world.process()
        for number in range(12):
            await store.create_volume(volume_format(name=f"v{number}"), NOTHING)
            volume = await store.open_volume("tenant", f"v{number}")
            owner = await acquire(volume)
            await volume.commit(owner, 1, batch_of(Counter("n", number), example_row(INODE, number)))
        for number in range(12):
            volume = await store.open_volume("tenant", f"v{number}")
            assert await volume.scan(COUNTER, after=None, limit=9) == [Counter("n", number)]
        counts = [sum(world.prefix.encode() in key for key in node.command("KEYS", "*:volume")) for node in cluster]
        assert sum(counts) == 12
        assert all(counts)
        assert len(await store.list_volumes()) == 12


async def move(key: bytes | str, source: Redis, target: Redis, *, half: asyncio.Event, go_on: asyncio.Event) -> None:
    """Move the slot of a key as an operator's tool does; stops when half of its keys have moved."""
    slot = source.command("CLUSTER", "KEYSLOT", key)
    ids = [node.command("CLUSTER", "MYID") for node in (source, target)]
    target.command("CLUSTER", "SETSLOT", slot, "IMPORTING", ids[0])
    source.command("CLUSTER", "SETSLOT", slot, "MIGRATING", ids[1])
    # What scripts declare comes first, so that in the middle the target answers for buckets that it does not have yet.
    keys = sorted(
        source.command("CLUSTER", "GETKEYSINSLOT", slot, 100_000), key=lambda found: (found.count(b":"), found)
    )
    for index, moved in enumerate(keys):
        if index == len(keys) // 2:
            half.set()
            await go_on.wait()
        source.command("MIGRATE", target.host, target.port, moved, 0, 5000, "AUTH2", target.user, target.password)
    for node in (target, source):
        node.command("CLUSTER", "SETSLOT", slot, "NODE", ids[1])


async def test_a_volume_that_moves_to_another_server_takes_its_owner_along(own_cluster: list[Redis]) -> None:
    world = RedisWorld(ClusterAt(own_cluster))
    async with world.running():
        volume = await world.volume()
        owner = await volume.acquire(nonce="first", address="here", ttl_s=3600)
        batch = batch_of(*(example_row(INODE, number) for number in range(1000)), Counter("n", 1))
        await volume.commit(owner, 1, batch)
        key = await world.volume_key()
        (source,) = [node for node in own_cluster if _has(node, key)]
        target = next(node for node in own_cluster if node is not source)
        half, go_on = asyncio.Event(), asyncio.Event()
        moving = asyncio.create_task(move(key, source, target, half=half, go_on=go_on))
        await half.wait()
        number = 1
        # In the middle of it a batch waits or is refused as a whole; nothing is answered from half of the rows.
        committing = asyncio.create_task(volume.commit(owner, 2, batch_of(Counter("n", 2), example_row(INODE, 7))))
        loading = asyncio.create_task(volume.load({INODE: [(n,) for n in range(1000)]}, {}))
        scanning = asyncio.create_task(volume.scan(INODE, after=None, limit=2000))
        # The volume's hash has moved: the target has it, and is asked (ASK) before the slot is its own.
        assert _has(target, key)
        await volume.renew(owner, ttl_s=3600)
        assert not moving.done()
        go_on.set()
        await moving
        with contextlib.suppress(StoreError):
            await committing
        number = await volume.last_batch(owner)
        assert number in (1, 2)
        assert sorted((await loading).rows[INODE]) == await scanning == [example_row(INODE, n) for n in range(1000)]
        await volume.commit(owner, number + 1, batch_of(Counter("n", 3)))
        assert await volume.scan(COUNTER, after=None, limit=9) == [Counter("n", 3)]
        assert _has(target, key)
        assert not _has(source, key)


async def test_while_two_servers_name_each_other_calls_wait(own_cluster: list[Redis]) -> None:
    world = RedisWorld(ClusterAt(own_cluster))
    async with world.running():
        volume = await world.volume()
        owner = await volume.acquire(nonce="first", address="here", ttl_s=3600)
        await volume.commit(owner, 1, batch_of(Counter("n", 1)))
        key = await world.volume_key()
        (source,) = [node for node in own_cluster if _has(node, key)]
        target = next(node for node in own_cluster if node is not source)
        slot, taker = source.command("CLUSTER", "KEYSLOT", key), target.command("CLUSTER", "MYID")
        target.command("CLUSTER", "SETSLOT", slot, "IMPORTING", source.command("CLUSTER", "MYID"))
        source.command("CLUSTER", "SETSLOT", slot, "MIGRATING", taker)
        for moved in source.command("CLUSTER", "GETKEYSINSLOT", slot, 100):
            source.command("MIGRATE", target.host, target.port, moved, 0, 5000, "AUTH2", target.user, target.password)
        # The wrong order: for now the target sends everybody back to the source.
        source.command("CLUSTER", "SETSLOT", slot, "NODE", taker)
        calls = [
            asyncio.create_task(volume.commit(owner, 2, batch_of(Counter("n", 2)))),
            asyncio.create_task(volume.scan(COUNTER, after=None, limit=9)),
        ]
        assert not (await asyncio.wait(calls, timeout=0.3))[0]
        target.command("CLUSTER", "SETSLOT", slot, "NODE", taker)
        await calls[0]
        assert await calls[1] in ([Counter("n", 1)], [Counter("n", 2)])
        assert await volume.last_batch(owner) == 2


def _has(node: Redis, key: str) -> bool:
    return any(found == key.encode() for found in node.command("KEYS", "*:volume"))


async def test_a_server_of_a_cluster_that_is_killed_and_comes_back_is_a_pause(own_cluster: list[Redis]) -> None:
    world = RedisWorld(ClusterAt(own_cluster))
    nodes = ",".join(f"{node.host}:{node.port}" for node in own_cluster)
    first = own_cluster[0]
    store = await open_store(world.url.replace(f"{first.host}:{first.port}", nodes), create=True)
    volumes = []
    for number in range(6):
        await store.create_volume(volume_format(name=f"v{number}"), NOTHING)
        volume = await store.open_volume("tenant", f"v{number}")
        volumes.append((volume, await volume.acquire(nonce="first", address="here", ttl_s=3600)))
    for number in range(1, 4):
        for node in own_cluster:
            for volume, owner in volumes:
                await volume.last_batch(owner)
            await asyncio.to_thread(node.kill)
            await asyncio.to_thread(node.start)
            for volume, owner in volumes:
                last = await volume.last_batch(owner)
                await volume.commit(owner, last + 1, batch_of(Counter(f"{last + 1}", number)))
                assert len(await volume.scan(COUNTER, after=None, limit=99)) == last + 1
    await store.close()
