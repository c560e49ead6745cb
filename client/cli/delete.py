"""``atoll delete ADDRESS``: the end of a volume of a service, and of its objects and backups.

The rows go first: from then on nothing can name the objects, and whoever is interrupted is told where what is left lies.
"""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING

import click

from client.cli.options import token_option
from client.cli.output import keep_quiet
from client.cli.progress import Shown, shown_progress
from client.cli.tenant import managing
from client.control.messages import Progress

if TYPE_CHECKING:
    from chunkstore.buckets import ObjectStore
    from client.address import ServicePlace


@click.command("delete")
@click.argument("address")
@click.option("--keep-objects", is_flag=True, help="Leave the bytes in the bucket.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@token_option
def command(address: str, *, keep_objects: bool, yes: bool, token_file: str | None) -> None:
    """Delete the volume ADDRESS, atoll://HOST:PORT/TENANT/VOLUME, which no client uses any more, with all files and tokens."""
    from client.address import parse_service_place, shown

    place = parse_service_place(address)
    if not place.volume or place.path != b"/":
        raise click.UsageError(f"{shown(address)} is no volume of a service: give atoll://HOST:PORT/TENANT/VOLUME")
    if not yes:
        click.confirm(f"delete all files of {place.tenant}/{place.volume} for good?", abort=True, err=True)
    keep_quiet()
    asyncio.run(_delete(place, token_file, keep_objects=keep_objects))


async def _delete(place: ServicePlace, token_file: str | None, *, keep_objects: bool) -> None:
    from chunkstore.buckets import open_bucket
    from client.address import shown
    from metasvc.jobs.backups.shelf import prefixes_of

    volume_format = await managing(place, token_file).delete_volume(f"{place.tenant}/{place.volume}")
    where = f"{shown(volume_format.bucket_url)} under {volume_format.uuid}/"
    if keep_objects:
        click.echo(f"volume {place.tenant}/{place.volume} is deleted; its objects are in {where}")
        return
    bucket = open_bucket(volume_format.bucket_url, env=os.environ)
    try:
        with shown_progress() as shown_to:
            # Backups first: without the objects they are none.
            for prefix in prefixes_of(volume_format.uuid):
                await _delete_objects(bucket, prefix, shown_to)
            count = await _delete_objects(bucket, f"{volume_format.uuid}/", shown_to)
    except BaseException:
        click.echo(f"volume {place.tenant}/{place.volume} is deleted; objects are left in {where}", err=True)
        raise
    finally:
        await bucket.close()
    click.echo(f"volume {place.tenant}/{place.volume} is deleted, with {count:,} objects")


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
