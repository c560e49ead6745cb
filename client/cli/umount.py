"""``atoll umount MOUNTPOINT``: unmount, and wait until the daemon has ended.

The daemon is asked to tell about its end *before* the mount is taken away, on a connection that it keeps until the end; its
process is waited for through a pidfd, so that no other process with the same number is taken for it.
"""

from __future__ import annotations

import errno
import os
import select
import sys
from contextlib import ExitStack
from typing import Final

import click

from client.address import Address, parse_address, shown
from client.cli.main import fail
from client.cli.mountpoint import MountpointInvalid, absolute, detach, unmount
from client.cli.output import say
from client.cli.progress import shown_progress
from client.control.caller import ANSWER_S, HolderCall, HolderLost, call_holder
from client.control.messages import JsonObject, RemoteError, Request
from client.holder import holder_directory
from client.mounts import is_dead, mounts_at, read_mounts
from client.sizes import format_size

END_S: Final = 60.0
"""How long a daemon that has said its last word may take to be gone."""


@click.command("umount")
@click.argument("mountpoint")
@click.option("--force", is_flag=True, help="Cut off programs that have files open.")
def command(mountpoint: str, *, force: bool) -> None:
    """Unmount what is mounted at MOUNTPOINT. Returns when all data are uploaded and the daemon has ended."""
    where = absolute(mountpoint)
    there = mounts_at(where, read_mounts())
    if not there or not there[-1].is_ours:
        raise MountpointInvalid(f"no volume is mounted at {shown(where)}: look at `mount -t fuse.atoll`")
    address = parse_address(there[-1].source)
    with ExitStack() as stack:
        call = _holder_of(address, where, force=force)
        if call is None:
            _unmount_without_holder(where, force=force)
            return
        stack.enter_context(call)
        process = os.pidfd_open(call.holder_pid)
        stack.callback(os.close, process)
        if not force:
            call.send(Request("watch-end", {}))
            _unmount(where)
        else:
            call.send(Request("stop", {}))
        end = _watch(call)
        if not select.select([process], [], [], END_S)[0]:
            fail(f"the daemon (pid {call.holder_pid}) does not end: look at its log, or end it with kill -9", code=1)
    _tell(end, where)


def _holder_of(address: Address, mountpoint: str, *, force: bool) -> HolderCall | None:
    """Return a connection to the daemon of a mount; None if there is none, or the volume is mounted elsewhere by now.

    HolderLost if it is there and silent, unless by force: then it is treated as gone.
    """
    directory = holder_directory(address, mountpoint, env=os.environ)
    assert directory is not None
    first = call_holder(directory, silence_s=ANSWER_S)
    if first is None:
        return None
    with first:
        try:
            holder = first.run(Request("holder", {}))
        except (HolderLost, RemoteError):
            if force:
                return None
            raise
    return call_holder(directory) if holder.get("mountpoint") == mountpoint else None


def _unmount_without_holder(mountpoint: str, *, force: bool) -> None:
    # In this order: a look at the mount point of a daemon that hangs would hang.
    if force or is_dead(mountpoint):
        detach(mountpoint)
        say(f"the daemon of the mount at {shown(mountpoint)} was gone: unmounted it")
        return
    # Alive, but its volume's directory is out of reach (moved away, another user's): the daemon ends by itself.
    _unmount(mountpoint)
    say(f"unmounted {shown(mountpoint)}; its daemon cannot be asked and ends by itself")


def _unmount(mountpoint: str) -> None:
    where = shown(mountpoint)
    try:
        unmount(mountpoint)
    except OSError as error:
        if error.errno == errno.EBUSY:
            raise MountpointInvalid(
                f"{where} is in use: end what uses it (`fuser -vm {where}`), or give --force", errno=errno.EBUSY
            ) from error
        if error.errno == errno.EPERM:
            raise MountpointInvalid(f"{where} is another user's mount: ask as that user or as root", errno=1) from error
        raise


def _watch(call: HolderCall) -> JsonObject | None:
    """Show how far the daemon's end is; its last word, or None if it ended without one."""
    with shown_progress() as shown_to:
        try:
            return call.receive(show=shown_to.progress)
        except HolderLost:
            return None


def _tell(end: JsonObject | None, mountpoint: str) -> None:
    where = shown(mountpoint)
    if end is None:
        fail(
            f"the daemon of {where} ended without a word: look at its log, then mount again to upload what is staged",
            code=1,
        )
    if end["lost_files"]:
        log = shown(end["log_path"])
        fail(
            f"data of {end['lost_files']} files could not be written to the bucket and are lost: {log} names them",
            code=1,
        )
    if end["pending_bytes"]:
        left, cache = format_size(end["pending_bytes"]), shown(end["cache_dir"])
        fail(f"{left} in {cache} are not uploaded: mount the volume again when the bucket can be reached", code=1)
    sys.exit(0)
