"""Object storage as the rest of chunkstore sees it: the Protocol, its values, and how a URL becomes a store.

Owns the contract that every store keeps (`tests/chunkstore/buckets/contract.py` runs it on each) and the bounds on requests.
Must not know blocks, slices or images: keys and bytes only. Drivers are imported when one is opened (obstore costs 0.2 s).

The contract in words:
- Keys are relative to the URL's prefix: non-empty, segments joined by single `/`, none of them `.` or `..` or starting with
  `.tmp-`. A key that breaks this is a ValueError.
- An object appears whole or not at all, and is durable when `put` returns (for a directory: file and directory entries are
  fsynced). Objects are never changed in place; a second put replaces the first atomically.
- A cancelled or failed `put` may or may not have happened, or happen later: an attempt that was given up may still be on its
  way. It never leaves a torn object that a reader could see. So a put repeated after a timeout and then deleted may come
  back; keys are never reused, and garbage collection finds it.
- All errors are `AtollError`s of one line: ObjectMissing, ObjectExists, BucketUnavailable (retryable), BucketDenied,
  BucketInvalid, BucketFull.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol

from chunkstore.geometry import Buffer

if TYPE_CHECKING:
    from chunkstore.buckets.retry import RetryingStore

# S3's DeleteObjects takes 1,000 keys; all stores take the same number.
MAX_DELETE_KEYS: Final = 1000
# No segment of a key starts like this: the directory store names so what it has not finished writing.
RESERVED_PREFIX: Final = ".tmp-"


class ObjectInfo(NamedTuple):
    """Describe one object. `etag` is opaque, None where the provider has none; `mtime_ns` counts from 1970 UTC."""

    key: str
    size_bytes: int
    mtime_ns: int
    etag: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Bound what a store may do at once and how long it may take.

    `attempt_timeout_s` bounds one request, `budget_s` a call with all its retries and its wait for a slot. Two minutes let a
    server be away for 30 s unseen, with room for backoff and a second outage. Each get and put holds a block in memory:
    with blocks of 4 MiB that is 128 and 64 MiB at worst, and fills 10 Gb/s at 100 ms a request.
    """

    max_gets: int = 32
    max_puts: int = 16
    attempt_timeout_s: float = 30.0
    budget_s: float = 120.0


class VerbCounters(NamedTuple):
    """Count, since the store was opened, the calls of one verb.

    `requests` are attempts that were sent, `retries` those that repeated one, `errors` calls that failed in the end,
    `bytes` what was received or sent by calls that succeeded, `seconds` the time of all calls, waiting included.
    """

    requests: int
    retries: int
    errors: int
    bytes: int
    seconds: float


class ObjectStore(Protocol):
    """Keep immutable objects under keys. Safe for any number of tasks of one event loop.

    `timeout_s` bounds a call whole, retries and waiting included; None means the store's own bound.
    """

    async def get(
        self, key: str, *, start: int | None = None, end: int | None = None, timeout_s: float | None = None
    ) -> bytes | memoryview:
        """Return the bytes `[start, end)` of an object, read-only; None means from its first, to its last byte.

        Fewer bytes, down to none, come back only where the object ends before `end`. One request. ObjectMissing.
        """

    async def put(self, key: str, data: Buffer, *, if_absent: bool = False, timeout_s: float | None = None) -> None:
        """Store an object; durable and visible to all when it returns. One request.

        `if_absent` never replaces: ObjectExists if there is one with other bytes, success if its bytes are equal (an
        earlier attempt of ours whose answer was lost). `data` must never change, not even after a cancellation.
        """

    async def delete(self, keys: Sequence[str], *, timeout_s: float | None = None) -> None:
        """Delete up to 1,000 objects; absent ones are fine. Some may be gone when it fails: repeat it whole.

        One request where the provider has one for many keys.
        """

    def list(self, prefix: str = "", *, start_after: str | None = None) -> AsyncIterator[ObjectInfo]:
        """Yield the objects whose key starts with `prefix`: empty, or ending in `/`. One request per 1,000 objects.

        The order is the provider's and always the same; for keys whose segments have only [0-9a-z.-] up to the last one it
        is that of the keys' bytes. `start_after`, a key, leaves out all up to and including it in that order. Objects put
        or deleted meanwhile may be missed or shown.
        """

    async def head(self, key: str, *, timeout_s: float | None = None) -> ObjectInfo:
        """Describe an object without reading it. One request. ObjectMissing."""

    async def probe(self) -> None:
        """Prove that this bucket works for us: put, get, list and delete a small object under a random key.

        Raises, after about 5 s for each step at most, what a user must be told: unreachable, wrong key, no such bucket,
        not writable.
        """

    async def close(self) -> None:
        """Free connections and threads, after the calls that are running. The store is unusable afterwards."""


def check_key(key: str) -> str:
    """Return the key; ValueError where it is none: empty, or with an empty, `.`, `..` or reserved segment."""
    if any(segment in ("", ".", "..") or segment.startswith(RESERVED_PREFIX) for segment in key.split("/")):
        raise ValueError(f"{key!r} cannot be the key of an object")
    return key


def check_prefix(prefix: str) -> str:
    """Return the prefix of a listing; ValueError unless it is empty or a key followed by `/`."""
    if prefix and not (prefix.endswith("/") and check_key(prefix[:-1])):
        raise ValueError(f"{prefix!r} cannot be listed: a prefix ends in /")
    return prefix


def check_delete(keys: Sequence[str]) -> None:
    """Raise ValueError for too many keys, or for one that cannot be a key."""
    if len(keys) > MAX_DELETE_KEYS:
        raise ValueError(f"{len(keys)} keys in one delete, at most {MAX_DELETE_KEYS}")
    for key in keys:
        check_key(key)


def open_bucket(url: str, *, env: Mapping[str, str], limits: Limits | None = None) -> RetryingStore:
    """Return the store that a bucket URL names, with retries, limits and counters in front. Sends nothing.

    `s3://bucket/prefix?endpoint=http://host:port&region=…`, `gs://bucket/prefix`, `az://container/prefix`, `file:///dir`.
    Credentials are read from `env` under the provider's usual names; where it has none, the provider's own chain is asked
    (files, roles of the machine). BucketInvalid for a URL that cannot be meant, BucketDenied where keys are missing.
    """
    from chunkstore.buckets.retry import RetryingStore
    from chunkstore.buckets.url import parse_bucket_url

    limits = limits or Limits()
    place = parse_bucket_url(url)
    inner: ObjectStore
    if place.scheme == "file":
        from chunkstore.buckets.directory import DirectoryStore

        inner = DirectoryStore(place.path)
    else:
        from chunkstore.buckets.cloud import CloudStore

        inner = CloudStore(place, env=env, attempt_timeout_s=limits.attempt_timeout_s)
    return RetryingStore(inner, limits=limits)
