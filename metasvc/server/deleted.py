"""Volumes whose rows were deleted and whose objects may be left: what the service remembers of them until they are gone.

Who deletes a volume deletes its objects when its rows are gone, so that nothing ever names an object that is not there; without
keys of the bucket by URLs that the service signs. So the service keeps the keys, and the volume's format as the setting
``deleted/TENANT/UUID``, until it is told that the objects are gone, or shall stay. Volumes whose URLs it cannot sign are not
remembered: who deletes them has the keys, and is told where objects are left.

What ends where, in this order:

1. The setting is made, then the rows go. Ended between: the volume is there, and the setting says nothing while it is.
2. Whoever deletes asks which volumes of that name are remembered, and deletes their objects. Ended between: asked again.
3. The keys are forgotten, then the setting. Ended between: a setting without keys is dropped when it is met.

A volume with the uuid of one that is remembered is not made and not loaded: its objects would be deleted. Whether there is one
is looked at again before anything is signed.
"""

from __future__ import annotations

import errno as E

from chunkstore.signing import S3Signer
from metasvc.api.volume_format import dump_format, parse_format
from metasvc.errors import FsError, VolumeExists
from metasvc.model import VolumeFormat
from metasvc.server.keys import DELETED, BucketKeys
from metasvc.store import Store

__all__ = ["DeletedVolumes", "check_not_in"]


class DeletedVolumes:
    """What is remembered in one store."""

    def __init__(self, store: Store, keys: BucketKeys | None) -> None:
        """``keys`` None: nothing is kept, and nothing remembered."""
        self._store = store
        self._keys = keys

    async def remember(self, form: VolumeFormat) -> None:
        """Remember a volume whose rows are going to be deleted; durable when it returns."""
        await self._store.create_setting(_name(form.tenant, form.uuid), dump_format(form).encode())

    async def of(self, tenant: str, volume: str = "") -> list[VolumeFormat]:
        """Return what is remembered of a tenant's volumes (of one name, if it is given), by their uuids. StoreError."""
        found = []
        # In this order: whoever is among the volumes now may be remembered before its rows go.
        live = {form.uuid for form in await self._store.list_volumes()}
        for value in (await self._store.settings(_name(tenant, ""))).values():
            form = parse_format(value.decode())
            if form.uuid not in live and volume in ("", form.name) and await self._has_keys(form):
                found.append(form)
        return found

    async def get(self, tenant: str, uuid: str) -> VolumeFormat:
        """Return the format of a volume that is remembered. FsError ENOENT, also while it is not deleted."""
        live = any(form.uuid == uuid for form in await self._store.list_volumes())
        value = None if live else await self._store.setting(_name(tenant, uuid))
        if value is None or not await self._has_keys(form := parse_format(value.decode())):
            raise FsError(E.ENOENT, f"no deleted volume {uuid[:80]!r} of tenant {tenant} has objects that are left")
        return form

    async def signer(self, form: VolumeFormat) -> S3Signer:
        """Return what signs URLs for a volume that is remembered. KeysLocked; FsError ENOENT."""
        keys = None if self._keys is None else await self._keys.of(form)
        if keys is None:
            raise FsError(E.ENOENT, f"the keys of the deleted volume {form.uuid} are forgotten")
        return S3Signer(form.bucket_url, keys)

    async def forget(self, tenant: str, uuid: str) -> None:
        """Forget a volume, and its keys: its objects are gone, or shall stay. FsError ENOENT."""
        form = await self.get(tenant, uuid)
        if self._keys is not None:
            await self._keys.forget(form)
        await self._store.delete_setting(_name(tenant, uuid))

    async def _has_keys(self, form: VolumeFormat) -> bool:
        """Return whether there are keys; a setting without is what an end in the middle of `forget` has left."""
        if self._keys is None:
            return False
        if await self._keys.has(form):
            return True
        await self._store.delete_setting(_name(form.tenant, form.uuid))
        return False

    async def check_free(self, uuid: str) -> None:
        """Refuse a new volume with the uuid of one whose objects are being deleted. VolumeExists."""
        check_not_in(await self.uuids(), uuid)

    async def uuids(self) -> dict[str, str]:
        """Return the uuids of all that is remembered, each with the tenant's and the volume's name."""
        found = [parse_format(value.decode()) for value in (await self._store.settings(DELETED)).values()]
        return {form.uuid: f"{form.tenant}/{form.name}" for form in found}


def check_not_in(deleted: dict[str, str], uuid: str) -> None:
    """Refuse a uuid that is among those. VolumeExists."""
    if uuid in deleted:
        raise VolumeExists(
            f"objects of the deleted volume {deleted[uuid]}, which had the same uuid, are still to be deleted: "
            "finish that with `atoll delete --resume`, or keep them with `atoll delete --resume --keep-objects`"
        )


def _name(tenant: str, uuid: str) -> str:
    return f"{DELETED}{tenant}/{uuid}"
