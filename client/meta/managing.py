"""Tenants, tokens and the end of volumes, over the wire: a connection for each call.

A call that a process sends on to the owner of the volume is asked there. None is repeated: who asked gets the error and looks.
"""

from __future__ import annotations

import errno
from typing import Any

from client.meta.endpoint import Endpoint
from metasvc.api import atoll_pb2 as pb
from metasvc.api import wire
from metasvc.api.volume_format import parse_format
from metasvc.errors import FsError
from metasvc.model import VolumeFormat

__all__ = ["RemoteManaging"]


class RemoteManaging:
    """What metasvc.server.managing answers. Errors as there; ServiceUnavailable, AccessRefused."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint

    async def _ask(self, name: str, value: Any) -> pb.ManageReply:
        request = pb.ManageRequest(**{name: value}).SerializeToString()
        reply = pb.ManageReply.FromString(await self._endpoint.ask(pb.Opening.MANAGE, request))
        if reply.HasField("failure"):
            raise wire.error_of(reply.failure)
        return reply

    async def create_tenant(self, name: str, *, max_bytes: int, max_inodes: int) -> None:
        """Make a tenant; 0 is no limit. EEXIST."""
        await self._ask("create_tenant", pb.CreateTenant(name=name, max_bytes=max_bytes, max_inodes=max_inodes))

    async def tenants(self) -> list[pb.Tenant]:
        """Return the tenants that the token administers, by name."""
        return list((await self._ask("list_tenants", pb.Nothing())).tenants)

    async def delete_tenant(self, name: str) -> None:
        """Delete a tenant that has no volumes, and its tokens. ENOENT, ENOTEMPTY."""
        await self._ask("delete_tenant", pb.DeleteTenant(name=name))

    async def set_tenant_quota(self, name: str, *, max_bytes: int | None, max_inodes: int | None) -> None:
        """Limit all volumes of a tenant together; None leaves a limit, 0 lifts it. ENOENT."""
        await self._ask("set_tenant_quota", pb.SetTenantQuota(name=name, max_bytes=max_bytes, max_inodes=max_inodes))

    async def create_token(self, asked: pb.CreateToken) -> tuple[str, pb.TokenInfo]:
        """Make a token; the token, which nobody can be asked for again, and what is listed of it."""
        reply = await self._ask("create_token", asked)
        return reply.token, reply.tokens[0]

    async def tokens(self, tenant: str) -> list[pb.TokenInfo]:
        """Return the tokens of a tenant; empty: all that the token administers."""
        return list((await self._ask("list_tokens", pb.ListTokens(tenant=tenant))).tokens)

    async def revoke_token(self, tenant: str, token_id: str) -> pb.TokenInfo:
        """Revoke a token; what it was. ENOENT."""
        return (await self._ask("revoke_token", pb.RevokeToken(tenant=tenant, token_id=token_id))).tokens[0]

    async def delete_volume(self, name: str) -> VolumeFormat:
        """Delete the rows of a volume (TENANT/NAME); its format, which says where its objects are. EBUSY."""
        return parse_format((await self._ask("delete_volume", name)).format.json)

    async def deleted_volumes(self, tenant: str, volume: str) -> list[VolumeFormat]:
        """Return the deleted volumes of one name whose keys the service keeps until their objects are deleted, too."""
        try:
            reply = await self._ask("list_deleted", pb.ListDeleted(tenant=tenant, volume=volume))
        except FsError as error:
            if error.errno != errno.ENOSYS:
                raise
            return []  # An older service remembers none.
        return [parse_format(each.json) for each in reply.deleted]

    async def forget_deleted(self, tenant: str, uuid: str) -> None:
        """Say that the objects of a deleted volume are gone, or shall stay: its keys are forgotten. ENOENT."""
        await self._ask("forget_deleted", pb.ForgetDeleted(tenant=tenant, uuid=uuid))
