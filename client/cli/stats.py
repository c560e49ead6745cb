"""``atoll stats PATH|ADDRESS``."""

from __future__ import annotations

import click

from client.cli.ask import ask, named_volume
from client.cli.options import json_option
from client.cli.output import echo_json


@click.command("stats")
@click.argument("address")
@json_option
def command(address: str, *, as_json: bool) -> None:
    """Show the counters of the process that holds the volume, as Prometheus text.

    ADDRESS is the volume, or a path under its mount.
    """
    document = ask(named_volume(address), "stats", {}, command="stats")
    if as_json:
        from client.admin.stats import parse_metrics

        echo_json(parse_metrics("\n".join(document["lines"])))
    else:
        for line in document["lines"]:
            click.echo(line)
