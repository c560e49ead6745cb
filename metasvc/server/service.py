"""The gRPC server: who may call, and which call goes where.

Owns the gRPC server and its limits. Metadata operations travel on streams (connection); administration is unary calls
(administration). Every stream and call carries a token, which is checked before anything else is looked at.
"""

from __future__ import annotations

import ipaddress
import logging
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Final

import grpc
import grpc.aio
from google.protobuf.message import DecodeError, Message

from chunkstore.errors import AtollError
from chunkstore.geometry import is_block_size
from metasvc.api import atoll_pb2 as pb
from metasvc.api.volume_format import dump_format, parse_format
from metasvc.engine import first_rows
from metasvc.errors import FsError, NotOwner, StoreError, VolumeExists, VolumeMissing
from metasvc.server.administration import administer, problems
from metasvc.server.connection import Connection, Context
from metasvc.server.tokens import TokenRefused, Tokens
from metasvc.server.volumes import Volume, Volumes

MAX_MESSAGE_BYTES: Final = 16 * 1024 * 1024
"""Of what comes in: a commit has up to 2,048 pieces and 32 KiB inline for each slice. What goes out may be four times as large:
the map of a file with thousands of inline slices."""
_OPTIONS: Final = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", 4 * MAX_MESSAGE_BYTES),
    # Connections that say nothing, or answer no ping, are closed.
    ("grpc.server_handshake_timeout_ms", 10_000),
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_ping_interval_without_data_ms", 1_000),
    ("grpc.max_connection_idle_ms", 300_000),
    ("grpc.max_concurrent_streams", 1_000),
    ("grpc.so_reuseport", 0),
)
MAX_INLINE_BYTES: Final = 64 * 1024
VOLUME_KEY: Final = "atoll-volume-bin"

log = logging.getLogger(__name__)


class Service:
    """The service on one address. Start it, and stop it."""

    def __init__(self, volumes: Volumes, tokens: Tokens) -> None:
        """Take what is served, and who is let in."""
        self._volumes = volumes
        self._tokens = tokens
        self._server = grpc.aio.server(options=_OPTIONS)
        self._server.add_generic_rpc_handlers(
            (
                grpc.method_handlers_generic_handler(
                    "atoll.v1.Volume",
                    {
                        "Session": grpc.stream_stream_rpc_method_handler(self._session),
                        "Administer": self._unary(pb.AdminRequest, self._administer),
                        "Check": grpc.unary_stream_rpc_method_handler(self._check),
                    },
                ),
                grpc.method_handlers_generic_handler(
                    "atoll.v1.Tenancy",
                    {
                        "CreateVolume": self._unary(pb.CreateVolumeRequest, self._create_volume),
                        "ListVolumes": self._unary(pb.ListVolumesRequest, self._list_volumes),
                    },
                ),
            )
        )
        self.connections: set[Connection] = set()

    async def start(self, listen: str) -> int:
        """Listen on HOST:PORT (port 0: any) without encryption; the port. StoreError if the address is taken."""
        try:
            port = self._server.add_insecure_port(listen)
        except RuntimeError as error:
            raise StoreError(f"cannot listen on {listen}: {error}; give another with --listen") from error
        await self._server.start()
        return port

    async def stop(self, *, grace_s: float) -> None:
        """Take no more calls, give running ones so long, then cut them off. Sessions stay."""
        for connection in list(self.connections):
            connection.fail(AtollError("the metadata service is ending", retryable=True))
        await self._server.stop(grace_s)

    # -- calls ------------------------------------------------------------------------------------------------------------

    def _unary(
        self, request: type[Message], answer: Callable[[Any, Any], Awaitable[Message]]
    ) -> grpc.RpcMethodHandler[bytes, bytes]:
        """Return the handler of a unary call that needs a token."""

        async def handle(data: bytes, context: Context) -> bytes:
            await self._authorize(context)
            try:
                return (await answer(request.FromString(data), context)).SerializeToString()
            except DecodeError:
                await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "the request is damaged")
            except AtollError as error:
                await _abort(context, error)
            raise AssertionError  # abort() has raised

        return grpc.unary_unary_rpc_method_handler(handle)

    async def _session(self, _: Any, context: Context) -> None:
        await self._authorize(context)
        connection = Connection(context, peer=str(context.peer()))
        self.connections.add(connection)
        try:
            volume = await self._volume(context)
            await connection.serve(volume)
        except AtollError as error:
            await _abort(context, error)
        finally:
            self.connections.discard(connection)

    async def _administer(self, request: pb.AdminRequest, context: Context) -> Message:
        volume = await self._volume(context)
        reply = await administer(volume.admin, request)
        if reply.HasField("status"):
            reply.status.counters.update(volume.job_counters())
        return reply

    async def _check(self, data: bytes, context: Context) -> AsyncIterator[bytes]:
        await self._authorize(context)
        try:
            request = pb.CheckRequest.FromString(data)
            volume = await self._volume(context)
            async for problem in problems(volume.admin, request):
                yield problem.SerializeToString()
        except DecodeError:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "the request is damaged")
        except AtollError as error:
            await _abort(context, error)

    async def _create_volume(self, request: pb.CreateVolumeRequest, _: Context) -> Message:
        volume_format = parse_format(request.format.json)
        for text in (volume_format.tenant, volume_format.name):
            check_name(text)
        store = self._volumes.store
        try:
            uuid.UUID(volume_format.uuid)
        except ValueError as error:
            raise FsError(22, f"{volume_format.uuid[:80]!r} is no uuid") from error
        if (
            not is_block_size(volume_format.block_bytes)
            or not 0 <= volume_format.inline_limit_bytes <= MAX_INLINE_BYTES
        ):
            raise FsError(22, "a block size or inline limit that no volume can have")
        if any(each.uuid == volume_format.uuid for each in await store.list_volumes()):
            raise VolumeExists(f"there is a volume with the uuid {volume_format.uuid}: make another")
        rows = first_rows(volume_format, uid=request.uid, gid=request.gid, mode=request.mode & 0o7777)
        await store.add_tenant(volume_format.tenant, created_ns=time.time_ns())
        await store.create_volume(volume_format, rows)
        log.info("volume %s/%s was made", volume_format.tenant, volume_format.name)
        return pb.VolumeFormat(json=dump_format(volume_format))

    async def _list_volumes(self, request: pb.ListVolumesRequest, _: Context) -> Message:
        formats = await self._volumes.store.list_volumes()
        wanted = [each for each in formats if not request.tenant or each.tenant == request.tenant]
        return pb.ListVolumesReply(formats=[pb.VolumeFormat(json=dump_format(each)) for each in wanted])

    # -- who and what -----------------------------------------------------------------------------------------------------

    async def _authorize(self, context: Context) -> None:
        """Let only those in whose token says that they may. Ends the call otherwise."""
        values = [value for key, value in context.invocation_metadata() or () if key == "authorization"]
        scheme, _, token = str(values[0] if len(values) == 1 else "").partition(" ")
        try:
            if scheme != "Bearer" or not token:
                raise TokenRefused("there is no token: give one with --token-file or ATOLL_TOKEN")
            self._tokens.check(token)
        except TokenRefused as error:
            log.warning("client %s: %s", context.peer(), error)
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, error.message)

    async def _volume(self, context: Context) -> Volume:
        values = [value for key, value in context.invocation_metadata() or () if key == VOLUME_KEY]
        raw = values[0] if len(values) == 1 else b""
        try:
            tenant, name = (raw if isinstance(raw, bytes) else raw.encode()).decode().split("/")
        except ValueError as error:
            raise VolumeMissing("the call names no volume: upgrade the client") from error
        check_name(tenant)
        check_name(name)
        return await self._volumes.get(tenant, name)


def check_name(text: str) -> None:
    """Refuse what cannot be the name of a tenant or a volume: they stand in addresses. FsError EINVAL."""
    allowed = text.replace("-", "").replace("_", "").replace(".", "")
    if not 0 < len(text) <= 63 or not allowed.isalnum() or not text.isascii() or not text[0].isalnum():
        raise FsError(
            22, f"{text[:80]!r} is no name: letters, digits, '-', '_' and '.', at most 63, a letter or digit first"
        )


def is_loopback(host: str) -> bool:
    """Return whether a host names this machine only."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


_STATUS: Final[dict[type[AtollError], grpc.StatusCode]] = {
    VolumeMissing: grpc.StatusCode.NOT_FOUND,
    VolumeExists: grpc.StatusCode.ALREADY_EXISTS,
    FsError: grpc.StatusCode.INVALID_ARGUMENT,
    NotOwner: grpc.StatusCode.UNAVAILABLE,
}


async def _abort(context: Context, error: AtollError) -> None:
    """End a call with an error."""
    default = grpc.StatusCode.UNAVAILABLE if error.retryable else grpc.StatusCode.INTERNAL
    await context.abort(_STATUS.get(type(error), default), error.message)
