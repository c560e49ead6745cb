"""``atoll tenant create|list|quota|delete``."""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING

import click

from client.cli.options import COUNT, SIZE, json_option, token_option
from client.cli.output import echo_json, echo_table, limit
from client.sizes import format_size

if TYPE_CHECKING:
    from client.address import ServicePlace
    from client.meta.endpoint import Endpoint
    from client.meta.managing import RemoteManaging


@click.group("tenant")
def command() -> None:
    """Manage the tenants of a service, each with volumes, tokens and limits of its own. Needs the administrator's token."""


@command.command("create")
@click.argument("address")
@click.option("--capacity", type=SIZE, default="0", help="What all its volumes may hold together  [default: unlimited]")
@click.option("--inodes", type=COUNT, default=0, help="Files and directories in all its volumes  [default: unlimited]")
@token_option
def create(address: str, capacity: int, inodes: int, token_file: str | None) -> None:
    """Make the tenant ADDRESS: atoll://HOST:PORT/TENANT."""
    place = tenant_at(address)
    asyncio.run(managing(place, token_file).create_tenant(place.tenant, max_bytes=capacity, max_inodes=inodes))
    click.echo(f"tenant {place.tenant}: capacity {limit(capacity)}, inodes {limit(inodes, size=False)}")


@command.command("list")
@click.argument("address")
@token_option
@json_option
def list_tenants(address: str, token_file: str | None, *, as_json: bool) -> None:
    """List the tenants of the service ADDRESS: atoll://HOST:PORT."""
    from client.address import parse_service_place

    found = asyncio.run(managing(parse_service_place(address), token_file).tenants())
    if as_json:
        rows = [
            {
                "tenant": each.name,
                "volumes": list(each.volumes),
                "used_bytes": each.used_bytes,
                "used_inodes": each.used_inodes,
                "max_bytes": each.max_bytes,
                "max_inodes": each.max_inodes,
            }
            for each in found
        ]
        echo_json({"tenants": rows})
        return
    echo_table(
        ("tenant", "volumes", "used", "capacity", "inodes used", "inodes"),
        (
            (
                each.name,
                ", ".join(each.volumes) or "-",
                format_size(each.used_bytes),
                limit(each.max_bytes),
                f"{each.used_inodes:,}",
                limit(each.max_inodes, size=False),
            )
            for each in found
        ),
        right=frozenset({2, 3, 4, 5}),
    )


@command.command("quota")
@click.argument("address")
@click.option("--capacity", type=SIZE, help="What all its volumes may hold together; 0 lifts the limit.")
@click.option("--inodes", type=COUNT, help="Files and directories in all its volumes; 0 lifts the limit.")
@token_option
def quota(address: str, capacity: int | None, inodes: int | None, token_file: str | None) -> None:
    """Limit the tenant ADDRESS; what is not given stays as it is."""
    if capacity is None and inodes is None:
        raise click.UsageError("give --capacity, --inodes or both")
    place = tenant_at(address)
    asyncio.run(managing(place, token_file).set_tenant_quota(place.tenant, max_bytes=capacity, max_inodes=inodes))


@command.command("delete")
@click.argument("address")
@token_option
def delete(address: str, token_file: str | None) -> None:
    """Delete the tenant ADDRESS, which has no volumes any more, and its tokens."""
    place = tenant_at(address)
    asyncio.run(managing(place, token_file).delete_tenant(place.tenant))
    click.echo(f"tenant {place.tenant} is deleted")


def tenant_at(address: str) -> ServicePlace:
    """Return the tenant that an address names. UsageError for anything else."""
    from client.address import parse_service_place, shown

    place = parse_service_place(address)
    if not place.tenant or place.volume:
        raise click.UsageError(f"{shown(address)} is no tenant: give atoll://HOST:PORT/TENANT")
    return place


def managing(place: ServicePlace, token_file: str | None) -> RemoteManaging:
    """Return what is asked at a service."""
    from client.meta.managing import RemoteManaging

    return RemoteManaging(endpoint_of(place, token_file))


def endpoint_of(place: ServicePlace, token_file: str | None) -> Endpoint:
    """Return the processes of a service, asked with the token that is given."""
    from client.meta.encryption import endpoint_at
    from client.volume import read_token

    return endpoint_at(place, read_token(token_file, env=os.environ), env=os.environ)
