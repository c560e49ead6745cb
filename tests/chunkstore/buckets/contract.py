"""What every object store promises, as checks that any implementation must pass.

Each check gets an empty store and leaves whatever it likes in it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Final

import pytest

from chunkstore.buckets import MAX_DELETE_KEYS, ObjectStore
from chunkstore.errors import ObjectExists, ObjectMissing

Check = Callable[[ObjectStore], Awaitable[None]]

UUID: Final = "0193b1f0-5d1a-7c1e-9d7a-3f0c2f6f8a11"
CONTENT: Final = bytes(range(256)) * 40


async def an_object_is_read_as_it_was_put(store: ObjectStore) -> None:
    for data in (b"x", CONTENT, bytearray(CONTENT), memoryview(CONTENT)[3:4001]):
        await store.put(f"{UUID}/0/1.0", data)
        assert await store.get(f"{UUID}/0/1.0") == data


async def an_object_of_no_bytes_is_an_object(store: ObjectStore) -> None:
    await store.put("empty", b"")
    assert await store.get("empty") == b""
    assert await store.get("empty", start=0, end=10) == b""
    assert (await store.head("empty")).size_bytes == 0


async def an_object_of_16_mib_is_put_and_read_whole(store: ObjectStore) -> None:
    data = CONTENT * (16 * 1024**2 // len(CONTENT) + 1)
    await store.put("big", data)
    assert await store.get("big") == data
    assert await store.get("big", start=len(data) - 5) == data[-5:]


async def a_range_is_cut_at_the_end_of_the_object(store: ObjectStore) -> None:
    await store.put("a", CONTENT)
    size = len(CONTENT)
    for start, end in [
        (0, 1),
        (0, size),
        (7, 7),
        (100, 200),
        (None, 5),
        (5, None),
        (0, None),
        (size - 1, size),
        (size - 1, size + 100),
        (size, size + 1),
        (size, None),
        (size + 5, size + 10),
        (3, 2),
    ]:
        assert await store.get("a", start=start, end=end) == CONTENT[start or 0 : end], (start, end)


async def what_is_read_cannot_be_written_to(store: ObjectStore) -> None:
    await store.put("a", CONTENT)
    for data in (await store.get("a"), await store.get("a", start=1, end=5)):
        assert memoryview(data).readonly


async def a_second_put_replaces_the_object(store: ObjectStore) -> None:
    await store.put("a/b", b"first")
    await store.put("a/b", b"second, longer")
    assert await store.get("a/b") == b"second, longer"
    await store.put("a/b", b"3rd")
    assert await store.get("a/b") == b"3rd"


async def put_if_absent_never_replaces_other_bytes(store: ObjectStore) -> None:
    await store.put("a/b", b"first", if_absent=True)
    for other in (b"other", b"first!", b"", b"firs"):
        with pytest.raises(ObjectExists):
            await store.put("a/b", other, if_absent=True)
    assert await store.get("a/b") == b"first"


async def put_if_absent_of_equal_bytes_succeeds(store: ObjectStore) -> None:
    await store.put("a", CONTENT, if_absent=True)
    await store.put("a", CONTENT, if_absent=True)
    await store.put("a", memoryview(bytearray(CONTENT)), if_absent=True)
    assert await store.get("a") == CONTENT


async def of_simultaneous_puts_if_absent_one_wins(store: ObjectStore) -> None:
    results = await asyncio.gather(
        *(store.put("a/b/c", b"content %d" % n, if_absent=True) for n in range(8)), return_exceptions=True
    )
    winners = [n for n, result in enumerate(results) if result is None]
    assert len(winners) == 1
    assert all(isinstance(result, ObjectExists) for result in results if result is not None)
    assert await store.get("a/b/c") == b"content %d" % winners[0]


async def an_object_never_put_is_missing(store: ObjectStore) -> None:
    await store.put("a/b", b"x")
    for key in ("b", "a", "a/c", "a/b/c", "no/such/folder"):
        with pytest.raises(ObjectMissing, match=f"{key}: no such object"):
            await store.get(key)
        with pytest.raises(ObjectMissing):
            await store.get(key, start=0, end=10)
        with pytest.raises(ObjectMissing):
            await store.head(key)


async def deleted_objects_are_gone_and_the_others_are_not(store: ObjectStore) -> None:
    keys = [f"{UUID}/0/{n:x}.0" for n in range(20)]
    for key in keys:
        await store.put(key, key.encode())
    await store.delete(keys[5:])
    assert [info.key async for info in store.list()] == keys[:5]
    with pytest.raises(ObjectMissing):
        await store.get(keys[7])
    assert await store.get(keys[4]) == keys[4].encode()


async def deleting_what_is_absent_is_fine(store: ObjectStore) -> None:
    await store.put("a", b"1")
    await store.delete(["b", "a", "c/d"])
    await store.delete(["a"])
    await store.delete([])
    assert [info.key async for info in store.list()] == []


async def one_delete_takes_a_thousand_keys(store: ObjectStore) -> None:
    keys = [f"a/{n}" for n in range(MAX_DELETE_KEYS)]
    for key in keys[::250]:
        await store.put(key, b"1")
    await store.delete(keys)
    assert [info.key async for info in store.list()] == []
    with pytest.raises(ValueError, match="1001 keys"):
        await store.delete([*keys, "b"])


async def head_says_size_and_time(store: ObjectStore) -> None:
    before_ns = time.time_ns()
    await store.put("a/b", CONTENT)
    after_ns = time.time_ns()
    info = await store.head("a/b")
    assert (info.key, info.size_bytes) == ("a/b", len(CONTENT))
    # Servers keep whole seconds, file systems the time of the last tick.
    assert before_ns - 10**9 <= info.mtime_ns <= after_ns + 10**9


async def the_etag_changes_with_the_bytes(store: ObjectStore) -> None:
    await store.put("a", b"first")
    first = (await store.head("a")).etag
    assert first is not None
    assert (await store.head("a")).etag == first
    await store.put("a", b"other")
    assert (await store.head("a")).etag != first


async def a_listing_shows_all_objects_in_key_order(store: ObjectStore) -> None:
    keys = [f"{UUID}/{folder:x}/{n:x}.{index}" for folder in (0, 1, 2, 16, 17) for n in (1, 16, 17) for index in (0, 1)]
    for key in keys:
        await store.put(key, key.encode())
    infos = [info async for info in store.list()]
    assert [info.key for info in infos] == sorted(keys)
    assert [info.size_bytes for info in infos] == [len(key) for key in sorted(keys)]
    assert infos[3] == await store.head(infos[3].key)


async def a_listing_takes_a_prefix_that_ends_in_a_slash(store: ObjectStore) -> None:
    for key in ("a/b", "a/c/d", "ab/c", "a-b", "b/a/c"):
        await store.put(key, b"1")
    assert {info.key async for info in store.list("a/")} == {"a/b", "a/c/d"}
    assert {info.key async for info in store.list("a/c/")} == {"a/c/d"}
    assert {info.key async for info in store.list("")} == {"a/b", "a/c/d", "ab/c", "a-b", "b/a/c"}
    assert [info.key async for info in store.list("c/")] == []
    assert [info.key async for info in store.list("a/b/")] == []
    for prefix in ("a", "/", "a//", "../"):
        with pytest.raises(ValueError, match="cannot be"):
            await anext(store.list(prefix))


async def a_listing_resumes_after_any_of_its_keys(store: ObjectStore) -> None:
    keys = [f"{UUID}/{folder}/{n:x}.0" for folder in (0, 1) for n in range(5)]
    for key in keys:
        await store.put(key, b"1")
    for position, key in enumerate(keys):
        assert [info.key async for info in store.list(f"{UUID}/", start_after=key)] == keys[position + 1 :]
    assert [info.key async for info in store.list(f"{UUID}/", start_after=f"{UUID}/0/2.5")] == keys[3:]
    assert [info.key async for info in store.list("", start_after="z")] == []


async def a_listing_goes_over_more_than_one_page(store: ObjectStore) -> None:
    keys = {f"a/{n:04x}" for n in range(1050)}
    for batch in range(0, 1050, 50):
        await asyncio.gather(*(store.put(f"a/{n:04x}", b"") for n in range(batch, batch + 50)))
    assert [info.key async for info in store.list("a/")] == sorted(keys)


async def simultaneous_calls_do_not_disturb_each_other(store: ObjectStore) -> None:
    async def one(n: int) -> None:
        key, data = f"{UUID}/{n % 3}/{n:x}.0", bytes([n]) * (1000 + n)
        await store.put(key, data)
        assert await store.get(key) == data
        assert await store.get(key, start=n, end=n + 10) == data[n : n + 10]
        if n % 2:
            await store.delete([key])

    await asyncio.gather(*(one(n) for n in range(60)))
    assert len([info async for info in store.list()]) == 30


async def readers_see_the_old_or_the_new_object_whole(store: ObjectStore) -> None:
    versions = [bytes([n]) * 200_000 for n in range(1, 12)]
    await store.put("a", versions[0])
    done = asyncio.Event()

    async def read() -> int:
        reads = 0
        while not done.is_set():
            data = bytes(await store.get("a"))
            assert data in versions
            reads += 1
        return reads

    async with asyncio.TaskGroup() as group:
        readers = [group.create_task(read()) for _ in range(2)]
        for version in versions[1:]:
            await store.put("a", version)
        done.set()
    assert all(reader.result() > 0 for reader in readers)


async def a_cancelled_put_leaves_nothing_or_all(store: ObjectStore) -> None:
    data = CONTENT * 200
    for ticks in range(6):
        task = asyncio.ensure_future(store.put(f"a/{ticks}", data))
        for _ in range(ticks):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    await store.put("a/last", data)
    for key in [info.key async for info in store.list()]:
        assert await store.get(key) == data


async def keys_of_unusual_characters_are_keys(store: ObjectStore) -> None:
    keys = ["spaces and + plus", "per%cent%20", "ü/日本", "a=b&c?d", "~(x)*'!", ".hidden", "a.tmp", "..."]
    for key in keys:
        await store.put(key, key.encode())
    for key in keys:
        assert await store.get(key) == key.encode()
        assert (await store.head(key)).key == key
    assert {info.key async for info in store.list()} == set(keys)
    await store.delete(keys)
    assert [info.key async for info in store.list()] == []


async def what_cannot_be_a_key_is_refused(store: ObjectStore) -> None:
    for key in ("", "/", "/a", "a/", "a//b", ".", "..", "a/../b", "a/.", ".tmp-1", "a/.tmp-x/b"):
        for call in (store.get(key), store.put(key, b"x"), store.delete([key]), store.head(key)):
            with pytest.raises(ValueError, match="cannot be the key"):
                await call
    assert [info.key async for info in store.list()] == []


async def probing_leaves_nothing_behind(store: ObjectStore) -> None:
    await store.probe()
    assert [info.key async for info in store.list()] == []


CHECKS: Final[tuple[Check, ...]] = (
    an_object_is_read_as_it_was_put,
    an_object_of_no_bytes_is_an_object,
    an_object_of_16_mib_is_put_and_read_whole,
    a_range_is_cut_at_the_end_of_the_object,
    what_is_read_cannot_be_written_to,
    a_second_put_replaces_the_object,
    put_if_absent_never_replaces_other_bytes,
    put_if_absent_of_equal_bytes_succeeds,
    of_simultaneous_puts_if_absent_one_wins,
    an_object_never_put_is_missing,
    deleted_objects_are_gone_and_the_others_are_not,
    deleting_what_is_absent_is_fine,
    one_delete_takes_a_thousand_keys,
    head_says_size_and_time,
    the_etag_changes_with_the_bytes,
    a_listing_shows_all_objects_in_key_order,
    a_listing_takes_a_prefix_that_ends_in_a_slash,
    a_listing_resumes_after_any_of_its_keys,
    a_listing_goes_over_more_than_one_page,
    simultaneous_calls_do_not_disturb_each_other,
    readers_see_the_old_or_the_new_object_whole,
    a_cancelled_put_leaves_nothing_or_all,
    keys_of_unusual_characters_are_keys,
    what_cannot_be_a_key_is_refused,
    probing_leaves_nothing_behind,
)
