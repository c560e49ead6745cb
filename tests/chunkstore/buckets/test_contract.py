"""The contract of object stores, on each driver bare and behind retries, on real storage."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Final

import pytest

from chunkstore.buckets import Limits, ObjectStore, open_bucket
from chunkstore.buckets.cloud import CloudStore
from chunkstore.buckets.directory import DirectoryStore
from chunkstore.buckets.url import parse_bucket_url
from tests.chunkstore.buckets.contract import CHECKS, Check
from tests.servers.buckets import Bucket

_DEADLINE_S: Final = 60


def _directory(request: pytest.FixtureRequest) -> ObjectStore:
    tmp_path: Path = request.getfixturevalue("tmp_path")
    return DirectoryStore(str(tmp_path))


def _retried_directory(request: pytest.FixtureRequest) -> ObjectStore:
    tmp_path: Path = request.getfixturevalue("tmp_path")
    return open_bucket(f"file://{tmp_path}", env={})


def _s3(request: pytest.FixtureRequest) -> ObjectStore:
    bucket: Bucket = request.getfixturevalue("bucket")
    return CloudStore(parse_bucket_url(bucket.url), env=bucket.environment, attempt_timeout_s=30)


def _retried_s3(request: pytest.FixtureRequest) -> ObjectStore:
    bucket: Bucket = request.getfixturevalue("bucket")
    # Few slots, so that checks with many calls at once wait for them.
    return open_bucket(bucket.url, env=bucket.environment, limits=Limits(max_gets=3, max_puts=2))


@pytest.fixture(params=[_directory, _retried_directory, _s3, _retried_s3], ids=lambda make: make.__name__.strip("_"))
def make_store(request: pytest.FixtureRequest) -> Callable[[], ObjectStore]:
    make: Callable[[pytest.FixtureRequest], ObjectStore] = request.param
    return lambda: make(request)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_it_keeps_the_contract(check: Check, make_store: Callable[[], ObjectStore]) -> None:
    async def run() -> None:
        store = make_store()
        try:
            async with asyncio.timeout(_DEADLINE_S):
                await check(store)
        finally:
            await store.close()

    asyncio.run(run())
