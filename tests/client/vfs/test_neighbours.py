"""Small files fetched before they are read: which, how many, and nothing where nobody reads so."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from chunkstore.errors import AtollError, BucketUnavailable
from chunkstore.geometry import KIB, SliceId
from client.vfs import neighbours
from client.vfs.neighbours import Neighbours
from metasvc.errors import FsError
from metasvc.model import READ_MAPS_MAX, ROOT_INO, Ino, SetAttr
from tests.client.vfs.remote import mounted
from tests.client.vfs.volumes import INLINE_BYTES, ROOT, Place, VfsVolume

SIZE = 8 * KIB
NOWHERE = SliceId(1 << 60)


def content(name: bytes) -> bytes:
    """Return what a file of this name holds: nothing in it is in another."""
    return (name + b"|") * (SIZE // (len(name) + 1))


async def write(volume: VfsVolume, parent: Ino, name: bytes, data: bytes) -> Ino:
    """Create a file with this content."""
    vfs = volume.vfs
    handle = await vfs.create(ROOT, parent, name, mode=0o644, flags=os.O_RDWR)
    await vfs.write(handle.fh, 0, data)
    await vfs.flush(handle.fh)
    await vfs.release(handle.fh)
    return handle.inode.ino


async def read(volume: VfsVolume, parent: Ino, name: bytes) -> bytes:
    """Look a file up, open, read and close it."""
    vfs = volume.vfs
    handle = await vfs.open(ROOT, (await vfs.lookup(parent, name)).ino, os.O_RDONLY)
    try:
        return bytes(await vfs.read(handle.fh, 0, 128 * KIB))
    finally:
        await vfs.release(handle.fh)


async def make(place: Place, *, directories: int = 1, files: int = 20) -> tuple[list[Ino], list[bytes]]:
    """Write directories of small files; return them and the names that each has."""
    names = [b"file%03d" % number for number in range(files)]
    inos = []
    async with place.opened() as volume:
        for number in range(directories):
            inode = await volume.vfs.mkdir(ROOT, ROOT_INO, b"directory%d" % number, mode=0o755)
            inos.append(inode.ino)
            for name in names:
                await write(volume, inode.ino, name, content(name))
    return inos, names


async def until(holds: Callable[[], bool]) -> None:
    """Wait until something holds, for 20 s at most."""
    async with asyncio.timeout(20):
        while not holds():
            await asyncio.sleep(0.002)


def of(volume: VfsVolume) -> Neighbours:
    """Return what fetches ahead, once the store knows what its cache has."""
    found = volume.vfs._neighbours
    assert found is not None
    return found


async def ready(volume: VfsVolume) -> Neighbours:
    await until(lambda: not volume.chunks.may_have(NOWHERE))
    return of(volume)


async def rests(ahead: Neighbours) -> None:
    """Wait until nothing is being fetched ahead."""
    await until(lambda: not len(ahead._tasks))


async def test_after_two_files_the_others_are_there_before_they_are_read(tmp_path: Path) -> None:
    place = Place(tmp_path)
    (directory,), names = await make(place)
    async with place.opened(fresh_cache=True) as volume:
        ahead = await ready(volume)
        for name in names[5:7]:
            assert await read(volume, directory, name) == content(name)
        await until(lambda: volume.bucket.gets == len(names))
        await rests(ahead)
        volume.bucket.gets_fail = True
        for name in names:
            assert await read(volume, directory, name) == content(name)
        assert volume.bucket.gets == len(names), "each object once"
        metrics = volume.vfs.metrics
        assert (
            metrics.neighbour_fetched_bytes == metrics.neighbour_read_bytes == (len(names) - 2) * len(content(names[0]))
        )


async def test_one_file_brings_no_other(tmp_path: Path) -> None:
    place = Place(tmp_path)
    (directory,), names = await make(place)
    async with place.opened(fresh_cache=True) as volume:
        ahead = await ready(volume)
        await read(volume, directory, names[0])
        volume.clock.now_s += neighbours.PAUSE_S + 0.1
        await read(volume, directory, names[1])
        await rests(ahead)
        assert volume.bucket.gets == 2, "a pause between: they are not in a row"
        await read(volume, directory, names[2])
        await until(lambda: volume.bucket.gets == len(names))


async def test_what_lies_in_the_cache_starts_nothing(tmp_path: Path) -> None:
    place = Place(tmp_path)
    (directory,), names = await make(place)
    async with place.opened() as volume:
        ahead = await ready(volume)
        for name in names:
            await read(volume, directory, name)
        assert not ahead._directories
        assert not volume.bucket.gets


async def test_large_and_inline_files_are_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbours, "LARGEST_BYTES", SIZE)
    place = Place(tmp_path)
    (directory,), names = await make(place, files=3)
    async with place.opened() as volume:
        await write(volume, directory, b"large", b"x" * (SIZE + 1))
        await write(volume, directory, b"tiny", b"x" * INLINE_BYTES)
        await volume.vfs.mkdir(ROOT, directory, b"below", mode=0o755)
        await volume.vfs.symlink(ROOT, directory, b"link", b"x" * 3000)
    async with place.opened(fresh_cache=True) as volume:
        ahead = await ready(volume)
        for name in names[:2]:
            await read(volume, directory, name)
        await until(lambda: volume.bucket.gets == 3)
        await rests(ahead)
        assert volume.bucket.gets == 3
        assert await read(volume, directory, b"large") == b"x" * (SIZE + 1)


async def test_no_more_than_the_budget_lies_unread_and_reading_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(neighbours, "START_BYTES", 4 * SIZE)
    monkeypatch.setattr(neighbours, "MOST_BYTES", 6 * SIZE)
    place = Place(tmp_path)
    (directory,), names = await make(place, files=40)
    async with place.opened(fresh_cache=True) as volume:
        ahead = await ready(volume)
        for name in names[:2]:
            await read(volume, directory, name)
        await until(lambda: volume.bucket.gets == 6)
        await rests(ahead)
        assert volume.bucket.gets == 6, "two that were read, four ahead"
        for number, name in enumerate(names[2:], 3):
            assert await read(volume, directory, name) == content(name)
            await rests(ahead)
            assert volume.bucket.gets <= number + 6
        assert volume.bucket.gets == len(names), "each object once"
        metrics = volume.vfs.metrics
        assert metrics.neighbour_read_bytes == metrics.neighbour_fetched_bytes == 38 * len(content(names[0])), (
            "none of the others was waited for"
        )


async def test_what_nobody_reads_makes_it_fetch_less(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbours, "START_BYTES", 8 * SIZE)
    monkeypatch.setattr(neighbours, "LEAST_BYTES", SIZE)
    place = Place(tmp_path)
    directories, names = await make(place, directories=6)
    async with place.opened(fresh_cache=True) as volume:
        ahead = await ready(volume)
        fetched = []
        for directory in directories:
            before = volume.bucket.gets
            for name in names[:2]:
                await read(volume, directory, name)
            await rests(ahead)
            fetched.append(volume.bucket.gets - before - 2)
            volume.clock.now_s += neighbours.PATIENCE_S + 1
        assert fetched == [8, 4, 2, 1, 1, 1]
        assert volume.vfs.metrics.neighbour_unread_bytes == 16 * len(content(names[0])), "the last has its time yet"


async def test_the_next_directory_needs_one_file_only(tmp_path: Path) -> None:
    place = Place(tmp_path)
    (first, second), names = await make(place, directories=2)
    async with place.opened(fresh_cache=True) as volume:
        ahead = await ready(volume)
        for name in names:
            await read(volume, first, name)
        await rests(ahead)
        await read(volume, second, names[0])
        await until(lambda: volume.bucket.gets == 2 * len(names))


async def test_who_takes_directories_in_order_finds_the_next_ones_there(tmp_path: Path) -> None:
    place = Place(tmp_path)
    directories, names = await make(place, directories=4, files=6)
    async with place.opened(fresh_cache=True) as volume:
        ahead = await ready(volume)
        for name in names:
            await read(volume, directories[0], name)
            await rests(ahead)
        assert volume.bucket.gets == 6, "it has not gone on to any other"
        for name in names[:2]:
            await read(volume, directories[1], name)
            await rests(ahead)
        assert volume.bucket.gets == 24, "it goes from one to the one behind it"
        volume.bucket.gets_fail = True
        for directory in directories:
            for name in names:
                assert await read(volume, directory, name) == content(name)
        metrics = volume.vfs.metrics
        assert metrics.neighbour_fetched_bytes == metrics.neighbour_read_bytes


@pytest.mark.parametrize("order", [(3, 1), (0, 2), (2, 1)])
async def test_who_takes_directories_in_another_order_gets_the_one_that_is_read(
    tmp_path: Path, order: tuple[int, int]
) -> None:
    place = Place(tmp_path)
    directories, names = await make(place, directories=4, files=6)
    async with place.opened(fresh_cache=True) as volume:
        ahead = await ready(volume)
        for number in order:
            for name in names:
                assert await read(volume, directories[number], name) == content(name)
                await rests(ahead)
        assert volume.bucket.gets == 12


async def test_of_a_directory_that_nobody_reads_yet_so_many_files_are_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(neighbours, "_FILES_OF_NEXT", 4)
    monkeypatch.setattr(neighbours, "_MAPS_AT_ONCE", 2)
    monkeypatch.setattr(neighbours, "_DIRECTORIES_AHEAD", 2)
    place = Place(tmp_path)
    directories, names = await make(place, directories=5, files=10)
    async with place.opened(fresh_cache=True) as volume:
        ahead = await ready(volume)
        for directory in directories[:2]:
            for name in names:
                assert await read(volume, directory, name) == content(name)
                await rests(ahead)
        assert volume.bucket.gets == 2 * 10 + 2 * 4
        for directory in directories:
            for name in names:
                assert await read(volume, directory, name) == content(name)
                await rests(ahead)
        assert volume.bucket.gets == 50, "each object once"


async def test_files_that_change_or_go_meanwhile_harm_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = Place(tmp_path)
    (directory,), names = await make(place)
    async with place.opened(fresh_cache=True) as volume:
        vfs, ahead = volume.vfs, await ready(volume)
        read_maps = volume.meta.read_maps

        async def late(inos: list[Ino]) -> object:
            await vfs.unlink(ROOT, directory, names[10])
            ino = (await vfs.lookup(directory, names[11])).ino
            await vfs.setattr(ROOT, ino, SetAttr(size_bytes=10))
            found = await read_maps(inos)
            ino = (await vfs.lookup(directory, names[12])).ino
            await vfs.setattr(ROOT, ino, SetAttr(size_bytes=0))
            return found

        monkeypatch.setattr(volume.meta, "read_maps", late)
        for name in names[:2]:
            await read(volume, directory, name)
        await until(lambda: bool(ahead._unread))
        await rests(ahead)
        volume.bucket.gets_fail = True
        for name in names:
            if name == names[10]:
                with pytest.raises(FsError) as told:
                    await read(volume, directory, name)
                assert told.value.errno == errno.ENOENT
            else:
                cut = {names[11]: 10, names[12]: 0}.get(name)
                assert await read(volume, directory, name) == content(name)[:cut]


async def test_a_bucket_that_fails_is_told_to_who_reads_and_to_nobody_else(tmp_path: Path) -> None:
    place = Place(tmp_path)
    (directory,), names = await make(place)
    async with place.opened(fresh_cache=True) as volume:
        ahead = await ready(volume)
        await read(volume, directory, names[0])
        volume.bucket.gets_fail = True
        with pytest.raises(BucketUnavailable):
            await read(volume, directory, names[1])
        await rests(ahead)
        with pytest.raises(BucketUnavailable):
            await read(volume, directory, names[5])
        volume.bucket.gets_fail = False
        for name in names:
            assert await read(volume, directory, name) == content(name)


async def test_a_service_that_fails_is_no_error_of_a_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = Place(tmp_path)
    (directory,), names = await make(place)
    async with place.opened(fresh_cache=True) as volume:
        ahead = await ready(volume)

        async def away(*_: object, **__: object) -> object:
            raise AtollError("the service is away")

        with monkeypatch.context() as patch:
            patch.setattr(volume.meta, "readdir", away)
            for name in names[:4]:
                assert await read(volume, directory, name) == content(name)
            await rests(ahead)
            assert volume.bucket.gets == 4
        assert await read(volume, directory, names[4]) == content(names[4])
        await until(lambda: volume.bucket.gets == len(names))


async def test_closing_waits_for_nothing_that_is_under_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = Place(tmp_path)
    (directory,), names = await make(place)
    async with asyncio.timeout(20):
        async with place.opened(fresh_cache=True) as volume:
            await ready(volume)
            await read(volume, directory, names[0])
            get, hangs = volume.bucket.get, 0

            async def hang(key: str, **options: object) -> object:
                nonlocal hangs
                if volume.bucket.gets >= 2:
                    hangs += 1
                    await asyncio.Event().wait()
                return await get(key, **options)  # type: ignore[arg-type]

            monkeypatch.setattr(volume.bucket, "get", hang)
            await read(volume, directory, names[1])
            await until(lambda: hangs == neighbours.AT_ONCE)


async def test_many_maps_over_the_wire_are_those_that_single_reads_bring(tmp_path: Path) -> None:
    async with mounted(tmp_path) as mount:
        vfs, meta = mount.vfs, mount.client.meta
        inos = []
        for number in range(6):
            handle = await vfs.create(ROOT, ROOT_INO, b"file%d" % number, mode=0o644, flags=os.O_RDWR)
            # Nothing, inline bytes, one slice, several.
            for piece in range(number):
                await vfs.write(handle.fh, piece * 50_000, b"x" * number * 700)
                await vfs.flush(handle.fh)
            await vfs.release(handle.fh)
            inos.append(handle.inode.ino)
        directory = await vfs.mkdir(ROOT, ROOT_INO, b"directory", mode=0o755)
        pieces = await vfs.create(ROOT, ROOT_INO, b"pieces", mode=0o644, flags=os.O_RDWR)
        for piece in range(65):
            await vfs.write(pieces.fh, piece * 10, b"x")
            await vfs.flush(pieces.fh)
        await vfs.release(pieces.fh)
        before = mount.client.connection.requests
        found = await meta.read_maps([*inos, directory.ino, pieces.inode.ino, Ino(1 << 40)])
        assert mount.client.connection.requests - before == 1
        assert list(found) == inos
        for ino in inos:
            assert found[ino] == await meta.read_map(ino, start=0, end=1)
        with pytest.raises(FsError) as told:
            await meta.read_maps([inos[0]] * (READ_MAPS_MAX + 1))
        assert told.value.errno == errno.EINVAL
