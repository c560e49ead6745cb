"""The lock file beside a database that says whether the owner of a volume is alive.

Owns ``<database>.<volume id>.owner``: whoever owns the volume holds an flock(2) on it as long as its process lives. The
kernel drops it when the process ends, however it ends, so a successor need not wait for the ownership row to
expire; and a process that is merely stopped (SIGSTOP, a suspended laptop, a debugger) keeps it, so nobody takes
its volume away although its row expired. A stopped owner that blocks a volume is ended with kill -9 of the process named.

The file holds one line ``<pid> <address>\\n`` for messages, empty while nobody owns the volume. It stays when the owner
lets go and is removed with the volume; a lock counts only if the path still leads to the locked file, so a file
removed in between does no harm. Works on local file systems only, and so does SQLite's log.
"""

from __future__ import annotations

import fcntl
import os
from dataclasses import dataclass

from metasvc.errors import StoreError

__all__ = ["Holder", "OwnerLock"]


@dataclass(frozen=True, slots=True)
class Holder:
    """What the lock file says of the process that holds it."""

    pid: int
    address: str


class OwnerLock:
    """The lock of one volume, in one process or handle. Two of them exclude each other within a process as well."""

    def __init__(self, database_path: str, volume_id: int) -> None:
        self.path = f"{database_path}.{volume_id}.owner"
        self._descriptor: int | None = None

    @property
    def held(self) -> bool:
        """Whether this object has the lock."""
        return self._descriptor is not None

    def try_lock(self) -> bool:
        """Take the lock unless another has it; True if this object has it now. Does not wait. Raises OSError."""
        if self._descriptor is not None:
            if self._leads_to(self._descriptor):
                return True
            # Somebody removed the file, and perhaps another has the lock of the new one: this lock is worth nothing.
            os.close(self._descriptor)
            self._descriptor = None
        # Each round but the last lost the file to somebody who removed a volume at that moment.
        for _ in range(100):
            descriptor = self._open()
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if self._leads_to(descriptor):
                    self._descriptor, descriptor = descriptor, -1
                    return True
            except BlockingIOError:
                return False
            finally:
                if descriptor >= 0:
                    os.close(descriptor)
        raise StoreError(f"{self.path} keeps being replaced: end the process that does that, then try again")

    def sign(self, address: str) -> None:
        """Write who holds the lock into the file."""
        assert self._descriptor is not None
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, f"{os.getpid()} {address}\n".encode("utf-8", "replace"), 0)

    def holder(self) -> Holder | None:
        """Return what the file says; None if it says nothing (yet)."""
        try:
            with open(self.path, encoding="utf-8", errors="replace") as file:
                pid, _, address = file.readline(4096).rstrip("\n").partition(" ")
            return Holder(int(pid), address)
        except (FileNotFoundError, ValueError):
            return None

    def unlock(self, *, remove: bool = False) -> None:
        """Let go of the lock, with ``remove`` of the file as well. Nothing happens if this object has no lock."""
        if self._descriptor is None:
            return
        descriptor, self._descriptor = self._descriptor, None
        try:
            if self._leads_to(descriptor):
                if remove:
                    os.unlink(self.path)
                else:
                    os.ftruncate(descriptor, 0)
        finally:
            os.close(descriptor)

    def _open(self) -> int:
        return os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def _leads_to(self, descriptor: int) -> bool:
        try:
            found = os.stat(self.path)
        except FileNotFoundError:
            return False
        locked = os.fstat(descriptor)
        return (found.st_dev, found.st_ino) == (locked.st_dev, locked.st_ino)
