"""The virtual files under `.atoll/` at the root: what they are called, and where their content comes from.

Owns names and inode numbers, which lie at the top of the 64-bit range, where the owner of a volume never gets to. Must
not know what is in the files: content is a callable that the composition root injects, or the access log.
"""

from __future__ import annotations

import stat
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from client.vfs.accesslog import AccessLog, AccessLogReader
from metasvc.model import Ino, Inode

DIRECTORY_NAME: Final = b".atoll"
ACCESSLOG_NAME: Final = b"accesslog"
FIRST_INO: Final = Ino((1 << 64) - 4096)
"""The directory; its files follow. Everything from here on is virtual."""


@dataclass(frozen=True, slots=True)
class VirtualFile:
    """Describe one read-only virtual file: `read` is called once per open and must not block."""

    name: bytes
    read: Callable[[], bytes]
    mode: int = 0o444


class VirtualFiles:
    """The directory `.atoll` and what is in it."""

    def __init__(self, files: Sequence[VirtualFile], access_log: AccessLog, *, made_ns: int) -> None:
        """Take the files; the access log is added. `made_ns` is the time that all of them show."""
        self._log = access_log
        self._made_ns = made_ns
        self._files = [*files, VirtualFile(ACCESSLOG_NAME, lambda: b"", 0o400)]
        self._by_name = {file.name: index for index, file in enumerate(self._files)}

    def getattr(self, ino: Ino) -> Inode | None:
        """Return the attributes of a virtual inode; None if there is no such."""
        index = ino - FIRST_INO - 1
        if index == -1:
            return self._inode(ino, stat.S_IFDIR | 0o555, nlink=2)
        if 0 <= index < len(self._files):
            return self._inode(ino, stat.S_IFREG | self._files[index].mode, nlink=1)
        return None

    def _inode(self, ino: Ino, mode: int, *, nlink: int) -> Inode:
        now = self._made_ns
        return Inode(ino, mode, nlink, 0, 0, 0, 0, now, now, now, Ino(0), 0, 0, 0)

    def lookup(self, name: bytes) -> Inode | None:
        """Return the attributes of a file of the directory."""
        index = self._by_name.get(name)
        return None if index is None else self.getattr(Ino(FIRST_INO + 1 + index))

    def names(self) -> list[tuple[bytes, Inode]]:
        """Return names and attributes of all files."""
        found = [(file.name, self.lookup(file.name)) for file in self._files]
        return [(name, inode) for name, inode in found if inode is not None]

    def open(self, ino: Ino) -> bytes | AccessLogReader:
        """Return the content of a file as it is now, or a reader of the access log. KeyError for what is no file."""
        index = ino - FIRST_INO - 1
        if not 0 <= index < len(self._files):
            raise KeyError(ino)
        file = self._files[index]
        return self._log.open() if file.name == ACCESSLOG_NAME else file.read()
