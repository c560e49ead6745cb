"""What must not happen and does: bugs, refused memory, disks that lose what they took. Nothing counts as stored then."""

from __future__ import annotations

import asyncio
import errno
from pathlib import Path

import pytest

from chunkstore.errors import AtollError
from chunkstore.geometry import KIB, MIB, SliceId
from chunkstore.images.disk import Disk
from chunkstore.slices import Durability
from chunkstore.uploading import Uploader
from tests.chunkstore.stores import Workshop, append, content, settled


@pytest.mark.parametrize("durability", list(Durability))
@pytest.mark.parametrize("length", [64_000, 2 * MIB, 5 * MIB])
async def test_a_seal_tells_of_any_exception_and_works_when_it_has_passed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, length: int, durability: Durability
) -> None:
    workshop = Workshop(tmp_path, durability=durability)
    data = content(length)
    async with workshop.opened() as store:
        writer = store.writer(SliceId(1))
        with monkeypatch.context() as patched:

            async def refuse(*_: object) -> None:
                raise MemoryError

            patched.setattr("chunkstore.flight.Flight._upload", refuse)
            patched.setattr("chunkstore.flight.Flight._hash", refuse)
            await append(writer, data)
            if durability is Durability.OBJECT or length > 2 * MIB:
                with pytest.raises(AtollError, match="could not be stored"):
                    await writer.seal()
                assert await writer.read(0, length) == data
        sealed = await writer.seal()
        await store.drain()
        store.forget(SliceId(1))
        await settled(store)
        assert await store.read(sealed.info, 0, length) == data


async def test_a_staged_slice_is_not_forgotten_when_its_upload_meets_a_bug(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("chunkstore.uploading._FIRST_PAUSE_S", 0.05)
    workshop = Workshop(tmp_path, durability=Durability.LOCAL)
    data = content(3 * MIB)
    put = Uploader.put
    attempts = 0

    async def fail_twice(self: Uploader, slice_id: SliceId, block_index: int, payload: bytes) -> None:
        nonlocal attempts
        attempts += 1
        if attempts <= 2:
            raise RuntimeError("a bug")
        await put(self, slice_id, block_index, payload)

    monkeypatch.setattr(Uploader, "put", fail_twice)
    async with workshop.opened() as store:
        writer = store.writer(SliceId(1))
        await append(writer, data)
        sealed = await writer.seal()
        await store.drain()
        assert attempts > 2
        assert len(await workshop.bucket.keys()) == 2
        store.forget(SliceId(1))
        assert await store.read(sealed.info, 0, len(data)) == data


class LosingDisk(Disk):
    """A disk that takes small writes, and tells at the next sync that it could not keep them."""

    def datasync(self, descriptor: int) -> None:
        raise OSError(errno.EIO, "writing back failed")


async def test_a_tail_that_the_cache_disk_could_not_keep_is_an_error_and_never_data(tmp_path: Path) -> None:
    workshop = Workshop(tmp_path, write_memory_bytes=4 * MIB)
    async with workshop.opened() as store:
        writers = [store.writer(SliceId(number)) for number in range(1, 8)]
        for writer in writers:
            await append(writer, content(600 * KIB, salt=writer.slice_id))
        spilled = [writer for writer in writers if writer._is_spilled]
        assert spilled
        for writer in spilled:
            writer._flight.draft._disk = LosingDisk()
            with pytest.raises((OSError, AtollError)):
                await writer.seal()
        for writer in writers:
            if writer not in spilled:
                await writer.seal()
            await writer.discard()


async def test_a_read_that_meets_the_end_of_a_draft_reads_the_slice_elsewhere(tmp_path: Path) -> None:
    workshop = Workshop(tmp_path)
    data = content(7 * MIB)

    class SlowDisk(Disk):
        """Let reads of the draft wait until the slice is sealed and its draft closed."""

        def __init__(self) -> None:
            self.reads = 0

        def try_pread(self, descriptor: int, buffer: bytearray, offset: int) -> int:
            self.reads += 1
            return -1

    async with workshop.opened() as store:
        writer = store.writer(SliceId(1))
        await append(writer, data)
        for _ in range(200):
            if all(block.in_draft and block.is_uploaded for block in writer._flight.blocks):
                break
            await asyncio.sleep(0.01)
        writer._flight.draft._disk = SlowDisk()
        reading = asyncio.ensure_future(writer.read(MIB, 6 * MIB + 5))
        sealing = asyncio.ensure_future(writer.seal())
        assert await reading == data[MIB : 6 * MIB + 5]
        sealed = await sealing
        # After the seal the draft answers nobody: its descriptor may be that of another file by now.
        with pytest.raises(OSError, match="closed"):
            await writer._flight.draft.read(0, 10)
        assert await writer.read(0, len(data)) == data
        assert await store.read(sealed.info, 0, len(data)) == data
