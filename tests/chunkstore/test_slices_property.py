"""Random histories of a chunk store against bytearrays: writes, seals, reads, evictions, kills, other boots, damage."""

from __future__ import annotations

import asyncio
import itertools
import random
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from uuid import UUID

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from chunkstore.errors import AtollError
from chunkstore.geometry import KIB, MIB, SliceId
from chunkstore.slices import ChunkStore, Durability, SliceInfo, SliceWriter
from tests.chunkstore.stores import Workshop, append, content, settled, unavailable


class History:
    """Do random things to one chunk store after the other, and know what must be read."""

    def __init__(self, workshop: Workshop, seed: int) -> None:
        self.workshop = workshop
        self.choose = random.Random(seed)
        self.boot = 1
        self.next_id = 1
        self.writers: dict[SliceWriter, bytearray] = {}
        self.sealed: dict[SliceInfo, bytes] = {}
        self.store = self.made()

    def made(self) -> ChunkStore:
        config = replace(self.workshop.config, durability=self.choose.choice(list(Durability)))
        return ChunkStore(config, bucket=self.workshop.bucket, boot_id=str(UUID(int=self.boot)))

    async def start(self) -> None:
        self.store = self.made()
        await self.store.__aenter__()
        await self.store.recover()

    async def write(self) -> None:
        if not self.writers or self.choose.random() < 0.3:
            self.writers[self.store.writer(SliceId(self.next_id))] = bytearray()
            self.next_id += 1
        writer, data = self.choose.choice(list(self.writers.items()))
        piece = content(self.choose.choice([1, 500, 70_000, 300_000]), salt=self.choose.randrange(1, 1 << 20))
        await append(writer, piece, step=self.choose.choice([4096, 65536, 1 << 20]))
        data += piece
        if self.choose.random() < 0.5 and writer.mutable_from < writer.length:
            offset = self.choose.randrange(writer.mutable_from, writer.length)
            patch = content(min(900, writer.length - offset), salt=self.choose.randrange(1, 1 << 20))
            if (wait := writer.overwrite(offset, patch)) is not None:
                await wait
            data[offset : offset + len(patch)] = patch

    async def read_unsealed(self) -> None:
        for writer, data in self.writers.items():
            assert writer.length == len(data)
            if data:
                start = self.choose.randrange(len(data))
                end = self.choose.randint(start, len(data) + 10)
                assert await writer.read(start, end) == data[start:end]

    async def seal(self) -> None:
        if self.writers:
            writer = self.choose.choice(list(self.writers))
            data = bytes(self.writers.pop(writer))
            if self.choose.random() < 0.2:
                self.workshop.bucket.put_error = unavailable()
                await asyncio.gather(writer.seal(), return_exceptions=True)
                self.workshop.bucket.put_error = None
            sealed = await writer.seal()
            if sealed.inline is not None:
                assert sealed.inline == data
            else:
                self.sealed[sealed.info] = data

    async def discard(self) -> None:
        if self.writers:
            writer = self.choose.choice(list(self.writers))
            del self.writers[writer]
            await writer.discard()

    async def read(self) -> None:
        async def one(info: SliceInfo, start: int, end: int) -> None:
            data = self.store.try_read(info, start, end)
            if data is None:
                data = await self.store.read(info, start, end)
            assert data == self.sealed[info][start:end]

        ranges = []
        for _ in range(self.choose.randint(1, 12) if self.sealed else 0):
            info = self.choose.choice(list(self.sealed))
            start = self.choose.randrange(info.length)
            ranges.append((info, start, min(info.length, start + self.choose.choice([1, 4096, 131072, 1 << 20]))))
        readers = [asyncio.create_task(one(*range_)) for range_ in ranges]
        if readers and self.choose.random() < 0.2:
            await asyncio.sleep(0)
            readers.pop().cancel()
        await asyncio.gather(*readers)

    async def read_in_order(self) -> None:
        if self.sealed:
            info, data = self.choose.choice(list(self.sealed.items()))
            for start in range(0, info.length, 131072):
                end = min(info.length, start + 131072)
                assert await self.store.read(info, start, end) == data[start:end]

    async def prefetch(self) -> None:
        for info in list(self.sealed)[:3]:
            self.store.prefetch(info, self.choose.randrange(info.length), info.length)

    async def forget(self) -> None:
        if self.sealed:
            self.store.forget(self.choose.choice(list(self.sealed)).slice_id)

    async def evict(self) -> None:
        await self.store._evictor.evict(self.choose.choice([1, 100_000, 1 << 30]))

    async def punch(self) -> None:
        for image in list(self.store._cache.opened):
            if image.states is not None and self.choose.random() < 0.5:
                await self.store._cache.punch(image, [self.choose.randrange(image.layout.block_count)])

    async def delete(self) -> None:
        if self.sealed:
            info = self.choose.choice(list(self.sealed))
            del self.sealed[info]
            await self.store.delete(info.slice_id, info.length)

    async def drain(self) -> None:
        await self.store.drain(timeout_s=30)

    async def restart(self) -> None:
        """End it in one of all ways. Writers end with it; what was sealed must be there afterwards."""
        self.writers.clear()
        way = self.choose.choice(["close", "kill", "boot", "damage"])
        if way == "close":
            await self.store.__aexit__(None, None, None)
        else:
            await self.workshop.kill(self.store)
        if way in ("boot", "damage"):
            self.boot += 1
        if way == "damage":
            self.damage()
        await self.start()

    def damage(self) -> None:
        """Leave of the cache what another boot may find: anything, but for what is staged, which was synced."""
        staged = {path.name.partition("-")[0] for path in (self.workshop.cache / "staged").iterdir()}
        for path in itertools.chain(
            (self.workshop.cache / "images").iterdir(), (self.workshop.cache / "sides").iterdir()
        ):
            if path.name in staged or self.choose.random() < 0.5:
                continue
            data = bytearray(path.read_bytes())
            match self.choose.randrange(4):
                case 0:
                    path.unlink()
                case 1:
                    path.write_bytes(data[: self.choose.randrange(len(data) + 1)])
                case 2:
                    start = self.choose.randrange(len(data) + 1) // 4096 * 4096
                    data[start : start + 4096] = bytes(len(data[start : start + 4096]))
                    path.write_bytes(data)
                case _:
                    if data:
                        data[self.choose.randrange(len(data))] ^= 0xFF
                    path.write_bytes(data)

    async def end(self) -> None:
        await self.store.drain(timeout_s=30)
        for writer in self.writers:
            await writer.discard()
        self.writers.clear()
        await settled(self.store)
        assert self.store.stats()["write_memory_bytes"] == 0
        await self.store.__aexit__(None, None, None)
        # From the bucket alone.
        config = replace(self.workshop.config, cache_dir=self.workshop.directory / "empty")
        async with ChunkStore(config, bucket=self.workshop.bucket) as store:
            for info, data in self.sealed.items():
                assert await store.read(info, 0, info.length) == data


STEPS = [
    *[History.write] * 6,
    *[History.seal] * 4,
    *[History.read] * 5,
    History.read_unsealed,
    History.read_in_order,
    History.discard,
    History.prefetch,
    History.forget,
    History.evict,
    History.punch,
    History.delete,
    History.drain,
    History.restart,
]


async def play(directory: Path, steps: list[int], seed: int, *, block_bytes: int, write_memory_bytes: int) -> None:
    """Play a history to its end."""
    workshop = Workshop(
        directory,
        block_bytes=block_bytes,
        inline_limit_bytes=600,
        write_memory_bytes=write_memory_bytes,
        cache_limit_bytes=3 * MIB,
        read_memory_bytes=2 * MIB,
        max_open_images=8,
    )
    history = History(workshop, seed)
    try:
        async with asyncio.timeout(90):
            await history.start()
            for step in steps:
                await STEPS[step](history)
            await history.end()
    except AtollError as error:
        raise AssertionError(f"no error of the bucket is left in this history, but: {error}") from error


@settings(max_examples=25, suppress_health_check=list(HealthCheck))
@given(
    steps=st.lists(st.integers(0, len(STEPS) - 1), min_size=5, max_size=60),
    seed=st.integers(0, 2**32),
    block_bytes=st.sampled_from([64 * KIB, 512 * KIB, 2 * MIB]),
    write_memory_bytes=st.sampled_from([256 * KIB, 8 * MIB]),
)
def test_what_was_sealed_is_read_whatever_happened_since(
    steps: list[int], seed: int, block_bytes: int, write_memory_bytes: int
) -> None:
    with TemporaryDirectory(prefix="atoll-history-") as directory:
        asyncio.run(play(Path(directory), steps, seed, block_bytes=block_bytes, write_memory_bytes=write_memory_bytes))
