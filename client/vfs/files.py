"""The files that are open, by inode: one Writing for all handles of an inode, and what is owed to the owner at the end.

Owns how often each inode is open here, and which map version a kernel saw last. An entry leaves the table when nothing has
it open *and* nothing of it is pending: data whose flush failed at the last close stay, are tried again in the background,
and are found by whoever opens the file before that.
"""

from __future__ import annotations

from typing import Any

from chunkstore.errors import AtollError
from client.vfs.writing import Surroundings, Writing
from metasvc.model import Ino, OpenFile


class OpenFiles:
    """The table of open inodes."""

    def __init__(self, around: Surroundings, *, log: Any) -> None:
        """Start with nothing open."""
        self.around = around
        self._log = log
        self._files: dict[Ino, Writing] = {}
        self._opens: dict[Ino, int] = {}
        self._owed: dict[Ino, int] = {}
        """Releases not yet told to the owner, because data of the inode are pending."""
        self._versions: dict[Ino, int] = {}

    def get(self, ino: Ino) -> Writing | None:
        """Return the file if it is open, or has pending data."""
        return self._files.get(ino)

    def __len__(self) -> int:
        return len(self._files)

    def opened(self, opened: OpenFile) -> tuple[Writing, bool]:
        """Count an open; return the file, and whether the pages that a kernel has of it are still good."""
        ino = opened.inode.ino
        file = self._files.get(ino)
        if file is None:
            file = self._files[ino] = Writing(self.around, opened)
            file.pages_version = self._versions.pop(ino, -1)
        else:
            file.reopened(opened)
        is_same = file.pages_version == file.committed.version
        # What is read from now on is of this version, and pages of another one are dropped with the answer.
        file.pages_version = file.committed.version
        self._opens[ino] = self._opens.get(ino, 0) + 1
        return file, is_same

    def is_open_once(self, ino: Ino) -> bool:
        """Return whether a file has one open, and no more."""
        return self._opens.get(ino) == 1

    async def release(self, file: Writing) -> None:
        """Undo one open. At the last one the file is flushed; if that fails the data stay and are tried again. Never raises.

        What close(2) has to report was reported by flush() before: nobody waits for this.
        """
        ino = file.inode.ino
        self._opens[ino] -= 1
        self._owed[ino] = self._owed.get(ino, 0) + 1
        if not self._opens[ino] and file.is_dirty:
            try:
                await file.flush()
            except (AtollError, OSError) as error:
                self._log.warning("flush at close failed, the data are kept", inode=ino, error=str(error))
        await self.settle(file)

    async def settle(self, file: Writing) -> None:
        """Tell the owner of releases, unless the file is closed and has pending data. Called after each flush too."""
        ino = file.inode.ino
        if not self._opens.get(ino):
            if file.is_dirty:
                return
            if self._files.get(ino) is file:
                del self._files[ino]
                self._opens.pop(ino, None)
                if file.pages_version == file.committed.version:
                    self._remember(ino, file.committed.version)
        for _ in range(self._owed.pop(ino, 0)):
            try:
                await self.around.meta.release(ino)
            except AtollError as error:
                # The session is over, or the owner is; what it had open ends with it.
                self._log.warning("a file could not be released", inode=ino, error=str(error))

    def _remember(self, ino: Ino, version: int) -> None:
        versions = self._versions
        if len(versions) >= self.around.options.remembered_versions:
            del versions[next(iter(versions))]
        versions[ino] = version

    def forget_version(self, ino: Ino) -> None:
        """Let the next open of a file drop the pages that a kernel has of it."""
        self._versions.pop(ino, None)
        file = self._files.get(ino)
        if file is not None:
            file.pages_version = -1
