"""kill -9 in the same boot: what images have counts at once, what local acknowledged is there, nothing is ever wrong."""

from __future__ import annotations

import asyncio
import random
import subprocess
import sys
from pathlib import Path

from chunkstore.geometry import KIB, MIB, SliceId
from chunkstore.slices import Durability, SliceInfo
from tests.chunkstore.stores import Workshop, content, settled, written

BLOCK_BYTES = 1 * MIB


async def write_until_killed(directory: Path) -> None:
    """Seal slices and say so, one line each; read them in pieces and evict beside it. Runs in a process of its own."""
    workshop = Workshop(directory, durability=Durability.LOCAL, block_bytes=BLOCK_BYTES)
    choose = random.Random(directory.name)
    infos: list[SliceInfo] = []
    async with workshop.opened() as store:
        for number in range(1, 10_000):
            length = choose.choice([5 * KIB, 64 * KIB, 1 * MIB + 5, 3 * MIB])
            info = await written(store, number, content(length, salt=number))
            infos.append(info)
            sys.stdout.write(f"{info.slice_id} {info.length} {info.digests.hex()}\n")
            sys.stdout.flush()
            if number % 7 == 0:
                await store.drain(timeout_s=30)
                store.forget(choose.choice(infos).slice_id)
                other = choose.choice(infos)
                start = choose.randrange(other.length)
                await store.read(other, start, min(other.length, start + 100_000))
                for image in list(store._cache.opened):
                    if image.states is not None:
                        await store._cache.punch(image, [0])


async def test_kill_9_at_random_moments(tmp_path: Path, seed: int) -> None:
    choose = random.Random(seed)
    for turn in range(8):
        directory = tmp_path / f"turn-{seed}-{turn}"
        directory.mkdir()
        program = (
            "import asyncio; from pathlib import Path; from tests.chunkstore.test_kill import write_until_killed;"
            f"asyncio.run(write_until_killed(Path({str(directory)!r})))"
        )
        process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        lines = []
        try:
            lines += [process.stdout.readline() for _ in range(choose.randint(1, 40))]
        finally:
            process.kill()
            rest, _ = process.communicate()
        lines += [line for line in rest.splitlines(keepends=True) if line.endswith("\n")]
        infos = []
        for line in lines:
            slice_id, length, digests = line.split()
            infos.append(SliceInfo(SliceId(int(slice_id)), int(length), bytes.fromhex(digests)))
        workshop = Workshop(directory, durability=Durability.LOCAL, block_bytes=BLOCK_BYTES)
        async with workshop.opened() as store:
            for info in infos:
                assert await store.read(info, 0, info.length) == content(info.length, salt=info.slice_id)
            await store.drain(timeout_s=60)
            await settled(store)
        async with workshop.opened(cache_dir=directory / "empty") as store:
            for info in infos:
                assert await store.read(info, 0, info.length) == content(info.length, salt=info.slice_id)


async def test_what_was_fetched_before_a_kill_is_not_fetched_again_in_the_same_boot(tmp_path: Path) -> None:
    workshop = Workshop(tmp_path, block_bytes=BLOCK_BYTES)
    data = content(6 * MIB)
    async with workshop.opened() as store:
        info = await written(store, 1, data)
        store.forget(info.slice_id)
        await settled(store)
        await store.read(info, 2 * MIB, 4 * MIB)
        await asyncio.gather(*store._tasks._tasks)
        await workshop.kill(store)
    workshop.bucket.gets.clear()
    async with workshop.opened() as store:
        assert await store.read(info, 2 * MIB, 4 * MIB) == data[2 * MIB : 4 * MIB]
        assert workshop.bucket.gets == []
        assert store.try_read(info, 3 * MIB, 3 * MIB + 5) == data[3 * MIB : 3 * MIB + 5]
        assert await store.read(info, 0, 100) == data[:100]
        assert len(workshop.bucket.gets) == 1
