"""S3 through obstore: its errors as ours, against a real server and through a proxy that makes faults."""

from __future__ import annotations

import asyncio
import json
import threading
import time
import urllib.request
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from typing import Self

import pytest

from chunkstore.buckets import Limits, open_bucket
from chunkstore.buckets.cloud import CloudStore
from chunkstore.buckets.create import create_bucket
from chunkstore.buckets.retry import RetryingStore, RetryPolicy
from chunkstore.buckets.url import parse_bucket_url
from chunkstore.errors import (
    AtollError,
    BucketDenied,
    BucketInvalid,
    BucketUnavailable,
    ObjectExists,
    ObjectMissing,
)
from chunkstore.signing import S3Signer
from tests.servers.buckets import Bucket
from tests.servers.faults import (
    Delay,
    Dropped,
    Fault,
    FaultProxy,
    Hang,
    LostAnswer,
    Slow,
    Status,
    Torn,
)
from tests.servers.ports import HOST, free_ports
from tests.servers.seaweedfs import SeaweedFS

CONTENT = bytes(range(256)) * 4096


def _run(use: Awaitable[None]) -> None:
    async def run() -> None:
        async with asyncio.timeout(100):
            await use

    asyncio.run(run())


def _bare(bucket: Bucket, *, env: Mapping[str, str] | None = None, attempt_timeout_s: float = 10) -> CloudStore:
    return CloudStore(
        parse_bucket_url(bucket.url),
        env=bucket.environment if env is None else env,
        attempt_timeout_s=attempt_timeout_s,
    )


def _all_calls(store: CloudStore | RetryingStore) -> dict[str, Callable[[], Awaitable[object]]]:
    async def listing() -> None:
        async for _ in store.list():
            pass

    return {
        "get": lambda: store.get("a/b"),
        "range": lambda: store.get("a/b", start=1, end=5),
        "put": lambda: store.put("a/b", b"x"),
        "put_if_absent": lambda: store.put("a/c", b"x", if_absent=True),
        "delete": lambda: store.delete(["a/b"]),
        "head": lambda: store.head("a/b"),
        "list": listing,
        "probe": store.probe,
    }


CALLS = ("get", "range", "put", "put_if_absent", "delete", "head", "list", "probe")


@pytest.mark.parametrize("call", CALLS)
def test_wrong_keys_are_told_with_the_remedy(call: str, bucket: Bucket) -> None:
    async def use() -> None:
        for env in (
            {**bucket.environment, "AWS_SECRET_ACCESS_KEY": "wrong"},
            {**bucket.environment, "AWS_ACCESS_KEY_ID": "nobody"},
        ):
            with pytest.raises(BucketDenied) as caught:
                await _all_calls(_bare(bucket, env=env))[call]()
            assert "check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY" in str(caught.value)
            assert len(str(caught.value).splitlines()) == 1
            assert "wrong" not in str(caught.value)

    _run(use())


@pytest.mark.parametrize("call", ["get", "range", "put", "put_if_absent", "delete", "list", "probe"])
def test_a_bucket_that_does_not_exist_is_told_with_the_remedy(call: str, bucket: Bucket) -> None:
    async def use() -> None:
        with pytest.raises(
            BucketInvalid, match=r"NoSuchBucket.*create the bucket first, or format with --create-bucket"
        ):
            await _all_calls(_bare(replace(bucket, name="no-such-bucket")))[call]()

    _run(use())


@pytest.mark.parametrize("call", CALLS)
def test_a_server_that_is_not_there_is_unavailable(call: str, bucket: Bucket) -> None:
    async def use() -> None:
        nowhere = bucket.at(f"http://{HOST}:{free_ports(1)[0]}")
        with pytest.raises(BucketUnavailable, match="Connection refused: check the endpoint, and that the server runs"):
            await _all_calls(_bare(nowhere))[call]()

    _run(use())


def test_a_host_that_has_no_address_is_told(bucket: Bucket) -> None:
    async def use() -> None:
        with pytest.raises(BucketUnavailable, match="host name not found: check the endpoint"):
            await _bare(bucket.at("http://host.invalid:9000")).get("a")

    _run(use())


@pytest.mark.parametrize(
    ("url", "env", "remedy"),
    [
        ("s3://bkt?endpoint=http://host:1", {}, "no bucket keys: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"),
        ("s3://bkt?endpoint=http://host:1", {"AWS_ACCESS_KEY_ID": "a"}, "no AWS_SECRET_ACCESS_KEY: set"),
        ("s3://bkt", {"AWS_SECRET_ACCESS_KEY": "a"}, "no AWS_ACCESS_KEY_ID: set"),
        ("s3://bkt", {"AWS_ENDPOINT_URL": "http://host:1"}, "no bucket keys: set"),
        ("az://box", {}, "no storage account: set AZURE_STORAGE_ACCOUNT_NAME"),
    ],
)
def test_missing_keys_are_told_before_anything_is_sent(url: str, env: dict[str, str], remedy: str) -> None:
    with pytest.raises(BucketDenied) as caught:
        open_bucket(url, env=env)
    assert remedy in str(caught.value)


def test_settings_that_no_store_can_have_are_refused_in_one_line() -> None:
    with pytest.raises(BucketInvalid) as caught:
        open_bucket("az://box", env={"AZURE_STORAGE_ACCOUNT_NAME": "a", "AZURE_STORAGE_ACCOUNT_KEY": "not base64!"})
    assert len(str(caught.value).splitlines()) == 1


def test_an_endpoint_may_come_from_the_environment(bucket: Bucket) -> None:
    async def use() -> None:
        place = f"s3://{bucket.name}/{bucket.prefix}"
        store = open_bucket(place, env={**bucket.environment, "AWS_ENDPOINT_URL": bucket.endpoint})
        await store.put("a", b"1")
        await store.close()
        assert bucket.keys() == ["a"]

    _run(use())


def test_gcs_and_azure_stores_are_made_of_url_and_environment() -> None:
    """They need a provider to be used; that their requests go where the URL says is seen by refused connections."""

    async def use() -> None:
        endpoint = f"http://{HOST}:{free_ports(1)[0]}"
        # An account that needs no token: it would be asked for elsewhere.
        account = {"disable_oauth": True, "client_email": "", "private_key": "", "private_key_id": ""}
        for url, env in (
            (f"gs://bkt/p?endpoint={endpoint}", {"GOOGLE_SERVICE_ACCOUNT_KEY": json.dumps(account)}),
            (f"az://box/p?endpoint={endpoint}&account=acc", {"AZURE_STORAGE_ACCOUNT_KEY": "bm90IGEga2V5"}),
        ):
            store = CloudStore(parse_bucket_url(url), env=env, attempt_timeout_s=10)
            for call in ("get", "put", "delete", "head", "list"):
                with pytest.raises(BucketUnavailable, match="Connection refused"):
                    await _all_calls(store)[call]()

    _run(use())


# Retries, through the proxy.


def _patient(bucket: Bucket, proxy: FaultProxy, *, attempt_timeout_s: float = 1) -> RetryingStore:
    """Open the bucket through the proxy, with delays that suit a test."""
    return RetryingStore(
        _bare(bucket.at(proxy.endpoint), attempt_timeout_s=attempt_timeout_s),
        limits=Limits(attempt_timeout_s=attempt_timeout_s),
        policy=RetryPolicy(first_delay_s=0.01, max_delay_s=0.1),
    )


FAULTS: dict[str, Fault] = {
    "500": Status(500),
    "502": Status(502),
    "503": Status(503),
    "429": Status(429),
    "408": Status(408),
    "dropped": Dropped(),
    "lost answer": LostAnswer(),
    "hang": Hang(),
    "late": Delay(2.5),
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS.keys())
def test_a_passing_fault_is_not_seen_by_the_caller(fault: Fault, bucket: Bucket, fault_proxy: FaultProxy) -> None:
    async def use() -> None:
        store = _patient(bucket, fault_proxy)
        times = 1 if isinstance(fault, Hang | Delay) else 3

        fault_proxy.inject(fault, method="PUT", key="/put$", times=times)
        await store.put("put", CONTENT)
        fault_proxy.inject(fault, method="PUT", key="/put-if-absent$", times=times)
        await store.put("put-if-absent", CONTENT, if_absent=True)
        assert bucket.keys() == ["put", "put-if-absent"]

        fault_proxy.inject(fault, method="GET", key="/put$", times=times)
        assert await store.get("put") == CONTENT
        fault_proxy.inject(fault, method="GET", key="/put-if-absent$", times=times)
        assert await store.get("put-if-absent", start=1000, end=300_000) == CONTENT[1000:300_000]
        fault_proxy.inject(fault, method="HEAD", times=times)
        assert (await store.head("put")).size_bytes == len(CONTENT)
        fault_proxy.inject(fault, method="GET", key="^$", times=times)
        assert [info.key async for info in store.list()] == ["put", "put-if-absent"]

        fault_proxy.inject(fault, method="POST", times=times)
        await store.delete(["put", "absent"])
        assert bucket.keys() == ["put-if-absent"]

        assert sum(1 for request in fault_proxy.requests if request.fault) == 7 * times
        counted = store.counters()
        assert sum(verb.retries for verb in counted.values()) >= 7 * times
        assert sum(verb.errors for verb in counted.values()) == 0
        await store.close()

    _run(use())


@pytest.mark.parametrize("after_bytes", [0, 1, 70_000, len(CONTENT) - 1])
def test_a_torn_answer_is_never_data(after_bytes: int, bucket: Bucket, fault_proxy: FaultProxy) -> None:
    async def use() -> None:
        store = _patient(bucket, fault_proxy)
        await store.put("a", CONTENT)
        fault_proxy.inject(Torn(after_bytes), method="GET", times=2)
        assert await store.get("a") == CONTENT
        fault_proxy.inject(Torn(min(after_bytes, 999)), method="GET", times=2)
        assert await store.get("a", start=5, end=1005) == CONTENT[5:1005]
        assert store.counters()["get"].retries == 4

    _run(use())


def test_an_answer_that_comes_too_slowly_is_given_up_and_repeated(bucket: Bucket, fault_proxy: FaultProxy) -> None:
    async def use() -> None:
        store = _patient(bucket, fault_proxy)
        await store.put("a", CONTENT)
        rule = fault_proxy.inject(Slow(100_000), method="GET", times=1)
        assert await store.get("a") == CONTENT
        assert rule.hits == 1
        assert store.counters()["get"].retries == 1

    _run(use())


def test_a_put_if_absent_whose_answers_are_all_lost_but_one_is_done_once(
    bucket: Bucket, fault_proxy: FaultProxy
) -> None:
    async def use() -> None:
        store = _patient(bucket, fault_proxy)
        fault_proxy.inject(LostAnswer(), method="PUT", times=2)
        await store.put("a", CONTENT, if_absent=True)
        assert [r.status for r in fault_proxy.requests if r.method == "PUT"] == [None, None, 412]
        with pytest.raises(ObjectExists):
            await store.put("a", CONTENT[:-1], if_absent=True)
        assert bucket.keys() == ["a"]

    _run(use())


class AlteringProxy:
    """Pass connections on to a server, changing a word in what the client sends, a number of times."""

    def __init__(self, upstream: str, *, word: bytes, times: int) -> None:
        host, _, port = upstream.removeprefix("http://").partition(":")
        self._upstream = host, int(port)
        self._word = word
        self.times_left = times

        self._connections: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, HOST)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for connection in self._connections:
            connection.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    @property
    def endpoint(self) -> str:
        return f"http://{HOST}:{self._server.sockets[0].getsockname()[1]}"

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._connections.add(asyncio.ensure_future(self._pass_on(reader, writer)))

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        server_reader, server_writer = await asyncio.open_connection(*self._upstream)
        try:
            await asyncio.gather(self._pump(reader, server_writer), self._pump(server_reader, writer))
        finally:
            for each in (writer, server_writer):
                each.transport.abort()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(1 << 16):
            if self._word in data and self.times_left:
                self.times_left -= 1
                data = data.replace(self._word, self._word.swapcase())
            writer.write(data)
            await writer.drain()


@pytest.mark.parametrize("if_absent", [False, True])
def test_a_put_that_was_altered_on_its_way_is_sent_again(if_absent: bool, bucket: Bucket) -> None:  # noqa: FBT001
    data = b"x" * 1000 + b"ALTERME" + b"y" * 200_000

    async def use() -> None:
        async with AlteringProxy(bucket.endpoint, word=b"ALTERME", times=2) as proxy:
            store = open_bucket(bucket.at(proxy.endpoint).url, env=bucket.environment)
            await store.put("a", data, if_absent=if_absent)
            assert proxy.times_left == 0
            assert store.counters()["put"].retries == 2
        assert await _bare(bucket).get("a") == data

    _run(use())


def test_checksums_can_be_turned_off_for_servers_that_refuse_them(bucket: Bucket) -> None:
    async def use() -> None:
        async with AlteringProxy(bucket.endpoint, word=b"x-amz-checksum-sha256: ", times=1) as proxy:
            env = {**bucket.environment, "AWS_CHECKSUM_ALGORITHM": "none"}
            store = open_bucket(bucket.at(proxy.endpoint).url, env=env)
            await store.put("a", b"1")
            assert proxy.times_left == 1

    _run(use())


def test_what_the_server_refuses_for_good_is_asked_once(bucket: Bucket, fault_proxy: FaultProxy) -> None:
    async def use() -> None:
        store = _patient(bucket, fault_proxy)
        with pytest.raises(ObjectMissing):
            await store.get("absent")
        for code, kind in ((403, BucketDenied), (401, BucketDenied), (501, BucketInvalid), (400, BucketInvalid)):
            fault_proxy.inject(Status(code), key=f"/{code}$")
            with pytest.raises(kind):
                await store.get(str(code))
            assert fault_proxy.count(key=f"/{code}$") == 1
        assert fault_proxy.count(key="/absent$") == 1

    _run(use())


def test_when_the_budget_is_spent_the_cause_is_told(bucket: Bucket, fault_proxy: FaultProxy) -> None:
    async def use() -> None:
        store = _patient(bucket, fault_proxy)
        fault_proxy.inject(Status(503), key="/a$")
        with pytest.raises(BucketUnavailable, match=r": a: HTTP 503 \(no details\) \(gave up after \d+ attempts"):
            await store.get("a", timeout_s=1.5)
        assert fault_proxy.count(key="/a$") > 1

    _run(use())


def test_many_calls_get_through_a_server_that_fails_a_third_of_the_time(
    bucket: Bucket, fault_proxy: FaultProxy
) -> None:
    async def use() -> None:
        # Long: a put that was given up may still be carried out, even after a later delete.
        store = _patient(bucket, fault_proxy, attempt_timeout_s=30)
        for fault in (Status(503), LostAnswer(), Dropped(), Torn(3)):
            fault_proxy.inject(fault, fraction=0.1)

        async def one(n: int) -> None:
            key, data = f"a/{n}", bytes([n]) * (n * 500 + 1)
            await store.put(key, data, if_absent=bool(n % 2))
            assert await store.get(key) == data
            if n % 3 == 0:
                await store.delete([key])

        await asyncio.gather(*(one(n) for n in range(60)))
        assert {info.key async for info in store.list("a/")} == {f"a/{n}" for n in range(60) if n % 3}
        counted = store.counters()
        assert sum(verb.retries for verb in counted.values()) > 10
        assert sum(verb.errors for verb in counted.values()) == 0

    _run(use())


def test_a_server_that_is_killed_and_started_again_is_only_a_delay(own_s3_server: SeaweedFS) -> None:
    own_s3_server.create_bucket("outage")
    bucket = own_s3_server.bucket("outage", prefix="p")
    acknowledged = threading.Event()

    async def use() -> None:
        store = open_bucket(bucket.url, env=bucket.environment, limits=Limits(attempt_timeout_s=5))

        async def one(task: int) -> None:
            for step in range(12):
                key, data = f"a/{task}-{step}", CONTENT[: 1000 * task + step]
                await store.put(key, data)
                assert await store.get(key) == data
                acknowledged.set()

        restart = asyncio.ensure_future(asyncio.to_thread(_restart))
        while not restart.done():
            await asyncio.gather(*(one(task) for task in range(4)))
        await restart
        counted = store.counters()
        assert counted["put"].retries + counted["get"].retries > 0
        assert counted["put"].errors + counted["get"].errors == 0
        assert len(bucket.keys()) == 48

    def _restart() -> None:
        assert acknowledged.wait(60)
        own_s3_server.kill()
        own_s3_server.start()

    _run(use())


def test_probing_reports_a_server_that_is_not_there_within_seconds(bucket: Bucket) -> None:
    async def use() -> None:
        store = open_bucket(bucket.at(f"http://{HOST}:{free_ports(1)[0]}").url, env=bucket.environment)
        began = time.monotonic()
        with pytest.raises(BucketUnavailable, match="Connection refused"):
            await store.probe()
        # Far from the two minutes that a mounted volume would wait, whatever else this machine does.
        assert time.monotonic() - began < 60

    _run(use())


def test_probing_notices_a_bucket_that_may_not_be_written(bucket: Bucket, fault_proxy: FaultProxy) -> None:
    async def use() -> None:
        store = _patient(bucket, fault_proxy)
        for method in ("PUT", "GET", "POST"):
            fault_proxy.inject(Status(403), method=method)
            with pytest.raises(BucketDenied):
                await store.probe()
            fault_proxy.clear()
            await store.probe()

    _run(use())


# Creating buckets.


def test_a_bucket_is_created_once_and_again_without_harm(s3_server: SeaweedFS) -> None:
    bucket = s3_server.bucket("made-by-format", prefix="p")

    async def use() -> None:
        with pytest.raises(BucketInvalid):
            await _bare(bucket).probe()
        told = [await create_bucket(bucket.url, env=bucket.environment) for _ in range(2)]
        await _bare(bucket).probe()
        # What this server does not have is told, what is set already stays.
        closed = "the bucket is not closed to the public: the provider says NotImplemented"
        assert told[0] == [closed, "the bucket is rid of broken uploads after a week"]
        assert told[1] == [closed, "lifecycle of the bucket stays as it was set"]
        signed = S3Signer(bucket.url, bucket.environment).setting("lifecycle", sha256=None, life_s=60)
        with urllib.request.urlopen(signed.url, timeout=20) as answer:
            assert b"<AbortIncompleteMultipartUpload><DaysAfterInitiation>7<" in answer.read()

    try:
        _run(use())
    finally:
        s3_server.delete_bucket("made-by-format")


@pytest.mark.parametrize("name", ["ab", "Upper", "under_score"])
def test_a_bucket_of_a_forbidden_name_is_refused(name: str, s3_server: SeaweedFS) -> None:
    bucket = s3_server.bucket(name)

    async def use() -> None:
        with pytest.raises(BucketInvalid, match=r"InvalidBucketName.*choose another name"):
            await create_bucket(bucket.url, env=bucket.environment)

    _run(use())


def test_creating_a_bucket_with_wrong_keys_or_nowhere_fails_with_the_remedy(bucket: Bucket) -> None:
    async def use() -> None:
        cases: list[tuple[str, dict[str, str], type[AtollError], str]] = [
            (bucket.url, {**bucket.environment, "AWS_SECRET_ACCESS_KEY": "x"}, BucketDenied, "check the keys"),
            (bucket.at(f"http://{HOST}:{free_ports(1)[0]}").url, bucket.environment, BucketUnavailable, "reached"),
            ("gs://bkt", {}, BucketInvalid, "provider's own tools"),
        ]
        for url, env, kind, remedy in cases:
            with pytest.raises(kind, match=remedy):
                await create_bucket(url, env=env)

    _run(use())
