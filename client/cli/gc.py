"""``atoll gc ADDRESS``."""

from __future__ import annotations

import click

from client.cli.ask import ask, named_volume
from client.cli.options import json_option
from client.cli.output import echo_json
from client.sizes import format_size


@click.command("gc")
@click.argument("address")
@click.option("--dry-run", is_flag=True, help="Count, delete nothing.")
@click.option(
    "--ignore-backups", is_flag=True, help="Delete garbage that backups need, too: they cannot be restored whole."
)
@json_option
def command(address: str, *, dry_run: bool, ignore_backups: bool, as_json: bool) -> None:
    """Delete objects that nothing needs: garbage, expired trash, and what writers left that died before they committed."""
    params = {"dry_run": dry_run, "ignore_backups": ignore_backups}
    document = ask(named_volume(address), "gc", params, command="gc")
    if as_json:
        echo_json(document)
        return
    leaked = f"{document['leaked_objects']:,} objects ({format_size(document['leaked_bytes'])}) that nothing refers to"
    click.echo(f"trash: {document['expired_trash_entries']:,} expired entries removed")
    click.echo(f"garbage: {document['garbage_slices']:,} slices in {document['garbage_objects']:,} objects")
    if document["garbage_held"]:
        click.echo("kept: garbage that backups may need, until they are older (--ignore-backups deletes it)")
    click.echo(f"leaked: {leaked}, of {document['listed_objects']:,} listed")
    if document["foreign_objects"]:
        click.echo(f"left alone: {document['foreign_objects']:,} objects with keys that are no blocks")
    click.echo("deleted: nothing (dry run)" if dry_run else f"deleted: {document['deleted_objects']:,} objects")
