"""``atoll format ADDRESS``: make an embedded volume.

Everything is checked before anything is made: the address, the options, the bucket with a probe. The volume is built in a
directory of its own beside the address and renamed to it, so that no half-made one can be seen.
"""

from __future__ import annotations

import asyncio
import errno
import os
import secrets
import shutil
import time
import uuid
from typing import TYPE_CHECKING, Any

import click

from chunkstore.errors import AtollError
from client.address import (
    META_DB,
    OBJECTS,
    EmbeddedAddress,
    ServiceAddress,
    parse_address,
    shown,
    split_path,
)
from client.cli.new_volume import check_free, prepare_bucket, sync_directory
from client.cli.options import COUNT, DAYS, SIZE, json_option, token_option
from client.cli.output import echo_json, keep_quiet, limit
from client.sizes import format_size
from metasvc.model import VolumeFormat

if TYPE_CHECKING:
    from client.meta.endpoint import Endpoint


class BlockSizeType(click.ParamType[int]):
    """A block size: a power of two of 64 KiB to 16 MiB."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        from chunkstore.geometry import is_block_size

        size: int = SIZE.convert(value, param, ctx)
        if not is_block_size(size):
            self.fail(f"{value!r} is no block size: give a power of two from 64KiB to 16MiB", param, ctx)
        return size


class CompressionType(click.ParamType[str]):
    """``none`` or ``zstd:N``."""

    name = "none|zstd:N"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        from chunkstore.block import Codec

        try:
            return str(Codec.parse(value))
        except ValueError as error:
            self.fail(str(error), param, ctx)


@click.command("format")
@click.argument("address")
@click.option(
    "--bucket", metavar="URL", help="Where the bytes go: s3://, gs://, az://, file:///dir  [default: in ADDRESS]"
)
@click.option("--create-bucket", is_flag=True, help="Make the bucket or directory if it is missing.")
@click.option(
    "--block-size", type=BlockSizeType(), default="4MiB", show_default=True, help="What is stored as one object."
)
@click.option(
    "--compression", type=CompressionType(), default="zstd:1", show_default=True, help="Of blocks that shrink."
)
@click.option("--capacity", type=SIZE, default="0", help="Limit of the volume's space  [default: unlimited]")
@click.option("--inodes", type=COUNT, default=0, help="Limit of files and directories  [default: unlimited]")
@click.option("--trash-days", type=DAYS, default=1.0, show_default=True, help="How long removed files are kept.")
@click.option(
    "--inline-limit", type=SIZE, default="32KiB", show_default=True, help="Files up to this lie with the metadata."
)
@click.option(
    "--keys",
    "keys_in",
    type=click.Choice(["auto", "service", "environment"]),
    default="auto",
    show_default=True,
    help="Who has the keys of the bucket: the service, or the environment of all. auto: the service if it has a master key.",
)
@token_option
@json_option
def command(
    address: str,
    *,
    bucket: str | None,
    create_bucket: bool,
    block_size: int,
    compression: str,
    capacity: int,
    inodes: int,
    trash_days: float,
    inline_limit: int,
    keys_in: str,
    token_file: str | None,
    as_json: bool,
) -> None:
    """Make a volume at ADDRESS: a directory that is absent or empty, or atoll://HOST:PORT/TENANT/VOLUME.

    Without --bucket the bytes of an embedded volume lie in ADDRESS/objects. Keys of a bucket are read from the environment of
    each command.
    """
    from client.volume import DEFAULT_BUCKET, NAME, TENANT

    if split_path(address)[1] is not None:
        raise click.UsageError(f"{shown(address)} names a path in a volume: give the directory of the volume only")
    if inline_limit > min(block_size, 64 << 10):
        raise click.UsageError("--inline-limit is at most 64KiB and at most the block size: give a smaller one")
    if create_bucket and bucket is None:
        raise click.UsageError("--create-bucket goes with --bucket: leave it out, the directory objects is always made")
    where = parse_address(address)
    if isinstance(where, ServiceAddress) and bucket is None:
        raise click.UsageError("a volume of a service needs --bucket: its clients are on many machines")
    if isinstance(where, EmbeddedAddress) and keys_in == "service":
        raise click.UsageError("--keys service goes with a volume of a service: an embedded one stores no keys")
    volume_format = VolumeFormat(
        uuid=str(uuid.uuid4()),
        tenant=where.tenant if isinstance(where, ServiceAddress) else TENANT,
        name=where.volume if isinstance(where, ServiceAddress) else NAME,
        bucket_url=bucket if bucket is not None else DEFAULT_BUCKET,
        block_bytes=block_size,
        compression=compression,
        inline_limit_bytes=inline_limit,
        capacity_bytes=capacity,
        max_inodes=inodes,
        trash_days=trash_days,
        created_ns=time.time_ns(),
    )
    keep_quiet()
    is_kept = False
    if isinstance(where, ServiceAddress):
        is_kept = asyncio.run(
            _make_at_service(where, volume_format, token_file=token_file, create_bucket=create_bucket, keys_in=keys_in)
        )
    else:
        check_free(where)
        asyncio.run(_make(where, volume_format, create_bucket=create_bucket))
    if as_json:
        from client.admin.status import format_json

        document: dict[str, Any] = {"address": str(where), "format": format_json(volume_format)}
        if isinstance(where, ServiceAddress):
            document["keys_in_service"] = is_kept
        echo_json(document)
        return
    place = where.objects if isinstance(where, EmbeddedAddress) and bucket is None else bucket or ""
    click.echo(f"{shown(str(where))}: volume {volume_format.uuid}, bytes in {shown(place)}")
    click.echo(
        f"blocks of {format_size(block_size)}, compression {compression}, capacity {limit(capacity)}, "
        f"trash kept for {trash_days:g} days"
    )
    if is_kept:
        is_signed = volume_format.bucket_url.startswith("s3:")
        click.echo(f"the service keeps the keys of the bucket: clients need {'none' if is_signed else 'them, too'}")
    elif isinstance(where, ServiceAddress) and not volume_format.bucket_url.startswith("file:"):
        click.echo("the keys of the bucket are not kept: the service and every client need them in their environment")
    if bucket is not None and bucket.startswith("file:"):
        click.echo(f"every node that mounts the volume must reach the directory {shown(place)} under that path")


async def _make(address: EmbeddedAddress, volume_format: VolumeFormat, *, create_bucket: bool) -> None:
    """Probe the bucket, build the volume beside its address, and move it there. On any error nothing is left."""
    from client.volume import DEFAULT_BUCKET
    from metasvc.engine import first_rows
    from metasvc.store.open import open_store

    if volume_format.bucket_url != DEFAULT_BUCKET:
        await prepare_bucket(address, volume_format.bucket_url, create=create_bucket)
    draft = f"{address.directory}.format-{secrets.token_hex(4)}"
    try:
        os.mkdir(draft, 0o700)
        if volume_format.bucket_url == DEFAULT_BUCKET:
            os.mkdir(os.path.join(draft, OBJECTS), 0o700)
        store = await open_store(f"sqlite:///{draft}/{META_DB}", create=True)
        try:
            rows = first_rows(volume_format, uid=os.geteuid(), gid=os.getegid())
            await store.create_volume(volume_format, rows)
        finally:
            await store.close()
        sync_directory(draft)
        # Replaces an empty directory, and nothing else: ENOTEMPTY if somebody was quicker.
        os.rename(draft, address.directory)
        sync_directory(os.path.dirname(address.directory))
    except BaseException as error:
        shutil.rmtree(draft, ignore_errors=True)
        if isinstance(error, OSError):
            where = shown(str(address))
            raise AtollError(
                f"{where}: {error.strerror}: choose another place for the volume", errno=error.errno
            ) from error
        raise


async def _make_at_service(
    address: ServiceAddress, volume_format: VolumeFormat, *, token_file: str | None, create_bucket: bool, keys_in: str
) -> bool:
    """Probe the bucket from here, then have the service make the volume; whether the service has the keys now."""
    from client.meta.admin import create_volume
    from client.meta.encryption import endpoint_at
    from client.meta.keys import give_keys
    from client.volume import read_token

    endpoint = endpoint_at(address, read_token(token_file, env=os.environ), env=os.environ)
    await prepare_bucket(address, volume_format.bucket_url, create=create_bucket)
    variables = await _keys_for(endpoint, volume_format, keys_in)
    await create_volume(endpoint, volume_format, uid=os.geteuid(), gid=os.getegid(), mode=0o755)
    if not variables:
        return False
    name = f"{volume_format.tenant}/{volume_format.name}"
    try:
        await give_keys(endpoint, name, variables)
    except AtollError as error:
        where = shown(str(address))
        raise AtollError(
            f"{where} was made, but the service does not keep the keys: {error.message}; repeat that with "
            f"`atoll keys set {where}`",
            errno=error.errno,
        ) from error
    return True


async def _keys_for(endpoint: Endpoint, volume_format: VolumeFormat, keys_in: str) -> dict[str, str]:
    """Return what is to be given to the service; nothing where the keys stay in the environment."""
    from client.cli.new_volume import keys_to_give
    from client.meta.keys import can_keep_keys
    from metasvc.api import bucket_keys

    if keys_in == "environment" or (
        keys_in == "auto" and not (endpoint.is_private and bucket_keys.keys_in(volume_format.bucket_url, os.environ))
    ):
        return {}
    variables = keys_to_give(volume_format.bucket_url)
    if await can_keep_keys(endpoint, f"{volume_format.tenant}/{volume_format.name}"):
        return variables
    if keys_in == "auto":
        return {}
    raise AtollError(
        "the service keeps no keys: start it with --master-key-file or ATOLL_MASTER_KEY, or format with --keys environment",
        errno=errno.EACCES,
    )
