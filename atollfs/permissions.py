"""Who may do what, by owner, group and mode: what a kernel decides for a mount, for this process.

Owns the rules of path_resolution(7), sticky directories included. Pure, but for asking the system who this process is.
Root may everything.

POSIX ACLs are not looked at. Where a file has one, the group bits of its mode are the ACL's mask: members of the owning group
may be let in by this module where the ACL would refuse them, and users whom only the ACL names are refused. None of it keeps
out somebody who means harm: who holds the token of a service, or may open an embedded volume, can say to be anybody.
"""

from __future__ import annotations

import os
import stat
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

from metasvc.model import Inode

READ: Final = 4
WRITE: Final = 2
EXECUTE: Final = 1
_UMASK_FIELD: Final = "Umask:"


@dataclass(frozen=True, slots=True)
class Identity:
    """Credentials of a process."""

    uid: int
    gid: int
    groups: frozenset[int] = frozenset()
    """Supplementary groups."""

    @classmethod
    def of_process(cls) -> Identity:
        """Return the effective user, group and supplementary groups, as they are now. One to three system calls."""
        uid = os.geteuid()
        return cls(uid, os.getegid(), frozenset(os.getgroups()) if uid else frozenset())

    def may(self, inode: Inode, wanted: int) -> bool:
        """Return whether READ, WRITE, EXECUTE (or'ed) are all granted."""
        if self.uid == 0:
            return True
        if inode.uid == self.uid:
            granted = inode.mode >> 6
        elif inode.gid == self.gid or inode.gid in self.groups:
            granted = inode.mode >> 3
        else:
            granted = inode.mode
        return granted & wanted == wanted

    def may_remove(self, directory: Inode, inode: Inode) -> bool:
        """Return whether a sticky directory lets go of this entry; that the directory may be written is asked elsewhere."""
        return not directory.mode & stat.S_ISVTX or self.uid in (0, inode.uid, directory.uid)


def umask() -> int:
    """Return the umask of this process. Reads /proc: asking by umask(2) would change it for other threads.

    0o022 where there is no /proc.
    """
    with suppress(OSError), open("/proc/self/status", encoding="ascii", errors="replace") as status:
        for line in status:
            if line.startswith(_UMASK_FIELD):
                return int(line[len(_UMASK_FIELD) :], 8)
    return 0o022
