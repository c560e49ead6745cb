"""``atoll status ADDRESS``."""

from __future__ import annotations

import click

from client.cli.ask import ask, named_volume
from client.cli.options import json_option
from client.cli.output import echo_json, echo_pairs, limit, moment
from client.control.messages import JsonObject
from client.sizes import format_size


@click.command("status")
@click.argument("address")
@json_option
def command(address: str, *, as_json: bool) -> None:
    """Show what the volume at ADDRESS is, who holds it, what is in it and what is on its way.

    A path under a mount stands for its volume.
    """
    document = ask(named_volume(address), "status", {}, command="status")
    if as_json:
        echo_json(document)
    else:
        echo_pairs(_lines(document))


def _lines(document: JsonObject) -> list[tuple[str, str]]:
    form, usage, trash = document["format"], document["usage"], document["trash"]
    holder, cache = document["holder"], document["cache"]
    pairs = [
        ("volume", document["address"]),
        ("uuid", form["uuid"]),
        ("formatted", moment(form["created_ns"])),
        ("bucket", form["bucket_url"]),
        ("blocks", f"{format_size(form['block_size_bytes'])}, compression {form['compression']}"),
        ("space", f"{format_size(usage['used_bytes'])} used of {limit(usage['capacity_bytes'])}"),
        ("inodes", f"{usage['used_inodes']:,} used of {limit(usage['max_inodes'], size=False)}"),
        (
            "trash",
            f"{trash['inodes']:,} inodes with {format_size(trash['used_bytes'])}, kept for {form['trash_days']:g} days",
        ),
        ("garbage", f"{document['garbage_slices']:,} slices"),
        ("owner", f"{document['owner']}, epoch {document['epoch']}"),
    ]
    if (tenant := document["tenant"]) is not None:
        pairs.append(("tenant", tenant_line(form["tenant"], tenant)))
    if holder is None:
        pairs.append(("holder", "none: the volume is not mounted"))
    else:
        pairs += [
            ("holder", f"pid {holder['pid']} since {moment(holder['started_ns'])}"),
            ("mounted at", holder["mountpoint"]),
            ("options", _options(holder)),
            ("log", holder["log_path"]),
        ]
    if cache is not None:
        pairs.append(("cache", f"{format_size(int(cache.get('cache_bytes', 0)))} in {cache['directory']}"))
    staged = document["staging"]["pending_bytes"]
    if staged:
        pairs.append(("not uploaded", format_size(staged)))
    for session in document["sessions"]:
        where = session["mountpoint"] or "no mount"
        pairs.append(("session", f"{session['session_id']}: {session['host']} pid {session['pid']}, {where}"))
    return pairs


def tenant_line(name: str, use: JsonObject) -> str:
    """Tell what all volumes of a tenant hold."""
    return (
        f"{name}: {format_size(use['used_bytes'])} used of {limit(use['max_bytes'])}, "
        f"{use['used_inodes']:,} inodes of {limit(use['max_inodes'], size=False)}"
    )


def _options(holder: JsonObject) -> str:
    parts = [f"durability {holder['durability']}", holder["transport"]]
    if holder["read_only"]:
        parts.append("read-only")
    if holder["subdir"] != "/":
        parts.append(f"subdirectory {holder['subdir']}")
    return ", ".join(parts)
