"""``atoll fsck ADDRESS``."""

from __future__ import annotations

import sys

import click

from client.cli.ask import ask, named_volume
from client.cli.options import json_option
from client.cli.output import echo_json, printable_name
from client.control.messages import JsonObject


@click.command("fsck")
@click.argument("address")
@click.option("--repair", is_flag=True, help="Put right what can be derived from the rest.")
@click.option("--data", is_flag=True, help="Read every object and verify every byte.")
@json_option
def command(address: str, *, repair: bool, data: bool, as_json: bool) -> None:
    """Check that the volume is consistent and that its objects are there. Exits with 0 if it is clean, else with 1."""
    document = ask(named_volume(address), "fsck", {"repair": repair, "data": data}, command="fsck")
    if as_json:
        echo_json(document)
    else:
        _print(document)
    sys.exit(0 if document["clean"] else 1)


def _print(document: JsonObject) -> None:
    for row in document["problems"]:
        where = f" inode {row['inode']}" if row["inode"] else ""
        files = [path for file in row.get("files", []) for path in file["paths"] or [f"inode {file['inode']}"]]
        belongs = f" ({', '.join(printable_name(path) for path in files)})" if files else ""
        end = "repaired" if row["repaired"] else "--repair puts it right" if row["repairable"] else "not repairable"
        click.echo(f"{row['code']}:{where} {printable_name(row['text'])}{belongs}: {end}")
    verified = f", {document['verified_objects']:,} verified" if document["verified_objects"] else ""
    staged = f", {document['staged_slices']:,} slices wait for upload" if document["staged_slices"] else ""
    checked = f"{document['checked_slices']:,} slices in {document['checked_objects']:,} objects{verified}{staged}"
    count = document["problem_count"]
    click.echo(f"clean: {checked}" if not count else f"{count:,} problems found: {checked}")
