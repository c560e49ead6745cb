"""Blocks by presigned URLs, with a server that checks signatures: no key here, few requests for URLs, no URL told."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from random import Random

import pytest

from chunkstore.buckets import Limits
from chunkstore.errors import AtollError, BucketDenied, BucketUnavailable, ObjectExists, ObjectMissing
from chunkstore.geometry import SliceId, block_key
from chunkstore.model import Place, SliceInfo
from chunkstore.presigned import AHEAD, URLS_KEPT, PresignedAccess, Signed
from chunkstore.signing import S3Signer
from tests.servers.buckets import Bucket
from tests.servers.ports import HOST, free_ports
from tests.servers.seaweedfs import ACCESS_KEY_ID, SECRET_ACCESS_KEY

UUID = "0193b1f0-5d1a-7c1e-9d7a-3f0c2f6f8a11"
BLOCK = 1 << 16
KEYS = {"AWS_ACCESS_KEY_ID": ACCESS_KEY_ID, "AWS_SECRET_ACCESS_KEY": SECRET_ACCESS_KEY}


class Service:
    """Who has the keys: signs all that it is asked for, and counts."""

    def __init__(self, bucket: Bucket, *, clock: Callable[[], float] = time.time) -> None:
        self._signer = S3Signer(bucket.url, KEYS, clock=clock)
        self.life_s = 60
        self.gets: list[tuple[int, list[int]]] = []
        self.puts: list[tuple[int, list[int]]] = []
        self.refusal: AtollError | None = None
        self.lacks: set[int] = set()
        """Blocks that no file has."""
        self.unknown: set[int] = set()
        """Files that have nothing."""
        self.open = asyncio.Event()
        self.open.set()

    async def sign_get(self, info: SliceInfo, blocks: Sequence[int]) -> Signed:
        self.gets.append((info.slice_id, list(blocks)))
        await self.open.wait()
        if self.refusal is not None:
            raise self.refusal
        if blocks[0] in self.lacks or (info.place and info.place.ino in self.unknown):
            raise ObjectMissing(f"block {blocks[0]} is not in the file")
        keys = ["" if index in self.lacks else block_key(UUID, info.slice_id, index) for index in blocks]
        return Signed([key and self._signer.get(key, life_s=self.life_s) for key in keys], self.life_s)

    async def sign_put(self, slice_id: SliceId, blocks: Sequence[int], sha256: Sequence[bytes]) -> Signed:
        self.puts.append((slice_id, list(blocks)))
        signed = [
            self._signer.put(block_key(UUID, slice_id, index), sha256=each, life_s=self.life_s)
            for index, each in zip(blocks, sha256, strict=True)
        ]
        return Signed([each.url for each in signed], self.life_s, [each.headers for each in signed])


@contextlib.asynccontextmanager
async def opened(
    service: Service, *, limits: Limits | None = None, **options: Callable[[], float]
) -> AsyncIterator[PresignedAccess]:
    access = PresignedAccess(service, volume_uuid=UUID, block_bytes=BLOCK, name="s3://it", limits=limits, **options)
    try:
        yield access
    finally:
        await access.close()


def slice_of(blocks: int, number: int = 7) -> SliceInfo:
    return SliceInfo(SliceId(number), blocks * BLOCK, b"", Place(1, 0))


async def fill(access: PresignedAccess, info: SliceInfo, seed: int) -> list[bytes]:
    rand = Random(seed)
    data = [rand.randbytes(1000 + index) for index in range(-(-info.length // BLOCK))]
    await asyncio.gather(*(access.put(info.slice_id, index, each) for index, each in enumerate(data)))
    return data


async def test_a_sequential_read_asks_for_urls_once_in_a_while_and_ahead(bucket: Bucket, seed: int) -> None:
    service = Service(bucket)
    info = slice_of(3 * AHEAD)
    async with opened(service) as access:
        data = await fill(access, info, seed)
        waited = 0
        for index, expected in enumerate(data):
            # Before a block is read its URL has come, but for the first.
            async with asyncio.timeout(10):
                while index and (info.slice_id, index) in access._asked:
                    await asyncio.sleep(0.001)
            waited += access._good((info.slice_id, index)) is None
            assert await access.get(info, index) == expected
        assert waited == 1
        assert [index for _, blocks in service.gets for index in blocks] == list(range(3 * AHEAD))
        assert await access.get(info, 5, start=10, end=20) == data[5][10:20]
        assert len(service.gets) <= 8
        assert access.counters()["get"].requests == 3 * AHEAD + 1
        assert access.counters()["put"].requests == 3 * AHEAD


async def test_readers_of_one_block_share_one_request_and_one_that_is_cancelled_harms_nobody(bucket: Bucket) -> None:
    service = Service(bucket)
    info = slice_of(1)
    async with opened(service) as access:
        [data] = await fill(access, info, 1)
        service.open.clear()
        reading = [asyncio.create_task(access.get(info, 0)) for _ in range(20)]
        await asyncio.sleep(0.01)
        reading[0].cancel()
        service.open.set()
        found = await asyncio.gather(*reading, return_exceptions=True)
        assert isinstance(found[0], asyncio.CancelledError)
        assert found[1:] == [data] * 19
        assert len(service.gets) == 1
        assert not access._asked
        assert not access._infos


async def test_a_block_that_is_there_already_is_success_only_with_equal_bytes(bucket: Bucket) -> None:
    async with opened(Service(bucket)) as access:
        await access.put(SliceId(7), 0, b"the bytes")
        await access.put(SliceId(7), 0, b"the bytes")
        with pytest.raises(ObjectExists):
            await access.put(SliceId(7), 0, b"others")
        assert await access.get(slice_of(1), 0) == b"the bytes"
        for data in (bytearray(b"x" * 70000), memoryview(b"y" * 70000)[3:]):
            await access.put(SliceId(8), len(data), data)
            assert await access.get(slice_of(1, 8), len(data)) == data


async def test_urls_whose_time_is_over_are_signed_anew_once_and_then_it_is_refused(bucket: Bucket) -> None:
    late_s = 0.0
    service = Service(bucket, clock=lambda: time.time() - late_s)
    info = slice_of(1)
    async with opened(service) as access:
        late_s = 100.0
        with pytest.raises(BucketDenied, match="clocks") as refused:
            await access.put(info.slice_id, 0, b"x")
        assert refused.value.errno == 13
        assert len(service.puts) == 2
        late_s = 0.0
        await access.put(info.slice_id, 0, b"the bytes")
        late_s = 100.0
        with pytest.raises(BucketDenied, match="clocks"):
            await access.get(info, 0)
        assert len(service.gets) == 2
        # The URL that is kept expired, by the bucket's clock: one more is asked for, and does.
        late_s = 0.0
        assert await access.get(info, 0) == b"the bytes"


async def test_a_url_is_not_used_shortly_before_its_end(bucket: Bucket) -> None:
    now_s = 1000.0
    service = Service(bucket)
    service.life_s = 900
    info = slice_of(1)
    async with opened(service, clock=lambda: now_s) as access:
        await access.put(info.slice_id, 0, b"the bytes")
        for now_s, asked in ((1000.0, 1), (1839.0, 1), (1841.0, 2), (2680.0, 2)):  # noqa: B007 (the clock reads it)
            assert await access.get(info, 0) == b"the bytes"
            assert len(service.gets) == asked


async def test_what_is_refused_is_told_and_asked_for_again_by_the_next_reader(bucket: Bucket) -> None:
    service = Service(bucket)
    info = slice_of(1)
    async with opened(service) as access:
        with pytest.raises(ObjectMissing):
            await access.get(info, 0)
        await access.put(info.slice_id, 0, b"the bytes")
        assert await access.get(info, 0) == b"the bytes"
        service.refusal = ObjectMissing("slice 9 is not in the file any more")
        with pytest.raises(ObjectMissing, match="any more"):
            await access.get(slice_of(1, 9), 0)
        service.refusal = None
        with pytest.raises(ObjectMissing):
            await access.get(slice_of(1, 9), 0)
        with pytest.raises(BucketDenied, match="without a key"):
            await access.store.delete(["a"])
        with pytest.raises(BucketDenied, match="without a key"):
            await anext(aiter(access.store.list()))
        await access.delete([(SliceId(7), 0)])
        assert await access.get(info, 0) == b"the bytes"


async def test_blocks_that_the_file_has_not_keep_nobody_from_the_others(bucket: Bucket, seed: int) -> None:
    service = Service(bucket)
    info = slice_of(AHEAD + 4)
    async with opened(service) as access:
        data = await fill(access, info, seed)
        service.lacks = {1, 3, AHEAD // 2}
        found = await asyncio.gather(*(access.get(info, index) for index in range(len(data))), return_exceptions=True)
        for index, each in enumerate(found):
            assert isinstance(each, ObjectMissing) if index in service.lacks else each == data[index], index
        assert not access._asked


async def test_a_file_that_is_gone_does_not_speak_for_another_one_with_the_same_slice(bucket: Bucket) -> None:
    service = Service(bucket)
    service.unknown = {1}
    info = slice_of(1)
    async with opened(service) as access:
        [data] = await fill(access, info, 1)
        service.open.clear()
        reading = [asyncio.create_task(access.get(info._replace(place=Place(ino, 0)), 0)) for ino in (1, 2, 1)]
        await asyncio.sleep(0.01)
        service.open.set()
        found = await asyncio.gather(*reading, return_exceptions=True)
        assert isinstance(found[0], ObjectMissing)
        assert found[1] == data


async def test_what_is_kept_of_urls_is_bounded(bucket: Bucket) -> None:
    service = Service(bucket)
    async with opened(service) as access:
        for number in range(URLS_KEPT // AHEAD + 10):
            await access._have(slice_of(AHEAD // 2, number + 1), 0)
            await access._have(slice_of(AHEAD // 2, number + 100_000), 0)
        assert len(access._urls) == URLS_KEPT


async def test_outages_are_retried_and_no_message_has_a_url(bucket: Bucket, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    [port] = free_ports(1)
    away = Service(bucket.at(f"http://{HOST}:{port}"))
    async with opened(away, limits=Limits(attempt_timeout_s=1.0, budget_s=1.5)) as access:
        with pytest.raises(BucketUnavailable) as told:
            await access.get(slice_of(1), 0)
        assert access.counters()["get"].retries >= 1
    wrong = Service(bucket)
    wrong._signer = S3Signer(bucket.url, {**KEYS, "AWS_SECRET_ACCESS_KEY": "wrong"})
    async with opened(wrong) as access:
        with pytest.raises(BucketDenied, match="keys set") as denied:
            await access.get(slice_of(1), 0)
        assert access.counters()["get"].requests == 1
    for text in (str(told.value), repr(told.value.__cause__), str(denied.value), caplog.text):
        assert "Signature=" not in text
        assert "X-Amz" not in text
