"""``atoll backups list``, and a backup in a bucket as what `atoll load` reads.

Whoever lost the store has nothing but the bucket: its URL is enough, here and for `load`. The keys come from the environment.
"""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing, contextmanager
from typing import TYPE_CHECKING, Final

import click

from chunkstore.errors import AtollError
from client.address import shown
from client.cli.options import json_option
from client.cli.output import echo_json, echo_table, moment, say
from client.control.messages import JsonObject
from client.sizes import format_size

if TYPE_CHECKING:
    from metasvc.api.dump_stream import Header
    from metasvc.jobs.backups import Manifest

LATEST: Final = "latest"
_BUCKET_URL: Final = re.compile(r"(s3|gs|az|file)://", re.ASCII)


class BackupMissing(AtollError):
    """Say that a bucket has no such backup, and what it has."""

    code = "backup-missing"
    errno = 2


@click.group("backups")
def command() -> None:
    """List the backups of a volume, or those that are in a bucket. `atoll load` makes a volume of one."""


@command.command("list")
@click.argument("place", metavar="ADDRESS|BUCKET-URL")
@json_option
def list_backups(place: str, *, as_json: bool) -> None:
    """Show the backups of the volume at ADDRESS, or of all volumes in a bucket, oldest first.

    Objects of files that were removed or replaced since a backup are kept until the time that is shown, and for the newest
    backup until there is another one. From an older one names come back, and what was not removed since.
    """
    if is_bucket_url(place):
        from client.admin.backups import backups_json

        document: JsonObject = {"backups": backups_json(asyncio.run(_manifests(place)))}
    else:
        from client.cli.ask import ask, named_volume

        document = ask(named_volume(place), "backups", {}, command="backups list")
    if as_json:
        echo_json(document)
        return
    rows = [
        (
            each["name"],
            each["volume"],
            each["uuid"],
            moment(each["made_ns"]),
            f"{each['inodes']:,}",
            format_size(each["size_bytes"]),
            moment(each["objects_kept_until_ns"]) + (" or the next" if each["is_newest"] else ""),
        )
        for each in document["backups"]
    ]
    echo_table(
        ("NAME", "VOLUME", "UUID", "MADE", "INODES", "SIZE", "OBJECTS KEPT UNTIL"), rows, right=frozenset({4, 5})
    )


def is_bucket_url(text: str) -> bool:
    """Return whether a text names a bucket, not a file or a volume."""
    return _BUCKET_URL.match(text) is not None


class BucketSource:
    """A backup in a bucket: client.cli.load.Source."""

    def __init__(self, url: str, manifest: Manifest, header: Header) -> None:
        """Take what was read of it."""
        self.file = url
        self.backup: str | None = manifest.name
        self.header = header
        self.size_bytes: int | None = manifest.size_bytes
        self._manifest = manifest

    async def data(self) -> AsyncGenerator[bytes, None]:
        """Yield all bytes from the beginning."""
        from chunkstore.buckets import open_bucket
        from metasvc.jobs.backups import read_backup

        bucket = open_bucket(self.file, env=os.environ)
        try:
            async with aclosing(read_backup(bucket, self._manifest)) as parts:
                async for part in parts:
                    yield part
        finally:
            await bucket.close()


@contextmanager
def in_bucket_source(url: str, name: str, volume: str | None) -> Iterator[BucketSource]:
    """Find a backup and read its header. ``volume`` is TENANT/VOLUME or a uuid, where there are several. BackupMissing."""
    yield asyncio.run(_found(url, name, volume))


async def _found(url: str, name: str, volume: str | None) -> BucketSource:
    from chunkstore.buckets import open_bucket
    from metasvc.api.dump_stream import Header, Unpacker
    from metasvc.jobs.backups import read_backup

    chosen = choose(await _manifests(url), name, volume, url=url)
    bucket = open_bucket(url, env=os.environ)
    try:
        unpacker = Unpacker(rows=False)
        async with aclosing(read_backup(bucket, chosen)) as parts:
            async for part in parts:
                for _, raw in unpacker.feed(part):
                    return BucketSource(url, chosen, Header.parse(raw))
        unpacker.end()
        raise AssertionError("the end without a piece is an error of its own")
    finally:
        await bucket.close()


def choose(found: Sequence[Manifest], name: str, volume: str | None, *, url: str) -> Manifest:
    """Return the backup that is meant; ``found`` comes oldest first. BackupMissing, UsageError."""
    where = shown(url)
    if volume is not None:
        found = [each for each in found if volume in (each.uuid, f"{each.tenant}/{each.volume}")]
    if not found:
        of_it = "" if volume is None else f" of {volume}"
        raise BackupMissing(f"there is no backup{of_it} in {where}: see `atoll backups list {where}`")
    if name != LATEST:
        for each in found:
            if each.name == name:
                return each
        raise BackupMissing(f"there is no backup {name} in {where}: see `atoll backups list {where}`")
    volumes = sorted({f"{each.tenant}/{each.volume} ({each.uuid})" for each in found})
    if len({each.uuid for each in found}) > 1:
        raise click.UsageError(f"{where} has backups of {', '.join(volumes)}: choose with --volume")
    return found[-1]


async def _manifests(url: str) -> list[Manifest]:
    from chunkstore.buckets import Limits, open_bucket
    from metasvc.jobs.backups import all_manifests

    bucket = open_bucket(url, env=os.environ, limits=Limits(attempt_timeout_s=10.0, budget_s=30.0))
    try:
        return await all_manifests(bucket, refused=say)
    finally:
        await bucket.close()
