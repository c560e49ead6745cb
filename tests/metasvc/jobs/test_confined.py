"""Packs hold files of the whole volume; a session that is confined to a directory reads its own, and not a byte of others."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import structlog

from chunkstore.block import Codec
from chunkstore.errors import ObjectMissing
from chunkstore.geometry import KIB
from chunkstore.model import Place, SliceInfo
from chunkstore.presigned import PresignedAccess
from chunkstore.slices import ChunkStore, ChunkStoreConfig
from client.meta.admin import RemoteAdmin
from client.meta.connection import SessionConnection
from client.meta.endpoint import Endpoint
from client.meta.managing import RemoteManaging
from client.meta.remote import RemoteMeta
from client.meta.signing import RemoteSigning
from client.vfs.options import VfsOptions
from client.vfs.vfs import Vfs
from metasvc.api import atoll_pb2 as pb
from metasvc.api.server import Server
from metasvc.engine import first_rows
from metasvc.errors import FsError
from metasvc.jobs import reading
from metasvc.jobs.packing import LEAST_BYTES
from metasvc.jobs.reading import PackReader
from metasvc.jobs.schedule import JobRates
from metasvc.jobs.served import ServedJobs
from metasvc.model import ROOT_INO, FileMap, Ino, SliceKind
from metasvc.server.keys import BucketKeys, MasterKeys
from metasvc.server.operations import OPERATIONS
from metasvc.server.volumes import Volume
from metasvc.store.memory import MemoryStore
from metasvc.store.tables import PACK
from tests.metasvc.engine.volumes import volume_format
from tests.metasvc.jobs.places import ROOT, read, write
from tests.metasvc.server.served import Client, Served, served
from tests.servers.buckets import Bucket

MASTER = MasterKeys([bytes(range(32))])
PACKS = JobRates(garbage_s=3600, trash_s=3600, compaction_s=3600, packs_s=0.05, packs_age_s=0, packs_pause_s=0)
DIRECTORIES = (b"mine", b"others")


@contextlib.asynccontextmanager
async def keeping_keys(path: Path, bucket: Bucket) -> AsyncIterator[Served]:
    """Serve a volume whose clients have no keys, with its jobs."""
    store = MemoryStore()
    await store.add_tenant("team", created_ns=1)
    form = volume_format(
        tenant="team", name="data", bucket_url=bucket.url, block_bytes=64 * KIB, inline_limit_bytes=2 * KIB
    )
    await store.create_volume(form, first_rows(form))
    keys = BucketKeys(store, MASTER)
    await keys.put(form, bucket.environment)
    jobs = ServedJobs(cache_dir=path / "serve", env={}, log=structlog.get_logger(), rates=PACKS)
    async with served(store, name="team/data", work=jobs.run, keys=keys) as service:
        yield service


@contextlib.asynccontextmanager
async def session(service: Served, *, directory: str = "/") -> AsyncIterator[Client]:
    token = service.token
    if directory != "/":
        asked = pb.CreateToken(tenant="team", volume="data", path=[directory.encode()])
        token = (await RemoteManaging(service.endpoint()).create_token(asked))[0]
    endpoint = Endpoint([Server("127.0.0.1", service.port)], token)
    connection = SessionConnection(endpoint, "team/data", host="test", pid=1, mountpoint="/m", timeout_s=60)
    await connection.open(timeout_s=20)
    meta = RemoteMeta(connection)
    try:
        yield Client(connection, meta, RemoteAdmin(endpoint, "team/data", timeout_s=20))
    finally:
        await meta.close()
        await connection.close()


@contextlib.asynccontextmanager
async def mounted(client: Client, cache_dir: Path) -> AsyncIterator[Vfs]:
    """A mount without a kernel that reaches blocks by URLs."""
    form = client.meta.format
    cache_dir.mkdir()
    config = ChunkStoreConfig(
        volume_uuid=form.uuid,
        cache_dir=cache_dir,
        codec=Codec.parse(form.compression),
        block_bytes=form.block_bytes,
        inline_limit_bytes=form.inline_limit_bytes,
        free_ratio_floor=0.0,
    )
    access = PresignedAccess(
        RemoteSigning(client.connection, block_bytes=form.block_bytes),
        volume_uuid=form.uuid,
        block_bytes=form.block_bytes,
        name=form.bucket_url,
    )
    try:
        async with (
            ChunkStore(config, access=access) as chunks,
            Vfs(client.meta, chunks, log=structlog.get_logger(), options=VfsOptions(root=client.meta.root)) as vfs,
        ):
            yield vfs
    finally:
        await access.close()


async def fill(vfs: Vfs, rng: random.Random, *, files: int) -> dict[bytes, dict[bytes, bytes]]:
    """Write small files into both directories by turns, so that they share packs."""
    parents = {name: (await vfs.mkdir(ROOT, ROOT_INO, name, mode=0o755)).ino for name in DIRECTORIES}
    written: dict[bytes, dict[bytes, bytes]] = {name: {} for name in DIRECTORIES}
    for number in range(files):
        for name, parent in parents.items():
            data = rng.randbytes(rng.randint(600, 2000))
            await write(vfs, b"f%04d" % number, data, parent=parent)
            written[name][b"f%04d" % number] = data
    # One of several small slices with a hole between, and one of which a part was overwritten.
    pieces = [rng.randbytes(1500) for _ in range(3)]
    await write(vfs, b"pieces", *pieces, parent=parents[b"mine"])
    written[b"mine"][b"pieces"] = b"".join(pieces)
    handle = await vfs.create(ROOT, parents[b"mine"], b"holes", mode=0o644, flags=os.O_RDWR)
    for offset in (0, 5000, 5200):
        await vfs.write(handle.fh, offset, bytes([65 + offset % 23]) * 1000)
        await vfs.fsync(handle.fh)
    await vfs.release(handle.fh)
    written[b"mine"][b"holes"] = (
        b"A" * 1000 + bytes(4000) + bytes([65 + 5000 % 23]) * 200 + bytes([65 + 5200 % 23]) * 1000
    )
    return written


async def until_packed(volume: Volume) -> None:
    """Wait until all that is enough for packs lies in packs."""
    async with asyncio.timeout(60):
        while True:
            rows = await volume.admin.live_slices(after=None, limit=5000)
            inline_bytes = sum(row.length for row in rows if row.kind == SliceKind.INLINE)
            if inline_bytes < LEAST_BYTES and any(row.kind == SliceKind.BLOCKS for row in rows):
                return
            await asyncio.sleep(0.05)


async def content(vfs: Vfs, parent: Ino, name: bytes) -> bytes:
    handle = await vfs.open(ROOT, (await vfs.lookup(parent, name)).ino, os.O_RDONLY)
    try:
        return await read(vfs, handle.fh)
    finally:
        await vfs.release(handle.fh)


@pytest.mark.timeout(180)
async def test_files_in_packs_are_read_through_a_token_of_their_directory(
    tmp_path: Path, bucket: Bucket, seed: int
) -> None:
    rng = random.Random(seed)
    async with keeping_keys(tmp_path, bucket) as service:
        async with session(service) as client, mounted(client, tmp_path / "writer") as vfs:
            written = await fill(vfs, rng, files=900)
            await until_packed(await service.volume())
        async with session(service, directory="mine") as client, mounted(client, tmp_path / "reader") as vfs:
            for name, data in written[b"mine"].items():
                assert await content(vfs, vfs.root, name) == data
            # Copied, cut and written further by the confined session itself.
            source = await vfs.open(ROOT, (await vfs.lookup(vfs.root, b"f0001")).ino, os.O_RDONLY)
            copy = await vfs.create(ROOT, vfs.root, b"copy", mode=0o644, flags=os.O_RDWR)
            expected = written[b"mine"][b"f0001"][100:500]
            assert await vfs.copy_range(ROOT, source.fh, 100, copy.fh, 0, 400) == 400
            assert await read(vfs, copy.fh) == expected
            await vfs.write(copy.fh, 200, b"mine")
            await vfs.fsync(copy.fh)
            assert await read(vfs, copy.fh) == expected[:200] + b"mine" + expected[204:]
            await vfs.release(source.fh)
            await vfs.release(copy.fh)
        async with session(service) as client, mounted(client, tmp_path / "whole") as vfs:
            for directory, files in written.items():
                parent = (await vfs.lookup(ROOT_INO, directory)).ino
                for name in rng.sample(sorted(files), 100):
                    assert await content(vfs, parent, name) == files[name]
                assert await content(vfs, (await vfs.lookup(ROOT_INO, b"mine")).ino, b"copy") == (
                    expected[:200] + b"mine" + expected[204:]
                )


@pytest.mark.timeout(180)
async def test_a_confined_session_is_given_no_byte_and_no_url_of_a_pack(
    tmp_path: Path, bucket: Bucket, seed: int
) -> None:
    async with keeping_keys(tmp_path, bucket) as service:
        async with session(service) as client, mounted(client, tmp_path / "writer") as vfs:
            written = await fill(vfs, random.Random(seed), files=900)
            volume = await service.volume()
            await until_packed(volume)
            secrets = list(written[b"others"].values())
            mine = (await vfs.lookup(ROOT_INO, b"mine")).ino
            inos = [(await vfs.lookup(mine, name)).ino for name in written[b"mine"]]
        packs = [row[0] for row in await volume.engine.store.scan(PACK, after=None, limit=100)]
        assert packs
        async with session(service, directory="mine") as client:
            told: list[FileMap] = []
            for ino in inos:
                told += [(await client.meta.open(ino)).map, await client.meta.read_map(ino, start=0, end=1 << 30)]
            for first in range(0, len(inos), 256):
                told += (await client.meta.read_maps(inos[first : first + 256])).values()
            assert not set(packs) & {slice_id for found in told for slice_id in found.slices}
            everything = b"".join(row.data for found in told for row in found.slices.values())
            assert not [data for data in secrets if data[:64] in everything or data[-64:] in everything]
            sign = RemoteSigning(client.connection, block_bytes=64 * KIB)
            for pack in packs:
                row = await volume.engine.run(lambda tx, pack=pack: tx.slice(pack))
                for ino in inos[::50]:
                    info = SliceInfo(pack, row.length, row.data, Place(ino, 0))
                    for index in range(row.length // (64 * KIB)):
                        with pytest.raises((ObjectMissing, FsError)):
                            await sign.sign_get(info, [index])
        # A session of the whole volume gets them: else nothing was tested.
        async with session(service) as client:
            found = await client.meta.read_map(inos[0], start=0, end=1 << 30)
            assert set(found.slices) <= set(packs)


@pytest.mark.timeout(180)
async def test_an_inline_slice_is_told_no_further_than_the_file_shows_it(tmp_path: Path, bucket: Bucket) -> None:
    async with keeping_keys(tmp_path, bucket) as service:
        async with session(service) as client, mounted(client, tmp_path / "writer") as vfs:
            mine = (await vfs.mkdir(ROOT, ROOT_INO, b"mine", mode=0o755)).ino
            await write(vfs, b"secret", b"shared" + b"secret" * 50)
            source = await vfs.open(ROOT, (await vfs.lookup(ROOT_INO, b"secret")).ino, os.O_RDONLY)
            copy = await vfs.create(ROOT, mine, b"copy", mode=0o644, flags=os.O_RDWR)
            assert await vfs.copy_range(ROOT, source.fh, 0, copy.fh, 0, 6) == 6
            ino = copy.inode.ino
            await vfs.release(source.fh)
            await vfs.release(copy.fh)
        async with session(service, directory="mine") as client:
            opened, found = (await client.meta.open(ino)).map, await client.meta.read_map(ino, start=0, end=1 << 30)
            assert (
                [row.data for row in opened.slices.values()]
                == [row.data for row in found.slices.values()]
                == [b"shared"]
            )


async def test_the_chunk_store_for_packs_is_opened_again_after_a_rest(
    tmp_path: Path, bucket: Bucket, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "_IDLE_S", 0.05)
    async with keeping_keys(tmp_path, bucket) as service:
        async with session(service) as client, mounted(client, tmp_path / "writer") as vfs:
            written = await fill(vfs, random.Random(seed), files=900)
            await until_packed(await service.volume())
        reader = (await service.volume()).access.require_packs()
        assert isinstance(reader, PackReader)
        async with session(service, directory="mine") as client, mounted(client, tmp_path / "reader") as vfs:
            for name in list(written[b"mine"])[:800:200]:
                assert await content(vfs, vfs.root, name) == written[b"mine"][name]
                async with asyncio.timeout(30):
                    while reader._stack is not None:
                        await asyncio.sleep(0.02)


def test_all_that_answers_maps_is_cut_for_confined_sessions() -> None:
    tells = {name for name, operation in OPERATIONS.items() if _tells_maps(name)}
    assert tells == {name for name, operation in OPERATIONS.items() if operation.confine is not None}
    assert {"open", "create", "read_map", "read_maps", "punch", "copy_range"} <= tells


def _tells_maps(name: str) -> bool:
    """Return whether the result of an operation, written into a reply, may have a map."""
    put = OPERATIONS[name].put
    return not {put.__name__, *put.__code__.co_names}.isdisjoint({"put_map", "put_open"})
