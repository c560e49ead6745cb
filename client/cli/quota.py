"""``atoll quota set|get|list|remove``."""

from __future__ import annotations

import click

from client.cli.ask import ask, named_path, named_volume
from client.cli.options import COUNT, SIZE, json_option
from client.cli.output import echo_json, echo_table, limit, printable_name
from client.control.messages import JsonObject
from client.sizes import format_size


@click.group("quota")
def command() -> None:
    """Limit directories. PATH is a path under a mount, or ADDRESS:/path; the root of a volume stands for all of it."""


@command.command("set")
@click.argument("path")
@click.option("--capacity", type=SIZE, help="Bytes that the tree may be charged with; 0 lifts the limit.")
@click.option("--inodes", type=COUNT, help="Files and directories that may be below; 0 lifts the limit.")
@json_option
def set_quota(path: str, capacity: int | None, inodes: int | None, *, as_json: bool) -> None:
    """Limit the tree at PATH; what is not given stays as it is."""
    if capacity is None and inodes is None:
        raise click.UsageError("give --capacity, --inodes or both")
    named = named_path(path)
    params: JsonObject = {"target": named.target(follow=True)}
    if capacity is not None:
        params["capacity_bytes"] = capacity
    if inodes is not None:
        params["max_inodes"] = inodes
    _show([ask(named, "quota-set", params, command="quota set")], as_json=as_json)


@command.command("get")
@click.argument("path")
@json_option
def get_quota(path: str, *, as_json: bool) -> None:
    """Show the quota of the directory PATH."""
    named = named_path(path)
    document = ask(named, "quota-get", {"target": named.target(follow=True)}, command="quota get")
    _show([document], as_json=as_json)


@command.command("list")
@click.argument("address")
@json_option
def list_quotas(address: str, *, as_json: bool) -> None:
    """Show the quotas of all directories of a volume, the volume's own limits first."""
    document = ask(named_volume(address), "quota-list", {}, command="quota list")
    if as_json:
        echo_json(document)
    else:
        _show(document["quotas"], as_json=False)


@command.command("remove")
@click.argument("path")
@json_option
def remove_quota(path: str, *, as_json: bool) -> None:
    """Remove the quota of the directory PATH."""
    named = named_path(path)
    document = ask(named, "quota-remove", {"target": named.target(follow=True)}, command="quota remove")
    if as_json:
        echo_json(document)
    else:
        click.echo(f"{printable_name(document['path'])} has no quota of its own any more")


def _show(quotas: list[JsonObject], *, as_json: bool) -> None:
    if as_json:
        echo_json(quotas[0])
        return
    rows = [
        (
            quota["path"] if quota["path"] is not None else f"inode {quota['inode']}",
            format_size(quota["used_bytes"]),
            limit(quota["capacity_bytes"]),
            f"{quota['used_inodes']:,}",
            limit(quota["max_inodes"], size=False),
        )
        for quota in quotas
    ]
    echo_table(("PATH", "USED", "CAPACITY", "INODES", "LIMIT"), rows, right=frozenset({1, 2, 3, 4}))
