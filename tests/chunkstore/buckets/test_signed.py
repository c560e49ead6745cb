"""A bucket by URLs that somebody signs, on a server that checks signatures: the contract of stores, pages, refusals."""

from __future__ import annotations

import asyncio
import contextlib
import http.server
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from urllib.parse import parse_qs, urlsplit

import pytest

from chunkstore.buckets import Limits, ObjectInfo
from chunkstore.buckets.cloud import CloudStore
from chunkstore.buckets.list_page import MAX_PAGE_BYTES, parse_page
from chunkstore.buckets.retry import RetryingStore
from chunkstore.buckets.signed import SIGNED_AT_ONCE, SignedStore, Verb
from chunkstore.buckets.url import parse_bucket_url
from chunkstore.errors import AtollError, BucketDenied, BucketInvalid, BucketUnavailable, ObjectMissing
from chunkstore.geometry import Buffer
from chunkstore.signing import S3Signer
from tests.chunkstore.buckets.contract import CHECKS, UUID, Check
from tests.chunkstore.test_signing import send
from tests.servers.buckets import Bucket
from tests.servers.ports import HOST
from tests.servers.seaweedfs import ACCESS_KEY_ID, SECRET_ACCESS_KEY

KEYS = {"AWS_ACCESS_KEY_ID": ACCESS_KEY_ID, "AWS_SECRET_ACCESS_KEY": SECRET_ACCESS_KEY}


class Service:
    """Who has the keys: signs all that it is asked for, and counts."""

    def __init__(self, bucket_url: str, *, clock: Callable[[], float] = time.time) -> None:
        self._signer = S3Signer(bucket_url, KEYS, clock=clock)
        self.asked: list[tuple[Verb, int]] = []
        self.refusals: list[AtollError] = []

    async def sign(self, verb: Verb, keys: Sequence[str], *, start_after: str = "") -> Sequence[str]:
        self.asked.append((verb, len(keys)))
        if self.refusals:
            raise self.refusals.pop()
        if verb == "list":
            return [self._signer.listing(keys[0], start_after=start_after, life_s=60)]
        sign = {"head": self._signer.head, "get": self._signer.get, "delete": self._signer.delete}[verb]
        return [sign(key, life_s=60) for key in keys]


class PutElsewhere(SignedStore):
    """What the contract puts is put with keys: by URLs nothing is."""

    def __init__(self, bucket: Bucket) -> None:
        super().__init__(Service(bucket.url), bucket.url)
        self._keyed = CloudStore(parse_bucket_url(bucket.url), env=bucket.environment, attempt_timeout_s=30)

    async def put(self, key: str, data: Buffer, *, if_absent: bool = False, timeout_s: float | None = None) -> None:
        await self._keyed.put(key, data, if_absent=if_absent)

    async def probe(self) -> None:
        await self._keyed.probe()


@pytest.mark.parametrize("kind", ["bare", "retried"])
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_it_keeps_the_contract(check: Check, bucket: Bucket, kind: str) -> None:
    async def run() -> None:
        bare = PutElsewhere(bucket)
        store = RetryingStore(bare, limits=Limits(max_gets=3, max_puts=2)) if kind == "retried" else bare
        try:
            async with asyncio.timeout(60):
                await check(store)
        finally:
            await store.close()

    asyncio.run(run())


@contextlib.asynccontextmanager
async def opened(service: Service, bucket_url: str) -> AsyncIterator[SignedStore]:
    store = SignedStore(service, bucket_url)
    try:
        yield store
    finally:
        await store.close()


async def put_all(bucket: Bucket, keys: Sequence[str]) -> None:
    store = CloudStore(parse_bucket_url(bucket.url), env=bucket.environment, attempt_timeout_s=30)
    for start in range(0, len(keys), 50):
        await asyncio.gather(*(store.put(key, b"x") for key in keys[start : start + 50]))


async def test_thousands_of_objects_are_listed_page_by_page_and_deleted_in_few_requests_for_urls(
    bucket: Bucket,
) -> None:
    keys = sorted(f"{UUID}/0/{number:x}.0" for number in range(2100))
    others = [f"{UUID}0/0/1.0", "zzz/1"]
    await put_all(bucket, [*keys, *others])
    service = Service(bucket.url)
    async with opened(service, bucket.url) as store:
        assert [info.key async for info in store.list(f"{UUID}/")] == keys
        assert service.asked == [("list", 1)] * 3
        assert [info.key async for info in store.list(f"{UUID}/", start_after=keys[1050])] == keys[1051:]
        service.asked.clear()
        await store.delete(keys[:1000])
        assert [count for _, count in service.asked] == [SIGNED_AT_ONCE] * 3 + [1000 - 3 * SIGNED_AT_ONCE]
        assert [info.key async for info in store.list(f"{UUID}/")] == keys[1000:]
        await store.delete(keys[:1000])
    assert bucket.keys() == sorted([*keys[1000:], *others])


async def test_it_describes_objects_as_one_with_keys_does(bucket: Bucket) -> None:
    keyed = CloudStore(parse_bucket_url(bucket.url), env=bucket.environment, attempt_timeout_s=30)
    await keyed.put(f"{UUID}/0/1.0", b"some bytes")
    async with opened(Service(bucket.url), bucket.url) as store:
        theirs = await keyed.head(f"{UUID}/0/1.0")
        ours = await store.head(f"{UUID}/0/1.0")
        [listed] = [info async for info in store.list(f"{UUID}/")]
        [listed_with_keys] = [info async for info in keyed.list(f"{UUID}/")]
        assert ours == theirs
        assert listed == listed_with_keys
        with pytest.raises(ObjectMissing):
            await store.head(f"{UUID}/0/2.0")


async def test_a_url_lists_the_page_that_it_was_signed_for_and_no_other(bucket: Bucket) -> None:
    await put_all(bucket, [f"{UUID}/0/1.0", f"{UUID}/0/2.0", "other/0/1.0"])
    [url] = await Service(bucket.url).sign("list", [f"{UUID}/"], start_after=f"{UUID}/0/1.0")
    status, text = await asyncio.to_thread(send, "GET", url)
    assert status == 200
    assert [info.key for info in parse_page(text, where="it").objects] == [f"{bucket.prefix}/{UUID}/0/2.0"]
    query = parse_qs(urlsplit(url).query)
    assert query["prefix"] == [f"{bucket.prefix}/{UUID}/"]
    for tampered in (
        url.replace(f"%2F{UUID}%2F&", "%2Fother%2F&"),
        url.replace(f"prefix={bucket.prefix.replace('/', '%2F')}%2F{UUID}%2F", "prefix="),
        url.replace(f"&prefix={bucket.prefix.replace('/', '%2F')}%2F{UUID}%2F", ""),
        url.replace("start-after=", "start-after=x"),
        url + "&delimiter=%2F",
        url + "&continuation-token=x",
        url + "&prefix=",
        url.replace("list-type=2", "list-type=1"),
        url.replace("list-type=2&", ""),
        url.replace("max-keys=1000", "max-keys=9999"),
        url.replace(f"/{bucket.name}?", "/?"),
        url.replace(f"/{bucket.name}?", f"/{bucket.name}/{bucket.prefix}/other/0/1.0?"),
    ):
        assert tampered != url
        status, text = await asyncio.to_thread(send, "GET", tampered)
        assert status == 403, (tampered, text)
    for method in ("PUT", "DELETE", "POST"):
        assert (await asyncio.to_thread(send, method, url))[0] in (403, 405)


async def test_a_url_does_what_it_was_signed_for_and_nothing_else(bucket: Bucket) -> None:
    await put_all(bucket, [f"{UUID}/0/1.0", f"{UUID}/0/2.0"])
    service = Service(bucket.url)
    for verb, method in (("head", "HEAD"), ("get", "GET"), ("delete", "DELETE")):
        [url] = await service.sign(verb, [f"{UUID}/0/1.0"])  # type: ignore[arg-type]
        for other in {"HEAD", "GET", "DELETE", "PUT"} - {method}:
            assert (await asyncio.to_thread(send, other, url))[0] == 403, (verb, other)
        assert (await asyncio.to_thread(send, method, url.replace("/1.0?", "/2.0?")))[0] == 403
        assert (await asyncio.to_thread(send, method, url))[0] in (200, 204)
    assert bucket.keys() == [f"{UUID}/0/2.0"]


async def test_who_signs_may_be_away_for_a_while_and_refuses_at_once(bucket: Bucket) -> None:
    await put_all(bucket, [f"{UUID}/0/{number}.0" for number in range(3)])
    service = Service(bucket.url)
    async with opened(service, bucket.url) as bare:
        store = RetryingStore(bare, limits=Limits())
        service.refusals = [BucketUnavailable("the service is away")] * 2
        assert len([info async for info in store.list(f"{UUID}/")]) == 3
        service.refusals = [BucketUnavailable("the service is away")]
        assert await store.get(f"{UUID}/0/1.0") == b"x"
        service.refusals = [BucketDenied("not for you")]
        with pytest.raises(BucketDenied, match="not for you"):
            await store.delete([f"{UUID}/0/1.0"])
        with pytest.raises(BucketDenied, match="nobody puts"):
            await store.put(f"{UUID}/0/1.0", b"x")
        assert len([info async for info in store.list(f"{UUID}/")]) == 3


async def test_clocks_that_are_apart_are_told_and_no_url_is(bucket: Bucket) -> None:
    async with opened(Service(bucket.url, clock=lambda: time.time() - 1000), bucket.url) as store:
        for call in (store.get(f"{UUID}/0/1.0"), anext(store.list(f"{UUID}/")), store.delete([f"{UUID}/0/1.0"])):
            with pytest.raises(BucketDenied, match="clocks") as told:
                await call
            assert "Signature" not in str(told.value)


# -- what a bucket says ---------------------------------------------------------------------------------------------------


def page(*keys: str, truncated: bool = False, size: str = "1") -> bytes:
    contents = "".join(
        f"<Contents><Key>{key}</Key><Size>{size}</Size><LastModified>2026-01-02T03:04:05.678Z</LastModified>"
        f"<ETag>&quot;e&quot;</ETag><Owner><ID>i</ID></Owner></Contents>"
        for key in keys
    )
    return (
        '<?xml version="1.0" encoding="UTF-8"?><ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
        f"<Name>b</Name><IsTruncated>{str(truncated).lower()}</IsTruncated>{contents}</ListBucketResult>"
    ).encode()


def test_a_page_is_read() -> None:
    found = parse_page(page("a/1", "a/&amp;&lt;ü", truncated=True), where="it")
    assert found.is_truncated
    mtime_ns = 1767323045_678000000
    assert found.objects == [ObjectInfo("a/1", 1, mtime_ns, '"e"'), ObjectInfo("a/&<ü", 1, mtime_ns, '"e"')]
    assert parse_page(page(), where="it") == ([], False)
    assert len(parse_page(page(*(["k" * 1024] * 1000)), where="it").objects) == 1000


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"", id="nothing"),
        pytest.param(page("a")[:-30], id="half of it"),
        pytest.param(b"<html><body>Log in</body></html>", id="a page of somebody else"),
        pytest.param(b"<ListBucketResult></ListBucketResult>", id="not whether more follows"),
        pytest.param(page("a", size="x"), id="no size"),
        pytest.param(page("a").replace(b"<Key>a</Key>", b""), id="no key"),
        pytest.param(page("a").replace(b"2026-01", b"2026-41"), id="no time"),
        pytest.param(page(*(["a"] * 1001)), id="too many objects"),
        pytest.param(page("a" * 5000), id="too long a key"),
        pytest.param(
            page("&e;").replace(b"<ListB", b'<!DOCTYPE x [<!ENTITY e "text">]><ListB', 1), id="an entity of its own"
        ),
        pytest.param(
            page("a").replace(b"<ListB", b'<!DOCTYPE x SYSTEM "file:///etc/passwd"><ListB', 1), id="a document type"
        ),
        pytest.param(b"\xff\xfe\x00", id="no text"),
    ],
)
def test_what_is_no_page_is_refused(data: bytes) -> None:
    with pytest.raises(BucketUnavailable, match="it: what came is no page of a listing"):
        parse_page(data, where="it")


@contextlib.contextmanager
def server(answers: Sequence[bytes]) -> Iterator[str]:
    """Answer requests one after the other, whatever they ask; the last answer again and again."""
    left = list(answers)

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            data = left.pop(0) if len(left) > 1 else left[0]
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            with contextlib.suppress(OSError):
                self.wfile.write(data)

        def do_HEAD(self) -> None:
            self.do_GET()

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer((HOST, 0), Handler) as running:
        running.daemon_threads = True
        thread = threading.Thread(target=running.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"s3://b/p?endpoint=http://{HOST}:{running.server_address[1]}"
        finally:
            running.shutdown()
            thread.join(60)


@pytest.mark.parametrize(
    "answers",
    [
        pytest.param([page("p/w/1"), page("q/v/1")], id="another prefix"),
        pytest.param([page("p/v/../w/1")], id="a key that leads out"),
        pytest.param([page("p/v//1")], id="a key with an empty segment"),
        pytest.param([page("p/v/1", truncated=True)], id="the same page again"),
        pytest.param([page("p/v/1", truncated=True), page(truncated=True)], id="more, but nothing"),
        pytest.param([b"x" * (MAX_PAGE_BYTES + 1)], id="no end"),
    ],
)
async def test_a_bucket_that_lists_what_it_was_not_asked_for_is_not_believed(answers: Sequence[bytes]) -> None:
    with server(answers) as url:
        async with opened(Service(url), url) as store, asyncio.timeout(60):
            with pytest.raises(BucketInvalid):
                async for info in store.list("v/"):
                    assert info.key.startswith("v/")


async def test_directories_that_are_shown_as_objects_are_left_out() -> None:
    with server([page("p/v/", "p/v/0/", truncated=True), page("p/v/0/1")]) as url:
        async with opened(Service(url), url) as store:
            assert [info.key async for info in store.list("v/")] == ["v/0/1"]


async def test_a_server_that_does_not_describe_objects_is_told() -> None:
    with server([b"x"]) as url:
        async with opened(Service(url), url) as store:
            with pytest.raises(BucketInvalid, match="HEAD"):
                await store.head("v/0/1")
