"""The same system calls on three trees: the vfs, a directory of this machine's file system, and a model in plain Python.

Each call returns what the call returns, or raises OSError (or AtollError) with its errno. Paths are tuples of names; symbolic
links are never followed. Handles are small numbers that the caller chooses.
"""

from __future__ import annotations

import ctypes
import errno as E
import os
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from client.vfs.vfs import Vfs
from metasvc.model import ROOT_INO, Ino, Inode, RenameFlags, SetAttr
from tests.client.vfs.volumes import ROOT

MKDIR_BITS = 0o1777
"""What a kernel passes on of the mode of mkdir(2)."""
Names = tuple[bytes, ...]
Shown = tuple[Any, ...]
"""What stat says of a file, as far as all trees agree on it."""


def shown(mode: int, nlink: int, uid: int, gid: int, size: int, mtime_ns: int) -> Shown:
    """Cut a stat down to what must be equal: sizes and link counts of directories are each file system's own."""
    if stat.S_ISDIR(mode):
        return stat.S_IFMT(mode), stat.S_IMODE(mode), uid, gid
    # Only times that utimens set are comparable; those are before 1970 + 1000 s.
    set_mtime_ns = mtime_ns if mtime_ns < 1000 * 10**9 else None
    return stat.S_IFMT(mode), stat.S_IMODE(mode), nlink, uid, gid, size, set_mtime_ns


class RealTree:
    """A directory of this machine."""

    def __init__(self, root: Path) -> None:
        self._root = os.fsencode(root)
        self._fds: dict[int, int] = {}
        self._libc = ctypes.CDLL(None, use_errno=True)

    def _path(self, path: Names) -> bytes:
        return b"/".join((self._root, *path))

    async def mkdir(self, path: Names, mode: int) -> None:
        os.mkdir(self._path(path), mode)

    async def rmdir(self, path: Names) -> None:
        os.rmdir(self._path(path))

    async def mkfifo(self, path: Names, mode: int) -> None:
        os.mkfifo(self._path(path), mode)

    async def symlink(self, path: Names, target: bytes) -> None:
        os.symlink(target, self._path(path))

    async def readlink(self, path: Names) -> bytes:
        return os.readlink(self._path(path))

    async def link(self, path: Names, new: Names) -> None:
        os.link(self._path(path), self._path(new), follow_symlinks=False)

    async def unlink(self, path: Names) -> None:
        os.unlink(self._path(path))

    async def rename(self, path: Names, new: Names, flags: int) -> None:
        if self._libc.renameat2(-100, self._path(path), -100, self._path(new), flags):
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))

    async def open(self, slot: int, path: Names, flags: int) -> None:
        self._fds[slot] = os.open(self._path(path), flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o640)

    async def close(self, slot: int) -> None:
        os.close(self._fds.pop(slot))

    async def read(self, slot: int, offset: int, size: int) -> bytes:
        return os.pread(self._fds[slot], size, offset)

    async def write(self, slot: int, offset: int | None, data: bytes) -> int:
        fd = self._fds[slot]
        return os.pwrite(fd, data, os.fstat(fd).st_size if offset is None else offset)

    async def fsync(self, slot: int) -> None:
        os.fsync(self._fds[slot])

    async def truncate(self, path: Names, size: int) -> None:
        os.truncate(self._path(path), size)

    async def chmod(self, path: Names, mode: int) -> None:
        os.chmod(self._path(path), mode)

    async def chown(self, path: Names, uid: int, gid: int) -> None:
        os.chown(self._path(path), uid, gid, follow_symlinks=False)

    async def utime(self, path: Names, mtime_ns: int) -> None:
        os.utime(self._path(path), ns=(mtime_ns, mtime_ns), follow_symlinks=False)

    async def stat(self, path: Names) -> Shown:
        found = os.lstat(self._path(path))
        return shown(found.st_mode, found.st_nlink, found.st_uid, found.st_gid, found.st_size, found.st_mtime_ns)

    async def fstat(self, slot: int) -> Shown:
        found = os.fstat(self._fds[slot])
        return shown(found.st_mode, found.st_nlink, found.st_uid, found.st_gid, found.st_size, found.st_mtime_ns)

    async def readdir(self, path: Names) -> list[tuple[bytes, int]]:
        directory = os.open(self._path(path), os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            modes = {
                name: os.stat(name, dir_fd=directory, follow_symlinks=False).st_mode for name in os.listdir(directory)
            }
        finally:
            os.close(directory)
        return sorted((os.fsencode(name), stat.S_IFMT(mode)) for name, mode in modes.items())

    async def setxattr(self, path: Names, name: bytes, value: bytes, flags: int) -> None:
        os.setxattr(self._path(path), name, value, flags, follow_symlinks=False)

    async def getxattr(self, path: Names, name: bytes) -> bytes:
        return os.getxattr(self._path(path), name, follow_symlinks=False)

    async def removexattr(self, path: Names, name: bytes) -> None:
        os.removexattr(self._path(path), name, follow_symlinks=False)

    async def listxattr(self, path: Names) -> list[str]:
        return sorted(os.listxattr(self._path(path), follow_symlinks=False))


class VfsTree:
    """The vfs, called as a kernel calls it: a lookup for each component, then the call."""

    def __init__(self, vfs: Vfs) -> None:
        self.vfs = vfs
        self._fhs: dict[int, tuple[int, Ino]] = {}

    async def _find(self, path: Names) -> Inode:
        inode = await self.vfs.getattr(ROOT_INO)
        for name in path:
            inode = await self.vfs.lookup(inode.ino, name)
        return inode

    async def _parent(self, path: Names) -> Ino:
        parent = await self._find(path[:-1])
        if not parent.is_dir:
            _refuse(E.ENOTDIR)
        return parent.ino

    async def mkdir(self, path: Names, mode: int) -> None:
        await self.vfs.mkdir(ROOT, await self._parent(path), path[-1], mode=mode & MKDIR_BITS)

    async def rmdir(self, path: Names) -> None:
        await self.vfs.rmdir(ROOT, await self._parent(path), path[-1])

    async def mkfifo(self, path: Names, mode: int) -> None:
        await self.vfs.mknod(ROOT, await self._parent(path), path[-1], mode=stat.S_IFIFO | mode)

    async def symlink(self, path: Names, target: bytes) -> None:
        await self.vfs.symlink(ROOT, await self._parent(path), path[-1], target)

    async def readlink(self, path: Names) -> bytes:
        return await self.vfs.readlink((await self._find(path)).ino)

    async def link(self, path: Names, new: Names) -> None:
        found = await self._find(path)
        await self.vfs.link(ROOT, found.ino, await self._parent(new), new[-1])

    async def unlink(self, path: Names) -> None:
        await self.vfs.unlink(ROOT, await self._parent(path), path[-1])

    async def rename(self, path: Names, new: Names, flags: int) -> None:
        parent, new_parent = await self._parent(path), await self._parent(new)
        await self.vfs.rename(ROOT, parent, path[-1], new_parent, new[-1], flags=flags)

    async def open(self, slot: int, path: Names, flags: int) -> None:
        parent = await self._parent(path)
        try:
            found = await self.vfs.lookup(parent, path[-1])
        except OSError as error:
            raise AssertionError("the vfs raises AtollError only") from error
        except Exception as error:
            if getattr(error, "errno", None) != E.ENOENT or not flags & os.O_CREAT:
                raise
            handle = await self.vfs.create(ROOT, parent, path[-1], mode=0o640, flags=flags)
        else:
            # What a kernel refuses before it asks a file system.
            if flags & os.O_CREAT and flags & os.O_EXCL:
                _refuse(E.EEXIST)
            if found.is_symlink:
                _refuse(E.ELOOP)
            handle = await self.vfs.open(ROOT, found.ino, flags)
        self._fhs[slot] = handle.fh, handle.inode.ino

    async def close(self, slot: int) -> None:
        fh, _ = self._fhs.pop(slot)
        try:
            await self.vfs.flush(fh)
        finally:
            await self.vfs.release(fh)

    async def read(self, slot: int, offset: int, size: int) -> bytes:
        return bytes(await self.vfs.read(self._fhs[slot][0], offset, size))

    async def write(self, slot: int, offset: int | None, data: bytes) -> int:
        return await self.vfs.write(self._fhs[slot][0], offset, data)

    async def fsync(self, slot: int) -> None:
        await self.vfs.fsync(self._fhs[slot][0])

    async def truncate(self, path: Names, size: int) -> None:
        found = await self._find(path)
        if found.is_symlink:
            _refuse(E.ENOENT)  # the target of all symlinks here
        await self.vfs.setattr(ROOT, found.ino, SetAttr(size_bytes=size))

    async def chmod(self, path: Names, mode: int) -> None:
        found = await self._find(path)
        if found.is_symlink:
            _refuse(E.ENOENT)
        await self.vfs.setattr(ROOT, found.ino, SetAttr(mode=mode))

    async def chown(self, path: Names, uid: int, gid: int) -> None:
        await self.vfs.setattr(ROOT, (await self._find(path)).ino, SetAttr(uid=uid, gid=gid))

    async def utime(self, path: Names, mtime_ns: int) -> None:
        await self.vfs.setattr(ROOT, (await self._find(path)).ino, SetAttr(atime_ns=mtime_ns, mtime_ns=mtime_ns))

    async def stat(self, path: Names) -> Shown:
        return self._shown(await self._find(path))

    async def fstat(self, slot: int) -> Shown:
        return self._shown(await self.vfs.getattr(self._fhs[slot][1]))

    def _shown(self, inode: Inode) -> Shown:
        return shown(inode.mode, inode.nlink, inode.uid, inode.gid, inode.size_bytes, inode.mtime_ns)

    async def readdir(self, path: Names) -> list[tuple[bytes, int]]:
        found = await self._find(path)
        if not found.is_dir:
            _refuse(E.ENOTDIR)
        fh = await self.vfs.opendir(found.ino)
        entries: list[tuple[bytes, int]] = []
        cookie = 0
        while page := await self.vfs.readdir(fh, cookie):
            entries += [(entry.name, stat.S_IFMT(entry.inode.mode)) for _, entry in page]
            cookie = page[-1][0]
        await self.vfs.releasedir(fh)
        assert [name for name, _ in entries[:2]] == [b".", b".."]
        return sorted(entries[2:])

    async def setxattr(self, path: Names, name: bytes, value: bytes, flags: int) -> None:
        await self.vfs.setxattr(ROOT, (await self._find(path)).ino, name, value, flags=flags)

    async def getxattr(self, path: Names, name: bytes) -> bytes:
        return await self.vfs.getxattr((await self._find(path)).ino, name)

    async def removexattr(self, path: Names, name: bytes) -> None:
        await self.vfs.removexattr(ROOT, (await self._find(path)).ino, name)

    async def listxattr(self, path: Names) -> list[str]:
        return sorted(os.fsdecode(name) for name in await self.vfs.listxattr((await self._find(path)).ino))


def _refuse(errno: int) -> NoReturn:
    raise OSError(errno, os.strerror(errno))


@dataclass(eq=False)
class Node:
    """A file, directory, fifo or symlink of the model."""

    mode: int
    nlink: int = 1
    uid: int = 0
    gid: int = 0
    mtime_ns: int = 1 << 60
    content: bytearray = field(default_factory=bytearray)
    entries: dict[bytes, Node] = field(default_factory=dict)
    xattrs: dict[bytes, bytes] = field(default_factory=dict)
    is_removed: bool = False

    @property
    def is_dir(self) -> bool:
        return stat.S_ISDIR(self.mode)


class ModelTree:
    """The rules as man pages tell them, in plain Python."""

    def __init__(self) -> None:
        self.root = Node(stat.S_IFDIR | 0o755)
        self._open: dict[int, tuple[Node, int]] = {}

    def paths(self) -> list[Names]:
        """Return the paths of everything."""
        found: list[Names] = []

        def walk(path: Names, node: Node) -> None:
            for name, child in node.entries.items():
                found.append((*path, name))
                walk((*path, name), child)

        walk((), self.root)
        return found

    def symlinks(self) -> set[Names]:
        """Return the paths of symbolic links."""
        return {path for path in self.paths() if stat.S_ISLNK(self._find(path).mode)}

    def _find(self, path: Names) -> Node:
        node = self.root
        for name in path:
            if not node.is_dir:
                _refuse(E.ENOTDIR)
            if len(name) > 255:
                _refuse(E.ENAMETOOLONG)
            if name not in node.entries:
                _refuse(E.ENOENT)
            node = node.entries[name]
        return node

    def _parent(self, path: Names) -> Node:
        node = self._find(path[:-1])
        if not node.is_dir:
            _refuse(E.ENOTDIR)
        if len(path[-1]) > 255:
            _refuse(E.ENAMETOOLONG)
        return node

    def _add(self, path: Names, node: Node) -> None:
        parent = self._parent(path)
        if path[-1] in parent.entries:
            _refuse(E.EEXIST)
        self._inherit(parent, node)
        parent.entries[path[-1]] = node

    def _inherit(self, parent: Node, node: Node) -> None:
        if parent.mode & stat.S_ISGID:
            node.gid = parent.gid
            if node.is_dir:
                node.mode |= stat.S_ISGID

    async def mkdir(self, path: Names, mode: int) -> None:
        self._add(path, Node(stat.S_IFDIR | mode & MKDIR_BITS))

    async def rmdir(self, path: Names) -> None:
        parent, node = self._parent(path), self._find(path)
        if not node.is_dir:
            _refuse(E.ENOTDIR)
        if node.entries:
            _refuse(E.ENOTEMPTY)
        del parent.entries[path[-1]]

    async def mkfifo(self, path: Names, mode: int) -> None:
        self._add(path, Node(stat.S_IFIFO | mode))

    async def symlink(self, path: Names, target: bytes) -> None:
        self._add(path, Node(stat.S_IFLNK | 0o777, content=bytearray(target)))

    async def readlink(self, path: Names) -> bytes:
        node = self._find(path)
        if not stat.S_ISLNK(node.mode):
            _refuse(E.EINVAL)
        return bytes(node.content)

    async def link(self, path: Names, new: Names) -> None:
        node, parent = self._find(path), self._parent(new)
        if new[-1] in parent.entries:
            _refuse(E.EEXIST)
        if node.is_dir:
            _refuse(E.EPERM)
        parent.entries[new[-1]] = node
        node.nlink += 1

    async def unlink(self, path: Names) -> None:
        parent, node = self._parent(path), self._find(path)
        if node.is_dir:
            _refuse(E.EISDIR)
        del parent.entries[path[-1]]
        node.nlink -= 1

    async def rename(self, path: Names, new: Names, flags: int) -> None:
        parent, new_parent = self._parent(path), self._parent(new)
        node = self._find(path)
        there = new_parent.entries.get(new[-1])
        if there is not None and flags & RenameFlags.NOREPLACE:
            _refuse(E.EEXIST)
        if there is None and flags & RenameFlags.EXCHANGE:
            _refuse(E.ENOENT)
        if node.is_dir and self._holds(node, new_parent):
            _refuse(E.EINVAL)
        if there is not None and there.is_dir and self._holds(there, parent):
            _refuse(E.EINVAL if flags & RenameFlags.EXCHANGE else E.ENOTEMPTY)
        if there is node:
            return
        if flags & RenameFlags.EXCHANGE:
            assert there is not None
            parent.entries[path[-1]], new_parent.entries[new[-1]] = there, node
            return
        if there is not None:
            if there.is_dir and not node.is_dir:
                _refuse(E.EISDIR)
            if node.is_dir and not there.is_dir:
                _refuse(E.ENOTDIR)
            if there.entries:
                _refuse(E.ENOTEMPTY)
            there.nlink -= 1
        del parent.entries[path[-1]]
        new_parent.entries[new[-1]] = node

    def _holds(self, top: Node, node: Node) -> bool:
        return top is node or any(child.is_dir and self._holds(child, node) for child in top.entries.values())

    async def open(self, slot: int, path: Names, flags: int) -> None:
        parent = self._parent(path)
        node = parent.entries.get(path[-1])
        if node is None:
            if not flags & os.O_CREAT:
                _refuse(E.ENOENT)
            node = parent.entries[path[-1]] = Node(stat.S_IFREG | 0o640)
            self._inherit(parent, node)
        elif flags & os.O_CREAT and flags & os.O_EXCL:
            _refuse(E.EEXIST)
        elif stat.S_ISLNK(node.mode):
            _refuse(E.ELOOP)
        elif node.is_dir:
            _refuse(E.EISDIR)
        elif flags & os.O_TRUNC:
            node.content.clear()
            node.mtime_ns = 1 << 60
        self._open[slot] = node, flags & os.O_ACCMODE

    async def close(self, slot: int) -> None:
        del self._open[slot]

    async def read(self, slot: int, offset: int, size: int) -> bytes:
        node, access = self._open[slot]
        if access == os.O_WRONLY:
            _refuse(E.EBADF)
        return bytes(node.content[offset : offset + size])

    async def write(self, slot: int, offset: int | None, data: bytes) -> int:
        node, access = self._open[slot]
        if access == os.O_RDONLY:
            _refuse(E.EBADF)
        content = node.content
        start = len(content) if offset is None else offset
        if data:
            content.extend(bytes(max(0, start - len(content))))
            content[start : start + len(data)] = data
            node.mtime_ns = 1 << 60
        return len(data)

    async def fsync(self, slot: int) -> None:
        pass

    async def truncate(self, path: Names, size: int) -> None:
        node = self._find(path)
        if stat.S_ISLNK(node.mode):
            _refuse(E.ENOENT)
        if not stat.S_ISREG(node.mode):
            _refuse(E.EISDIR if node.is_dir else E.EINVAL)
        del node.content[size:]
        node.content.extend(bytes(size - len(node.content)))
        node.mtime_ns = 1 << 60

    async def chmod(self, path: Names, mode: int) -> None:
        node = self._find(path)
        if stat.S_ISLNK(node.mode):
            _refuse(E.ENOENT)
        node.mode = stat.S_IFMT(node.mode) | mode

    async def chown(self, path: Names, uid: int, gid: int) -> None:
        node = self._find(path)
        node.uid, node.gid = uid, gid
        if not node.is_dir:
            node.mode &= ~(0o6000 if node.mode & stat.S_IXGRP else 0o4000)

    async def utime(self, path: Names, mtime_ns: int) -> None:
        self._find(path).mtime_ns = mtime_ns

    async def stat(self, path: Names) -> Shown:
        return self._shown(self._find(path))

    async def fstat(self, slot: int) -> Shown:
        return self._shown(self._open[slot][0])

    def _shown(self, node: Node) -> Shown:
        return shown(node.mode, node.nlink, node.uid, node.gid, len(node.content), node.mtime_ns)

    async def readdir(self, path: Names) -> list[tuple[bytes, int]]:
        node = self._find(path)
        if not node.is_dir:
            _refuse(E.ENOTDIR)
        return sorted((name, stat.S_IFMT(child.mode)) for name, child in node.entries.items())

    async def setxattr(self, path: Names, name: bytes, value: bytes, flags: int) -> None:
        node = self._find(path)
        if not (node.is_dir or stat.S_ISREG(node.mode)):
            _refuse(E.EPERM)
        if flags & os.XATTR_CREATE and name in node.xattrs:
            _refuse(E.EEXIST)
        if flags & os.XATTR_REPLACE and name not in node.xattrs:
            _refuse(E.ENODATA)
        node.xattrs[name] = value

    async def getxattr(self, path: Names, name: bytes) -> bytes:
        node = self._find(path)
        if name not in node.xattrs:
            _refuse(E.ENODATA)
        return node.xattrs[name]

    async def removexattr(self, path: Names, name: bytes) -> None:
        node = self._find(path)
        if name not in node.xattrs:
            _refuse(E.ENODATA)
        del node.xattrs[name]

    async def listxattr(self, path: Names) -> list[str]:
        return sorted(os.fsdecode(name) for name in self._find(path).xattrs)
