"""POSIX ACLs as Linux stores them in xattrs, and how they act on modes. Pure functions.

Source: acl(5), POSIX 1003.1e draft 17, and the kernel's include/uapi/linux/posix_acl_xattr.h for the layout:
``u32 version = 2`` then entries ``u16 tag, u16 perm, u32 id``, little-endian.
"""

from __future__ import annotations

import errno as E
import struct
from typing import Final, NamedTuple

from metasvc.errors import FsError

ACCESS: Final = b"system.posix_acl_access"
DEFAULT: Final = b"system.posix_acl_default"

USER_OBJ, USER, GROUP_OBJ, GROUP, MASK, OTHER = 0x01, 0x02, 0x04, 0x08, 0x10, 0x20
_UNDEFINED_ID: Final = 0xFFFFFFFF
_VERSION = struct.Struct("<I")
_ENTRY = struct.Struct("<HHI")


class AclEntry(NamedTuple):
    """One entry: who (tag and id) and which of rwx (4, 2, 1)."""

    tag: int
    perm: int
    id: int


def parse(value: bytes) -> list[AclEntry]:
    """Parse and validate an ACL. EINVAL, EOPNOTSUPP (another version)."""
    if len(value) < 4 or (len(value) - 4) % 8:
        raise FsError(E.EINVAL)
    if _VERSION.unpack_from(value)[0] != 2:
        raise FsError(E.EOPNOTSUPP)
    entries = [AclEntry(*fields) for fields in _ENTRY.iter_unpack(value[4:])]
    tags = [entry.tag for entry in entries]
    if entries:
        if any(tags.count(tag) != 1 for tag in (USER_OBJ, GROUP_OBJ, OTHER)) or tags.count(MASK) > 1:
            raise FsError(E.EINVAL)
        if MASK not in tags and (USER in tags or GROUP in tags):
            raise FsError(E.EINVAL)
        if any(tag not in (USER_OBJ, USER, GROUP_OBJ, GROUP, MASK, OTHER) for tag in tags):
            raise FsError(E.EINVAL)
        if any(entry.perm & ~7 for entry in entries) or tags != sorted(tags):
            raise FsError(E.EINVAL)
    return entries


def pack(entries: list[AclEntry]) -> bytes:
    """Inverse of parse()."""
    return _VERSION.pack(2) + b"".join([_ENTRY.pack(*entry) for entry in entries])


def is_minimal(entries: list[AclEntry]) -> bool:
    """Return whether the permission bits say all that the ACL says."""
    return all(entry.tag in (USER_OBJ, GROUP_OBJ, OTHER) for entry in entries)


def mode_of(entries: list[AclEntry]) -> int:
    """Return the permission bits (0777) that an ACL shows: the mask, if there is one, as group bits."""
    perms = {entry.tag: entry.perm for entry in entries if entry.tag not in (USER, GROUP)}
    return perms[USER_OBJ] << 6 | perms.get(MASK, perms[GROUP_OBJ]) << 3 | perms[OTHER]


def chmod(entries: list[AclEntry], mode: int) -> list[AclEntry]:
    """Return the ACL after chmod: group bits go to the mask if there is one."""
    masked = any(entry.tag == MASK for entry in entries)
    group_tag = MASK if masked else GROUP_OBJ
    bits = {USER_OBJ: mode >> 6 & 7, group_tag: mode >> 3 & 7, OTHER: mode & 7}
    return [entry._replace(perm=bits[entry.tag]) if entry.tag in bits else entry for entry in entries]


def inherit(default: list[AclEntry], mode: int) -> tuple[list[AclEntry], int]:
    """Return access ACL and permission bits of a new inode under a default ACL; the umask does not apply.

    Each class keeps only what both the default ACL and the mode of the create call grant.
    """
    masked = any(entry.tag == MASK for entry in default)
    group_tag = MASK if masked else GROUP_OBJ
    keep = {USER_OBJ: mode >> 6 & 7, group_tag: mode >> 3 & 7, OTHER: mode & 7}
    access = [entry._replace(perm=entry.perm & keep[entry.tag]) if entry.tag in keep else entry for entry in default]
    return access, mode & ~0o777 | mode_of(access)
