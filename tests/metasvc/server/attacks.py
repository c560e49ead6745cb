"""What a token does not allow, tried: a table of attempts, each with the error that must come.

Owns the attempts and the world that they are made in, which may be served by this process (test_rights) or by another one
(bench/attacks.py). An attempt may be made any number of times, one after the other, in the same world: it leaves the world as
it was, but for `THEIR_OWN`. Tokens are made once in a world and used again.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import time
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field, replace
from typing import Any

import jwt

from chunkstore.buckets.signed import Verb
from chunkstore.errors import AtollError
from chunkstore.geometry import SliceId
from client.meta.admin import RemoteAdmin
from client.meta.connection import SessionConnection
from client.meta.encryption import Trust
from client.meta.endpoint import AccessRefused, Endpoint, ServiceRefused
from client.meta.managing import RemoteManaging
from client.meta.remote import RemoteMeta
from client.meta.signing import ObjectSigning
from metasvc.api import atoll_pb2 as pb
from metasvc.api.frames import EndedByService, Frames
from metasvc.api.server import Server
from metasvc.api.volume_format import dump_format
from metasvc.errors import FsError, VolumeMissing
from metasvc.model import ROOT_INO, Caller, Commit, Ino, RenameFlags, SetAttr, SliceKind, SliceRef, WrittenSlice
from metasvc.server.tokens import Tokens
from metasvc.store.memory import MemoryStore
from tests.metasvc.engine.volumes import volume_format
from tests.metasvc.server.served import Client

ROOT = Caller()
SECRET = b"what nobody but its owner may read"
VOLUMES = (("team", "data", 1), ("team", "other", 2), ("rival", "data", 3))
"""Of the world: tenant, name, and the last digit of the uuid."""


@dataclass
class World:
    """Two tenants. Of team/data the attacker has tokens; `inside` is what they reach."""

    port: int
    """Where the service answers, on loopback."""
    admin_token: str
    signing_key: bytes
    """What tokens are signed with."""
    owner: Client
    inside: Ino
    outside: Ino
    file: Ino
    """In `inside`."""
    secret: Ino
    """In `outside`."""
    secret_slice: int
    trust: Trust | None = field(default=None, kw_only=True)
    _tokens: dict[bytes, str] = field(default_factory=dict, kw_only=True)
    _forged: dict[Forge, str] = field(default_factory=dict, kw_only=True)

    @property
    def managing(self) -> RemoteManaging:
        return RemoteManaging(self.endpoint(self.admin_token))

    async def token(self, path: str = "/", volume: str = "team/data", **further: Any) -> str:
        tenant, _, name = volume.partition("/")
        parts = [part.encode() for part in path.split("/") if part]
        return await self.made(pb.CreateToken(tenant=tenant, volume=name, path=parts, **further))

    async def made(self, asked: pb.CreateToken) -> str:
        """Return a token like this; the same one each time."""
        key = asked.SerializeToString(deterministic=True)
        if key not in self._tokens:
            self._tokens[key] = (await self.managing.create_token(asked))[0]
        return self._tokens[key]

    async def forged(self, forge: Forge) -> str:
        """Return what is no good token; the same one each time."""
        if forge not in self._forged:
            self._forged[forge] = await forge(self)
        return self._forged[forge]

    def endpoint(self, token: str) -> Endpoint:
        return Endpoint([Server("127.0.0.1", self.port)], token, trust=self.trust)

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


async def furnish(owner: Client) -> tuple[Ino, Ino, Ino, Ino, int]:
    """Make what the attempts are about in team/data; `inside`, `outside`, `file`, `secret`, `secret_slice` of the World."""
    meta = owner.meta
    inside = (await meta.mkdir(ROOT, ROOT_INO, b"inside", mode=0o755)).ino
    outside = (await meta.mkdir(ROOT, ROOT_INO, b"outside", mode=0o755)).ino
    file = (await meta.mknod(ROOT, inside, b"file", mode=0o100644)).ino
    await write(meta, file, b"of the attacker")
    secret = (await meta.mknod(ROOT, outside, b"secret", mode=0o100644)).ino
    secret_slice = await write(meta, secret, SECRET)
    await meta.symlink(ROOT, inside, b"way out", b"../outside/secret")
    return inside, outside, file, secret, secret_slice


Forge = Callable[[World], Awaitable[str]]
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


def refused_token(name: str, forge: Forge) -> None:
    @attack(name, AccessRefused, errno.EACCES)
    async def attempt(world: World) -> None:
        async with world.session(await world.forged(forge)):
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
    return jwt.encode({**claims_of(await world.token()), "jti": "0" * 16}, world.signing_key, algorithm="HS256")


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
refused_token("no token", nothing)
refused_token("a token of zeros", rubbish)


@attack("a token of a process, for a volume", AccessRefused, errno.EACCES)
async def of_a_process(world: World) -> None:
    # Good for a minute, so not one that is made once.
    async with world.session(Tokens(world.signing_key, MemoryStore()).for_this_process()):
        pass


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
        made = await world.made(pb.CreateToken(**token))
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


managing("a user lists deleted volumes", lambda w, m: m.deleted_volumes("team", "data"), **USER)
managing("a tenant lists another's deleted volumes", lambda w, m: m.deleted_volumes("rival", "data"), **TENANT)
managing("a tenant has another's keys forgotten", lambda w, m: m.forget_deleted("rival", "0" * 32), **TENANT)


def signing(name: str, verb: Verb, of: str = "team/data", deleted_uuid: str = "", **token: Any) -> None:
    @attack(name, AccessRefused, errno.EACCES)
    async def attempt(world: World) -> None:
        endpoint = world.endpoint(await world.made(pb.CreateToken(**token)))
        await ObjectSigning(endpoint, of, deleted_uuid=deleted_uuid).sign(verb, [f"{world.owner.meta.format.uuid}/"])


signing("a user has a listing of objects signed", "list", **USER)
signing("a user has the deletion of objects signed", "delete", **USER)
signing("a user of a subtree has the reading of objects signed", "get", path=[b"inside"], **USER)
signing("a tenant has a listing of another's objects signed", "list", "rival/data", **TENANT)
signing("a tenant has the deletion of another's objects signed", "delete", "rival/data", **TENANT)
signing("a tenant has the deletion of another's deleted volume signed", "delete", "rival/data", "0" * 32, **TENANT)


@attack("a tenant's administrator makes a volume for another", AccessRefused, errno.EACCES)
async def volume_for_another(world: World) -> None:
    token = await world.made(pb.CreateToken(tenant="team"))
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
    await world.endpoint(world.admin_token).ask(pb.Opening.HAND_OVER, request)


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
        doomed = (await world.owner.meta.mknod(ROOT, world.outside, b"doomed", mode=0o100644)).ino
        await write(world.owner.meta, doomed, SECRET)
        hello.open_inos.append(doomed)
        hello.open_counts.append(1)
        await stream.say(pb.FromClient(hello=hello))
        # Without a name, it would be reached by whoever has it open.
        await world.owner.meta.open(doomed)
        await world.owner.meta.unlink(ROOT, world.outside, b"doomed")
        asked = pb.Request(number=1, read_map=pb.ReadMap(ino=doomed, end=1))
        (reply,) = (await stream.say(pb.FromClient(requests=[asked]))).replies
        assert SECRET not in reply.SerializeToString()
        await world.owner.meta.release(doomed)
        raise FsError(reply.failure.errno)


THEIR_OWN = {"files of others are said to be open, then read", "a request is replayed after its reply was confirmed"}
"""Attempts that make changes which they may make, too."""
