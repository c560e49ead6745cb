"""``atoll load FILE|BUCKET-URL ADDRESS``.

An embedded volume is built in the directory ``ADDRESS.loading`` and renamed to its address when it is whole, as `format` does.
That directory is locked while a load works on it; what one that was killed left in it, the next one to the same address
removes. A service builds the volume in its store, where nobody can open it before (metasvc.engine.load).
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import select
import shutil
import sys
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Protocol

import click

from chunkstore.errors import AtollError
from client.address import META_DB, OBJECTS, EmbeddedAddress, ServiceAddress, parse_address, shown, split_path
from client.cli.backups import in_bucket_source, is_bucket_url
from client.cli.new_volume import check_free, prepare_bucket, sync_directory
from client.cli.options import json_option, token_option
from client.cli.output import echo_json, keep_quiet, moment
from client.cli.progress import Shown, shown_progress
from client.control.messages import Progress
from metasvc.model import VolumeFormat

if TYPE_CHECKING:
    from metasvc.api.dump_stream import Header

READ_BYTES: Final = 1 << 20
_STOP_S: Final = 0.5


@click.command("load")
@click.argument("file", metavar="FILE|BUCKET-URL")
@click.argument("address")
@click.option("--backup", metavar="latest|NAME", help="Which backup in a bucket.  [latest]")
@click.option("--volume", metavar="TENANT/VOLUME|UUID", help="Of which volume, where a bucket has backups of several.")
@click.option("--bucket", metavar="URL", help="Where the objects are now, if not where the dump says.")
@token_option
@json_option
def command(
    file: str,
    address: str,
    *,
    backup: str | None,
    volume: str | None,
    bucket: str | None,
    token_file: str | None,
    as_json: bool,
) -> None:
    """Make a volume at ADDRESS from the dump in FILE (- is stdin), which nobody can open before it is there whole.

    Or from a backup in a bucket, s3://BUCKET/PREFIX?…, which is where the objects of the volume are. ADDRESS is a directory
    that is absent or empty, or atoll://HOST:PORT/TENANT/VOLUME. The objects stay where they are: unmount the original for
    good before this volume is used, for two volumes on the same objects delete each other's.
    """
    from client.volume import DEFAULT_BUCKET

    if split_path(address)[1] is not None:
        raise click.UsageError(f"{shown(address)} names a path in a volume: give the address of a new volume only")
    where = parse_address(address)
    if isinstance(where, EmbeddedAddress):
        check_free(where)
    keep_quiet()
    in_bucket = is_bucket_url(file)
    if not in_bucket and (backup is not None or volume is not None):
        raise click.UsageError("--backup and --volume choose from a bucket: give its URL in the place of FILE")
    if in_bucket and bucket is None:
        # Whatever the bucket was called when the backup was made: its objects are where the backup is.
        bucket = file
    began_s = time.monotonic()
    source: Source
    with (
        in_bucket_source(file, backup or "latest", volume) if in_bucket else _source(file) as source,
        shown_progress() as shown_to,
    ):
        header = source.header
        url = header.format.bucket_url if bucket is None else bucket
        if isinstance(where, ServiceAddress) and url == DEFAULT_BUCKET:
            raise click.UsageError(
                "the objects lie beside the dumped volume: say with --bucket where its service finds them"
            )
        least_slice_id = 0
        if bucket is not None and bucket != DEFAULT_BUCKET:
            asyncio.run(prepare_bucket(where, bucket, create=False))
            least_slice_id = asyncio.run(_first_free_slice(where, bucket, header.format.uuid))
        how = _How(bucket, least_slice_id, _told(shown_to, source))
        if isinstance(where, ServiceAddress):
            loaded = asyncio.run(_load_into_service(where, source, token_file=token_file, how=how))
        else:
            loaded = _load_embedded(where, source, how=how)
    volume_format, rows = loaded
    seconds = time.monotonic() - began_s
    if as_json:
        echo_json(_document(where, source, header, volume_format, rows, seconds))
        return
    rate = rows / max(1e-3, seconds)
    click.echo(f"{shown(str(where))}: volume {volume_format.uuid} as of {moment(header.made_ns)}")
    click.echo(f"{rows:,} rows, {rate:,.0f} rows/s; check it with `atoll fsck {shown(str(where))}`")
    if isinstance(where, EmbeddedAddress) and volume_format.bucket_url == DEFAULT_BUCKET:
        click.echo(f"its objects go into {shown(where.objects)}: move them there before it is used")


def _document(
    where: EmbeddedAddress | ServiceAddress,
    source: Source,
    header: Header,
    volume_format: VolumeFormat,
    rows: int,
    seconds: float,
) -> dict[str, Any]:
    from client.admin.status import format_json

    return {
        "address": str(where),
        "file": source.file,
        "backup": source.backup,
        "format": format_json(volume_format),
        "dumped_ns": header.made_ns,
        "rows": rows,
        "seconds": round(seconds, 3),
    }


# -- the dump -------------------------------------------------------------------------------------------------------------


class Source(Protocol):
    """The bytes of a dump, of which the header was read."""

    @property
    def file(self) -> str:
        """Return how it was named."""
        ...

    @property
    def backup(self) -> str | None:
        """Return the name of the backup, if it is one."""
        ...

    @property
    def header(self) -> Header: ...

    @property
    def size_bytes(self) -> int | None:
        """Return how much it is, None for a pipe."""
        ...

    def data(self) -> AsyncGenerator[bytes, None]:
        """Yield all bytes from the beginning. Once."""
        ...


class _FileSource:
    """A dump in a file, or from a pipe."""

    backup = None

    def __init__(self, file: str, descriptor: int) -> None:
        """Read the header. DumpDamaged, FormatUnsupported, SchemaTooNew."""
        from metasvc.api.dump_stream import Header, Unpacker

        self.file = file
        self._descriptor = descriptor
        found = os.fstat(descriptor)
        self.size_bytes = found.st_size or None
        self._head = b""
        self._is_stopped = False
        unpacker = Unpacker(rows=False)
        pieces: list[tuple[Any, bytes]] = []
        while not pieces:
            data = os.read(descriptor, READ_BYTES)
            if not data:
                unpacker.end()
            self._head += data
            pieces = list(unpacker.feed(data))
        self.header: Header = Header.parse(pieces[0][1])

    async def data(self) -> AsyncGenerator[bytes, None]:
        yield self._head
        try:
            while data := await asyncio.to_thread(self._read):
                yield data
        finally:
            self._is_stopped = True

    def _read(self) -> bytes:
        # Not a read that blocks: the thread of a command that was interrupted must end, though the pipe says nothing.
        while not select.select([self._descriptor], [], [], _STOP_S)[0]:
            if self._is_stopped:
                return b""
        return os.read(self._descriptor, READ_BYTES)


@contextmanager
def _source(file: str) -> Iterator[_FileSource]:
    if file == "-":
        if sys.stdin.isatty():
            raise click.UsageError("a dump is not typed: give the name of a file, or redirect stdin")
        yield _FileSource(file, sys.stdin.fileno())
        return
    with open(file, "rb", buffering=0) as opened:
        yield _FileSource(file, opened.fileno())


@dataclass(frozen=True, slots=True)
class _How:
    """What a load is told besides the bytes."""

    bucket: str | None
    least_slice_id: int
    told: Callable[[int, int], None]


async def _first_free_slice(address: EmbeddedAddress | ServiceAddress, url: str, uuid: str) -> int:
    """Ask the bucket above which slice id there is no object."""
    from client.volume import open_volume_bucket
    from metasvc.jobs.backups import first_free_slice

    bucket = open_volume_bucket(address, url, env=os.environ)
    try:
        return await first_free_slice(bucket, uuid)
    finally:
        await bucket.close()


def _told(shown_to: Shown, source: Source) -> Callable[[int, int], None]:
    began_s = time.monotonic()

    def told(rows: int, taken_bytes: int) -> None:
        spent_s = max(1e-3, time.monotonic() - began_s)
        text = f"loading, {rows:,} rows, {rows / spent_s:,.0f} rows/s"
        total = source.size_bytes
        if total is not None and taken_bytes:
            minutes, seconds = divmod(round(spent_s * max(0, total - taken_bytes) / taken_bytes), 60)
            text += f", {minutes}:{seconds:02d} left"
        shown_to.progress(Progress(text, taken_bytes, total))

    return told


# -- a service ------------------------------------------------------------------------------------------------------------


async def _load_into_service(
    address: ServiceAddress, source: Source, *, token_file: str | None, how: _How
) -> tuple[VolumeFormat, int]:
    from client.meta.encryption import endpoint_at
    from client.meta.loading import load_volume
    from client.volume import read_token

    endpoint = endpoint_at(address, read_token(token_file, env=os.environ), env=os.environ)
    async with aclosing(source.data()) as data:
        return await load_volume(
            endpoint,
            address.name,
            data,
            bucket_url=how.bucket,
            told=how.told,
            least_slice_id=how.least_slice_id,
        )


# -- a directory ----------------------------------------------------------------------------------------------------------


def _load_embedded(address: EmbeddedAddress, source: Source, *, how: _How) -> tuple[VolumeFormat, int]:
    from client.volume import DEFAULT_BUCKET

    try:
        with _draft(address) as draft:
            volume_format, rows = asyncio.run(_load_into(draft, source, how))
            if volume_format.bucket_url == DEFAULT_BUCKET:
                os.mkdir(os.path.join(draft, OBJECTS), 0o700)
            sync_directory(draft)
            # Replaces an empty directory, and nothing else: ENOTEMPTY if somebody was quicker.
            os.rename(draft, address.directory)
            sync_directory(os.path.dirname(address.directory))
    except OSError as error:
        where = shown(str(address))
        raise AtollError(
            f"{where}: {error.strerror}: choose another place for the volume", errno=error.errno
        ) from error
    return volume_format, rows


async def _load_into(directory: str, source: Source, how: _How) -> tuple[VolumeFormat, int]:
    from client.volume import NAME, TENANT
    from metasvc.engine.load import load
    from metasvc.store.open import open_store

    store = await open_store(f"sqlite:///{directory}/{META_DB}", create=True)
    try:
        async with aclosing(source.data()) as data:
            loaded = await load(
                store,
                data,
                tenant=TENANT,
                name=NAME,
                address="`atoll load`",
                bucket_url=how.bucket,
                told=how.told,
                least_slice_id=how.least_slice_id,
            )
    finally:
        await store.close()
    return loaded.format, loaded.rows


@contextmanager
def _draft(address: EmbeddedAddress) -> Iterator[str]:
    """Yield an empty directory beside an address that is this process's alone. If the block fails nothing is left of it."""
    path = f"{address.directory}.loading"
    try:
        os.mkdir(path, 0o700)
    except FileExistsError:
        pass
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        found = os.fstat(descriptor)
        if found.st_uid != os.geteuid():
            raise AtollError(f"{shown(path)} belongs to another user: remove it", errno=errno.EPERM)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _busy(address) from None
        if not os.path.lexists(path) or not os.path.samestat(os.stat(path), found):
            raise _busy(address)  # it was renamed, or removed, between the two
        for name in os.listdir(path):
            inner = os.path.join(path, name)
            if os.path.isdir(inner) and not os.path.islink(inner):
                shutil.rmtree(inner)
            else:
                os.unlink(inner)
        try:
            yield path
        except BaseException:
            shutil.rmtree(path, ignore_errors=True)
            raise
    finally:
        os.close(descriptor)


def _busy(address: EmbeddedAddress) -> AtollError:
    return AtollError(
        f"{shown(str(address))} is being loaded by another process: wait for that to end",
        errno=errno.EBUSY,
        retryable=True,
    )
