"""Tenants, tokens and the end of volumes: what is about more than the inside of one volume.

Owns the messages of the method MANAGE, and who may ask for what. What concerns a volume is done by the
process that owns it, to which clients are sent (NotOwner). Every step is durable before the next; a process that ends midway
leaves what the same call finds and does when it is asked again.
"""

from __future__ import annotations

import errno as E
import json
import logging
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Collection
from typing import Any, Final

from chunkstore.errors import AtollError
from metasvc.api import atoll_pb2 as pb
from metasvc.api import wire
from metasvc.api.volume_format import dump_format
from metasvc.errors import FsError, NotOwner
from metasvc.model import ROOT_INO, Ino
from metasvc.server.audit import audited
from metasvc.server.names import check_name, volume_name
from metasvc.server.rights import Rights
from metasvc.server.tenant_space import Limits, limits_name, read_limits, read_shares, shares_name, use_of
from metasvc.server.tokens import TokenInfo, Tokens, new_token
from metasvc.server.volumes import Volumes
from metasvc.store import Store

__all__ = ["Managing"]

_MAX_LASTS_S: Final = 100 * 365 * 86400.0
_MAX_LABEL: Final = 200
_READING: Final = frozenset({"list_tenants", "list_tokens", "list_deleted"})

log = logging.getLogger(__name__)


class Managing:
    """Answer requests."""

    def __init__(self, volumes: Volumes, tokens: Tokens, cut_off: Callable[[Collection[str]], None]) -> None:
        """``cut_off`` ends the streams of this process that use tokens with such ids."""
        self._volumes = volumes
        self._tokens = tokens
        self._cut_off = cut_off
        self._operations: dict[str, Callable[[Any, Rights], Awaitable[pb.ManageReply]]] = {
            "create_tenant": self._create_tenant,
            "list_tenants": self._list_tenants,
            "delete_tenant": self._delete_tenant,
            "set_tenant_quota": self._set_tenant_quota,
            "create_token": self._create_token,
            "list_tokens": self._list_tokens,
            "revoke_token": self._revoke_token,
            "delete_volume": self._delete_volume,
            "list_deleted": self._list_deleted,
            "forget_deleted": self._forget_deleted,
        }

    async def manage(self, request: pb.ManageRequest, rights: Rights, peer: str) -> pb.ManageReply:
        """Run one request; errors are part of the answer. NotOwner: ask the owner."""
        name = request.WhichOneof("operation")
        try:
            operation = None if name is None else self._operations.get(name)
            if operation is None:
                raise FsError(E.ENOSYS, "this service does not know the operation: upgrade it")
            asked = getattr(request, str(name))
            if name in _READING:
                return await operation(asked, rights)
            with audited(rights, peer, str(name).replace("_", " "), _subject(asked)):
                return await operation(asked, rights)
        except NotOwner:
            raise
        except AtollError as error:
            reply = pb.ManageReply()
            wire.put_failure(error, reply.failure)
            return reply

    @property
    def _store(self) -> Store:
        return self._volumes.store

    # -- tenants ----------------------------------------------------------------------------------------------------------

    async def _create_tenant(self, asked: pb.CreateTenant, rights: Rights) -> pb.ManageReply:
        check_name(asked.name)
        rights.require_admin("making a tenant", tenant="")
        limits = _checked(Limits(asked.max_bytes, asked.max_inodes))
        if not await self._store.add_tenant(asked.name, created_ns=time.time_ns()):
            raise FsError(E.EEXIST, f"there is a tenant {asked.name}")
        await self._put_limits(asked.name, limits)
        return pb.ManageReply()

    async def _list_tenants(self, _: pb.Nothing, rights: Rights) -> pb.ManageReply:
        rights.require_admin("listing tenants", tenant=rights.tenant)
        volumes = defaultdict(list)
        for form in await self._store.list_volumes():
            volumes[form.tenant].append(form.name)
        reply = pb.ManageReply()
        for name in sorted({*await self._store.tenants(), *volumes}):
            if rights.tenant in ("", name):
                reply.tenants.append(await self._tenant(name, volumes[name]))
        return reply

    async def _tenant(self, name: str, volumes: list[str]) -> pb.Tenant:
        use = use_of(await read_limits(self._store, name), await read_shares(self._store, name))
        return pb.Tenant(name=name, volumes=volumes, **use._asdict())

    async def _delete_tenant(self, asked: pb.DeleteTenant, rights: Rights) -> pb.ManageReply:
        check_name(asked.name)
        rights.require_admin("deleting a tenant", tenant="")
        left = [form.name for form in await self._store.list_volumes() if form.tenant == asked.name]
        if left:
            raise FsError(E.ENOTEMPTY, f"tenant {asked.name} has volumes ({', '.join(left[:5])}): delete them first")
        if deleted := [form.name for form in await self._volumes.deleted.of(asked.name)]:
            raise FsError(
                E.ENOTEMPTY,
                f"objects of deleted volumes of tenant {asked.name} are left ({', '.join(deleted[:5])}): finish that with "
                "`atoll delete --resume`",
            )
        await self._revoke(await self._tokens.all_of(asked.name))
        await self._store.delete_setting(limits_name(asked.name))
        await self._store.delete_setting(shares_name(asked.name))
        if not await self._store.remove_tenant(asked.name):
            raise FsError(E.ENOENT, f"there is no tenant {asked.name}")
        return pb.ManageReply()

    async def _set_tenant_quota(self, asked: pb.SetTenantQuota, rights: Rights) -> pb.ManageReply:
        check_name(asked.name)
        rights.require_admin("limiting a tenant", tenant="")
        if asked.name not in await self._store.tenants():
            raise FsError(E.ENOENT, f"there is no tenant {asked.name}")
        limits = await read_limits(self._store, asked.name)
        if asked.HasField("max_bytes"):
            limits = limits._replace(max_bytes=asked.max_bytes)
        if asked.HasField("max_inodes"):
            limits = limits._replace(max_inodes=asked.max_inodes)
        await self._put_limits(asked.name, _checked(limits))
        return pb.ManageReply()

    async def _put_limits(self, tenant: str, limits: Limits) -> None:
        value = json.dumps(limits._asdict()).encode()
        while not await self._store.create_setting(limits_name(tenant), value):
            before = await self._store.setting(limits_name(tenant))
            if before is not None and await self._store.replace_setting(limits_name(tenant), value, expected=before):
                return

    # -- tokens -----------------------------------------------------------------------------------------------------------

    async def _create_token(self, asked: pb.CreateToken, rights: Rights) -> pb.ManageReply:
        lasts_s = asked.lasts_s or None
        if not (0 <= asked.lasts_s <= _MAX_LASTS_S) or len(asked.label) > _MAX_LABEL:
            raise FsError(
                E.EINVAL, f"a token lasts at most 100 years, and its label has at most {_MAX_LABEL} characters"
            )
        if asked.volume:
            info = await self._for_volume(asked, rights, lasts_s)
        else:
            if asked.tenant:
                check_name(asked.tenant)
            if asked.path or asked.read_only:
                raise FsError(E.EINVAL, "a directory, or reading only, is of a token for a volume: name the volume")
            rights.require_admin("making a token", tenant=asked.tenant)
            if asked.tenant and asked.tenant not in await self._store.tenants():
                raise FsError(E.ENOENT, f"there is no tenant {asked.tenant}: make it with `atoll tenant create`")
            info = new_token(
                tenant=asked.tenant, is_admin=True, lasts_s=lasts_s, made_by=rights.token_id, label=asked.label
            )
        reply = pb.ManageReply(token=await self._tokens.make(info))
        reply.tokens.append(_message(info))
        return reply

    async def _for_volume(self, asked: pb.CreateToken, rights: Rights, lasts_s: float | None) -> TokenInfo:
        tenant, name = volume_name(f"{asked.tenant}/{asked.volume}")
        rights.require_admin("making a token", tenant=tenant)
        volume = await self._volumes.get(tenant, name)
        root = ROOT_INO
        if asked.path:
            directory = await volume.admin.resolve(list(asked.path))
            if not directory.is_dir:
                raise FsError(E.ENOTDIR, "a token is for a directory, or for the whole volume")
            root = Ino(directory.ino)
        return new_token(
            tenant=tenant,
            volume=name,
            uuid=volume.format.uuid,
            root=root,
            path="/" + b"/".join(asked.path).decode("utf-8", "backslashreplace"),
            is_read_only=asked.read_only,
            lasts_s=lasts_s,
            made_by=rights.token_id,
            label=asked.label,
        )

    async def _list_tokens(self, asked: pb.ListTokens, rights: Rights) -> pb.ManageReply:
        tenant = asked.tenant or rights.tenant
        rights.require_admin("listing tokens", tenant=tenant)
        found = await self._tokens.all_of(tenant or None)
        return pb.ManageReply(tokens=[_message(info) for info in found])

    async def _revoke_token(self, asked: pb.RevokeToken, rights: Rights) -> pb.ManageReply:
        tenant = asked.tenant or rights.tenant
        rights.require_admin("revoking a token", tenant=tenant)
        # Who administers the service need not know whose it is.
        found = [info for info in await self._tokens.all_of(tenant or None) if info.token_id == asked.token_id]
        if not found:
            raise FsError(E.ENOENT, f"there is no token {asked.token_id[:80]!r}: see `atoll token list`")
        await self._revoke(found)
        return pb.ManageReply(tokens=[_message(info) for info in found])

    async def _revoke(self, tokens: Collection[TokenInfo]) -> None:
        await self._tokens.revoke(tokens)
        self._cut_off({info.token_id for info in tokens})

    # -- volumes ----------------------------------------------------------------------------------------------------------

    async def _delete_volume(self, asked: str, rights: Rights) -> pb.ManageReply:
        tenant, name = volume_name(asked)
        rights.require_admin("deleting a volume", tenant=tenant)
        volume = await self._volumes.get(tenant, name)
        await self._volumes.delete(tenant, name)
        await self._revoke([info for info in await self._tokens.all_of(tenant) if info.volume == name])
        log.info("volume %s/%s was deleted", tenant, name)
        return pb.ManageReply(format=pb.VolumeFormat(json=dump_format(volume.format)))

    async def _list_deleted(self, asked: pb.ListDeleted, rights: Rights) -> pb.ManageReply:
        check_name(asked.tenant)
        rights.require_admin("deleting a volume", tenant=asked.tenant)
        found = await self._volumes.deleted.of(asked.tenant, asked.volume)
        return pb.ManageReply(deleted=[pb.VolumeFormat(json=dump_format(form)) for form in found])

    async def _forget_deleted(self, asked: pb.ForgetDeleted, rights: Rights) -> pb.ManageReply:
        check_name(asked.tenant)
        rights.require_admin("deleting a volume", tenant=asked.tenant)
        await self._volumes.deleted.forget(asked.tenant, asked.uuid)
        return pb.ManageReply()


def _checked(limits: Limits) -> Limits:
    if min(limits) < 0:
        raise FsError(E.EINVAL, "a limit is not negative; 0 is none")
    return limits


def _subject(asked: Any) -> str:
    """Return what a request is about, for the audit log."""
    if isinstance(asked, str):
        return asked[:200]
    fields = {field.name: value for field, value in asked.ListFields()}
    return " ".join(f"{name}={value!r}"[:300] for name, value in fields.items()) or "-"


def _message(info: TokenInfo) -> pb.TokenInfo:
    return pb.TokenInfo(
        token_id=info.token_id,
        tenant=info.tenant,
        volume=info.volume,
        path=info.path,
        read_only=info.is_read_only,
        admin=info.is_admin,
        created_s=info.created_s,
        expires_s=info.expires_s or 0.0,
        made_by=info.made_by,
        label=info.label,
    )
