"""What a token does not allow is refused: by name, by number, by session, by message; and harms nobody else."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import inspect
import json
import logging
import time
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, replace
from typing import Any

import jwt
import pytest

from chunkstore.errors import AtollError
from chunkstore.geometry import SliceId
from client.meta.admin import RemoteAdmin
from client.meta.connection import SessionConnection
from client.meta.endpoint import AccessRefused, Endpoint, ServiceRefused
from client.meta.managing import RemoteManaging
from client.meta.remote import RemoteMeta
from metasvc.api import atoll_pb2 as pb
from metasvc.api.frames import EndedByService, Frames
from metasvc.api.server import Server
from metasvc.api.volume_format import dump_format
from metasvc.engine import first_rows
from metasvc.errors import FsError, VolumeMissing
from metasvc.model import ROOT_INO, Caller, Commit, Ino, RenameFlags, SetAttr, SliceKind, SliceRef, WrittenSlice
from metasvc.server.operations import OPERATIONS
from metasvc.server.tokens import TOKEN_KEY, Tokens
from metasvc.store.memory import MemoryStore
from tests.metasvc.engine.volumes import volume_format
from tests.metasvc.server.served import Client, Served, served

ROOT = Caller()
SECRET = b"what nobody but its owner may read"


@dataclass
class World:
    """Two tenants. Of team/data the attacker has tokens; `inside` is what they reach."""

    service: Served
    owner: Client
    inside: Ino
    outside: Ino
    file: Ino
    """In `inside`."""
    secret: Ino
    """In `outside`."""
    secret_slice: int

    @property
    def managing(self) -> RemoteManaging:
        return RemoteManaging(self.service.endpoint())

    async def token(self, path: str = "/", volume: str = "team/data", **further: Any) -> str:
        tenant, _, name = volume.partition("/")
        parts = [part.encode() for part in path.split("/") if part]
        asked = pb.CreateToken(tenant=tenant, volume=name, path=parts, **further)
        return (await self.managing.create_token(asked))[0]

    def endpoint(self, token: str) -> Endpoint:
        return Endpoint([Server("127.0.0.1", self.service.port)], token)

    @contextlib.asynccontextmanager
    async def session(self, token: str, volume: str = "team/data") -> AsyncIterator[Client]:
        endpoint = self.endpoint(token)
        connection = SessionConnection(
            endpoint, volume, host="attacker", pid=2, mountpoint="/x", timeout_s=20, takes_leases=True
        )
        await connection.open(timeout_s=20)
        meta = RemoteMeta(connection)
        try:
            yield Client(connection, meta, RemoteAdmin(endpoint, volume, timeout_s=20))
        finally:
            await meta.close()
            await connection.close()

    async def state(self) -> list[Any]:
        """Return everything of the volume that an attack could have changed, but the times of reading."""
        found: list[Any] = []
        todo = [ROOT_INO]
        while todo:
            directory = todo.pop()
            page = await self.owner.meta.readdir(directory, after=None, limit=5000)
            for name, inode in page.entries:
                found.append((directory, name, inode._replace(atime_ns=0)))
                if inode.is_dir:
                    todo.append(inode.ino)
        return found


async def write(meta: RemoteMeta, ino: Ino, data: bytes) -> int:
    (slice_id,) = await meta.allocate_slices(1)
    ref = SliceRef(0, SliceId(slice_id), 0, len(data))
    written = WrittenSlice(SliceId(slice_id), len(data), SliceKind.INLINE, data, (ref,))
    inode = await meta.getattr(ino)
    await meta.commit(ROOT, ino, Commit((written,), len(data), inode.size_epoch, time.time_ns()))
    return slice_id


@contextlib.asynccontextmanager
async def a_world() -> AsyncIterator[World]:
    store = MemoryStore()
    for tenant, name, number in (("team", "data", 1), ("team", "other", 2), ("rival", "data", 3)):
        uuid = f"00000000-0000-0000-0000-00000000000{number}"
        form = replace(volume_format(), tenant=tenant, name=name, uuid=uuid)
        await store.add_tenant(tenant, created_ns=1)
        await store.create_volume(form, first_rows(form))
    async with served(store, name="team/data") as service:
        endpoint = service.endpoint()
        connection = SessionConnection(endpoint, "team/data", host="o", pid=1, mountpoint="/o", timeout_s=20)
        await connection.open(timeout_s=20)
        meta = RemoteMeta(connection)
        inside = (await meta.mkdir(ROOT, ROOT_INO, b"inside", mode=0o755)).ino
        outside = (await meta.mkdir(ROOT, ROOT_INO, b"outside", mode=0o755)).ino
        file = (await meta.mknod(ROOT, inside, b"file", mode=0o100644)).ino
        await write(meta, file, b"of the attacker")
        secret = (await meta.mknod(ROOT, outside, b"secret", mode=0o100644)).ino
        secret_slice = await write(meta, secret, SECRET)
        await meta.symlink(ROOT, inside, b"way out", b"../outside/secret")
        owner = Client(connection, meta, RemoteAdmin(endpoint, "team/data", timeout_s=20))
        yield World(service, owner, inside, outside, file, secret, secret_slice)
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


Attack = Callable[[World], Awaitable[Any]]
ATTACKS: dict[str, tuple[type[AtollError], int | None, Attack]] = {}
"""By what is tried: the error, its errno, and the attempt."""


def attack(
    name: str, error: type[AtollError] = FsError, number: int | None = errno.ENOENT
) -> Callable[[Attack], Attack]:
    def noted(function: Attack) -> Attack:
        assert name not in ATTACKS
        ATTACKS[name] = (error, number, function)
        return function

    return noted


def within(name: str, work: Callable[[World, RemoteMeta], Awaitable[Any]], number: int = errno.ENOENT) -> None:
    """Note an attempt by who has a token of the subtree."""

    @attack(name, FsError, number)
    async def attempt(world: World) -> None:
        async with world.session(await world.token("/inside")) as client:
            await work(world, client.meta)


within("getattr of an inode outside", lambda w, m: m.getattr(w.secret))
within("getattr of the root of the volume", lambda w, m: m.getattr(ROOT_INO))
within("lookup in a directory outside", lambda w, m: m.lookup(w.outside, b"secret"))
within("lookup in the root of the volume", lambda w, m: m.lookup(ROOT_INO, b"outside"))
within("lookup of .. of the subtree", lambda w, m: m.lookup(w.inside, b".."))
within("a walk over .. out of the subtree", lambda w, m: m.resolve(w.inside, [b"..", b"outside", b"secret"]))
within("a walk from the root of the volume", lambda w, m: m.resolve(ROOT_INO, [b"outside", b"secret"]))
within("readdir of a directory outside", lambda w, m: m.readdir(w.outside, after=None, limit=100))
within("readdir of the root of the volume", lambda w, m: m.readdir(ROOT_INO, after=None, limit=100))
within("open of a file outside", lambda w, m: m.open(w.secret))
within("the map of a file outside", lambda w, m: m.read_map(w.secret, start=0, end=1))
within("readlink outside", lambda w, m: m.readlink(w.secret))
within("attributes outside", lambda w, m: m.getxattr(w.secret, b"user.x"))
within("names of attributes outside", lambda w, m: m.listxattr(w.secret))
within("an attribute is set outside", lambda w, m: m.setxattr(ROOT, w.secret, b"user.x", b"y", flags=0))
within("an attribute is removed outside", lambda w, m: m.removexattr(ROOT, w.secret, b"user.x"))
within("chmod outside", lambda w, m: m.setattr(ROOT, w.secret, SetAttr(mode=0o777)))
within("truncate outside", lambda w, m: m.setattr(ROOT, w.secret, SetAttr(size_bytes=0)))
within("a file is made outside", lambda w, m: m.mknod(ROOT, w.outside, b"new", mode=0o100644))
within("a file is created outside", lambda w, m: m.create(ROOT, w.outside, b"new", mode=0o644, exclusive=True))
within(
    "a file outside is opened by create", lambda w, m: m.create(ROOT, w.outside, b"secret", mode=0o644, exclusive=False)
)
within("a directory is made in the root", lambda w, m: m.mkdir(ROOT, ROOT_INO, b"new", mode=0o755))
within("a symlink is made outside", lambda w, m: m.symlink(ROOT, w.outside, b"new", b"x"))
within("a file outside gets a name inside", lambda w, m: m.link(ROOT, w.secret, w.inside, b"mine"))
within("a file inside gets a name outside", lambda w, m: m.link(ROOT, w.file, w.outside, b"yours"))
within("unlink outside", lambda w, m: m.unlink(ROOT, w.outside, b"secret"))
within("the subtree itself is removed", lambda w, m: m.rmdir(ROOT, ROOT_INO, b"inside"))
within(
    "a file is moved in from outside",
    lambda w, m: m.rename(ROOT, w.outside, b"secret", w.inside, b"mine", flags=RenameFlags(0)),
)
within(
    "a file is moved out", lambda w, m: m.rename(ROOT, w.inside, b"file", w.outside, b"secret", flags=RenameFlags(0))
)
within(
    "files are exchanged over the border",
    lambda w, m: m.rename(ROOT, w.inside, b"file", w.outside, b"secret", flags=RenameFlags.EXCHANGE),
)
within("a file outside is copied in", lambda w, m: m.copy_range(ROOT, w.secret, 0, w.file, 0, len(SECRET)))
within("a file inside is copied out", lambda w, m: m.copy_range(ROOT, w.file, 0, w.secret, 0, 4))
within("a hole is punched outside", lambda w, m: m.punch(ROOT, w.secret, start=0, end=4))
within("room is reserved outside", lambda w, m: m.reserve(w.secret, end=1 << 30))
within("statfs outside", lambda w, m: m.statfs(w.outside))
within("a commit to a file outside", lambda w, m: write_to(m, w.secret))


async def write_to(meta: RemoteMeta, ino: Ino) -> None:
    (slice_id,) = await meta.allocate_slices(1)
    ref = SliceRef(0, SliceId(slice_id), 0, 4)
    await meta.commit(
        ROOT, ino, Commit((WrittenSlice(SliceId(slice_id), 4, SliceKind.INLINE, b"evil", (ref,)),), 4, 0, 1)
    )


@attack("a slice of another session is committed", FsError, errno.ESTALE)
async def foreign_slice(world: World) -> None:
    async with world.session(await world.token("/inside")) as client:
        ref = SliceRef(0, SliceId(world.secret_slice), 0, len(SECRET))
        written = WrittenSlice(SliceId(world.secret_slice), len(SECRET), SliceKind.INLINE, SECRET, (ref,))
        await client.meta.commit(ROOT, world.file, Commit((written,), len(SECRET), 0, 1))


@attack("a slice of another file is made part of one inside", FsError, errno.EINVAL)
async def foreign_ref(world: World) -> None:
    async with world.session(await world.token("/inside")) as client:
        (slice_id,) = await client.meta.allocate_slices(1)
        ref = SliceRef(0, SliceId(world.secret_slice), 0, 4)
        written = WrittenSlice(SliceId(slice_id), 4, SliceKind.INLINE, b"evil", (ref,))
        await client.meta.commit(ROOT, world.file, Commit((written,), 4, 0, 1))


@attack("another tenant's volume by its name", AccessRefused, errno.EACCES)
async def rival_volume(world: World) -> None:
    async with world.session(await world.token(), "rival/data"):
        pass


@attack("another volume of the tenant by its name", AccessRefused, errno.EACCES)
async def other_volume(world: World) -> None:
    async with world.session(await world.token(), "team/other"):
        pass


@attack("a volume that does not exist is refused as one of somebody else", AccessRefused, errno.EACCES)
async def no_volume(world: World) -> None:
    async with world.session(await world.token(), "rival/nothing"):
        pass


@attack("a name with .. as a volume", VolumeMissing, None)
async def dotted_volume(world: World) -> None:
    async with world.session(await world.token(), "team/../rival/data"):
        pass


def refused_token(name: str, forge: Callable[[World], Awaitable[str]]) -> None:
    @attack(name, AccessRefused, errno.EACCES)
    async def attempt(world: World) -> None:
        async with world.session(await forge(world)):
            pass


async def expired(world: World) -> str:
    token = await world.token(lasts_s=0.01)
    await asyncio.sleep(1.1)
    return token


async def revoked(world: World) -> str:
    asked = pb.CreateToken(tenant="team", volume="data")
    token, info = await world.managing.create_token(asked)
    await world.managing.revoke_token("team", info.token_id)
    return token


def claims_of(token: str) -> dict[str, Any]:
    body = token.split(".")[1]
    claims: dict[str, Any] = json.loads(urlsafe_b64decode(body + "=" * (-len(body) % 4)))
    return claims


def with_claims(token: str, **claims: Any) -> str:
    head, _, signature = token.split(".")
    body = urlsafe_b64encode(json.dumps({**claims_of(token), **claims}).encode()).rstrip(b"=").decode()
    return ".".join((head, body, signature))


async def widened(world: World) -> str:
    return with_claims(await world.token("/inside"), root=1)


async def another_tenant(world: World) -> str:
    return with_claims(await world.token(volume="rival/data"), tenant="team")


async def unsigned(world: World) -> str:
    return jwt.encode(claims_of(await world.token()), "", algorithm="none")


async def signed_by_another(world: World) -> str:
    return jwt.encode(claims_of(await world.token()), b"k" * 32, algorithm="HS256")


async def of_no_list(world: World) -> str:
    # Signed with the right key, and never made by the service: as after a restore of a backup, or of a leaked key of before.
    key = await world.service.store.setting(TOKEN_KEY)
    assert key is not None
    return jwt.encode({**claims_of(await world.token()), "jti": "0" * 16}, key, algorithm="HS256")


async def of_a_process(world: World) -> str:
    return (await Tokens.load(world.service.store)).for_this_process()


async def nothing(_: World) -> str:
    return ""


async def rubbish(_: World) -> str:
    return "\x00" * 5000


refused_token("a token that has expired", expired)
refused_token("a token that was revoked", revoked)
refused_token("a token whose subtree was altered", widened)
refused_token("a token whose tenant was altered", another_tenant)
refused_token("a token without a signature", unsigned)
refused_token("a token that was signed with another key", signed_by_another)
refused_token("a token that is not on the list", of_no_list)
refused_token("a token of a process, for a volume", of_a_process)
refused_token("no token", nothing)
refused_token("a token of zeros", rubbish)


def read_only(name: str, work: Callable[[World, RemoteMeta], Awaitable[Any]]) -> None:
    @attack(name, FsError, errno.EROFS)
    async def attempt(world: World) -> None:
        async with world.session(await world.token(read_only=True)) as client:
            await work(world, client.meta)


read_only("a read-only token makes a file", lambda w, m: m.create(ROOT, w.inside, b"new", mode=0o644, exclusive=True))
read_only("a read-only token takes slice ids", lambda w, m: m.allocate_slices(1))
read_only("a read-only token truncates", lambda w, m: m.setattr(ROOT, w.file, SetAttr(size_bytes=0)))
read_only("a read-only token removes", lambda w, m: m.unlink(ROOT, w.inside, b"file"))
read_only("a read-only token punches a hole", lambda w, m: m.punch(ROOT, w.file, start=0, end=1))
read_only(
    "a read-only token commits",
    lambda w, m: m.commit(
        ROOT,
        w.file,
        Commit((WrittenSlice(SliceId(9), 1, SliceKind.INLINE, b"x", (SliceRef(0, SliceId(9), 0, 1),)),), 1, 0, 1),
    ),
)


def administering(
    name: str, work: Callable[[World, RemoteAdmin], Awaitable[Any]], path: str = "/", **further: Any
) -> None:
    @attack(name, AtollError, errno.EACCES)
    async def attempt(world: World) -> None:
        admin = RemoteAdmin(world.endpoint(await world.token(path, **further)), "team/data", timeout_s=20)
        await work(world, admin)


async def checked(admin: RemoteAdmin) -> None:
    async for _ in admin.check(repair=False):
        pass


async def dumped(admin: RemoteAdmin) -> None:
    async for _ in admin.dump():
        pass


administering(
    "a user lifts the limits of the volume", lambda w, a: a.configure(capacity_bytes=0, max_inodes=0, trash_days=0)
)
administering("a user sets a quota", lambda w, a: a.quota_set(w.inside, max_bytes=1, max_inodes=1))
administering("a user empties the trash", lambda w, a: a.trash_expire(before_ns=1 << 62, limit=10))
administering("a user says that garbage is gone", lambda w, a: a.garbage_deleted([SliceId(1)]))
administering(
    "a user replaces the content of a chunk", lambda w, a: a.replace_refs(w.secret, 0, expected=[], written=[])
)
administering("a user dumps all names", lambda w, a: dumped(a))
administering("a user holds back all changes by a check", lambda w, a: checked(a))
administering(
    "a user of a subtree lists the bytes of small files", lambda w, a: a.live_slices(after=None, limit=9), "/inside"
)
administering("a user of a subtree asks for paths", lambda w, a: a.paths_of(w.secret), "/inside")
administering("a user of a subtree walks the volume", lambda w, a: a.resolve([b"outside", b"secret"]), "/inside")
administering("a user of a subtree sees the trash", lambda w, a: a.trash_list(after=None, limit=9), "/inside")
administering("a user of a subtree clones", lambda w, a: a.clone(ROOT, w.secret, w.inside, b"mine"), "/inside")
administering("a reader clones", lambda w, a: a.clone(ROOT, w.file, w.inside, b"mine"), read_only=True)


def managing(name: str, work: Callable[[World, RemoteManaging], Awaitable[Any]], **token: Any) -> None:
    @attack(name, AtollError, errno.EACCES)
    async def attempt(world: World) -> None:
        asked = pb.CreateToken(**token)
        made, _ = await world.managing.create_token(asked)
        await work(world, RemoteManaging(world.endpoint(made)))


USER: dict[str, Any] = {"tenant": "team", "volume": "data"}
TENANT: dict[str, Any] = {"tenant": "team"}

managing("a user makes a token", lambda w, m: m.create_token(pb.CreateToken(**USER)), **USER)
managing("a user makes a token of the administrator", lambda w, m: m.create_token(pb.CreateToken()), **USER)
managing("a user lists tokens", lambda w, m: m.tokens("team"), **USER)
managing("a user revokes a token", lambda w, m: m.revoke_token("team", "0" * 16), **USER)
managing("a user deletes the volume", lambda w, m: m.delete_volume("team/data"), **USER)
managing("a user lists tenants", lambda w, m: m.tenants(), **USER)
managing("a tenant makes a token for another", lambda w, m: m.create_token(pb.CreateToken(tenant="rival")), **TENANT)
managing(
    "a tenant makes a token for another's volume",
    lambda w, m: m.create_token(pb.CreateToken(tenant="rival", volume="data")),
    **TENANT,
)
managing("a tenant becomes the administrator", lambda w, m: m.create_token(pb.CreateToken()), **TENANT)
managing("a tenant lists the tokens of another", lambda w, m: m.tokens("rival"), **TENANT)
managing("a tenant deletes another's volume", lambda w, m: m.delete_volume("rival/data"), **TENANT)
managing("a tenant makes a tenant", lambda w, m: m.create_tenant("third", max_bytes=0, max_inodes=0), **TENANT)
managing("a tenant deletes a tenant", lambda w, m: m.delete_tenant("rival"), **TENANT)
managing("a tenant lifts its own limits", lambda w, m: m.set_tenant_quota("team", max_bytes=0, max_inodes=0), **TENANT)


@attack("a tenant's administrator makes a volume for another", AccessRefused, errno.EACCES)
async def volume_for_another(world: World) -> None:
    token, _ = await world.managing.create_token(pb.CreateToken(tenant="team"))
    form = replace(volume_format(), tenant="rival", name="new", uuid="00000000-0000-0000-0000-000000000009")
    request = pb.CreateVolumeRequest(format=pb.VolumeFormat(json=dump_format(form)), mode=0o755)
    await world.endpoint(token).ask(pb.Opening.CREATE_VOLUME, request.SerializeToString())


@attack("a user makes the process give up volumes", AccessRefused, errno.EACCES)
async def hand_over(world: World) -> None:
    request = pb.HandOverRequest(server="127.0.0.1:1", owned=0).SerializeToString()
    await world.endpoint(await world.token()).ask(pb.Opening.HAND_OVER, request)


@attack("the administrator's token makes the process give up volumes", AccessRefused, errno.EACCES)
async def hand_over_by_admin(world: World) -> None:
    request = pb.HandOverRequest(server="127.0.0.1:1", owned=0).SerializeToString()
    await world.service.endpoint().ask(pb.Opening.HAND_OVER, request)


@dataclass
class Raw:
    """A stream, message by message."""

    frames: Frames

    async def say(self, message: pb.FromClient) -> pb.FromService:
        self.frames.send(message.SerializeToString())
        return pb.FromService.FromString(await self.frames.read())


@contextlib.asynccontextmanager
async def raw(world: World, token: str) -> AsyncIterator[Raw]:
    endpoint = world.endpoint(token)
    frames = await endpoint.connect(pb.Opening.SESSION, "team/data")
    try:
        yield Raw(frames)
    except EndedByService as ended:
        raise endpoint.error(ended) from ended
    finally:
        frames.close()


@attack("the session of another is taken by its number", AtollError, errno.ESTALE)
async def stolen_session(world: World) -> None:
    async with raw(world, await world.token("/inside")) as stream:
        session = world.owner.connection.session_id
        await stream.say(pb.FromClient(hello=pb.Hello(protocol=1, session_id=session, secret=b"\0" * 16)))


@attack("the session of another is taken with an empty secret", AtollError, errno.ESTALE)
async def stolen_session_without_secret(world: World) -> None:
    async with raw(world, await world.token("/inside")) as stream:
        session = world.owner.connection.session_id
        await stream.say(pb.FromClient(hello=pb.Hello(protocol=1, session_id=session)))


@attack("a request is replayed after its reply was confirmed", ServiceRefused, errno.EINVAL)
async def replayed(world: World) -> None:
    async with raw(world, await world.token("/inside")) as stream:
        await stream.say(pb.FromClient(hello=pb.Hello(protocol=1)))
        make = pb.Request(number=1, mknod=pb.MakeNode(parent=world.inside, name=b"\xff", mode=0o100644))
        removal = pb.Request(number=2, unlink=pb.Unlink(parent=world.inside, name=b"\xff"))
        await stream.say(pb.FromClient(requests=[make]))
        (reply,) = (await stream.say(pb.FromClient(requests=[removal], confirmed=2))).replies
        assert not reply.HasField("failure"), reply
        await stream.say(pb.FromClient(requests=[make]))


@attack("a message that is damaged", ServiceRefused, errno.EINVAL)
async def damaged(world: World) -> None:
    async with raw(world, await world.token("/inside")) as stream:
        stream.frames.send(b"\xff" * 100)
        await stream.frames.read()


@attack("a message that is too large", AtollError, None)
async def oversized(world: World) -> None:
    async with raw(world, await world.token("/inside")) as stream:
        await stream.say(pb.FromClient(hello=pb.Hello(protocol=1)))
        stream.frames.send(b"\0" * (300 << 20))
        await stream.frames.read()


@attack("files of others are said to be open, then read", FsError, errno.ENOENT)
async def claimed_opens(world: World) -> None:
    async with raw(world, await world.token("/inside")) as stream:
        welcome = (await stream.say(pb.FromClient(hello=pb.Hello(protocol=1)))).welcome
    async with raw(world, await world.token("/inside")) as stream:
        hello = pb.Hello(protocol=1, session_id=welcome.session_id, secret=welcome.secret)
        hello.open_inos.append(world.secret)
        hello.open_counts.append(1)
        await stream.say(pb.FromClient(hello=hello))
        # Without a name, it would be reached by whoever has it open.
        await world.owner.meta.open(world.secret)
        await world.owner.meta.unlink(ROOT, world.outside, b"secret")
        asked = pb.Request(number=1, read_map=pb.ReadMap(ino=world.secret, end=1))
        (reply,) = (await stream.say(pb.FromClient(requests=[asked]))).replies
        assert SECRET not in reply.SerializeToString()
        raise FsError(reply.failure.errno)


THEIR_OWN = {"files of others are said to be open, then read", "a request is replayed after its reply was confirmed"}
"""Attempts that make changes which they may make, too."""


def test_there_are_attacks_enough() -> None:
    assert len(ATTACKS) >= 40


@pytest.mark.parametrize("name", ATTACKS)
@in_world
async def test_an_attack_is_refused_and_harms_nobody(world: World, name: str) -> None:
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
async def test_what_a_subtree_has_is_reached(world: World) -> None:
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
async def test_the_status_of_a_subtree_tells_nothing_of_others(world: World) -> None:
    admin = RemoteAdmin(world.endpoint(await world.token("/inside")), "team/data", timeout_s=20)
    status = await admin.status()
    assert status.format.name == "data"
    assert not status.sessions
    assert not status.counters
    assert (await world.owner.admin.status()).sessions


@in_world
async def test_a_file_with_a_name_inside_is_reached_by_it(world: World) -> None:
    await world.owner.meta.link(ROOT, world.secret, world.inside, b"shared")
    async with world.session(await world.token("/inside")) as client:
        assert (await client.meta.open(world.secret)).inode.ino == world.secret
        await world.owner.meta.unlink(ROOT, world.inside, b"shared")
        await world.owner.released()
        with pytest.raises(FsError):
            await client.meta.read_map(world.secret, start=0, end=1)


@in_world
async def test_a_subtree_is_reached_by_its_number_wherever_it_is(world: World) -> None:
    token = await world.token("/inside")
    await world.owner.meta.rename(ROOT, ROOT_INO, b"inside", world.outside, b"moved", flags=RenameFlags(0))
    impostor = (await world.owner.meta.mkdir(ROOT, ROOT_INO, b"inside", mode=0o755)).ino
    async with world.session(token) as client:
        assert (await client.meta.lookup(client.meta.root, b"file")).ino == world.file
        with pytest.raises(FsError):
            await client.meta.getattr(impostor)


@in_world
async def test_what_is_moved_out_is_out_of_reach(world: World) -> None:
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
async def test_a_lease_on_what_is_moved_out_is_not_extended(world: World) -> None:
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
async def test_an_open_file_without_a_name_goes_on_being_reached_by_who_opened_it(world: World) -> None:
    token = await world.token("/inside")
    async with world.session(token) as client, world.session(token) as other:
        await client.meta.open(world.file)
        await world.owner.meta.unlink(ROOT, world.inside, b"file")
        assert (await client.meta.read_map(world.file, start=0, end=1)).slices
        with pytest.raises(FsError):
            await other.meta.read_map(world.file, start=0, end=1)


@in_world
async def test_a_token_that_is_revoked_cuts_off_who_uses_it(world: World) -> None:
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
async def test_a_process_notices_what_another_one_revoked(world: World) -> None:
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
async def test_a_token_that_expires_cuts_off_who_uses_it(world: World) -> None:
    async with world.session(await world.token(lasts_s=2.0)) as client:
        with pytest.raises(AccessRefused, match="expired"):
            async with asyncio.timeout(20):
                while True:
                    await client.meta.getattr(ROOT_INO)
                    await asyncio.sleep(0.01)


@in_world
async def test_a_token_of_a_volume_that_was_deleted_is_not_for_the_next_one_of_its_name(world: World) -> None:
    token = await world.token(volume="team/other")
    await world.managing.delete_volume("team/other")
    form = replace(volume_format(), tenant="team", name="other", uuid="00000000-0000-0000-0000-000000000004")
    await world.service.store.create_volume(form, first_rows(form))
    with pytest.raises(AccessRefused):
        async with world.session(token, "team/other"):
            pass


@in_world
async def test_a_volume_in_use_is_not_deleted(world: World) -> None:
    with pytest.raises(FsError) as refused:
        await world.managing.delete_volume("team/data")
    assert refused.value.errno == errno.EBUSY
    await world.owner.meta.getattr(world.file)


@in_world
async def test_a_volume_that_was_deleted_is_gone(world: World) -> None:
    await world.managing.delete_volume("team/other")
    with pytest.raises(VolumeMissing):
        async with world.session(world.service.token, "team/other"):
            pass
    assert [each.name for each in await world.service.store.list_volumes()] == ["data", "data"]


@in_world
async def test_a_tenant_goes_when_its_volumes_have_gone(world: World) -> None:
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
async def test_a_tenants_administrator_does_what_belongs_to_the_tenant(world: World) -> None:
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
async def test_who_administers_is_in_the_log(world: World, caplog: pytest.LogCaptureFixture) -> None:
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
async def test_status_tells_each_what_is_its_own(world: World) -> None:
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
