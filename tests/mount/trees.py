"""File trees for tests: made from a seed, and described so completely that two equal descriptions mean equal trees.

Owns what counts as equal: kind, permissions, owner, size, modification time in ns, content, link target, which names are
one file, and user attributes. Sizes of directories, access and change times are the file system's own business.
"""

from __future__ import annotations

import hashlib
import os
import random
import stat
from pathlib import Path
from typing import Final, NamedTuple

KIB: Final = 1 << 10
MIB: Final = 1 << 20

EDGE_SIZES: Final = (
    *(0, 1, 511, 4095, 4096, 4097),
    *(32 * KIB - 1, 32 * KIB, 32 * KIB + 1),  # around what is stored inline
    *(256 * KIB - 1, 256 * KIB + 1),  # around a frame
    *(4 * MIB - 1, 4 * MIB, 4 * MIB + 1, 9 * MIB + 17),  # around a block, and several
)


class Described(NamedTuple):
    """Describe one name of a tree; `same_file_as` is the first name, in sorted order, of a file with several."""

    kind: str
    mode: int
    uid: int
    gid: int
    size_bytes: int
    mtime_ns: int
    content: str
    same_file_as: bytes
    attributes: tuple[tuple[str, bytes], ...]


def describe(root: Path) -> dict[bytes, Described]:
    """Return a description of every name below `root`, by its path relative to it; the root itself is `.`."""
    top = os.fsencode(root)
    names = [b"."]
    for directory, subdirectories, files in os.walk(top):
        names += [os.path.relpath(os.path.join(directory, name), top) for name in (*subdirectories, *files)]
    first_names: dict[tuple[int, int], bytes] = {}
    described = {}
    for name in sorted(names):
        path = os.path.join(top, name)
        status = os.lstat(path)
        if stat.S_ISREG(status.st_mode):
            with open(path, "rb") as file:
                content = hashlib.file_digest(file, "sha256").hexdigest()
        elif stat.S_ISLNK(status.st_mode):
            content = os.fsdecode(os.readlink(path))
        else:
            content = ""
        is_directory = stat.S_ISDIR(status.st_mode)
        described[name] = Described(
            kind=stat.filemode(status.st_mode)[0],
            mode=stat.S_IMODE(status.st_mode),
            uid=status.st_uid,
            gid=status.st_gid,
            size_bytes=0 if is_directory else status.st_size,
            mtime_ns=status.st_mtime_ns,
            content=content,
            same_file_as=name if is_directory else first_names.setdefault((status.st_dev, status.st_ino), name),
            attributes=tuple(
                (key, os.getxattr(path, key, follow_symlinks=False))
                for key in sorted(os.listxattr(path, follow_symlinks=False))
                if key.startswith(("user.", "system.posix_acl"))
            ),
        )
    return described


def differences(expected: dict[bytes, Described], actual: dict[bytes, Described]) -> list[str]:
    """Return one line for each name that differs, for an assertion that a person can read."""
    lines = []
    for name in sorted(expected.keys() | actual.keys()):
        before, after = expected.get(name), actual.get(name)
        if before is None or after is None:
            lines.append(f"{name!r}: {'missing' if after is None else 'not expected'}")
        elif before != after:
            changed = [
                f"{field} {old!r} -> {new!r}"
                for field, old, new in zip(Described._fields, before, after, strict=True)
                if old != new
            ]
            lines.append(f"{name!r}: {', '.join(changed)}")
    return lines


def make_tree(root: Path, rng: random.Random) -> None:
    """Make a tree that has one of everything an archiver must bring over.

    Sizes stand around the edges of inline data, frames and blocks; contents are half random, half compressible. Needs no
    root: owners are the caller's.
    """
    root.mkdir()
    directories = [root]
    for number in range(20):
        directory = rng.choice(directories) / f"directory {number}"
        directory.mkdir()
        directories.append(directory)
    (root / "empty directory").mkdir()
    sizes = [*EDGE_SIZES, *(int(rng.paretovariate(0.6) * 100) % (200 * KIB) for _ in range(150))]
    files = []
    for number, size_bytes in enumerate(sizes):
        file = rng.choice(directories) / f"file-{number:03}-{size_bytes}"
        file.write_bytes(rng.randbytes(size_bytes) if number % 2 else (b"%d " % number * size_bytes)[:size_bytes])
        file.chmod(rng.choice((0o644, 0o600, 0o755, 0o440, 0o666)))
        files.append(file)
    with (root / "sparse").open("wb") as sparse:
        sparse.write(b"head")
        sparse.seek(70 * MIB)  # past the first chunk
        sparse.write(b"tail")
        sparse.truncate(80 * MIB)
    with open(os.path.join(os.fsencode(root), b"not \xff\xfe utf-8 \n\t'\"\\"), "wb") as odd_name:
        odd_name.write(b"names are bytes")
    (root / ("long-" + "n" * 250)).write_bytes(b"255 bytes of name")
    for number, target in enumerate(("file-that-is-not-there", ".", "../" * 3, "t" * 1000)):
        (root / f"link-{number}").symlink_to(target)
    for number, file in enumerate(rng.sample(files, 10)):
        os.link(file, rng.choice(directories) / f"hard-link-{number}")
    for file in rng.sample(files, 10):
        os.setxattr(file, "user.kind", rng.randbytes(rng.randrange(1, 200)))
    os.setxattr(directories[1], "user.empty", b"")
    os.mkfifo(root / "fifo")
    directories[2].chmod(0o2775)
    set_times(root, rng)


def set_times(root: Path, rng: random.Random) -> None:
    """Give every name of a tree a modification time of its own, from 2001 to 2033, down to the ns.

    For programs that compare whole seconds only, as rsync does for directories. From the leaves up, so that nothing undoes it.
    """
    for directory, subdirectories, names in os.walk(os.fsencode(root), topdown=False):
        below = [os.path.join(directory, name) for name in sorted((*subdirectories, *names))]
        for name in (*(path for path in below if os.path.islink(path) or not os.path.isdir(path)), directory):
            modified_ns = rng.randrange(1_000_000_000, 2_000_000_000) * 10**9 + rng.randrange(10**9)
            os.utime(name, ns=(modified_ns, modified_ns), follow_symlinks=False)
