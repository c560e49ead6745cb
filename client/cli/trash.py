"""``atoll trash list|restore|empty``."""

from __future__ import annotations

import click

from client.cli.ask import ask, named_volume
from client.cli.options import DAYS, json_option
from client.cli.output import echo_json, echo_table, moment, printable_name, say
from client.sizes import format_size


@click.group("trash")
def command() -> None:
    """List, restore or empty what was removed. ADDRESS is a volume, a directory of it, or a path under its mount."""


@command.command("list")
@click.argument("address")
@json_option
def list_entries(address: str, *, as_json: bool) -> None:
    """Show what is in the trash and was removed below ADDRESS, oldest first."""
    named = named_volume(address)
    document = ask(named.address, "trash-list", {"target": named.target()}, command="trash list")
    if as_json:
        echo_json(document)
        return
    rows = [
        (
            str(entry["trash_id"]),
            moment(entry["deleted_ns"]),
            str(entry["uid"]),
            entry["type"],
            format_size(entry["size_bytes"]) if entry["type"] == "file" else "",
            entry["path"] if entry["path"] is not None else f"…/{entry['name']}",
        )
        for entry in document["entries"]
    ]
    echo_table(("ID", "REMOVED", "BY", "TYPE", "SIZE", "PATH"), rows, right=frozenset({0, 2, 4}))


@command.command("restore")
@click.argument("address")
@click.argument("trash_ids", metavar="ID...", type=click.IntRange(1, (1 << 63) - 1), nargs=-1, required=True)
@json_option
def restore(address: str, trash_ids: tuple[int, ...], *, as_json: bool) -> None:
    """Put entries back under their names, with the directories above them, and what was removed below them."""
    params = {"trash_ids": list(trash_ids)}
    document = ask(named_volume(address).address, "trash-restore", params, command="trash restore")
    if as_json:
        echo_json(document)
        return
    for row in document["restored"]:
        click.echo(f"{row['trash_id']}: {printable_name(row['path'])}")
    if document["left_entries"]:
        say(
            f"left in the trash, their names are taken or somebody else removed them: {document['left_entries']:,} entries"
        )


@command.command("empty")
@click.argument("address")
@click.option("--older-than", type=DAYS, default=0.0, metavar="DAYS", help="Leave what was removed later than this.")
@json_option
def empty(address: str, older_than: float, *, as_json: bool) -> None:
    """Remove for good what is in the trash."""
    params = {"older_than_s": older_than * 86400}
    document = ask(named_volume(address).address, "trash-empty", params, command="trash empty")
    if as_json:
        echo_json(document)
    else:
        click.echo(f"{document['removed_entries']:,} entries removed for good")
