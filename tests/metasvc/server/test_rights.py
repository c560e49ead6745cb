"""What a token does not allow is refused: by name, by number, by session, by message; and harms nobody else."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import inspect
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest

from chunkstore.errors import AtollError
from client.meta.admin import RemoteAdmin
from client.meta.connection import SessionConnection
from client.meta.endpoint import AccessRefused
from client.meta.managing import RemoteManaging
from client.meta.remote import RemoteMeta
from metasvc.api import atoll_pb2 as pb
from metasvc.engine import first_rows
from metasvc.errors import FsError, VolumeMissing
from metasvc.model import ROOT_INO, RenameFlags, SetAttr
from metasvc.server.operations import OPERATIONS
from metasvc.server.tokens import TOKEN_KEY, Tokens
from metasvc.store.memory import MemoryStore
from tests.metasvc.engine.volumes import volume_format
from tests.metasvc.server.attacks import ATTACKS, ROOT, SECRET, THEIR_OWN, VOLUMES, World, furnish, write
from tests.metasvc.server.served import Client, Served, served


@dataclass
class ServedWorld(World):
    """A world that is served by this process."""

    service: Served


@contextlib.asynccontextmanager
async def a_world() -> AsyncIterator[ServedWorld]:
    store = MemoryStore()
    for tenant, name, number in VOLUMES:
        uuid = f"00000000-0000-0000-0000-00000000000{number}"
        form = replace(volume_format(), tenant=tenant, name=name, uuid=uuid)
        await store.add_tenant(tenant, created_ns=1)
        await store.create_volume(form, first_rows(form))
    async with served(store, name="team/data") as service:
        endpoint = service.endpoint()
        connection = SessionConnection(endpoint, "team/data", host="o", pid=1, mountpoint="/o", timeout_s=20)
        await connection.open(timeout_s=20)
        meta = RemoteMeta(connection)
        owner = Client(connection, meta, RemoteAdmin(endpoint, "team/data", timeout_s=20))
        key = await store.setting(TOKEN_KEY)
        assert key is not None
        yield ServedWorld(service.port, service.token, key, owner, *await furnish(owner), service)
        await meta.close()
        await connection.close()


def in_world(test: Callable[..., Awaitable[None]]) -> Callable[..., Awaitable[None]]:
    """Give a test a world of its own, as its first argument."""

    async def run(**fixtures: Any) -> None:
        async with a_world() as world:
            await test(world, **fixtures)

    run.__name__, run.__doc__ = test.__name__, test.__doc__
    signature = inspect.signature(test)
    run.__signature__ = signature.replace(parameters=list(signature.parameters.values())[1:])  # type: ignore[attr-defined]
    return run


def test_there_are_attacks_enough() -> None:
    assert len(ATTACKS) >= 40


@pytest.mark.parametrize("name", ATTACKS)
@in_world
async def test_an_attack_is_refused_and_harms_nobody(world: ServedWorld, name: str) -> None:
    error, number, attempt = ATTACKS[name]
    before = await world.state()
    with pytest.raises(error) as refused:
        async with asyncio.timeout(60):
            await attempt(world)
    assert number is None or refused.value.errno == number, refused.value
    assert SECRET.decode() not in str(refused.value)
    if name not in THEIR_OWN:
        assert await world.state() == before
    assert b"\xff" not in [entry[1] for entry in await world.state()]
    assert (await world.owner.meta.getattr(world.file)).size_bytes == len(b"of the attacker")
    assert world.owner.connection.reconnections == 0


@in_world
async def test_what_a_subtree_has_is_reached(world: ServedWorld) -> None:
    """The refusals above mean nothing if everything is refused."""
    async with world.session(await world.token("/inside")) as client:
        meta = client.meta
        assert meta.root == world.inside
        assert not meta.is_read_only
        assert (await meta.lookup(meta.root, b"file")).ino == world.file
        assert (await meta.lookup(meta.root, b".")).ino == world.inside
        assert {entry.name for entry in (await meta.readdir(meta.root, after=None, limit=9)).entries} == {
            b"file",
            b"way out",
        }
        assert await meta.readlink((await meta.lookup(meta.root, b"way out")).ino) == b"../outside/secret"
        opened = await meta.open(world.file)
        assert opened.map.slices
        deep = (await meta.mkdir(ROOT, meta.root, b"deep", mode=0o755)).ino
        deeper = (await meta.mkdir(ROOT, deep, b"deeper", mode=0o755)).ino
        made = await meta.create(ROOT, deeper, b"new", mode=0o644, exclusive=True)
        await write(meta, made.inode.ino, b"mine")
        await meta.link(ROOT, made.inode.ino, deep, b"second")
        await meta.rename(ROOT, deep, b"second", meta.root, b"third", flags=RenameFlags(0))
        assert [inode and inode.ino for inode in await meta.getattr_many([world.file, world.secret, deep])] == [
            world.file,
            None,
            deep,
        ]
        assert set(await meta.read_maps([world.file, world.secret])) == {world.file}
        await meta.unlink(ROOT, deeper, b"new")
        await meta.mknod(ROOT, deep, b"fourth", mode=0o100644)
        await meta.rename(ROOT, deep, b"fourth", meta.root, b"third", flags=RenameFlags(0))
        await meta.unlink(ROOT, meta.root, b"third")
        await meta.rmdir(ROOT, deep, b"deeper")
        await meta.statfs(meta.root)
        assert (await meta.lookup(deep, b"..")).ino == world.inside


@in_world
async def test_the_status_of_a_subtree_tells_nothing_of_others(world: ServedWorld) -> None:
    admin = RemoteAdmin(world.endpoint(await world.token("/inside")), "team/data", timeout_s=20)
    status = await admin.status()
    assert status.format.name == "data"
    assert not status.sessions
    assert not status.counters
    assert (await world.owner.admin.status()).sessions


@in_world
async def test_a_file_with_a_name_inside_is_reached_by_it(world: ServedWorld) -> None:
    await world.owner.meta.link(ROOT, world.secret, world.inside, b"shared")
    async with world.session(await world.token("/inside")) as client:
        assert (await client.meta.open(world.secret)).inode.ino == world.secret
        await world.owner.meta.unlink(ROOT, world.inside, b"shared")
        await world.owner.released()
        with pytest.raises(FsError):
            await client.meta.read_map(world.secret, start=0, end=1)


@in_world
async def test_a_subtree_is_reached_by_its_number_wherever_it_is(world: ServedWorld) -> None:
    token = await world.token("/inside")
    await world.owner.meta.rename(ROOT, ROOT_INO, b"inside", world.outside, b"moved", flags=RenameFlags(0))
    impostor = (await world.owner.meta.mkdir(ROOT, ROOT_INO, b"inside", mode=0o755)).ino
    async with world.session(token) as client:
        assert (await client.meta.lookup(client.meta.root, b"file")).ino == world.file
        with pytest.raises(FsError):
            await client.meta.getattr(impostor)


@in_world
async def test_what_is_moved_out_is_out_of_reach(world: ServedWorld) -> None:
    directory = (await world.owner.meta.mkdir(ROOT, world.inside, b"dir", mode=0o755)).ino
    await world.owner.meta.mknod(ROOT, directory, b"below", mode=0o100644)
    async with world.session(await world.token("/inside")) as client:
        below = await client.meta.lookup(directory, b"below")
        await client.meta.open(below.ino)
        await world.owner.meta.rename(ROOT, world.inside, b"dir", world.outside, b"dir", flags=RenameFlags(0))
        for attempt in (
            client.meta.getattr(directory),
            client.meta.mknod(ROOT, directory, b"new", mode=0o100644),
            client.meta.setattr(ROOT, below.ino, SetAttr(size_bytes=5)),
        ):
            with pytest.raises(FsError) as refused:
                await attempt
            assert refused.value.errno == errno.ENOENT


@in_world
async def test_a_lease_on_what_is_moved_out_is_not_extended(world: ServedWorld) -> None:
    directory = (await world.owner.meta.mkdir(ROOT, world.inside, b"dir", mode=0o755)).ino
    deep = (await world.owner.meta.mkdir(ROOT, directory, b"deep", mode=0o755)).ino
    async with world.session(await world.token("/inside")) as client:
        call = client.connection.call
        page = await call("readdir", pb.ReadDir(ino=deep, limit=9, lease=True))
        assert list(page.leased) == [deep]
        assert list((await call("extend_leases", pb.ExtendLeases(inos=[deep]))).leased) == [deep]
        await world.owner.meta.rename(ROOT, world.inside, b"dir", world.outside, b"dir", flags=RenameFlags(0))
        with pytest.raises(FsError):
            await call("extend_leases", pb.ExtendLeases(inos=[deep]))
        assert list((await call("extend_leases", pb.ExtendLeases(inos=[deep, client.meta.root]))).leased) == []


@in_world
async def test_an_open_file_without_a_name_goes_on_being_reached_by_who_opened_it(world: ServedWorld) -> None:
    token = await world.token("/inside")
    async with world.session(token) as client, world.session(token) as other:
        await client.meta.open(world.file)
        await world.owner.meta.unlink(ROOT, world.inside, b"file")
        assert (await client.meta.read_map(world.file, start=0, end=1)).slices
        with pytest.raises(FsError):
            await other.meta.read_map(world.file, start=0, end=1)


@in_world
async def test_a_token_that_is_revoked_cuts_off_who_uses_it(world: ServedWorld) -> None:
    token, info = await world.managing.create_token(pb.CreateToken(tenant="team", volume="data"))
    async with world.session(token) as client, world.session(await world.token()) as other:
        await world.managing.revoke_token("", info.token_id)
        with pytest.raises(AccessRefused, match="revoked"):
            async with asyncio.timeout(20):
                while True:
                    await client.meta.getattr(ROOT_INO)
                    await asyncio.sleep(0.01)
        await other.meta.getattr(ROOT_INO)


@in_world
async def test_a_process_notices_what_another_one_revoked(world: ServedWorld) -> None:
    service = world.service.service
    assert service is not None
    watching = asyncio.create_task(service.watch_tokens())
    try:
        tokens = await Tokens.load(world.service.store)
        token, info = await world.managing.create_token(pb.CreateToken(tenant="team", volume="data"))
        async with world.session(token) as client:
            await client.meta.getattr(ROOT_INO)
            await tokens.revoke([one for one in await tokens.all_of("team") if one.token_id == info.token_id])
            with pytest.raises(AccessRefused, match="revoked"):
                async with asyncio.timeout(20):
                    while True:
                        await client.meta.getattr(ROOT_INO)
                        await asyncio.sleep(0.01)
        await world.owner.meta.getattr(ROOT_INO)
        assert world.owner.connection.reconnections == 0
    finally:
        watching.cancel()


@in_world
async def test_a_token_that_expires_cuts_off_who_uses_it(world: ServedWorld) -> None:
    async with world.session(await world.token(lasts_s=2.0)) as client:
        with pytest.raises(AccessRefused, match="expired"):
            async with asyncio.timeout(20):
                while True:
                    await client.meta.getattr(ROOT_INO)
                    await asyncio.sleep(0.01)


@in_world
async def test_a_token_of_a_volume_that_was_deleted_is_not_for_the_next_one_of_its_name(world: ServedWorld) -> None:
    token = await world.token(volume="team/other")
    await world.managing.delete_volume("team/other")
    form = replace(volume_format(), tenant="team", name="other", uuid="00000000-0000-0000-0000-000000000004")
    await world.service.store.create_volume(form, first_rows(form))
    with pytest.raises(AccessRefused):
        async with world.session(token, "team/other"):
            pass


@in_world
async def test_a_volume_in_use_is_not_deleted(world: ServedWorld) -> None:
    with pytest.raises(FsError) as refused:
        await world.managing.delete_volume("team/data")
    assert refused.value.errno == errno.EBUSY
    await world.owner.meta.getattr(world.file)


@in_world
async def test_a_volume_that_was_deleted_is_gone(world: ServedWorld) -> None:
    await world.managing.delete_volume("team/other")
    with pytest.raises(VolumeMissing):
        async with world.session(world.service.token, "team/other"):
            pass
    assert [each.name for each in await world.service.store.list_volumes()] == ["data", "data"]


@in_world
async def test_a_tenant_goes_when_its_volumes_have_gone(world: ServedWorld) -> None:
    with pytest.raises(FsError) as refused:
        await world.managing.delete_tenant("rival")
    assert refused.value.errno == errno.ENOTEMPTY
    token, _ = await world.managing.create_token(pb.CreateToken(tenant="rival"))
    await world.managing.delete_volume("rival/data")
    await world.managing.delete_tenant("rival")
    with pytest.raises(AccessRefused):
        await RemoteManaging(world.endpoint(token)).tenants()
    assert [each.name for each in await world.managing.tenants()] == ["team"]


@in_world
async def test_a_tenants_administrator_does_what_belongs_to_the_tenant(world: ServedWorld) -> None:
    token, _ = await world.managing.create_token(pb.CreateToken(tenant="team"))
    own = RemoteManaging(world.endpoint(token))
    assert [each.name for each in await own.tenants()] == ["team"]
    user, info = await own.create_token(pb.CreateToken(tenant="team", volume="data", path=[b"inside"], read_only=True))
    assert (info.path, info.read_only, info.admin) == ("/inside", True, False)
    assert {each.tenant for each in await own.tokens("")} == {"team"}
    async with world.session(user) as client:
        assert client.meta.is_read_only
        await client.meta.getattr(client.meta.root)
    await own.revoke_token("", info.token_id)
    await own.delete_volume("team/other")


@in_world
async def test_who_administers_is_in_the_log(world: ServedWorld, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="atoll.audit"):
        token = await world.token("/inside")
        with pytest.raises(AtollError):
            await RemoteManaging(world.endpoint(token)).delete_volume("team/data")
    lines = [record.getMessage() for record in caplog.records if record.name == "atoll.audit"]
    assert len(lines) == 2
    assert "create token tenant='team' volume='data'" in lines[0]
    assert lines[0].endswith("done")
    assert "delete volume team/data by token " in lines[1]
    assert "failed: " in lines[1]
    assert token not in "".join(lines)


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_names_all_its_inodes_to_the_guard(name: str) -> None:
    """A new field that holds an inode must not be forgotten."""
    operation = OPERATIONS[name]
    message = pb.Request.DESCRIPTOR.fields_by_name[name].message_type
    assert message is not None
    numbers = {field.name for field in message.fields if field.type == field.TYPE_UINT64}
    # What these name is looked up in the map of the inode, or belongs to the session (test_signing).
    numbers -= {"rdev", "size_epoch", "slice_id", "chunks"}
    if name == "release":
        # It ends what the session itself began, wherever the file is now.
        numbers.discard("ino")
    assert set(operation.inos) == numbers
    assert set(operation.directories) <= set(operation.inos)
    has_caller = "caller" in message.fields_by_name
    assert operation.changes == (has_caller or name in ("allocate_slices", "reserve", "sign_put"))


@in_world
async def test_status_tells_each_what_is_its_own(world: ServedWorld) -> None:
    tokens = {
        "admin": world.service.token,
        "user": await world.token(),
        "confined": await world.token("inside"),
    }
    found = {
        who: await RemoteAdmin(world.endpoint(token), "team/data", timeout_s=20).status()
        for who, token in tokens.items()
    }
    used = found["admin"].tenant
    assert used is not None
    assert (used.max_bytes, used.max_inodes) == (0, 0)
    assert found["user"].tenant is None
    assert found["confined"].tenant is None
    assert found["user"].counters.keys() == found["admin"].counters.keys()
    assert found["user"].sessions
    assert (found["confined"].counters, found["confined"].sessions) == ({}, [])
