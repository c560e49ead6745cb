"""The directory as a bucket: what survives a loss of power, leftovers, and errors of the file system."""

from __future__ import annotations

import asyncio
import errno
import os
import stat
import subprocess
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest

from chunkstore.buckets.directory import LEFTOVER_AGE_S, DirectoryStore, Disk, make_directory
from chunkstore.errors import (
    AtollError,
    BucketDenied,
    BucketFull,
    BucketInvalid,
    BucketUnavailable,
    ObjectMissing,
)


def _run(root: Path, use: Callable[[DirectoryStore], Awaitable[None]], *, disk: Disk | None = None) -> None:
    async def run() -> None:
        store = DirectoryStore(str(root), disk=disk)
        try:
            async with asyncio.timeout(60):
                await use(store)
        finally:
            await store.close()

    asyncio.run(run())


def _files(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}


class FailingDisk(Disk):
    """Fail with one error, once, at one kind of call."""

    def __init__(self, call: str, number: int) -> None:
        self._call = call
        self._number = number
        self.failed = False

    def _check(self, call: str) -> None:
        if call == self._call and not self.failed:
            self.failed = True
            raise OSError(self._number, os.strerror(self._number))

    def create(self, path: str) -> int:
        self._check("create")
        return super().create(path)

    def write(self, descriptor: int, data: memoryview) -> None:
        self._check("write")
        super().write(descriptor, data)

    def sync_file(self, descriptor: int) -> None:
        self._check("sync_file")
        super().sync_file(descriptor)

    def close(self, descriptor: int) -> None:
        super().close(descriptor)
        self._check("close")

    def replace(self, source: str, target: str) -> None:
        self._check("replace")
        super().replace(source, target)

    def mkdir(self, path: str) -> None:
        self._check("mkdir")
        super().mkdir(path)

    def sync_directory(self, path: str) -> None:
        self._check("sync_directory")
        super().sync_directory(path)


@pytest.mark.parametrize("call", ["create", "write", "sync_file", "close", "replace", "mkdir"])
@pytest.mark.parametrize(
    ("number", "kind"),
    [
        (errno.ENOSPC, BucketFull),
        (errno.EDQUOT, BucketFull),
        (errno.EIO, BucketUnavailable),
        (errno.EROFS, BucketDenied),
        (errno.ENOTSUP, BucketInvalid),
    ],
)
def test_a_put_that_fails_leaves_nothing_and_may_be_repeated(
    call: str, number: int, kind: type[AtollError], tmp_path: Path
) -> None:
    disk = FailingDisk(call, number)

    async def use(store: DirectoryStore) -> None:
        with pytest.raises(kind) as caught:
            await store.put("a/b", b"data")
        assert os.strerror(number) in str(caught.value)
        assert len(str(caught.value).splitlines()) == 1
        assert _files(tmp_path) == set()
        await store.put("a/b", b"data")
        assert await store.get("a/b") == b"data"

    _run(tmp_path, use, disk=disk)
    assert disk.failed


def test_a_put_whose_directory_cannot_be_synced_is_not_acknowledged(tmp_path: Path) -> None:
    async def use(store: DirectoryStore) -> None:
        # The first sync is that of the parent of the new directory.
        with pytest.raises(BucketUnavailable):
            await store.put("a/b", b"data")
        await store.put("a/b", b"data")

    _run(tmp_path, use, disk=FailingDisk("sync_directory", errno.EIO))


def test_a_full_file_system_is_reported_with_the_remedy(tmp_path: Path) -> None:
    async def use(store: DirectoryStore) -> None:
        with pytest.raises(BucketFull, match="No space left on device: free space or raise the quota there") as caught:
            await store.put("a/b", b"data")
        assert caught.value.errno == errno.ENOSPC
        assert not caught.value.retryable

    _run(tmp_path, use, disk=FailingDisk("write", errno.ENOSPC))


def test_a_directory_that_does_not_exist_is_told_with_the_remedy_by_every_call(tmp_path: Path) -> None:
    async def use(store: DirectoryStore) -> None:
        async def listing() -> None:
            async for _ in store.list():
                pass

        for call in (
            store.put("a/b", b"1"),
            store.put("a", b"1"),
            store.get("a"),
            store.head("a"),
            store.delete(["a"]),
            listing(),
            store.probe(),
        ):
            with pytest.raises(BucketInvalid, match=r"absent does not exist: create it, .* --create-bucket"):
                await call

    _run(tmp_path / "absent", use)
    assert list(tmp_path.iterdir()) == []


def test_probing_leaves_no_directory(tmp_path: Path) -> None:
    (tmp_path / "bucket").mkdir()

    async def use(store: DirectoryStore) -> None:
        await store.probe()

    _run(tmp_path / "bucket", use)
    assert list((tmp_path / "bucket").iterdir()) == []


def test_a_file_in_place_of_the_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")

    async def use(store: DirectoryStore) -> None:
        with pytest.raises(BucketInvalid):
            await store.probe()

    _run(tmp_path / "file", use)


def test_a_key_below_an_object_is_refused(tmp_path: Path) -> None:
    async def use(store: DirectoryStore) -> None:
        await store.put("a", b"1")
        with pytest.raises(BucketInvalid, match="is an object"):
            await store.put("a/b", b"1")
        await store.put("c/d", b"1")
        with pytest.raises(BucketInvalid, match="is a directory of objects"):
            await store.put("c", b"1")
        with pytest.raises(BucketInvalid, match="is a directory of objects"):
            await store.put("c", b"1", if_absent=True)
        assert {info.key async for info in store.list()} == {"a", "c/d"}

    _run(tmp_path, use)


def test_objects_are_for_the_daemon_alone(tmp_path: Path) -> None:
    async def use(store: DirectoryStore) -> None:
        await store.put("a/b", b"secret")

    _run(tmp_path, use)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o700
    assert stat.S_IMODE((tmp_path / "a/b").stat().st_mode) == 0o600


def test_a_directory_that_somebody_removed_is_made_again(tmp_path: Path) -> None:
    async def use(store: DirectoryStore) -> None:
        await store.put("a/b/c", b"1")
        (tmp_path / "a/b/c").unlink()
        (tmp_path / "a/b").rmdir()
        (tmp_path / "a").rmdir()
        await store.put("a/b/d", b"2")
        assert await store.get("a/b/d") == b"2"

    _run(tmp_path, use)


def test_leftovers_are_never_listed_and_go_when_they_are_old(tmp_path: Path) -> None:
    old, young = tmp_path / "a/.tmp-old", tmp_path / "a/.tmp-young"
    (tmp_path / "a").mkdir()
    for path in (old, young):
        path.write_text("half")
    past = time.time() - LEFTOVER_AGE_S - 10
    os.utime(old, (past, past))

    async def use(store: DirectoryStore) -> None:
        await store.put("a/b", b"1")
        assert [info.key async for info in store.list()] == ["a/b"]
        assert [info.key async for info in store.list("a/")] == ["a/b"]

    _run(tmp_path, use)
    assert not old.exists()
    assert young.exists()


def test_a_listing_passes_over_what_is_no_object(tmp_path: Path) -> None:
    (tmp_path / "dir").mkdir()
    (tmp_path / "link").symlink_to("/etc")
    os.mkfifo(tmp_path / "fifo")
    (Path(os.fsdecode(os.fsencode(tmp_path) + b"/not-utf8-\xff"))).write_text("x")

    async def use(store: DirectoryStore) -> None:
        await store.put("a", b"1")
        assert [info.key async for info in store.list()] == ["a"]
        for key in ("dir", "link"):
            with pytest.raises(ObjectMissing):
                await store.head(key)

    _run(tmp_path, use)


def test_a_listing_is_in_the_order_of_the_keys_bytes(tmp_path: Path) -> None:
    keys = ["a-b", "a.b", "a/b", "a0", "ab", "ä/x", "z", "a/b-c/d", "a/b.x"]

    async def use(store: DirectoryStore) -> None:
        for key in keys:
            await store.put(key, b"1")
        listed = [info.key async for info in store.list()]
        assert listed == sorted(keys, key=str.encode)
        for position, key in enumerate(listed):
            assert [info.key async for info in store.list(start_after=key)] == listed[position + 1 :]

    _run(tmp_path, use)


class GatedDisk(Disk):
    """Hold the first sync of a named directory until told, and count the syncs of it."""

    def __init__(self, directory: Path, *, puts: int) -> None:
        self._directory = str(directory)
        self._puts = puts
        self._lock = threading.Lock()
        self.syncs = 0
        self.began = threading.Event()
        self.all_renamed = threading.Event()
        self.go_on = threading.Event()

    def replace(self, source: str, target: str) -> None:
        super().replace(source, target)
        with self._lock:
            self._puts -= 1
            if self._puts == 0:
                self.all_renamed.set()

    def sync_directory(self, path: str) -> None:
        if path == self._directory:
            self.syncs += 1
            if self.syncs == 1:
                self.began.set()
                assert self.go_on.wait(30)
        super().sync_directory(path)


def test_simultaneous_puts_share_the_sync_of_their_directory(tmp_path: Path) -> None:
    disk = GatedDisk(tmp_path / "a", puts=11)

    async def use(store: DirectoryStore) -> None:
        first = asyncio.ensure_future(store.put("a/first", b"1"))
        await asyncio.to_thread(disk.began.wait, 30)
        others = [asyncio.ensure_future(store.put(f"a/{n}", b"1")) for n in range(10)]
        await asyncio.to_thread(disk.all_renamed.wait, 30)
        # They came after the sync began: it does not cover them, whatever it finds.
        assert not any(task.done() for task in others)
        disk.go_on.set()
        await asyncio.gather(first, *others)

    _run(tmp_path, use, disk=disk)
    # One for the first, one that covers those who had asked by then; a thread between rename and asking makes one more.
    assert 2 <= disk.syncs <= 4


def test_make_directory_makes_those_above_and_takes_one_that_exists(tmp_path: Path) -> None:
    for _ in range(2):
        make_directory(str(tmp_path / "a/b/c"))
    assert (tmp_path / "a/b/c").is_dir()
    (tmp_path / "file").write_text("x")
    with pytest.raises(OSError, match="file"):
        make_directory(str(tmp_path / "file/x"))


@pytest.fixture
def small_file_system(tmp_path: Path) -> Iterator[Path]:
    """Mount 256 KiB of memory (needs root)."""
    place = tmp_path / "small"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", place], check=True, timeout=30)
    yield place
    subprocess.run(["umount", place], check=True, timeout=30)


def test_on_a_file_system_that_is_really_full_old_objects_stay_and_new_ones_fail(small_file_system: Path) -> None:
    async def use(store: DirectoryStore) -> None:
        await store.put("a/old", b"o" * 100_000)
        for _ in range(2):
            with pytest.raises(BucketFull):
                await store.put("a/new", b"n" * 300_000)
            with pytest.raises(BucketFull):
                await store.put("a/old", b"n" * 300_000)
        assert await store.get("a/old") == b"o" * 100_000
        assert _files(small_file_system) == {"a/old"}
        await store.delete(["a/old"])
        await store.put("a/new", b"n" * 100_000)

    _run(small_file_system, use)
