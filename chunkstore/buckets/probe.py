"""The proof that a bucket works for us, made before a volume is formatted on it."""

from __future__ import annotations

import contextlib
import secrets
from typing import TYPE_CHECKING, Final

from chunkstore.errors import AtollError, BucketInvalid

if TYPE_CHECKING:
    from chunkstore.buckets import ObjectStore

# Somebody waits at a terminal; a server that is away for longer is reported rather than waited for.
PROBE_TIMEOUT_S: Final = 5.0
_PROBE_BYTES: Final = 4096


async def probe_store(store: ObjectStore) -> str:
    """Put, read, read a range of, list and delete an object under a random key; the first error is raised.

    Leaves no object behind if deleting is allowed; returns the prefix. About six requests.
    """
    prefix = f"atoll-probe-{secrets.token_hex(8)}/"
    key = f"{prefix}object"
    data = secrets.token_bytes(_PROBE_BYTES)
    await store.put(key, data, timeout_s=PROBE_TIMEOUT_S)
    try:
        whole = await store.get(key, timeout_s=PROBE_TIMEOUT_S)
        part = await store.get(key, start=100, end=200, timeout_s=PROBE_TIMEOUT_S)
        if whole != data or part != data[100:200]:
            raise BucketInvalid(f"{store} returns other bytes than were put: it cannot serve as a bucket")
        listed = [info.key async for info in store.list(prefix)]
        if listed != [key]:
            raise BucketInvalid(f"{store} does not list an object that was put: it cannot serve as a bucket")
    except AtollError:
        with contextlib.suppress(AtollError):
            await store.delete([key], timeout_s=PROBE_TIMEOUT_S)
        raise
    await store.delete([key], timeout_s=PROBE_TIMEOUT_S)
    return prefix
