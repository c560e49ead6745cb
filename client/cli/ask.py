"""How a command gets its answer: from the holder of the volume if there is one, else by opening the volume itself.

Owns that choice, waiting for a holder that is ending, and what PATH and ADDRESS arguments mean. The same operation
(client.admin) runs in both cases, so the answer is the same.

Between two looks a holder may come or go, so both ways are tried in turn for up to 10 s: a holder that is ending answers
no more and still owns the volume.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from client.address import Address, AddressInvalid, EmbeddedAddress, normalize, parse_address, parse_volume_path, shown
from client.cli.progress import Shown, shown_progress
from client.control.caller import HolderLost, RemoteError, call_holder
from client.control.messages import Items, JsonObject, Progress, Request, text_of
from client.holder import holder_directory
from client.mounts import Place, place_of
from metasvc.errors import NotOwner

WAIT_S: Final = 10.0
"""How long a holder that is ending is waited for."""
POLL_S: Final = 0.1
ENDING: Final = "holder-not-ready"
"""The code with which a holder refuses that is starting or ending: it will be ready, or gone, soon."""


@dataclass(frozen=True, slots=True)
class Named:
    """What an ADDRESS or PATH argument names: a volume and a path in it."""

    address: Address
    path: bytes
    mountpoint: str = ""
    """Set if the path counts from the root of this mount, which may be a subdirectory of the volume."""

    def target(self, *, follow: bool = False) -> JsonObject:
        """Return the path as operations take it."""
        return {"path": text_of(self.path), "in_mount": bool(self.mountpoint), "follow": follow}


def named_path(text: str) -> Named:
    """Return what a PATH argument names: a path under a live mount, or ADDRESS:/path. It need not exist in the volume.

    AddressInvalid for a path that lies on no mount of ours.
    """
    found = parse_volume_path(text)
    if found is not None:
        return Named(found.address, found.path)
    # A trailing slash asks for what a symbolic link points to, as with any program.
    place = _place(text)
    if place is None:
        raise AddressInvalid(f"{shown(text)} lies on no mounted volume: give a path under a mount, or ADDRESS:/path")
    return Named(parse_address(place.mount.source), place.path, place.mount.mountpoint)


def named_volume(text: str) -> Named:
    """Return what an ADDRESS argument names; a path under a mount stands for its volume, ADDRESS:/path is taken, too."""
    found = parse_volume_path(text)
    if found is not None:
        return Named(found.address, found.path)
    address = parse_address(text)
    if isinstance(address, EmbeddedAddress) and not os.path.isfile(address.meta_db):
        place = _place(text)
        if place is not None:
            return Named(parse_address(place.mount.source), place.path, place.mount.mountpoint)
    return Named(address, b"/")


def _place(text: str) -> Place | None:
    """Return the place of a path on a mount of ours, None if it lies elsewhere. The last name need not exist."""
    try:
        place = place_of(text, follow=text.endswith("/"))
        if not place.mount.is_ours:
            # A link from elsewhere into a mount; one that lies on a mount stands for itself.
            place = place_of(text)
    except FileNotFoundError:
        directory, name = os.path.split(text)
        if not name or name == "..":
            raise
        above = place_of(directory or ".")
        place = Place(above.mount, normalize(above.path + b"/" + os.fsencode(name)))
    except OSError as error:
        if error.errno == errno.ENOTCONN:
            where = shown(text)
            remedy = "`atoll umount` its mount point, then mount again"
            raise AddressInvalid(f"{where} is on a mount whose daemon is gone: {remedy}", errno=error.errno) from error
        raise
    return place if place.mount.is_ours else None


def ask(
    named: Named, name: str, params: JsonObject, *, command: str, take: Callable[[Items], None] | None = None
) -> JsonObject:
    """Return the result of an operation on a volume. ``command`` is what others are told while this holds the volume.

    ``take`` gets parts of the result as they come, in order, instead of their being collected; it may block.
    A volume of a service is asked at its mount if a path under one was given, else at the service. VolumeMissing; VolumeBusy
    after 10 s if another command has the volume; the operation's own errors.
    """
    from client.volume import check_is_volume

    address = named.address
    if isinstance(address, EmbeddedAddress):
        check_is_volume(address)
    directory = holder_directory(address, named.mountpoint, env=os.environ)
    request = Request(name, params)
    deadline_s = time.monotonic() + WAIT_S
    with shown_progress() as shown_to:
        while True:
            answer = None
            if directory is not None:
                answer = _ask_holder(directory, request, shown_to, take=take, deadline_s=deadline_s)
            if answer is None:
                answer = _ask_here(address, request, shown_to, take=take, command=command, deadline_s=deadline_s)
            if answer is not None:
                return answer
            time.sleep(POLL_S)


def _ask_holder(
    directory: str,
    request: Request,
    shown_to: Shown,
    *,
    take: Callable[[Items], None] | None,
    deadline_s: float,
) -> JsonObject | None:
    """Return the holder's answer; None if there is no holder, or it is ending and may be waited for."""
    from client.admin.operations import OPERATIONS

    try:
        call = call_holder(directory)
        if call is None:
            return None
        with call:
            return call.run(request, show=shown_to.progress, take=take)
    except HolderLost:
        # It may have done what was asked, and its answer got lost: only what may be asked twice is.
        if not OPERATIONS[request.name].repeatable or time.monotonic() >= deadline_s:
            raise
    except RemoteError as error:
        if error.code != ENDING or time.monotonic() >= deadline_s:
            raise
    return None


def _ask_here(
    address: Address,
    request: Request,
    shown_to: Shown,
    *,
    take: Callable[[Items], None] | None,
    command: str,
    deadline_s: float,
) -> JsonObject | None:
    """Return the answer of the same operation in this process; None if somebody else has the volume now."""
    import asyncio

    from client.volume import busy

    try:
        return asyncio.run(_operate(address, request, shown_to, take=take, command=command))
    except NotOwner as error:
        if time.monotonic() >= deadline_s:
            raise busy(error) from error
    return None


async def _operate(
    address: Address, request: Request, shown_to: Shown, *, take: Callable[[Items], None] | None, command: str
) -> JsonObject:
    from client.admin.operations import run_operation
    from client.cli.output import keep_quiet
    from client.control.endpoint import Peer
    from client.volume import open_volume

    keep_quiet()
    report = LocalReport(shown_to.progress, take)
    peer = Peer(os.getpid(), os.geteuid(), os.getegid())
    async with open_volume(address, owner=f"`atoll {command}`", env=os.environ) as volume:
        result = await run_operation(volume, request, peer, report)
    return {**result, **report.parts}


class LocalReport:
    """Collect what an operation in this process reports, as client.control.caller does with what comes from a holder."""

    def __init__(self, show: Callable[[Progress], None], take: Callable[[Items], None] | None = None) -> None:
        self.parts: dict[str, list[object]] = {}
        self._show = show
        self._take = take

    def progress(self, progress: Progress) -> None:
        self._show(progress)

    async def items(self, items: Items) -> None:
        if self._take is not None:
            # It may wait for a disk or a pipe, and the volume must be kept meanwhile.
            import asyncio

            await asyncio.to_thread(self._take, items)
            return
        self.parts.setdefault(items.key, []).extend(items.rows)
