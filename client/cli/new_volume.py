"""What `format` and `load` have in common: the place of a new volume, and its bucket."""

from __future__ import annotations

import os

import click

from client.address import Address, AddressInvalid, EmbeddedAddress, shown
from metasvc.errors import VolumeExists

__all__ = ["check_free", "keys_to_give", "prepare_bucket", "sync_directory"]


def check_free(address: EmbeddedAddress) -> None:
    """Refuse an address where there is something. Changes nothing."""
    where = shown(str(address))
    if os.path.lexists(address.meta_db):
        raise VolumeExists(f"there is a volume at {where} already: mount it, or choose another directory")
    parent = os.path.dirname(address.directory)
    if os.path.lexists(address.directory):
        if not os.path.isdir(address.directory):
            raise AddressInvalid(f"{where} is a file: give a directory that is absent or empty")
        if os.listdir(address.directory):
            raise AddressInvalid(f"{where} is not empty: give a directory that is absent or empty")
        if os.path.ismount(address.directory):
            raise AddressInvalid(f"{where} is a mount point: give a directory on it")
    elif not os.path.isdir(parent):
        raise AddressInvalid(
            f"there is no directory {shown(parent)}: create it, or choose another place for the volume"
        )
    if not os.access(parent, os.W_OK | os.X_OK):
        raise AddressInvalid(f"{shown(parent)} cannot be written: choose a place of yours, or run as root")


async def prepare_bucket(address: Address, url: str, *, create: bool) -> None:
    """Find out that a bucket can be used from here; with ``create`` make it if it is missing. BucketInvalid, BucketDenied."""
    from chunkstore.buckets import Limits
    from client.volume import open_volume_bucket

    # A bad URL or missing keys are told before a bucket is made.
    bucket = open_volume_bucket(address, url, env=os.environ, limits=Limits(attempt_timeout_s=5.0, budget_s=10.0))
    try:
        if create:
            from chunkstore.buckets.create import create_bucket

            for note in await create_bucket(url, env=os.environ):
                click.echo(note, err=True)
        await bucket.probe()
    finally:
        await bucket.close()


def keys_to_give(bucket_url: str) -> dict[str, str]:
    """Return the keys of a bucket that are in the environment, for a service. BucketDenied without."""
    from chunkstore.errors import BucketDenied
    from metasvc.api.bucket_keys import KEYS_OF, keys_in

    found = keys_in(bucket_url, os.environ)
    if not found:
        names = KEYS_OF.get(bucket_url.partition("://")[0])
        remedy = f"set {names[0]} and what goes with it" if names else "such a bucket has none, and needs none"
        raise BucketDenied(f"there are no keys of bucket {bucket_url} in the environment: {remedy}")
    return found


def sync_directory(path: str) -> None:
    """Make the names in a directory durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
