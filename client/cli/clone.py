"""``atoll clone SRC DST``."""

from __future__ import annotations

import click

from client.address import shown
from client.cli.ask import ask, named_path
from client.cli.options import json_option
from client.cli.output import echo_json, printable_name
from client.sizes import format_size


@click.command("clone")
@click.argument("source", metavar="SRC")
@click.argument("destination", metavar="DST")
@json_option
def command(source: str, destination: str, *, as_json: bool) -> None:
    """Copy the file or tree SRC to DST, of the same volume, without copying bytes. DST must be free."""
    first, second = named_path(source), named_path(destination)
    if first.address != second.address:
        raise click.UsageError(f"{shown(source)} and {shown(destination)} are in two volumes: copy instead")
    params = {"source": first.target(), "target": second.target()}
    document = ask(first, "clone", params, command="clone")
    if as_json:
        echo_json(document)
        return
    count = f"{document['files']:,} files, {document['directories']:,} directories"
    click.echo(f"{printable_name(document['path'])}: {count}, {format_size(document['size_bytes'])}")
