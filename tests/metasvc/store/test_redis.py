"""The store in Redis: the contract, and what only a server can show."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from chunkstore.geometry import SliceId
from metasvc.model import Chunk, Dentry, Ino, Inode, SliceRef, pack_refs
from tests.metasvc.store.contract import Step, StoreContract, acquire, compare_with_model, histories
from tests.metasvc.store.redis_world import RedisWorld
from tests.metasvc.store.rows_of import batch_of
from tests.servers.redis import Redis, RedisAt


@pytest.fixture
def world(redis: RedisAt) -> RedisWorld:
    return RedisWorld(redis)


class TestRedisStore(StoreContract):
    """The contract."""


@settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
@given(steps=histories, page=st.integers(1, 9))
def test_a_store_is_a_sorted_map_for_each_table(redis: RedisAt, steps: list[Step], page: int) -> None:
    asyncio.run(compare_with_model(RedisWorld(redis), steps, page=page))


@pytest.fixture(scope="module")
def spread_redis() -> Iterator[Redis]:
    """Run a server whose operator wants no listpacks: each hash and sorted set has pointers from its first row on."""
    with Redis(hash_max_listpack_entries="0", zset_max_listpack_entries="0") as server:
        yield server


@settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
@given(steps=histories, page=st.integers(1, 9))
def test_a_store_is_the_same_where_nothing_lies_in_listpacks(spread_redis: Redis, steps: list[Step], page: int) -> None:
    asyncio.run(compare_with_model(RedisWorld(spread_redis), steps, page=page))


async def test_rows_of_a_full_bucket_lie_in_listpacks_with_the_server_s_defaults(redis: RedisAt) -> None:
    world = RedisWorld(redis)
    async with world.running():
        volume = await world.volume()
        owner = await acquire(volume)
        now_ns = 1_790_000_000_123_456_789
        inodes = [
            Inode(Ino(64 + n), 0o100644, 1, 1000, 1000, 0, 1 << 34, now_ns, now_ns - 1, now_ns, Ino(1 << 30), 0, 9, 9)
            for n in range(64)
        ]
        names = [Dentry(Ino(2), b"%040d" % n, Ino(1 << 40), 0o100000) for n in range(128)]
        chunks = [Chunk(Ino(64 + n), 0, pack_refs([SliceRef(0, SliceId(n), 0, 1 << 26)])) for n in range(64)]
        await volume.commit(owner, 1, batch_of(*inodes, *names, *chunks))
        # Again, as rows that are replaced.
        await volume.commit(owner, 2, batch_of(*inodes, *names, *chunks))
        start = (await world.volume_key()).removesuffix("volume").encode()
        for table in (b"inode", b"dentry", b"chunk"):
            (bucket,) = [key for key in await world.keys() if key.startswith(start + table + b":")]
            assert await world.command("OBJECT", "ENCODING", bucket) == b"listpack"
