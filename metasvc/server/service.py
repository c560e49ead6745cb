"""The server: who may call, and which call goes where.

Owns the connections, and the one table from errors to what a client is told. Metadata operations travel
on streams (connection); administration is a connection for each call (administration, managing). Every connection begins with
a token, which is checked before anything else is looked at; what it allows goes with the call.

A stream ends when its token expires or is revoked. Processes look twice a second whether any was revoked (`watch_tokens`),
and once a minute at each that is in use: a process may have ended between revoking one and saying so.
"""

from __future__ import annotations

import asyncio
import logging
import math
import socket
import ssl
import time
from collections.abc import Awaitable, Callable, Collection, Iterator
from contextlib import aclosing, contextmanager
from typing import Any, Final, NamedTuple, TypeVar

from google.protobuf.message import DecodeError, Message

from chunkstore.errors import AtollError, BucketDenied, BucketInvalid
from metasvc.api import atoll_pb2 as pb
from metasvc.api import wire
from metasvc.api.bucket_keys import BucketKeysInvalid
from metasvc.api.frames import MAX_OPENING_BYTES, MAX_REQUEST_BYTES, ConnectionLost, Frames, NotOurs, Stalled
from metasvc.api.server import owner_of, parse_server
from metasvc.api.volume_format import dump_format, parse_format
from metasvc.engine import first_rows
from metasvc.errors import FsError, NotOwner, StoreError, VolumeExists, VolumeIncomplete, VolumeMissing
from metasvc.server.administration import administer, dump_parts, problems
from metasvc.server.audit import Commands, audited
from metasvc.server.certificate import Certificate
from metasvc.server.connection import Connection, Silent
from metasvc.server.crowds import Doorway, Repeated, Unfinished
from metasvc.server.keys import KeysLocked
from metasvc.server.listening import Listener
from metasvc.server.loading import check_format, load_volume
from metasvc.server.managing import Managing
from metasvc.server.names import check_name, volume_name
from metasvc.server.object_urls import OPERATION as SIGN_OBJECTS
from metasvc.server.object_urls import VERBS, sign_objects
from metasvc.server.rights import Rights, TokenRefused
from metasvc.server.session import Misbehaved
from metasvc.server.tokens import Tokens
from metasvc.server.volumes import SessionEnded, Volume, Volumes

OPENING_S: Final = 10.0
"""A connection that has not said by then what it is for is closed."""
REVOKED_S: Final = 0.5
"""So often a process looks whether tokens were revoked."""
_ALL_LOOKED_AT_S: Final = 60.0
_SHUTDOWN_S: Final = 5.0
"""So long a client may take to agree to the end of TLS."""

log = logging.getLogger(__name__)

_Message = TypeVar("_Message", bound=Message)


class _Call(NamedTuple):
    """One call, as its opening says."""

    volume: str
    """TENANT/NAME, for those of one volume."""
    rights: Rights
    peer: str
    """Where the client is, for logs."""
    is_private: bool
    """Nobody else can read what passes."""


_Method = Callable[[_Call, Frames], Awaitable[None]]


class Service:
    """The service on one address. Start it, and stop it."""

    def __init__(self, volumes: Volumes, tokens: Tokens) -> None:
        """Take what is served, and who is let in."""
        self._volumes = volumes
        self._tokens = tokens
        self._managing = Managing(volumes, tokens, self.cut_off)
        self._commands = Commands()
        self._listener = Listener(self._connect)
        self._certificate: Certificate | None = None
        self._serving: set[asyncio.Task[None]] = set()
        self._beginning: set[asyncio.Task[None]] = set()
        """Connections within the handshake of TLS."""
        self._open: set[Frames] = set()
        self._repeated = Repeated()
        self._doorway = Doorway(self._repeated)
        self._unfinished = Unfinished(self._repeated)
        self._methods: dict[int, _Method] = {
            pb.Opening.SESSION: self._session,
            pb.Opening.ADMINISTER: self._unary(pb.AdminRequest, self._administer),
            pb.Opening.CHECK: self._check,
            pb.Opening.CREATE_VOLUME: self._unary(pb.CreateVolumeRequest, self._create_volume),
            pb.Opening.LIST_VOLUMES: self._unary(pb.ListVolumesRequest, self._list_volumes),
            pb.Opening.HAND_OVER: self._unary(pb.HandOverRequest, self._hand_over),
            pb.Opening.DUMP: self._dump,
            pb.Opening.LOAD: self._load,
            pb.Opening.KEYS: self._unary(pb.KeysRequest, self._keep_keys),
            pb.Opening.MANAGE: self._unary(pb.ManageRequest, self._manage),
        }
        self.connections: set[Connection] = set()

    async def start(self, listen: str, *, certificate: Certificate | None = None) -> int:
        """Listen on HOST:PORT (port 0: any), with a certificate by TLS only; the port. StoreError if the address is taken."""
        host, _, port = listen.rpartition(":")
        self._certificate = certificate
        try:
            return await self._listener.start(host.strip("[]"), int(port))
        except OSError as error:
            raise StoreError(
                f"cannot listen on {listen}: {error.strerror or error}; give another with --listen"
            ) from error

    async def stop(self, *, grace_s: float) -> None:
        """Take no more calls, give running ones so long, then cut them off. Sessions stay."""
        self._listener.close()
        # Those that were just taken begin, so that what is cancelled has what it must close.
        await asyncio.sleep(0)
        for beginning in self._beginning:
            beginning.cancel()
        for connection in list(self.connections):
            connection.fail(AtollError("the metadata service is ending", retryable=True))
        if self._serving:
            await asyncio.wait(self._serving, timeout=grace_s)
        serving = list(self._serving)
        for task in serving:
            task.cancel()
        await asyncio.gather(*serving, return_exceptions=True)
        if self._open:
            # They take the end that they were told.
            await asyncio.wait([frames.gone for frames in self._open], timeout=grace_s)
        for frames in list(self._open):
            frames.abort()
        await asyncio.sleep(0)

    # -- connections ------------------------------------------------------------------------------------------------------

    def _connect(self, connection: socket.socket) -> None:
        """Begin with a connection that was just taken."""
        task = asyncio.get_running_loop().create_task(self._begin(connection))
        self._beginning.add(task)
        task.add_done_callback(self._beginning.discard)

    async def _begin(self, connection: socket.socket) -> None:
        encryption: dict[str, Any] = {}
        if self._certificate is not None:
            encryption = {
                "ssl": self._certificate.context,
                "ssl_handshake_timeout": OPENING_S,
                "ssl_shutdown_timeout": _SHUTDOWN_S,
            }
        try:
            await asyncio.get_running_loop().connect_accepted_socket(
                lambda: Frames(max_bytes=MAX_OPENING_BYTES, on_made=self._accept, on_unfinished=self._unfinished.note),
                connection,
                **encryption,
            )
        except ssl.SSLError as error:
            self._repeated.tell(f"a connection by TLS does not begin: {error.strerror or error}")
        except OSError as error:
            # It went, or said nothing.
            log.debug("a connection does not begin: %s", error)

    def _accept(self, frames: Frames) -> None:
        self._open.add(frames)
        self._doorway.enter(frames)
        frames.gone.add_done_callback(lambda _: self._gone(frames))
        task = asyncio.get_running_loop().create_task(self._serve(frames), name=f"connection of {frames.peer}")
        self._serving.add(task)
        task.add_done_callback(self._serving.discard)

    def _gone(self, frames: Frames) -> None:
        self._open.discard(frames)
        self._doorway.leave(frames)

    async def _serve(self, frames: Frames) -> None:
        try:
            await self._serve_method(frames)
            frames.end(pb.Ended.DONE, "")
        except ConnectionLost:
            pass
        except asyncio.CancelledError:
            frames.end(pb.Ended.AGAIN, "the metadata service is ending")
            raise
        except (Silent, Misbehaved, Stalled, NotOurs, TokenRefused) as error:
            # Who says nothing does so in crowds.
            tell = self._repeated.tell if isinstance(error, Silent) else log.warning
            tell(f"client {frames.peer}: {error}: its connection is closed")
            frames.end(_reason(error), str(error))
        except NotOwner as error:
            frames.end(pb.Ended.AGAIN, error.message, owner=error.owner if owner_of(error.owner) else "")
        except AtollError as error:
            frames.end(_reason(error), error.message)
        except Exception as error:
            log.exception("a call of client %s failed unexpectedly", frames.peer, exc_info=error)
            frames.end(pb.Ended.FAILED, f"the metadata service failed unexpectedly: {error!r}")
        finally:
            frames.close()

    async def _serve_method(self, frames: Frames) -> None:
        try:
            async with asyncio.timeout(OPENING_S):
                opening = pb.Opening.FromString(await frames.read())
        except TimeoutError:
            raise Silent(f"said nothing for {OPENING_S:.0f} s") from None
        except DecodeError:
            raise Misbehaved("sent a message that is damaged") from None
        if not opening.token:
            raise TokenRefused("there is no token: give one with --token-file or ATOLL_TOKEN")
        call = _Call(opening.volume, await self._tokens.check(opening.token), frames.peer, frames.is_private)
        self._doorway.leave(frames)
        method = self._methods.get(opening.method)
        if method is None:
            frames.end(pb.Ended.UNKNOWN_METHOD, f"method {opening.method}")
            return
        frames.greet()
        frames.max_bytes = MAX_REQUEST_BYTES
        if opening.method == pb.Opening.SESSION:
            await method(call, frames)
            return
        work = asyncio.ensure_future(method(call, frames))
        waited: set[asyncio.Future[Any]] = {work, frames.closed}
        try:
            await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
            await (work if work.done() else frames.closed)
        finally:
            # Whoever asked is gone, or this ends: a check, for one, must not go on holding back changes.
            work.cancel()
            await asyncio.gather(work, return_exceptions=True)

    def _unary(self, request: type[Message], answer: Callable[[Any, _Call], Awaitable[Message]]) -> _Method:
        """Return the method that answers one request by one message."""

        async def serve(call: _Call, frames: Frames) -> None:
            asked = await _request(request, frames)
            frames.send((await answer(asked, call)).SerializeToString())

        return serve

    async def _session(self, call: _Call, frames: Frames) -> None:
        connection = Connection(frames, call.rights)
        self.connections.add(connection)
        left_s = call.rights.left_s()
        expiry = None
        if left_s is not None:
            refusal = TokenRefused("the token has expired: ask for another one")
            expiry = asyncio.get_running_loop().call_later(left_s, connection.fail, refusal)
        try:
            await connection.serve(await self._volume(call))
        finally:
            self.connections.discard(connection)
            if expiry is not None:
                expiry.cancel()

    async def _administer(self, request: pb.AdminRequest, call: _Call) -> Message:
        if request.WhichOneof("operation") == SIGN_OBJECTS:
            return await self._sign_objects(request.sign_objects, call)
        volume = await self._volume(call)
        reply = await administer(volume.admin, request, call.rights, peer=call.peer, volume=volume.name)
        if reply.HasField("status") and not call.rights.is_confined:
            reply.status.counters.update(volume.job_counters())
            if call.rights.is_admin and (use := volume.tenant_use) is not None:
                wire.put_row(use, reply.status.tenant)
        return reply

    async def _sign_objects(self, asked: pb.SignObjects, call: _Call) -> Message:
        tenant, name = volume_name(call.volume)
        action = f"sign URLs that {VERBS.get(asked.verb, 'do')} objects of"
        deleted = f" (deleted, {asked.deleted_uuid[:40]})" if asked.deleted_uuid else ""
        command = asked.command[:32]
        try:
            with self._commands.audited(call.rights, call.peer, action, f"{tenant}/{name}{deleted}", command=command):
                call.rights.require_volume(tenant, name)
                call.rights.require_admin(
                    "listing, reading or deleting objects without the keys of the bucket", tenant=tenant
                )
                if asked.deleted_uuid:
                    form = await self._volumes.deleted.get(tenant, asked.deleted_uuid)
                    signer = await self._volumes.deleted.signer(form)
                else:
                    volume = await self._volume(call)
                    form, signer = volume.format, await volume.access.require_signer()
                return sign_objects(asked, form.uuid, signer)
        except (FsError, KeysLocked, BucketDenied, BucketInvalid) as error:
            reply = pb.AdminReply()
            wire.put_failure(error, reply.failure)
            return reply

    async def _check(self, call: _Call, frames: Frames) -> None:
        request = await _request(pb.CheckRequest, frames)
        with self._administering(call, "repair" if request.repair else "check"):
            volume = await self._volume(call)
            async for problem in problems(volume.admin, request):
                frames.send(problem.SerializeToString())
                await frames.drain()
                if frames.closed.done():
                    return

    async def _dump(self, call: _Call, frames: Frames) -> None:
        await _request(pb.DumpRequest, frames)
        with self._administering(call, "dump"):
            volume = await self._volume(call)
            async with aclosing(dump_parts(volume.admin)) as parts:
                async for part in parts:
                    frames.send(part.SerializeToString())
                    await frames.drain()
                    if frames.closed.done():
                        return

    async def _load(self, call: _Call, frames: Frames) -> None:
        with self._administering(call, "load"):
            tenant, name = volume_name(call.volume)
            await load_volume(self._volumes, tenant, name, frames)

    async def _create_volume(self, request: pb.CreateVolumeRequest, call: _Call) -> Message:
        volume_format = parse_format(request.format.json)
        for text in (volume_format.tenant, volume_format.name):
            check_name(text)
        with self._administering(call._replace(volume=f"{volume_format.tenant}/{volume_format.name}"), "make"):
            store = self._volumes.store
            check_format(volume_format)
            if any(each.uuid == volume_format.uuid for each in await store.list_volumes()):
                raise VolumeExists(f"there is a volume with the uuid {volume_format.uuid}: make another")
            await self._volumes.deleted.check_free(volume_format.uuid)
            rows = first_rows(volume_format, uid=request.uid, gid=request.gid, mode=request.mode & 0o7777)
            await store.add_tenant(volume_format.tenant, created_ns=time.time_ns())
            await store.create_volume(volume_format, rows)
            log.info("volume %s/%s was made", volume_format.tenant, volume_format.name)
            return pb.VolumeFormat(json=dump_format(volume_format))

    async def _list_volumes(self, request: pb.ListVolumesRequest, call: _Call) -> Message:
        formats = await self._volumes.store.list_volumes()
        asked_for = [each for each in formats if request.tenant in ("", each.tenant)]
        wanted = [each for each in asked_for if call.rights.sees(each.tenant, each.name)]
        return pb.ListVolumesReply(formats=[pb.VolumeFormat(json=dump_format(each)) for each in wanted])

    async def _hand_over(self, request: pb.HandOverRequest, call: _Call) -> Message:
        if not call.rights.is_process:
            raise TokenRefused("volumes are handed over to processes of this service only")
        server = parse_server(request.server)
        if server is None:
            raise FsError(22, f"{request.server[:80]!r} is no HOST:PORT")
        return pb.HandOverReply(volumes=await self._volumes.hand_over(server, request.owned))

    async def _keep_keys(self, request: pb.KeysRequest, call: _Call) -> Message:
        if request.WhichOneof("operation") != "put":
            tenant, _ = volume_name(call.volume)
            call.rights.require_admin("asking for keys", tenant=tenant)
            return pb.KeysReply(has_master=self._volumes.keeps_keys)
        try:
            with self._administering(call, "set the keys of"):
                if not call.is_private:
                    raise TokenRefused("keys are not taken in plain text from another machine: write atolls://")
                await (await self._volume(call)).access.replace(request.put.variables)
        except (KeysLocked, BucketKeysInvalid) as error:
            reply = pb.KeysReply()
            wire.put_failure(error, reply.failure)
            return reply
        return pb.KeysReply(has_master=True)

    async def _manage(self, request: pb.ManageRequest, call: _Call) -> Message:
        return await self._managing.manage(request, call.rights, call.peer)

    async def _volume(self, call: _Call) -> Volume:
        tenant, name = volume_name(call.volume)
        call.rights.require_volume(tenant, name)
        volume = await self._volumes.get(tenant, name)
        call.rights.require_same(volume.format.uuid)
        return volume

    @contextmanager
    def _administering(self, call: _Call, what: str) -> Iterator[None]:
        """Let only an administrator of the tenant do what is done in the block, and note it in the audit log."""
        tenant, name = volume_name(call.volume)
        with audited(call.rights, call.peer, what, f"{tenant}/{name}"):
            call.rights.require_volume(tenant, name)
            call.rights.require_admin(f"to {what} a volume", tenant=tenant)
            yield

    # -- tokens -----------------------------------------------------------------------------------------------------------

    async def watch_tokens(self) -> None:
        """Cut off whoever uses a token that was revoked, until cancelled."""
        known, looked_s = b"", -math.inf
        while True:
            try:
                count, now_s = await self._tokens.revoked_count(), time.monotonic()
                if count != known or now_s - looked_s > _ALL_LOOKED_AT_S:
                    in_use = [connection.rights for connection in self.connections]
                    self.cut_off(await self._tokens.no_longer_good(in_use))
                    known, looked_s = count, now_s
            except AtollError as error:
                log.warning("whether tokens were revoked is looked at again later: %s", error)
            await asyncio.sleep(REVOKED_S)

    def cut_off(self, token_ids: Collection[str]) -> None:
        """End the streams that use some tokens."""
        for connection in list(self.connections):
            if connection.rights.token_id in token_ids:
                connection.fail(TokenRefused("the token was revoked: ask for another one"))


async def _request(kind: type[_Message], frames: Frames) -> _Message:
    """Read what a call is about."""
    try:
        async with asyncio.timeout(OPENING_S):
            data = await frames.read()
    except TimeoutError:
        raise Silent(f"said nothing for {OPENING_S:.0f} s") from None
    # From here on it is noticed when the client goes.
    frames.deliver(_one_request)
    try:
        return kind.FromString(data)
    except DecodeError:
        raise Misbehaved("the request is damaged") from None


def _one_request(_: bytes) -> None:
    raise Misbehaved("a second request on a connection for one")


_REASONS: Final[dict[type[Exception], pb.Ended.Reason.ValueType]] = {
    SessionEnded: pb.Ended.SESSION_ENDED,
    TokenRefused: pb.Ended.NO_ACCESS,
    VolumeMissing: pb.Ended.NO_VOLUME,
    VolumeIncomplete: pb.Ended.NO_VOLUME,
    VolumeExists: pb.Ended.VOLUME_EXISTS,
    FsError: pb.Ended.INVALID,
    Misbehaved: pb.Ended.INVALID,
    NotOurs: pb.Ended.INVALID,
}


def _reason(error: Exception) -> pb.Ended.Reason.ValueType:
    """Return what a client is told to do about an error."""
    is_passing = isinstance(error, AtollError) and error.retryable
    return _REASONS.get(type(error), pb.Ended.AGAIN if is_passing else pb.Ended.FAILED)
