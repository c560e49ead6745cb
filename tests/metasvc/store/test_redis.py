"""The store in Redis: the contract, and what only a server can show."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.metasvc.store.contract import Step, StoreContract, compare_with_model, histories
from tests.metasvc.store.redis_world import RedisWorld
from tests.servers.redis import RedisAt


@pytest.fixture
def world(redis: RedisAt) -> RedisWorld:
    return RedisWorld(redis)


class TestRedisStore(StoreContract):
    """The contract."""


@settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
@given(steps=histories, page=st.integers(1, 9))
def test_a_store_is_a_sorted_map_for_each_table(redis: RedisAt, steps: list[Step], page: int) -> None:
    asyncio.run(compare_with_model(RedisWorld(redis), steps, page=page))
