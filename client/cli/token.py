"""``atoll token create|list|revoke``."""

from __future__ import annotations

import asyncio
import time

import click

from client.cli.options import DURATION, json_option, token_option
from client.cli.output import echo_json, echo_table, moment
from client.cli.tenant import managing
from metasvc.api import atoll_pb2 as pb


@click.group("token")
def command() -> None:
    """Manage tokens: who may do what in a service. Needs a token of the administrator, of the service or of the tenant."""


@command.command("create")
@click.argument("address")
@click.option("--read-only", is_flag=True, help="It allows no changes.")
@click.option("--expires", type=DURATION, help="After so long it is refused, as 12h or 30d  [default: never]")
@click.option("--label", default="", help="What it is for: shown in the list.")
@token_option
@json_option
def create(
    address: str, *, read_only: bool, expires: float | None, label: str, token_file: str | None, as_json: bool
) -> None:
    """Print a new token for ADDRESS. It is not kept, and cannot be printed again.

    \b
    atoll://HOST:PORT                        administers the service
    atoll://HOST:PORT/TENANT                 administers a tenant
    atoll://HOST:PORT/TENANT/VOLUME          uses a volume
    atoll://HOST:PORT/TENANT/VOLUME:/path    uses a directory, which may be renamed and moved, and what is below it
    """
    from client.address import components, parse_service_place

    place = parse_service_place(address)
    if not place.volume and read_only:
        raise click.UsageError("--read-only goes with a volume or a directory of it")
    asked = pb.CreateToken(
        tenant=place.tenant,
        volume=place.volume,
        path=components(place.path),
        read_only=read_only,
        lasts_s=expires or 0.0,
        label=label,
    )
    token, info = asyncio.run(managing(place, token_file).create_token(asked))
    if as_json:
        echo_json({"token": token, **_document(info)})
    else:
        click.echo(token)


@command.command("list")
@click.argument("address")
@token_option
@json_option
def list_tokens(address: str, token_file: str | None, *, as_json: bool) -> None:
    """List the tokens of ADDRESS, a service or a tenant: atoll://HOST:PORT or atoll://HOST:PORT/TENANT."""
    from client.address import parse_service_place

    place = parse_service_place(address)
    found = asyncio.run(managing(place, token_file).tokens(place.tenant))
    found = [info for info in found if place.volume in ("", info.volume)]
    if as_json:
        echo_json({"tokens": [_document(info) for info in found]})
        return
    echo_table(
        ("id", "for", "rights", "made", "expires", "label"),
        (
            (info.token_id, _reach(info), _rights(info), _time(info.created_s), _expiry(info), info.label)
            for info in found
        ),
    )


@command.command("revoke")
@click.argument("address")
@click.argument("token_id", metavar="ID")
@token_option
def revoke(address: str, token_id: str, token_file: str | None) -> None:
    """Revoke the token ID of a service or tenant ADDRESS: whoever uses it is cut off within a second."""
    from client.address import parse_service_place

    place = parse_service_place(address)
    info = asyncio.run(managing(place, token_file).revoke_token(place.tenant, token_id))
    click.echo(f"token {info.token_id} for {_reach(info)} is revoked")


def _reach(info: pb.TokenInfo) -> str:
    if not info.tenant:
        return "the service"
    if not info.volume:
        return f"tenant {info.tenant}"
    return f"{info.tenant}/{info.volume}{'' if info.path == '/' else ':' + info.path}"


def _rights(info: pb.TokenInfo) -> str:
    return "administers" if info.admin else "reads" if info.read_only else "reads, writes"


def _time(time_s: float) -> str:
    return moment(int(time_s * 1e9))


def _expiry(info: pb.TokenInfo) -> str:
    if not info.expires_s:
        return "never"
    return _time(info.expires_s) + (" (has expired)" if info.expires_s < time.time() else "")


def _document(info: pb.TokenInfo) -> dict[str, object]:
    return {
        "id": info.token_id,
        "tenant": info.tenant,
        "volume": info.volume,
        "path": info.path,
        "read_only": info.read_only,
        "admin": info.admin,
        "created_s": info.created_s,
        "expires_s": info.expires_s or None,
        "made_by": info.made_by,
        "label": info.label,
    }
