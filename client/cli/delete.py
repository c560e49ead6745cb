"""``atoll delete ADDRESS``: the end of a volume of a service, and of its objects and backups.

The rows go first: from then on nothing can name the objects. A service that signs URLs for the volume remembers it, with its
keys, until it is told that its objects are gone: who was interrupted gives the same command again, whenever. Of any other
volume whoever is interrupted is told where objects are left, and has the keys.
"""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING

import click

from client.cli.options import token_option
from client.cli.output import keep_quiet
from client.cli.progress import Shown, shown_progress
from client.cli.tenant import endpoint_of
from client.control.messages import Progress

if TYPE_CHECKING:
    from chunkstore.buckets import ObjectStore
    from client.address import ServicePlace
    from client.meta.endpoint import Endpoint
    from client.meta.managing import RemoteManaging
    from metasvc.model import VolumeFormat


@click.command("delete")
@click.argument("address")
@click.option("--keep-objects", is_flag=True, help="Leave the bytes in the bucket.")
@click.option(
    "--resume", is_flag=True, help="Go on with deletions of ADDRESS that were interrupted; delete no other volume."
)
@click.option("--yes", is_flag=True, help="Do not ask.")
@token_option
def command(address: str, *, keep_objects: bool, resume: bool, yes: bool, token_file: str | None) -> None:
    """Delete the volume ADDRESS, atoll://HOST:PORT/TENANT/VOLUME, which no client uses any more, with all files and tokens."""
    from client.address import parse_service_place, shown

    place = parse_service_place(address)
    if not place.volume or place.path != b"/":
        raise click.UsageError(f"{shown(address)} is no volume of a service: give atoll://HOST:PORT/TENANT/VOLUME")
    if not yes and not resume:
        click.confirm(f"delete all files of {place.tenant}/{place.volume} for good?", abort=True, err=True)
    keep_quiet()
    asyncio.run(_delete(place, token_file, keep_objects=keep_objects, resume=resume))


async def _delete(place: ServicePlace, token_file: str | None, *, keep_objects: bool, resume: bool) -> None:
    from client.meta.managing import RemoteManaging
    from metasvc.errors import VolumeMissing

    endpoint = endpoint_of(place, token_file)
    service = RemoteManaging(endpoint)
    name = f"{place.tenant}/{place.volume}"
    deleted: VolumeFormat | None = None
    missing = VolumeMissing(f"no deletion of {name} was interrupted: check the address")
    if not resume:
        try:
            deleted = await service.delete_volume(name)
        except VolumeMissing as error:
            missing = error
    remembered = await service.deleted_volumes(place.tenant, place.volume)
    if deleted is None and not remembered:
        raise missing
    for each in remembered:
        await _end(endpoint, service, each, keep_objects=keep_objects)
    if deleted is not None and all(each.uuid != deleted.uuid for each in remembered):
        await _end(endpoint, None, deleted, keep_objects=keep_objects)


async def _end(
    endpoint: Endpoint, service: RemoteManaging | None, volume_format: VolumeFormat, *, keep_objects: bool
) -> None:
    """Delete the objects of a volume that was deleted, or say where they are. ``service``: the one that remembers it."""
    from client.address import shown

    name = f"{volume_format.tenant}/{volume_format.name}"
    where = f"{shown(volume_format.bucket_url)} under {volume_format.uuid}/"
    count = 0
    if not keep_objects:
        try:
            bucket = _bucket(endpoint, volume_format, is_signed=service is not None)
            try:
                count = await _delete_all(bucket, volume_format.uuid)
            finally:
                await bucket.close()
        except BaseException:
            remedy = "" if service is None else ": `atoll delete --resume` with the same address goes on"
            click.echo(f"volume {name} is deleted; objects are left in {where}{remedy}", err=True)
            raise
    if service is not None:
        await service.forget_deleted(volume_format.tenant, volume_format.uuid)
    if keep_objects:
        click.echo(f"volume {name} is deleted; its objects are in {where}")
    else:
        click.echo(f"volume {name} is deleted, with {count:,} objects")


def _bucket(endpoint: Endpoint, volume_format: VolumeFormat, *, is_signed: bool) -> ObjectStore:
    """Return the bucket, with keys if the environment has them. BucketDenied without, where nobody signs URLs."""
    from chunkstore.buckets import open_bucket
    from chunkstore.buckets.signed import open_signed_bucket
    from client.meta.signing import ObjectSigning
    from metasvc.api.bucket_keys import keys_in

    url = volume_format.bucket_url
    if is_signed and not keys_in(url, os.environ):
        name = f"{volume_format.tenant}/{volume_format.name}"
        return open_signed_bucket(ObjectSigning(endpoint, name, deleted_uuid=volume_format.uuid), url)
    return open_bucket(url, env=os.environ)


async def _delete_all(bucket: ObjectStore, uuid: str) -> int:
    """Delete the backups and the blocks of a volume; how many blocks."""
    from metasvc.jobs.backups.shelf import prefixes_of

    with shown_progress() as shown_to:
        # Backups first: without the objects they are none.
        for prefix in prefixes_of(uuid):
            await _delete_objects(bucket, prefix, shown_to)
        return await _delete_objects(bucket, f"{uuid}/", shown_to)


async def _delete_objects(bucket: ObjectStore, prefix: str, shown_to: Shown) -> int:
    """Delete all objects below a prefix; how many."""
    from chunkstore.buckets import MAX_DELETE_KEYS

    count = 0
    keys: list[str] = []
    async for info in bucket.list(prefix):
        keys.append(info.key)
        if len(keys) == MAX_DELETE_KEYS:
            await bucket.delete(keys)
            count += len(keys)
            keys = []
            shown_to.progress(Progress("deleting objects", count, None, "objects"))
    if keys:
        await bucket.delete(keys)
    return count + len(keys)
