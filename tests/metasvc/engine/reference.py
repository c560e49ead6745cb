"""A reference tree: the simplest thing that behaves as POSIX says, to hold the engine against."""

from __future__ import annotations

import errno as E
from dataclasses import dataclass, field

from metasvc.model import RenameFlags


class Refused(Exception):
    """An operation is refused with this errno."""

    def __init__(self, errno: int) -> None:
        super().__init__(errno)
        self.errno = errno


@dataclass(eq=False)
class Node:
    """A file (content) or a directory (entries)."""

    entries: dict[bytes, Node] | None = None
    content: bytearray = field(default_factory=bytearray)
    names: int = 0

    @property
    def is_dir(self) -> bool:
        return self.entries is not None

    def children(self) -> dict[bytes, Node]:
        if self.entries is None:
            raise Refused(E.ENOTDIR)
        return self.entries


class Reference:
    """Directories and files by path (tuples of names)."""

    def __init__(self) -> None:
        self.root = Node(entries={})

    def find(self, path: tuple[bytes, ...]) -> Node:
        node = self.root
        for name in path:
            entries = node.children()
            if name not in entries:
                raise Refused(E.ENOENT)
            node = entries[name]
        return node

    def _parent(self, path: tuple[bytes, ...]) -> dict[bytes, Node]:
        return self.find(path[:-1]).children()

    def make(self, path: tuple[bytes, ...], *, directory: bool) -> None:
        entries = self._parent(path)
        if path[-1] in entries:
            raise Refused(E.EEXIST)
        entries[path[-1]] = Node(entries={} if directory else None, names=1)

    def link(self, source: tuple[bytes, ...], path: tuple[bytes, ...]) -> None:
        node = self.find(source)
        entries = self._parent(path)
        if node.is_dir:
            raise Refused(E.EPERM)
        if path[-1] in entries:
            raise Refused(E.EEXIST)
        entries[path[-1]] = node
        node.names += 1

    def unlink(self, path: tuple[bytes, ...]) -> None:
        entries = self._parent(path)
        if path[-1] not in entries:
            raise Refused(E.ENOENT)
        if entries[path[-1]].is_dir:
            raise Refused(E.EISDIR)
        entries.pop(path[-1]).names -= 1

    def rmdir(self, path: tuple[bytes, ...]) -> None:
        entries = self._parent(path)
        if path[-1] not in entries:
            raise Refused(E.ENOENT)
        if entries[path[-1]].children():
            raise Refused(E.ENOTEMPTY)
        del entries[path[-1]]

    def rename(self, source: tuple[bytes, ...], path: tuple[bytes, ...], flags: RenameFlags) -> None:
        old, new = self._parent(source), self._parent(path)
        if source[-1] not in old:
            raise Refused(E.ENOENT)
        moved, target = old[source[-1]], new.get(path[-1])
        if target is not None and flags & RenameFlags.NOREPLACE:
            raise Refused(E.EEXIST)
        if target is None and flags & RenameFlags.EXCHANGE:
            raise Refused(E.ENOENT)
        if moved.is_dir and self._holds(moved, new):
            raise Refused(E.EINVAL)
        if flags & RenameFlags.EXCHANGE:
            assert target is not None
            if target.is_dir and self._holds(target, old):
                raise Refused(E.EINVAL)
            old[source[-1]], new[path[-1]] = target, moved
            return
        if target is moved:
            return
        if target is not None:
            if target.is_dir and not moved.is_dir:
                raise Refused(E.EISDIR)
            if target.is_dir and target.children():
                raise Refused(E.ENOTEMPTY)
            if moved.is_dir and not target.is_dir:
                raise Refused(E.ENOTDIR)
            target.names -= 1
        del old[source[-1]]
        new[path[-1]] = moved

    def _holds(self, top: Node, entries: dict[bytes, Node]) -> bool:
        """Return whether these entries are those of a directory or of one below it."""
        if top.entries is entries:
            return True
        return any(self._holds(child, entries) for child in top.children().values() if child.is_dir)

    def file(self, path: tuple[bytes, ...]) -> Node:
        node = self.find(path)
        if node.is_dir:
            raise Refused(E.EISDIR)
        return node

    def write(self, path: tuple[bytes, ...], offset: int, data: bytes) -> None:
        content = self.file(path).content
        if len(content) < offset + len(data):
            content.extend(bytes(offset + len(data) - len(content)))
        content[offset : offset + len(data)] = data

    def truncate(self, path: tuple[bytes, ...], size: int) -> None:
        content = self.file(path).content
        if size < len(content):
            del content[size:]
        else:
            content.extend(bytes(size - len(content)))

    def punch(self, path: tuple[bytes, ...], start: int, end: int) -> None:
        content = self.file(path).content
        end = min(end, len(content))
        if start < end:
            content[start:end] = bytes(end - start)

    def copy(self, source: tuple[bytes, ...], start: int, path: tuple[bytes, ...], at: int, length: int) -> None:
        origin, target = self.file(source), self.file(path)
        length = max(0, min(length, len(origin.content) - start))
        if origin is target and start < at + length and at < start + length:
            raise Refused(E.EINVAL)
        if length:
            self.write(path, at, bytes(origin.content[start : start + length]))
