"""Who gets URLs of which blocks: what a file has, and what a session is writing, and nothing else."""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from chunkstore.errors import AtollError, ObjectMissing
from chunkstore.geometry import CHUNK_BYTES, SliceId, block_count
from chunkstore.model import Place, SliceInfo
from client.meta.connection import SessionConnection
from client.meta.endpoint import Endpoint
from client.meta.signing import RemoteSigning, signs_urls
from metasvc.api import atoll_pb2 as pb
from metasvc.api.server import Server
from metasvc.engine import first_rows
from metasvc.errors import FsError
from metasvc.model import ROOT_INO, Commit, Ino, SliceKind, SliceRef, WrittenSlice
from metasvc.server.access import URL_LIFE_S
from metasvc.server.keys import BucketKeys, MasterKeys
from metasvc.store.memory import MemoryStore
from tests.metasvc.engine.volumes import ROOT
from tests.metasvc.server.served import Client, Served, connected, served
from tests.metasvc.server.test_keys import KEYS, OLD, form_of

BLOCK = form_of(1).block_bytes
SHA = bytes(32)


@asynccontextmanager
async def signing(*, keys: bool = True) -> AsyncIterator[Served]:
    store = MemoryStore()
    form = form_of(1)
    await store.create_volume(form, first_rows(form))
    kept = BucketKeys(store, MasterKeys([OLD]))
    if keys:
        await kept.put(form, KEYS)
    async with served(store, name="acme/v1", keys=kept) as service:
        yield service


async def write(client: Client, name: bytes, length: int, *, parent: Ino = ROOT_INO, offset: int = 0) -> SliceInfo:
    """Commit a file with one slice of blocks."""
    meta = client.meta
    opened = await meta.create(ROOT, parent, name, mode=0o644, exclusive=True)
    slice_id = SliceId((await meta.allocate_slices(1))[0])
    digests = bytes(16 * block_count(length, BLOCK))
    written = WrittenSlice(slice_id, length, SliceKind.BLOCKS, digests, (SliceRef(offset, slice_id, 0, length),))
    change = Commit(slices=(written,), end=offset + length, size_epoch=opened.inode.size_epoch, mtime_ns=1)
    await meta.commit(ROOT, opened.inode.ino, change)
    return SliceInfo(slice_id, length, digests, Place(opened.inode.ino, offset))


def signing_of(client: Client) -> RemoteSigning:
    return RemoteSigning(client.connection, block_bytes=BLOCK)


def at(info: SliceInfo, ino: int) -> SliceInfo:
    return info._replace(place=Place(ino, 0))


async def test_whether_urls_are_signed_is_told() -> None:
    async with signing() as service, connected(service) as client:
        assert await signs_urls(client.connection)
    async with signing(keys=False) as service, connected(service) as client:
        assert not await signs_urls(client.connection)
        info = await write(client, b"f", 100)
        with pytest.raises(FsError) as refused:
            await signing_of(client).sign_get(info, [0])
        assert refused.value.errno == errno.ENOTSUP


async def test_urls_are_signed_for_blocks_that_the_file_has_and_no_others() -> None:
    async with signing() as service, connected(service) as client:
        sign = signing_of(client)
        info = await write(client, b"f", 3 * BLOCK + 1)
        other = await write(client, b"g", BLOCK)
        signed = await sign.sign_get(info, [0, 3, 1])
        assert signed.life_s == URL_LIFE_S
        assert [url.partition("?")[0].rpartition(".")[2] for url in signed.urls] == ["0", "3", "1"]
        assert all(f"/{form_of(1).uuid}/" in url and "X-Amz-Signature=" in url for url in signed.urls)
        assert other.place is not None
        assert info.place is not None
        for wrong, blocks in (
            (info, [4]),
            (info, [4, 0]),
            (at(info, other.place.ino), [0]),
            (at(other, info.place.ino), [0]),
            (at(info, 99999), [0]),
            (at(info, ROOT_INO), [0]),
        ):
            with pytest.raises((ObjectMissing, FsError)):
                await sign.sign_get(wrong, blocks)
        assert [bool(url) for url in (await sign.sign_get(info, [0, 4, 3, 17])).urls] == [True, False, True, False]
        for blocks in ([], [0] * 257, [1 << 16]):
            with pytest.raises(FsError) as refused:
                await sign.sign_get(info, blocks)
            assert refused.value.errno == errno.EINVAL


async def test_only_the_blocks_that_a_shared_part_lies_in_are_signed_for() -> None:
    async with signing() as service, connected(service) as client:
        sign = signing_of(client)
        info = await write(client, b"whole", 4 * BLOCK)
        part = await client.meta.create(ROOT, ROOT_INO, b"part", mode=0o644, exclusive=True)
        ino = part.inode.ino
        assert info.place is not None
        await client.meta.copy_range(ROOT, Ino(info.place.ino), BLOCK, ino, 0, BLOCK + 10)
        shared = info._replace(place=Place(ino, -BLOCK))
        assert len((await sign.sign_get(shared, [1, 2])).urls) == 2
        for index in (0, 3):
            with pytest.raises(ObjectMissing):
                await sign.sign_get(shared, [index])
        # Where it is in the file need not be known.
        assert len((await sign.sign_get(at(info, ino), [1])).urls) == 1


async def test_a_block_far_behind_in_a_file_is_found_with_and_without_its_place() -> None:
    async with signing() as service, connected(service) as client:
        sign = signing_of(client)
        far = 500 * CHUNK_BYTES - BLOCK
        info = await write(client, b"f", 2 * BLOCK, offset=far)
        assert len((await sign.sign_get(info, [0, 1])).urls) == 2
        assert info.place is not None
        assert len((await sign.sign_get(at(info, info.place.ino), [0, 1])).urls) == 2


async def test_what_a_file_has_no_more_is_not_signed_for() -> None:
    async with signing() as service, connected(service) as client:
        sign = signing_of(client)
        info = await write(client, b"f", BLOCK)
        assert info.place is not None
        ino = Ino(info.place.ino)
        assert (await sign.sign_get(info, [0])).urls
        await client.meta.unlink(ROOT, ROOT_INO, b"f")
        # Open in this session: it may still be read.
        assert (await sign.sign_get(info, [0])).urls
        await client.released(ino)
        with pytest.raises(ObjectMissing):
            await sign.sign_get(info, [0])


async def test_urls_that_put_are_signed_for_the_sessions_own_slices_while_it_lives() -> None:
    async with signing() as service, connected(service) as other:
        async with connected(service) as client:
            own = SliceId((await client.meta.allocate_slices(1))[0])
            signed = await signing_of(client).sign_put(own, [0, 5], [SHA, SHA])
            assert [dict(each)["if-none-match"] for each in signed.headers] == ["*", "*"]
            assert all("x-amz-checksum-sha256" in each for each in signed.headers)
            assert (await signing_of(client).sign_get(SliceInfo(own, 0, b""), [0])).urls
            for slice_id in (own, SliceId(own + 100_000)):
                with pytest.raises(AtollError) as refused:
                    await signing_of(other).sign_put(slice_id, [0], [SHA])
                assert refused.value.errno == errno.ESTALE
                with pytest.raises(ObjectMissing):
                    await signing_of(other).sign_get(SliceInfo(slice_id, 0, b""), [0])
            for blocks, sums in (([0], []), ([0], [b"short"]), ([], [])):
                with pytest.raises(FsError) as wrong:
                    await signing_of(client).sign_put(own, blocks, sums)
                assert wrong.value.errno == errno.EINVAL
        # Its session has ended: the id is retired.
        with pytest.raises(AtollError) as retired:
            await signing_of(other).sign_put(own, [0], [SHA])
        assert retired.value.errno == errno.ESTALE


async def test_a_session_goes_on_signing_after_a_restart_of_the_service() -> None:
    async with signing() as service, connected(service) as client:
        own = SliceId((await client.meta.allocate_slices(1))[0])
        await service.stop()
        await service.start()
        assert (await signing_of(client).sign_put(own, [0], [SHA])).urls


async def test_tokens_bound_what_is_signed() -> None:
    async with signing() as service, connected(service) as owner:
        inside = (await owner.meta.mkdir(ROOT, ROOT_INO, b"inside", mode=0o755)).ino
        mine = await write(owner, b"mine", BLOCK, parent=inside)
        secret = await write(owner, b"secret", BLOCK)
        async with session(service, path=[b"inside"]) as confined:
            sign = RemoteSigning(confined, block_bytes=BLOCK)
            assert await signs_urls(confined)
            assert (await sign.sign_get(mine, [0])).urls
            for wrong in (secret, secret._replace(place=mine.place), secret._replace(place=None)):
                with pytest.raises((ObjectMissing, FsError)):
                    await sign.sign_get(wrong, [0])
        async with session(service, read_only=True) as reader:
            sign = RemoteSigning(reader, block_bytes=BLOCK)
            assert (await sign.sign_get(secret, [0])).urls
            with pytest.raises(FsError) as refused:
                await sign.sign_put(secret.slice_id, [0], [SHA])
            assert refused.value.errno == errno.EROFS


@asynccontextmanager
async def session(
    service: Served, *, path: list[bytes] | None = None, read_only: bool = False
) -> AsyncIterator[SessionConnection]:
    asked = pb.CreateToken(tenant="acme", volume="v1", path=path or [], read_only=read_only)
    request = pb.ManageRequest(create_token=asked).SerializeToString()
    reply = pb.ManageReply.FromString(await service.endpoint().ask(pb.Opening.MANAGE, request))
    endpoint = Endpoint([Server("127.0.0.1", service.port)], reply.token)
    connection = SessionConnection(endpoint, "acme/v1", host="t", pid=1, mountpoint="/t", timeout_s=60)
    await connection.open(timeout_s=20)
    try:
        yield connection
    finally:
        await connection.close()
