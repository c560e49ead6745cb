"""The list of operations, and running one of them.

Owns their names, as they travel over the control socket. The code of an operation is imported when it is asked for.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Final, cast

from client.admin.asking import Asked, Params
from client.control.endpoint import Peer
from client.control.messages import ControlError, JsonObject, Request
from client.control.server import Report
from client.volume import OpenVolume


@dataclass(frozen=True, slots=True)
class Operation:
    """Where the code of an operation is, and what may be done with it."""

    module: str
    function: str
    repeatable: bool = True
    """Asking again after an answer got lost does no harm and gives the same result."""


OPERATIONS: Final = {
    "status": Operation("client.admin.status", "status"),
    "info": Operation("client.admin.info", "info"),
    "stats": Operation("client.admin.stats", "stats"),
    "gc": Operation("client.admin.gc", "gc"),
    "fsck": Operation("client.admin.fsck", "fsck"),
    "trash-list": Operation("client.admin.trash", "list_trash"),
    "trash-restore": Operation("client.admin.trash", "restore", repeatable=False),
    "trash-empty": Operation("client.admin.trash", "empty"),
    "quota-set": Operation("client.admin.quota", "set_quota"),
    "quota-get": Operation("client.admin.quota", "get_quota"),
    "quota-list": Operation("client.admin.quota", "list_quotas"),
    "quota-remove": Operation("client.admin.quota", "remove_quota", repeatable=False),
    "clone": Operation("client.admin.clone", "clone", repeatable=False),
    "dump": Operation("client.admin.dump", "dump", repeatable=False),
    "backups": Operation("client.admin.backups", "list_backups"),
}


async def run_operation(volume: OpenVolume, request: Request, peer: Peer, report: Report) -> JsonObject:
    """Run what a request names and return its result. ControlError for an unknown one; the operation's own errors."""
    operation = OPERATIONS.get(request.name)
    if operation is None:
        raise ControlError(
            f"unknown request {request.name!r}: use the same version of atoll as the holder of the volume"
        )
    function = cast(
        Callable[[Asked], Awaitable[JsonObject]], getattr(import_module(operation.module), operation.function)
    )
    return await function(Asked(volume, peer, Params(request.params), report))
