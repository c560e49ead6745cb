"""Objects by presigned URLs: GET and PUT, by HTTP, of whoever has no key.

Owns the connections and the table from answers to errors (`UrlClient`). Keys of objects become URLs by a function, which signs
or remembers; a URL is never part of a message, for whoever has it may use it. One whose time is over is asked for anew once.
Retries, limits and counters are `RetryingStore`'s in front of this, as for all stores. Deleting and listing are for
administrators only, whose store is `chunkstore.buckets.signed`.
"""

from __future__ import annotations

import asyncio
import logging
import re
import ssl
from collections.abc import AsyncIterator, Awaitable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from http import HTTPStatus
from typing import Any, Final, NamedTuple, Protocol, cast

import urllib3

from chunkstore.buckets import ObjectInfo, check_key
from chunkstore.errors import (
    AtollError,
    BucketDenied,
    BucketFull,
    BucketInvalid,
    BucketUnavailable,
    ObjectExists,
    ObjectMissing,
)
from chunkstore.geometry import Buffer

__all__ = ["Answer", "UrlClient", "UrlExpired", "UrlOfPut", "UrlStore", "Urls"]

_CONNECT_S: Final = 5.0
_GOOD: Final = frozenset({HTTPStatus.OK, HTTPStatus.PARTIAL_CONTENT, HTTPStatus.NO_CONTENT})
_REASONS: Final = {
    "NewConnectionError": "no connection",
    "NameResolutionError": "host name not found",
    "ConnectTimeoutError": "no answer in time",
    "ReadTimeoutError": "no answer in time",
    "ProtocolError": "connection closed before the answer ended",
    "IncompleteRead": "connection closed before the answer ended",
}
"""By the class of the error."""
_MAX_ERROR_BYTES: Final = 64 * 1024
_CODE: Final = re.compile(rb"<Code>([^<]{1,80})</Code>")
_EXPIRED: Final = re.compile(rb"expired", re.IGNORECASE)
_EXPIRED_CODES: Final = frozenset({"ExpiredToken", "ExpiredPresignRequest", "RequestExpired"})
_PASSING_CODES: Final = frozenset(
    {
        "BadDigest",
        "IncompleteBody",
        "InternalError",
        "OperationAborted",
        "RequestTimeout",
        "SlowDown",
        "ServiceUnavailable",
    }
)
_FULL_CODES: Final = frozenset({"QuotaExceeded", "InsufficientCapacity", "XMinioStorageFull"})
_NO_BUCKET_CODES: Final = frozenset({"NoSuchBucket"})


# It logs URLs while somebody debugs, and whoever has one may use it.
logging.getLogger("urllib3").setLevel(logging.WARNING)


class UrlOfPut(NamedTuple):
    """Where to put an object, and the headers that go with it; made for these bytes."""

    url: str
    headers: Mapping[str, str]


class Urls(Protocol):
    """Whoever signs."""

    def get_url(self, key: str, *, anew: bool) -> Awaitable[str]:
        """Return a URL that reads an object; ``anew``: the one of before does not do."""
        ...

    def put_url(self, key: str, data: Buffer, *, anew: bool) -> Awaitable[UrlOfPut]:
        """Return a URL that puts an object with these bytes; ``anew``: the one of before does not do."""
        ...


class UrlExpired(Exception):
    """The time of a URL is over."""


class Answer(NamedTuple):
    """What the bucket said to a request."""

    status: int
    headers: Mapping[str, str]
    data: bytes


class UrlClient:
    """Send requests to URLs, in threads."""

    def __init__(self, *, name: str, threads: int = 48, timeout_s: float = 30.0) -> None:
        """``name`` stands for the bucket in messages. Who stops waiting leaves a thread to the request, for ``timeout_s``."""
        self._name = name
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="url")
        self._http = urllib3.PoolManager(
            maxsize=threads,
            timeout=urllib3.Timeout(connect=_CONNECT_S, read=timeout_s),
            retries=False,
            ssl_context=ssl.create_default_context(),
        )

    def __str__(self) -> str:
        """Name the bucket for messages."""
        return f"bucket {self._name}"

    async def send(
        self,
        method: str,
        url: str,
        key: str,
        *,
        headers: Mapping[str, str] | None = None,
        data: Buffer | None = None,
        most_bytes: int | None = None,
    ) -> Answer:
        """Send one request, and return a good answer to it: 2xx, or 416 for what is behind the end, without bytes.

        ``key`` is what errors are about. An answer of more than ``most_bytes`` is BucketInvalid; UrlExpired.
        """
        loop = asyncio.get_running_loop()
        answer = await loop.run_in_executor(
            self._threads, self._request, method, url, key, headers or {}, data, most_bytes
        )
        if answer.status in _GOOD:
            return answer
        if answer.status == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            return answer._replace(data=b"")
        raise self._error(answer.status, answer.data[:_MAX_ERROR_BYTES], key)

    def _request(
        self,
        method: str,
        url: str,
        key: str,
        headers: Mapping[str, str],
        data: Buffer | None,
        most_bytes: int | None,
    ) -> Answer:
        """Send one request, in a thread. The body is checked against Content-Length."""
        # Any buffer is sent as it is, without a copy.
        body = cast("bytes | None", data)
        try:
            answer = self._http.request(
                method,
                url,
                headers=headers,
                body=body,
                redirect=False,
                decode_content=False,
                preload_content=most_bytes is None,
            )
            found = answer.data if most_bytes is None else _at_most(answer, most_bytes)
        except urllib3.exceptions.SSLError:
            raise BucketInvalid(
                f"{self}: {key}: no TLS with the server: install its certificate authority on this machine"
            ) from None
        except (urllib3.exceptions.HTTPError, OSError) as error:
            # Not the text of the error, nor the error: the URL may be in it.
            reason = _REASONS.get(type(error).__name__, type(error).__name__)
            raise BucketUnavailable(f"{self}: {key}: {reason}: check the endpoint, and that the server runs") from None
        if found is None:
            raise BucketInvalid(f"{self}: {key}: the answer has more than {most_bytes} bytes: check the endpoint")
        return Answer(answer.status, answer.headers, found)

    def _error(self, status: int, text: bytes, key: str) -> Exception:
        """Return what an answer means: the one table."""
        found = _CODE.search(text)
        code = found[1].decode("ascii", "replace") if found else ""
        where = f"{self}: {key}: HTTP {status} ({code or 'no details'})"
        if status == HTTPStatus.NOT_FOUND and code not in _NO_BUCKET_CODES:
            return ObjectMissing(f"{self}: {key}: no such object")
        if status == HTTPStatus.PRECONDITION_FAILED:
            return ObjectExists(f"{self}: {key}: exists with other bytes")
        if code in _EXPIRED_CODES or (status == HTTPStatus.FORBIDDEN and _EXPIRED.search(text)):
            return UrlExpired()
        if code in _FULL_CODES or status == HTTPStatus.INSUFFICIENT_STORAGE:
            return BucketFull(f"{where}: raise the quota there")
        if code in _PASSING_CODES or (
            status >= HTTPStatus.INTERNAL_SERVER_ERROR and status != HTTPStatus.NOT_IMPLEMENTED
        ):
            return BucketUnavailable(where)
        if status in (
            HTTPStatus.REQUEST_TIMEOUT,
            HTTPStatus.CONFLICT,
            HTTPStatus.TOO_EARLY,
            HTTPStatus.TOO_MANY_REQUESTS,
        ):
            return BucketUnavailable(where)
        if status in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN):
            return BucketDenied(f"{where}: check the keys that the service has, with `atoll keys set`")
        if HTTPStatus.MULTIPLE_CHOICES <= status < HTTPStatus.BAD_REQUEST:
            return BucketInvalid(f"{where}: the bucket is elsewhere, name its region or endpoint in the URL")
        return BucketInvalid(f"{where}: check the bucket's URL, its region and its endpoint")

    def close(self) -> None:
        """Close the connections."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._http.clear()


class UrlStore:
    """An ObjectStore of which only get and put work."""

    def __init__(self, urls: Urls, *, name: str, threads: int = 48, timeout_s: float = 30.0) -> None:
        """``name``, ``threads`` and ``timeout_s`` are a UrlClient's."""
        self._urls = urls
        self._client = UrlClient(name=name, threads=threads, timeout_s=timeout_s)

    def __str__(self) -> str:
        """Name the bucket for messages."""
        return str(self._client)

    async def get(
        self, key: str, *, start: int | None = None, end: int | None = None, timeout_s: float | None = None
    ) -> bytes | memoryview:
        """Return the bytes `[start, end)` of an object. One request, in a thread."""
        check_key(key)
        first = start or 0
        if end is not None and end <= first:
            return b""
        headers = {}
        if first or end is not None:
            headers["Range"] = f"bytes={first}-{'' if end is None else end - 1}"

        async def once(*, anew: bool) -> bytes:
            url = await self._urls.get_url(key, anew=anew)
            return (await self._client.send("GET", url, key, headers=headers)).data

        data = await self._unless_expired(once, key)
        # A server that knows no ranges sends all.
        return data if end is None or len(data) <= end - first else data[first:end]

    async def put(self, key: str, data: Buffer, *, if_absent: bool = False, timeout_s: float | None = None) -> None:
        """Store an object if there is none; success also if there is one with equal bytes. ObjectExists."""
        check_key(key)

        async def once(*, anew: bool) -> bytes:
            signed = await self._urls.put_url(key, data, anew=anew)
            return (await self._client.send("PUT", signed.url, key, headers=signed.headers, data=data)).data

        try:
            await self._unless_expired(once, key)
        except ObjectExists:
            if await self.get(key) != data:
                raise

    async def _unless_expired(self, once: Any, key: str) -> bytes:
        try:
            found: bytes = await once(anew=False)
            return found
        except UrlExpired:
            pass
        try:
            found = await once(anew=True)
        except UrlExpired:
            raise BucketDenied(
                f"{self}: {key}: the bucket takes a new URL for one whose time is over: set the clocks of the service and "
                "of the bucket"
            ) from None
        return found

    async def delete(self, keys: Sequence[str], *, timeout_s: float | None = None) -> None:
        """Refuse."""
        raise self._no("deletes")

    async def list(self, prefix: str = "", *, start_after: str | None = None) -> AsyncIterator[ObjectInfo]:
        """Refuse."""
        nothing: tuple[ObjectInfo, ...] = ()
        for info in nothing:
            yield info
        raise self._no("lists")

    async def head(self, key: str, *, timeout_s: float | None = None) -> ObjectInfo:
        """Refuse."""
        raise self._no("describes")

    async def probe(self) -> None:
        """Refuse."""
        raise self._no("tries")

    def _no(self, what: str) -> AtollError:
        return BucketDenied(f"{self}: nobody {what} objects without a key: set AWS_ACCESS_KEY_ID and what goes with it")

    async def close(self) -> None:
        """Close the connections."""
        self._client.close()


def _at_most(answer: urllib3.BaseHTTPResponse, most_bytes: int) -> bytes | None:
    """Read an answer whole; None if it has more bytes. Its connection is used again if it was read to its end."""
    data = answer.read(most_bytes + 1)
    if len(data) > most_bytes:
        answer.close()
        return None
    answer.drain_conn()
    answer.release_conn()
    return data
