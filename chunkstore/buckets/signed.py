"""A bucket for administrators without its keys: somebody who has them signs a URL for each request.

Owns how listing, describing, reading and deleting become requests by URL; the connections and the table of errors are
`chunkstore.buckets.urls`'. Nothing is put. URLs are asked for when they are used, up to `SIGNED_AT_ONCE` of them at a time, and
not kept: who signs is asked for each attempt, its errors are those of the attempt, and `RetryingStore` stands in front of both.

A listing holds one page in memory. The next page is asked for behind the last key of the one before: prefix and place are
signed. A bucket that does not keep to them, or stands still, is an error, for what is listed may be deleted.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from email.utils import parsedate_to_datetime
from typing import Final, Literal, Protocol

from chunkstore.buckets import Limits, ObjectInfo, check_delete, check_key, check_prefix
from chunkstore.buckets.list_page import MAX_PAGE_BYTES, Page, parse_page
from chunkstore.buckets.retry import RetryingStore
from chunkstore.buckets.url import parse_bucket_url
from chunkstore.buckets.urls import Answer, UrlClient, UrlExpired
from chunkstore.errors import AtollError, BucketDenied, BucketInvalid
from chunkstore.geometry import Buffer

__all__ = ["SIGNED_AT_ONCE", "ObjectSigning", "SignedStore", "Verb", "open_signed_bucket"]

SIGNED_AT_ONCE: Final = 256
LIMITS: Final = Limits(attempt_timeout_s=60.0, budget_s=180.0)
"""An attempt may be the deletion of a thousand objects, one by one."""

Verb = Literal["list", "head", "get", "delete"]


class ObjectSigning(Protocol):
    """Whoever signs. Errors: what the service says; retryable where another try may do."""

    async def sign(self, verb: Verb, keys: Sequence[str], *, start_after: str = "") -> Sequence[str]:
        """Sign a URL for each key, at most SIGNED_AT_ONCE; of "list" for one prefix, and a page behind ``start_after``."""
        ...


def open_signed_bucket(signing: ObjectSigning, bucket_url: str) -> RetryingStore:
    """Return the store over URLs, with retries, limits and counters in front. Sends nothing."""
    return RetryingStore(SignedStore(signing, bucket_url), limits=LIMITS)


class SignedStore:
    """An ObjectStore of which all but put works."""

    def __init__(self, signing: ObjectSigning, bucket_url: str) -> None:
        """``bucket_url`` is the one whose keys the signer has: it stands in messages, and its prefix in listed keys."""
        self._signing = signing
        prefix = parse_bucket_url(bucket_url).prefix
        self._prefix = f"{prefix}/" if prefix else ""
        self._client = UrlClient(name=bucket_url)

    def __str__(self) -> str:
        """Name the bucket for messages."""
        return str(self._client)

    async def get(
        self, key: str, *, start: int | None = None, end: int | None = None, timeout_s: float | None = None
    ) -> bytes | memoryview:
        """Return the bytes `[start, end)` of an object. A request, and one for its URL."""
        check_key(key)
        first = start or 0
        if end is not None and end <= first:
            return b""
        headers = {"Range": f"bytes={first}-{'' if end is None else end - 1}"} if first or end is not None else {}
        [url] = await self._signing.sign("get", [key])
        data = (await self._send("GET", url, key, headers=headers)).data
        return data if end is None or len(data) <= end - first else data[first:end]

    async def put(self, key: str, data: Buffer, *, if_absent: bool = False, timeout_s: float | None = None) -> None:
        """Refuse."""
        raise self._no("puts")

    async def delete(self, keys: Sequence[str], *, timeout_s: float | None = None) -> None:
        """Delete objects, a request for each, and one for 256 URLs."""
        check_delete(keys)
        for start in range(0, len(keys), SIGNED_AT_ONCE):
            some = keys[start : start + SIGNED_AT_ONCE]
            urls = await self._signing.sign("delete", some)
            sent = (self._send("DELETE", url, key) for key, url in zip(some, urls, strict=True))
            # All are waited for: none may be on its way when this has returned.
            answers = await asyncio.gather(*sent, return_exceptions=True)
            for answer in answers:
                if isinstance(answer, BaseException):
                    raise answer

    async def list(self, prefix: str = "", *, start_after: str | None = None) -> AsyncIterator[ObjectInfo]:
        """Yield the objects under a prefix, page by page, each two requests."""
        check_prefix(prefix)
        behind = start_after or ""
        while True:
            page = await self._page(prefix, behind)
            for info in page.objects:
                # Some providers show directories as objects without a name.
                if not info.key.endswith("/"):
                    yield info
            if not page.is_truncated:
                return
            behind = page.objects[-1].key

    async def _page(self, prefix: str, behind: str) -> Page:
        """Return one page, its keys relative to the prefix of the bucket, and checked: what is listed may be deleted."""
        [url] = await self._signing.sign("list", [prefix], start_after=behind)
        where = f"{self}: {prefix}"
        answer = await self._send("GET", url, prefix, most_bytes=MAX_PAGE_BYTES)
        found, is_truncated = await asyncio.to_thread(parse_page, answer.data, where=where)
        whole = self._prefix + prefix
        for info in found:
            if not info.key.startswith(whole):
                raise BucketInvalid(f"{where}: the listing has the key {info.key[:200]!r}: check the endpoint")
            rest = info.key[len(whole) :].removesuffix("/")
            if rest and any(segment in ("", ".", "..") for segment in rest.split("/")):
                raise BucketInvalid(
                    f"{where}: there is an object {info.key[:200]!r}, whose key is none of ours: remove it"
                )
        objects = [info._replace(key=info.key.removeprefix(self._prefix)) for info in found]
        if (is_truncated and not objects) or (behind and objects and objects[-1].key == behind):
            raise BucketInvalid(f"{where}: the listing does not go on behind {behind!r}: check the endpoint")
        return Page(objects, is_truncated)

    async def head(self, key: str, *, timeout_s: float | None = None) -> ObjectInfo:
        """Describe an object. A request, and one for its URL."""
        [url] = await self._signing.sign("head", [check_key(key)])
        headers = (await self._send("HEAD", url, key)).headers
        try:
            mtime_s = parsedate_to_datetime(headers["Last-Modified"]).timestamp()
            return ObjectInfo(key, int(headers["Content-Length"]), int(mtime_s) * 10**9, headers.get("ETag"))
        except (KeyError, ValueError) as error:
            raise BucketInvalid(f"{self}: {key}: HEAD does not say size and time: check the endpoint") from error

    async def probe(self) -> None:
        """Refuse."""
        raise self._no("tries")

    async def close(self) -> None:
        """Close the connections."""
        self._client.close()

    async def _send(
        self,
        method: str,
        url: str,
        key: str,
        *,
        headers: Mapping[str, str] | None = None,
        most_bytes: int | None = None,
    ) -> Answer:
        try:
            return await self._client.send(method, url, key, headers=headers, most_bytes=most_bytes)
        except UrlExpired:
            raise BucketDenied(
                f"{self}: {key}: the bucket takes a new URL for one whose time is over: set the clocks of the service and "
                "of the bucket"
            ) from None

    def _no(self, what: str) -> AtollError:
        return BucketDenied(f"{self}: nobody {what} objects by these URLs: set AWS_ACCESS_KEY_ID and what goes with it")
