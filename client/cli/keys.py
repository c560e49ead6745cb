"""``atoll keys set``: give the service the keys of a volume's bucket."""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING

import click

from client.cli.options import token_option

if TYPE_CHECKING:
    from client.address import ServiceAddress


@click.group("keys")
def command() -> None:
    """Manage the keys of buckets that a service keeps. Needs a token of the administrator, of the service or of the tenant."""


@command.command("set")
@click.argument("address")
@token_option
def set_keys(address: str, token_file: str | None) -> None:
    """Have the service keep the keys of the bucket of the volume ADDRESS that are in the environment, and use them at once.

    They are tried first, from here. Those of before are forgotten.
    """
    from client.address import ServiceAddress, parse_address, shown

    where = parse_address(address)
    if not isinstance(where, ServiceAddress):
        raise click.UsageError(f"{shown(address)} is no volume of a service: give atolls://HOST:PORT/TENANT/VOLUME")
    count = asyncio.run(_set(where, token_file))
    click.echo(f"the service keeps {count} variables for {where.name}")


async def _set(where: ServiceAddress, token_file: str | None) -> int:
    from client.cli.new_volume import keys_to_give, prepare_bucket
    from client.meta.admin import list_volumes
    from client.meta.encryption import endpoint_at
    from client.meta.keys import give_keys
    from client.volume import read_token
    from metasvc.errors import VolumeMissing

    endpoint = endpoint_at(where, read_token(token_file, env=os.environ), env=os.environ)
    forms = [form for form in await list_volumes(endpoint, tenant=where.tenant) if form.name == where.volume]
    if not forms:
        raise VolumeMissing(f"there is no volume {where.name}: check the address")
    variables = keys_to_give(forms[0].bucket_url)
    await prepare_bucket(where, forms[0].bucket_url, create=False)
    await give_keys(endpoint, where.name, variables)
    return len(variables)
