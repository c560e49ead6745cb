"""Measure dumps and loads: rows a second, bytes a row, on each store.

`python bench/dump.py [--rows N] [--rounds N]`. A volume of files of a training set (one in four with an object of its own, the
others inline, of 100 bytes of noise each, in directories of 1,000) is put into each store, dumped by its owner into a file, and
loaded from there into an empty store of the same kind, with the durability that a service has. The owner, the loader and, for
PostgreSQL, the server share the machine. Figures are reported and never judged.
"""

import asyncio
import random
import resource
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path
from statistics import median
from typing import Any, Final

import click
import uvloop

# Started as a file, Python looks for modules beside it; the benchmark imports its own by their full names.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from chunkstore.geometry import SliceId
from metasvc.engine import Engine, first_rows
from metasvc.engine.dump import dump
from metasvc.engine.format import NEXT_INO, NEXT_SLICE
from metasvc.engine.load import load
from metasvc.model import ROOT_INO, Chunk, Counter, Dentry, Ino, Inode, Slice, SliceKind, SliceRef, pack_refs
from metasvc.store import Store
from metasvc.store.postgresql import PostgresqlStore
from metasvc.store.sqlite import SqliteStore
from metasvc.store.tables import CHUNK, COUNTER, DENTRY, INODE, SLICE, Batch, Row
from tests.metasvc.engine.volumes import volume_format
from tests.servers.postgresql import PostgreSQL, installed_programs

_NOW_NS: Final = 1_700_000_000_000_000_000
_FILES_PER_DIRECTORY: Final = 1000
_ROWS_PER_FILE: Final = 4
_COMMIT_FILES: Final = 2000


def _files(first: int, count: int, rand: random.Random) -> Batch:
    """Return the rows of files as a job leaves them that unpacked an archive: times and sizes near each other."""
    inodes: list[Row] = []
    dentries: list[Row] = []
    chunks: list[Row] = []
    slices: list[Row] = []
    for number in range(first, first + count):
        directory = Ino(100 + number // _FILES_PER_DIRECTORY)
        ino, slice_id = Ino(1_000_000 + number), SliceId(1 + number)
        if number % _FILES_PER_DIRECTORY == 0:
            inodes.append(_inode(directory, 0o40755, 2, _FILES_PER_DIRECTORY, ROOT_INO, rand))
            dentries.append(Dentry(ROOT_INO, b"shard-%05d" % directory, directory, 0o40000))
        is_inline = number % 4 != 0
        data = rand.randbytes(100 if is_inline else 16)
        length = 100 if is_inline else rand.randrange(40_000, 4_000_000)
        inodes.append(_inode(ino, 0o100644, 1, length, directory, rand))
        dentries.append(Dentry(directory, b"sample-%08d.jpg" % number, ino, 0o100000))
        chunks.append(Chunk(ino, 0, pack_refs([SliceRef(0, slice_id, 0, length)])))
        slices.append(Slice(slice_id, length, 1, SliceKind.INLINE if is_inline else SliceKind.BLOCKS, data))
    return Batch({INODE: inodes, DENTRY: dentries, CHUNK: chunks, SLICE: slices}, {})


def _inode(ino: Ino, mode: int, nlink: int, size: int, parent: Ino, rand: random.Random) -> Inode:
    time_ns = _NOW_NS + ino * 250_000 + rand.randrange(200_000)
    return Inode(ino, mode, nlink, 1000, 1000, 0, size, time_ns, time_ns, time_ns, parent, 0, 1, 0)


async def _fill(store: Store, rows: int) -> int:
    """Make a volume of about so many rows; how many inodes it has."""
    form = volume_format()
    await store.create_volume(form, first_rows(form))
    volume = await store.open_volume(form.tenant, form.name)
    owner = await volume.acquire(nonce="bench", address="bench", ttl_s=3600)
    rand = random.Random(1)
    files = rows // _ROWS_PER_FILE
    for batch, first in enumerate(range(0, files, _COMMIT_FILES), start=1):
        await volume.commit(owner, batch, _files(first, min(_COMMIT_FILES, files - first), rand))
    counters: list[Row] = [Counter(NEXT_INO, 1_000_000 + files), Counter(NEXT_SLICE, 1 + files)]
    await volume.commit(owner, -(-files // _COMMIT_FILES) + 1, Batch({COUNTER: counters}, {}))
    await volume.release(owner)
    await volume.close()
    return files


async def _dump(store: Store, path: Path) -> tuple[int, int]:
    """Dump the volume into a file; rows and keys, and bytes of the file."""
    volume = await store.open_volume("local", "default")
    rows = size = 0
    async with await Engine.open(volume, address="bench") as engine:
        with await asyncio.to_thread(path.open, "wb") as file:
            async with aclosing(dump(engine)) as parts:
                async for part in parts:
                    file.write(part.data)
                    rows += part.rows
                    size += len(part.data)
    await volume.close()
    return rows, size


async def _load(store: Store, path: Path) -> int:
    async def data() -> AsyncIterator[bytes]:
        with await asyncio.to_thread(path.open, "rb") as file:
            while piece := file.read(1 << 20):
                yield piece

    return (await load(store, data(), tenant="local", name="default", address="bench")).rows


async def _round(name: str, source: Store, target: Store, path: Path, inodes: int) -> tuple[float, float]:
    began_s, cpu_s = time.perf_counter(), time.process_time()
    rows, size = await _dump(source, path)
    dump_s, dump_cpu_s = time.perf_counter() - began_s, time.process_time() - cpu_s
    began_s, cpu_s = time.perf_counter(), time.process_time()
    loaded = await _load(target, path)
    load_s, load_cpu_s = time.perf_counter() - began_s, time.process_time() - cpu_s
    assert loaded == rows
    print(
        f"{name:<11} dump {rows / dump_s:>9,.0f} rows/s ({dump_s:.1f} s, {dump_cpu_s:.1f} s of CPU)   "
        f"load {rows / load_s:>9,.0f} rows/s ({load_s:.1f} s, {load_cpu_s:.1f} s of CPU)   "
        f"{size / 1e6:.1f} MB, {size / inodes:.1f} bytes an inode, {size / rows:.1f} a row"
    )
    return rows / dump_s, rows / load_s


async def _sqlite(directory: Path, rows: int, rounds: int) -> None:
    source = await SqliteStore.open(str(directory / "source.db"), create=True)
    inodes = await _fill(source, rows)
    found = []
    for number in range(rounds):
        target = await SqliteStore.open(str(directory / f"target-{number}.db"), create=True)
        found.append(await _round("sqlite", source, target, directory / "dump", inodes))
        await target.close()
    await source.close()
    _report("sqlite", found)
    sizes = await asyncio.to_thread(lambda: [(directory / name).stat().st_size for name in ("source.db", "dump")])
    print(f"{'':<11} the database: {sizes[0] / 1e6:.1f} MB, {sizes[0] / sizes[1]:.1f} times the dump")


async def _postgresql(directory: Path, rows: int, rounds: int) -> None:
    programs = installed_programs()
    if programs is None:
        raise click.UsageError(
            "no PostgreSQL here: install postgresql-15, or name its programs by ATOLL_TEST_POSTGRESQL"
        )
    with PostgreSQL(programs) as server:
        source = await PostgresqlStore.open(server.url(search_path=await server.new_schema()), create=True)
        inodes = await _fill(source, rows)
        found = []
        for _ in range(rounds):
            target = await PostgresqlStore.open(server.url(search_path=await server.new_schema()), create=True)
            found.append(await _round("postgresql", source, target, directory / "dump", inodes))
            await target.close()
        await source.close()
        _report("postgresql", found)


def _report(name: str, found: list[tuple[float, float]]) -> None:
    dumps, loads = zip(*found, strict=True)
    print(f"{name:<11} median: dump {median(dumps):,.0f} rows/s, load {median(loads):,.0f} rows/s")


@click.command()
@click.option("--rows", default=1_000_000, show_default=True)
@click.option("--rounds", default=3, show_default=True)
@click.option("--store", "stores", multiple=True, type=click.Choice(["sqlite", "postgresql"]), help="[both]")
@click.option("--directory", type=click.Path(path_type=Path), help="Where the stores lie  [a temporary one]")
def main(rows: int, rounds: int, stores: tuple[str, ...], directory: Path | None) -> None:
    """Measure dumps and loads on each store."""
    works: dict[str, Any] = {"sqlite": _sqlite, "postgresql": _postgresql}
    for name in stores or works:
        with tempfile.TemporaryDirectory(prefix="atoll-bench-", dir=directory) as place:
            Path(place).chmod(0o755)  # a server that does not run as root enters it
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                runner.run(works[name](Path(place), rows, rounds))
    print(f"the most memory of this process: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB")


if __name__ == "__main__":
    main()
