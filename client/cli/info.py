"""``atoll info PATH``."""

from __future__ import annotations

import click

from client.cli.ask import ask, named_path
from client.cli.options import json_option
from client.cli.output import echo_json, echo_pairs, limit, moment
from client.control.messages import JsonObject
from client.sizes import format_size

SLICES_PRINTED = 20


@click.command("info")
@click.argument("path")
@json_option
def command(path: str, *, as_json: bool) -> None:
    """Show what PATH is made of: attributes, names, the slices of a file and where they are, the size of a tree."""
    named = named_path(path)
    document = ask(named, "info", {"target": named.target()}, command="info")
    if as_json:
        echo_json(document)
    else:
        echo_pairs(_lines(document))


def _lines(document: JsonObject) -> list[tuple[str, str]]:
    pairs = [
        ("path", document["path"]),
        ("inode", str(document["inode"])),
        ("type", document["type"]),
        ("mode", f"{document['mode']}, owner {document['uid']}:{document['gid']}, {document['link_count']} links"),
        ("modified", moment(document["mtime_ns"])),
    ]
    pairs += [("also named", path) for path in document["paths"] if path != document["path"]]
    if "target" in document:
        pairs.append(("target", document["target"]))
    elif "usage" in document:
        usage = document["usage"]
        pairs += [
            ("entries", f"{document['entries']:,}"),
            ("tree", f"{usage['files']:,} files, {usage['directories']:,} directories"),
            ("size", f"{format_size(usage['size_bytes'])}, charged {format_size(usage['space_bytes'])}"),
        ]
        quota = document["quota"]
        if quota is not None:
            space = f"{format_size(quota['used_bytes'])} of {limit(quota['capacity_bytes'])}"
            inodes = f"{quota['used_inodes']:,} of {limit(quota['max_inodes'], size=False)} inodes"
            pairs.append(("quota", f"{space}, {inodes}"))
    elif "slices" in document:
        pairs += [
            ("size", f"{format_size(document['size_bytes'])} ({document['size_bytes']:,} bytes)"),
            ("durability", document["durability"]),
            ("map", f"{document['slice_count']:,} slices in {document['chunks']:,} chunks"),
        ]
        for row in document["slices"][:SLICES_PRINTED]:
            objects = f", {row['objects']} objects from {row['first_object']}" if row["objects"] else ""
            size = format_size(row["size_bytes"])
            pairs.append(
                ("slice", f"{row['slice_id']}: {size} from offset {row['first_offset']:,}, {row['where']}{objects}")
            )
        more = document["slice_count"] - SLICES_PRINTED
        if more > 0:
            pairs.append(("", f"and {more:,} more (--json shows up to 1,000)"))
    return pairs
