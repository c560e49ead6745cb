"""``atoll dump ADDRESS FILE``.

The bytes are verified on their way, and the file appears under its name when all of them are on the disk: a dump that breaks
off never looks whole. On stdout there is no name to withhold, but the exit code, and the trailer, which `atoll load` demands.
"""

from __future__ import annotations

import base64
import os
import secrets
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from typing import BinaryIO

import click

from chunkstore.errors import AtollError
from client.address import shown
from client.cli.ask import ask, named_volume
from client.cli.new_volume import sync_directory
from client.cli.options import json_option
from client.cli.output import echo_json, say
from client.control.messages import Items, JsonObject
from client.sizes import format_size


@click.command("dump")
@click.argument("address")
@click.argument("file", metavar="FILE")
@json_option
def command(address: str, file: str, *, as_json: bool) -> None:
    """Write the metadata of the volume to FILE (- is stdout), as they are after one batch of changes. Nobody is held back.

    A file of that name is replaced when the dump is whole. Objects are not in it.
    """
    to_stdout = file == "-"
    if to_stdout and as_json:
        raise click.UsageError("--json prints on stdout, where the dump goes: give the name of a file")
    if to_stdout and sys.stdout.isatty():
        raise click.UsageError("a dump is not for a terminal: give the name of a file, or redirect stdout")
    if not to_stdout and os.path.isdir(file):
        raise click.UsageError(f"{shown(file)} is a directory: give the name of a file")
    began_s = time.monotonic()
    with _stdout() if to_stdout else _new_file(file) as out:
        sink = _Sink(out, file)
        ask(named_volume(address), "dump", {}, command="dump", take=sink.take)
        sink.end()
    document = sink.document(file, time.monotonic() - began_s)
    if as_json:
        echo_json(document)
        return
    rate = document["rows"] / max(1e-3, document["seconds"])
    size = format_size(document["size_bytes"])
    text = f"{document['rows']:,} rows, {size}, {rate:,.0f} rows/s, as of batch {document['last_batch']:,}"
    if to_stdout:
        say(text)
    else:
        click.echo(f"{shown(file)}: {text}")


class _Sink:
    """Verifies the bytes of a dump and writes them."""

    def __init__(self, out: BinaryIO, file: str) -> None:
        from metasvc.api.dump_stream import Trailer, Unpacker

        self._out = out
        self._file = file
        self._unpacker = Unpacker(rows=False)
        self._trailer: Trailer | None = None
        self._size_bytes = 0

    def take(self, items: Items) -> None:
        """Write the next bytes. DumpDamaged."""
        from metasvc.api.dump_stream import PieceKind, Trailer

        for text in items.rows:
            data = base64.b64decode(text)
            for kind, raw in self._unpacker.feed(data):
                if kind is PieceKind.TRAILER:
                    self._trailer = Trailer.parse(raw)
            with nullcontext() if self._file == "-" else _named(self._file):
                self._out.write(data)
            self._size_bytes += len(data)

    def end(self) -> None:
        """Find out that nothing is missing. DumpDamaged."""
        self._unpacker.end()

    def document(self, file: str, seconds: float) -> JsonObject:
        """Return what was written."""
        trailer = self._trailer
        assert trailer is not None, "end() was called"
        return {
            "file": file,
            "uuid": trailer.format.uuid,
            "volume": f"{trailer.format.tenant}/{trailer.format.name}",
            "last_batch": trailer.last_batch,
            "rows": trailer.row_count,
            "inodes": trailer.rows["inode"].puts,
            "size_bytes": self._size_bytes,
            "seconds": round(seconds, 3),
        }


@contextmanager
def _stdout() -> Iterator[BinaryIO]:
    yield sys.stdout.buffer
    sys.stdout.buffer.flush()


@contextmanager
def _new_file(path: str) -> Iterator[BinaryIO]:
    """Yield a file that gets its name, durably, when the block ends well, and is gone when it does not."""
    draft = f"{path}.{secrets.token_hex(4)}.new"
    try:
        with _named(path):
            out = open(draft, "xb", opener=_private)  # noqa: SIM115 (closed below, after what is yielded)
        with out:
            yield out
            with _named(path):
                out.flush()
                os.fsync(out.fileno())
        with _named(path):
            os.rename(draft, path)
            sync_directory(os.path.dirname(path) or ".")
    except BaseException:
        with suppress(OSError):
            os.unlink(draft)
        raise


@contextmanager
def _named(path: str) -> Iterator[None]:
    """Say of which file an error is."""
    try:
        yield
    except OSError as error:
        where = shown(path)
        raise AtollError(f"{where}: {error.strerror}: give another place for the dump", errno=error.errno) from error


def _private(path: str, flags: int) -> int:
    # Names and small files of all users are in it.
    return os.open(path, flags, 0o600)
