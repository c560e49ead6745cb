"""The fault proxy changes nothing it is not told to change, and makes each fault happen as its name says."""

from __future__ import annotations

import hashlib
import random
import time

import obstore
import pytest
from obstore.exceptions import BaseError
from obstore.store import S3Store

from tests.servers.buckets import Bucket
from tests.servers.faults import Altered, Delay, Dropped, Fault, FaultProxy, Hang, LostAnswer, Slow, Status, Torn
from tests.servers.seaweedfs import SeaweedFS


@pytest.fixture
def proxied(bucket: Bucket, fault_proxy: FaultProxy) -> S3Store:
    """Open the bucket through the proxy, with a short patience."""
    return bucket.at(fault_proxy.endpoint).store(timeout_s=10)


@pytest.mark.parametrize("key", ["plain", "deep/er/key", "spaces and + and %25 and é", "a=b&c?d#e", "~(x)*'!"])
def test_signed_requests_of_all_kinds_pass_unchanged(
    key: str, proxied: S3Store, bucket: Bucket, fault_proxy: FaultProxy, seed: int
) -> None:
    content = random.Random(seed).randbytes(3_000_000)
    obstore.put(proxied, key, content, use_multipart=False)
    assert bytes(obstore.get(proxied, key).bytes()) == content
    assert bytes(obstore.get_range(proxied, key, start=1_000_000, end=1_000_100)) == content[1_000_000:1_000_100]
    assert obstore.head(proxied, key)["size"] == len(content)
    assert [meta["path"] for page in obstore.list(proxied) for meta in page] == bucket.keys()
    assert bytes(obstore.get(bucket.store(), bucket.keys()[0]).bytes()) == content
    obstore.delete(proxied, key)
    assert bucket.keys() == []
    assert fault_proxy.count(method="PUT") == 1
    assert all(request.bucket == bucket.name and request.fault is None for request in fault_proxy.requests)


def test_an_upload_in_parts_passes_unchanged(proxied: S3Store, bucket: Bucket, seed: int) -> None:
    content = random.Random(seed).randbytes(12 * 1024 * 1024)
    obstore.put(proxied, "big", content, use_multipart=True, chunk_size=5 * 1024 * 1024)
    stored = obstore.get(bucket.store(), "big").bytes()
    assert hashlib.sha256(stored).digest() == hashlib.sha256(content).digest()


def test_a_wrong_key_is_refused_through_the_proxy_too(
    s3_server: SeaweedFS, bucket: Bucket, fault_proxy: FaultProxy
) -> None:
    stranger = S3Store(
        bucket.name,
        endpoint=fault_proxy.endpoint,
        region="us-east-1",
        access_key_id=bucket.access_key_id,
        secret_access_key="wrong",
        client_options={"allow_http": True},
    )
    with pytest.raises(obstore.exceptions.PermissionDeniedError, match="SignatureDoesNotMatch"):
        obstore.get(stranger, "key")


@pytest.mark.parametrize("code", [500, 503])
def test_a_status_is_answered_so_many_times_and_the_server_sees_none_of_it(
    code: int, proxied: S3Store, bucket: Bucket, fault_proxy: FaultProxy, s3_server: SeaweedFS
) -> None:
    rule = fault_proxy.inject(Status(code), method="PUT", times=2)
    for _ in range(2):
        with pytest.raises(BaseError, match=str(code)):
            obstore.put(proxied, "key", bytes(3_000_000), use_multipart=False)
    assert s3_server.requests(bucket.name).by_type["PUT"] == 1, "the one that made the bucket"
    obstore.put(proxied, "key", b"bytes", use_multipart=False)
    assert rule.hits == 2
    assert [request.status for request in fault_proxy.requests] == [code, code, 200]


def test_a_fraction_of_the_requests_fails_and_the_seed_says_which(bucket: Bucket, s3_server: SeaweedFS) -> None:
    def statuses(seed: int) -> list[int | None]:
        with FaultProxy(s3_server.endpoint, seed=seed) as proxy:
            proxy.inject(Status(503), fraction=0.3)
            store = bucket.at(proxy.endpoint).store()
            for index in range(60):
                try:
                    obstore.head(store, f"key-{index}")
                except (BaseError, FileNotFoundError):
                    continue
            return [request.status for request in proxy.requests]

    first = statuses(7)
    assert 5 <= first.count(503) <= 35
    assert first.count(503) + first.count(404) == 60
    assert statuses(7) == first
    assert statuses(8) != first


def test_a_rule_is_for_the_keys_and_methods_that_it_names(proxied: S3Store, fault_proxy: FaultProxy) -> None:
    fault_proxy.inject(Status(500), method="GET", key=r"\.1$")
    for index in range(2):
        obstore.put(proxied, f"block.{index}", b"bytes", use_multipart=False)
    assert obstore.get(proxied, "block.0").bytes() == b"bytes"
    with pytest.raises(BaseError, match="500"):
        obstore.get(proxied, "block.1")
    fault_proxy.clear()
    assert obstore.get(proxied, "block.1").bytes() == b"bytes"
    assert fault_proxy.count(method="GET", key=r"block\.1") == 2


def test_a_torn_answer_is_an_error_for_the_reader(proxied: S3Store, fault_proxy: FaultProxy) -> None:
    obstore.put(proxied, "key", bytes(300_000), use_multipart=False)
    fault_proxy.inject(Torn(after_bytes=100_000), method="GET", times=1)
    received = 0
    with pytest.raises(BaseError):
        for piece in obstore.get(proxied, "key").stream(min_chunk_size=1000):
            received += len(piece)
    assert 0 < received <= 100_000
    assert len(obstore.get(proxied, "key").bytes()) == 300_000


@pytest.mark.parametrize("offset", [0, 150_000, -1])
def test_an_altered_answer_differs_in_one_byte(offset: int, proxied: S3Store, fault_proxy: FaultProxy) -> None:
    obstore.put(proxied, "key", bytes(200_000), use_multipart=False)
    fault_proxy.inject(Altered(offset), method="GET")
    expected = bytearray(200_000)
    expected[offset] = 0xFF
    assert obstore.get(proxied, "key").bytes() == bytes(expected)


def test_a_request_whose_answer_is_lost_was_carried_out(
    proxied: S3Store, bucket: Bucket, fault_proxy: FaultProxy
) -> None:
    fault_proxy.inject(LostAnswer(), method="PUT", times=1)
    with pytest.raises(BaseError):
        obstore.put(proxied, "key", b"bytes", use_multipart=False)
    assert bucket.keys() == ["key"]


def test_a_dropped_request_was_not_carried_out(proxied: S3Store, bucket: Bucket, fault_proxy: FaultProxy) -> None:
    fault_proxy.inject(Dropped(), method="PUT", times=1)
    with pytest.raises(BaseError):
        obstore.put(proxied, "key", b"bytes", use_multipart=False)
    assert bucket.keys() == []


@pytest.mark.parametrize("fault", [Delay(0.3), Slow(bytes_per_s=1000)])
def test_late_and_slow_answers_are_whole(fault: Fault, proxied: S3Store, fault_proxy: FaultProxy) -> None:
    obstore.put(proxied, "key", bytes(300), use_multipart=False)
    fault_proxy.inject(fault, method="GET")
    started = time.monotonic()
    assert obstore.get(proxied, "key").bytes() == bytes(300)
    assert time.monotonic() - started >= 0.3, "a lower bound: the proxy itself waits"


def test_a_request_that_hangs_ends_when_the_client_gives_up(bucket: Bucket, fault_proxy: FaultProxy) -> None:
    impatient = bucket.at(fault_proxy.endpoint).store(timeout_s=0.2)
    fault_proxy.inject(Hang(), method="GET", times=1)
    with pytest.raises(BaseError):
        obstore.get(impatient, "key")
    with pytest.raises(FileNotFoundError):
        obstore.get(bucket.at(fault_proxy.endpoint).store(), "key")


def test_connections_are_refused_until_the_block_ends(proxied: S3Store, fault_proxy: FaultProxy) -> None:
    obstore.put(proxied, "key", b"bytes", use_multipart=False)
    with fault_proxy.refusing(), pytest.raises(BaseError):
        obstore.get(proxied, "key")
    assert obstore.get(proxied, "key").bytes() == b"bytes"


def test_a_server_that_is_down_looks_like_one_through_the_proxy(own_s3_server: SeaweedFS, seed: int) -> None:
    with FaultProxy(own_s3_server.endpoint, seed=seed) as proxy:
        store = own_s3_server.bucket("atoll-down").at(proxy.endpoint).store()
        own_s3_server.kill()
        with pytest.raises(BaseError):
            obstore.get(store, "key")
