"""Where the control socket of an embedded volume lies, and who may use it.

Owns the socket file ``holder.sock`` in the volume's directory: its creation with mode 0600, its replacement when a killed
holder left one behind, and connecting to it from directories of any depth.

A socket's address holds at most 107 bytes, and directories may be deeper than that. Both sides therefore go through a
descriptor of the directory, ``/proc/self/fd/N/holder.sock``, which the kernel resolves like any path.

A holder binds only while it owns the volume, so at most one live holder binds at a time; it binds under a name of its own
and renames that over ``holder.sock``, so there is no moment at which a stale file is in its way.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from contextlib import suppress
from typing import Final, NamedTuple

from client.control.messages import ControlError

SOCKET_NAME: Final = "holder.sock"
BACKLOG: Final = 64

# pid, uid, gid of struct ucred (unix(7)).
_UCRED: Final = struct.Struct("iII")


def _through(descriptor: int, name: str) -> str:
    return f"/proc/self/fd/{descriptor}/{name}"


def listen(directory: str) -> socket.socket:
    """Return a listening socket that answers at ``holder.sock`` in a directory, for this user only.

    Replaces what another holder left there. The caller owns the volume. OSError as bind(2) and rename(2) give it.
    """
    name = f"{SOCKET_NAME}.{os.getpid()}"
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with suppress(FileNotFoundError):
            os.unlink(name, dir_fd=descriptor)
        # The mode of the socket becomes that of its file (less the umask): it never has a wider one, even for a moment.
        os.fchmod(listener.fileno(), 0o600)
        listener.bind(_through(descriptor, name))
        os.chmod(name, 0o600, dir_fd=descriptor)
        listener.listen(BACKLOG)
        os.rename(name, SOCKET_NAME, src_dir_fd=descriptor, dst_dir_fd=descriptor)
    except BaseException:
        listener.close()
        with suppress(OSError):
            os.unlink(name, dir_fd=descriptor)
        raise
    finally:
        os.close(descriptor)
    return listener


def remove(directory: str) -> None:
    """Remove the socket file; nothing if it is gone. The caller still owns the volume: the file is its own."""
    with suppress(FileNotFoundError):
        os.unlink(os.path.join(directory, SOCKET_NAME))


def connect(directory: str, *, timeout_s: float) -> socket.socket | None:
    """Return a connection to the holder of a volume, or None if there is none (no file, or a killed holder's).

    PermissionError if the socket is another user's; TimeoutError if the holder takes no connection.
    """
    try:
        descriptor = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        return None
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.settimeout(timeout_s)
    try:
        connection.connect(_through(descriptor, SOCKET_NAME))
    except (FileNotFoundError, ConnectionRefusedError):
        connection.close()
        return None
    except OSError as error:
        connection.close()
        if error.errno == errno.EAGAIN:
            raise TimeoutError("the holder takes no connections") from error
        raise
    except BaseException:
        connection.close()
        raise
    finally:
        os.close(descriptor)
    return connection


class Peer(NamedTuple):
    """The process at the other end of a connection when it connected."""

    pid: int
    uid: int
    gid: int


def peer(connection: socket.socket) -> Peer:
    """Return who is at the other end, as the kernel knows it."""
    return Peer(*_UCRED.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)))


def admit(connection: socket.socket) -> Peer:
    """Return a peer that is this user or root; ControlError for others."""
    found = peer(connection)
    if found.uid not in (0, os.geteuid()):
        raise ControlError(
            f"user {found.uid} may not control this volume: ask as the user who mounted it or as root",
            errno=errno.EACCES,
        )
    return found
