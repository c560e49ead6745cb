"""Object storage as the rest of chunkstore sees it: the Protocol, its values, and how a URL becomes a store.

Owns the contract that every store keeps (`tests/chunkstore/buckets/contract.py` runs it on each) and the bounds on requests.
Must not know blocks, slices or images: keys and bytes only. Drivers are imported when one is opened (obstore costs 0.2 s).

The contract in words:
- Keys are relative to the URL's prefix: non-empty, segments joined by single `/`, no `.` or `..` segment.
- An object appears whole or not at all, and is durable when `put` returns (for a directory: file and directory entries are
  fsynced). Objects are never changed in place; a second put replaces the first atomically.
- A cancelled or failed `put` may or may not have happened; it never leaves a torn object that a reader could see.
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
    server be away for 30 s unseen, with room for backoff and a second outage.
    """

    max_gets: int = 64
    max_puts: int = 32
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
    """Keep immutable objects under keys. Safe for any number of tasks of one event loop."""

    async def get(
        self, key: str, *, start: int | None = None, end: int | None = None, timeout_s: float | None = None
    ) -> bytes | memoryview:
        """Return the bytes `[start, end)` of an object, read-only; None means from its first, to its last byte.

        Fewer bytes, down to none, come back only where the object ends before `end`. `timeout_s` bounds the whole call
        (default: the store's budget). One request. ObjectMissing if there is no such object.
        """

    async def put(self, key: str, data: Buffer, *, if_absent: bool = False, timeout_s: float | None = None) -> None:
        """Store an object; durable and visible to all when it returns. One request.

        `if_absent` never replaces: ObjectExists if there is one with other bytes, success if its bytes are equal (an
        earlier attempt of ours that was answered late). `data` must not change before this returns.
        """

    async def delete(self, keys: Sequence[str]) -> None:
        """Delete up to 1,000 objects; absent ones are fine. Some may be gone when it fails: repeat it whole."""

    def list(self, prefix: str = "", *, start_after: str | None = None) -> AsyncIterator[ObjectInfo]:
        """Yield the objects whose key starts with `prefix` (empty, or ending in `/`), in key order (UTF-8 bytes).

        `start_after` leaves out keys up to and including it. Objects put or deleted meanwhile may be missed or shown.
        """

    async def head(self, key: str) -> ObjectInfo:
        """Describe an object without reading it; ObjectMissing if there is none. One request."""

    async def probe(self) -> None:
        """Prove that this bucket works for us: put, get, head, list and delete a small object of a random key.

        Raises what a user must be told: unreachable, wrong key, no such bucket, not writable; never ObjectMissing.
        """

    async def close(self) -> None:
        """Free connections and threads; running calls are waited for. The store is unusable afterwards."""


def open_bucket(url: str, *, env: Mapping[str, str], limits: Limits | None = None) -> RetryingStore:
    """Return the store that a bucket URL names, with retries, limits and counters in front. Sends nothing.

    `s3://bucket/prefix?endpoint=http://host:port&region=…`, `gs://bucket/prefix`, `az://container/prefix`, `file:///dir`.
    Credentials are read from `env` under the provider's usual names. BucketInvalid for a URL that cannot be meant,
    BucketDenied where keys are needed and there are none.
    """
