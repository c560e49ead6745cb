"""A cache directory: one per volume, locked by one process, with a version.

Owns the names of its files and nothing of what is in them, except `format`. Plain blocking calls: runs on the disk executor.

    {cache dir}/{volume uuid}/
        lock      flock of the process that uses it, with its pid as text
        format    magic, version and block size; written once, fsynced
        images/   `{slice:x}-{length:x}-{check:08x}` small, `{slice:x}-{length:x}` big
        sides/    `{slice:x}`: side files of big images, here, in new/ and in staged/
        new/      `{slice:x}`: slices being written; emptied at start, as nothing names their bytes
        staged/   `{slice:x}-{length:x}-{root digest:032x}`: sealed, not uploaded; never evicted
        damaged/  staged images whose bytes are no longer what was sealed, kept for whoever wants to look

Crash: `format` is complete before anything else is made. Names in images/ and sides/ need no sync, as losing one is a miss.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path
from struct import Struct
from typing import Final, NamedTuple

from chunkstore.block import DIGEST_BYTES, digest
from chunkstore.errors import AtollError, FormatUnsupported
from chunkstore.geometry import SliceId
from chunkstore.images.disk import Disk
from chunkstore.images.layout import is_small
from chunkstore.model import SliceInfo

log = logging.getLogger(__name__)

MAGIC: Final = b"ATLC"
VERSION: Final = 1
CHECK_BYTES: Final = 4

# magic, version, flags, block bytes
_FORMAT: Final = Struct("<4sHHI")
_FORMAT_BYTES: Final = _FORMAT.size + DIGEST_BYTES

_IMAGE_NAME: Final = re.compile(r"([0-9a-f]+)-([0-9a-f]+)(?:-([0-9a-f]{8}))?")
_STAGED_NAME: Final = re.compile(r"([0-9a-f]+)-([0-9a-f]+)-([0-9a-f]{32})")
_SUBDIRECTORIES: Final = ("images", "sides", "new", "staged", "damaged")


class CacheLocked(AtollError):
    """Say that another process uses this cache directory."""

    errno = errno.EBUSY
    code = "cache-locked"


class ImageName(NamedTuple):
    """Say what the name of an image says; `check` is None for a big one, else the first 4 bytes of its block digest."""

    slice_id: SliceId
    length: int
    check: int | None


class StagedName(NamedTuple):
    """Say what the name of a staged image says; `root` is `root_of` its block digests."""

    slice_id: SliceId
    length: int
    root: bytes


def check_of(info: SliceInfo, block_bytes: int) -> int | None:
    """Return the check in the name of a slice's image, None for a big one."""
    return int.from_bytes(info.digests[:CHECK_BYTES], "big") if is_small(info.length, block_bytes) else None


def root_of(digests: bytes) -> bytes:
    """Return the digest that stands for all block digests of a slice; of a single block that is its own."""
    return digests if len(digests) == DIGEST_BYTES else digest(digests)


class CacheDirectory:
    """Lock, make and name the files of one volume's cache."""

    def __init__(self, root: Path, *, block_bytes: int, disk: Disk) -> None:
        """Take the directory of the volume. Touches nothing."""
        self.root = root
        self._block_bytes = block_bytes
        self._disk = disk
        self._lock: int | None = None
        base = str(root)
        self.images = f"{base}/images"
        self.sides = f"{base}/sides"
        self.new = f"{base}/new"
        self.staged = f"{base}/staged"
        self.damaged = f"{base}/damaged"

    def open(self) -> None:
        """Make the directory if need be, lock it, check its version, empty new/.

        CacheLocked names the process that has it. A directory of a newer or unknown format is set aside under another name
        and an empty one made, unless it holds staged slices: FormatUnsupported. OSError where it cannot be written.
        """
        self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._lock = self._take_lock()
        try:
            if (reason := self._why_unusable()) is not None:
                self._set_aside(reason)
            self._make()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Let go of the lock."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def image(self, slice_id: SliceId, length: int, check: int | None) -> str:
        """Return the path of an image; `check` None for a big one."""
        name = f"{slice_id:x}-{length:x}" if check is None else f"{slice_id:x}-{length:x}-{check:08x}"
        return f"{self.images}/{name}"

    def side(self, slice_id: SliceId) -> str:
        """Return the path of the side file of a big image."""
        return f"{self.sides}/{slice_id:x}"

    def draft(self, slice_id: SliceId) -> str:
        """Return the path of a slice that is being written."""
        return f"{self.new}/{slice_id:x}"

    def staged_image(self, name: StagedName) -> str:
        """Return the path of a staged image."""
        return f"{self.staged}/{name.slice_id:x}-{name.length:x}-{name.root.hex()}"

    def damaged_image(self, name: StagedName) -> str:
        """Return where a staged image goes that is damaged."""
        return f"{self.damaged}/{name.slice_id:x}-{name.length:x}-{name.root.hex()}"

    def image_names(self) -> Iterator[ImageName]:
        """Yield what lies in images/. 1 us each; reads no file."""
        parse = _IMAGE_NAME.fullmatch
        for name in self._disk.names(self.images):
            if (match := parse(name)) is not None:
                slice_hex, length_hex, check = match.groups()
                yield ImageName(
                    SliceId(int(slice_hex, 16)), int(length_hex, 16), None if check is None else int(check, 16)
                )

    def side_ids(self) -> Iterator[SliceId]:
        """Yield the slices that have a side file."""
        for name in self._disk.names(self.sides):
            if re.fullmatch(r"[0-9a-f]+", name):
                yield SliceId(int(name, 16))

    def staged_names(self) -> list[StagedName]:
        """Return what is staged, in order of slice ids."""
        found = [
            StagedName(SliceId(int(match[1], 16)), int(match[2], 16), bytes.fromhex(match[3]))
            for name in self._disk.names(self.staged)
            if (match := _STAGED_NAME.fullmatch(name)) is not None
        ]
        return sorted(found)

    def _take_lock(self) -> int:
        path = f"{self.root}/lock"
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.pread(descriptor, 32, 0).decode(errors="replace").strip() or "unknown"
            os.close(descriptor)
            raise CacheLocked(
                f"cache directory {self.root} is in use by process {holder}: unmount there, or give another --cache-dir"
            ) from error
        except BaseException:
            os.close(descriptor)
            raise
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, b"%d\n" % os.getpid(), 0)
        return descriptor

    def _why_unusable(self) -> str | None:
        """Return why what is in the directory cannot be used, None if it can (an empty one, too)."""
        try:
            data = Path(f"{self.root}/format").read_bytes()
        except FileNotFoundError:
            # `format` comes first, so what is here without one is not ours.
            strangers = [name for name in self._disk.names(str(self.root)) if not name.startswith("lock")]
            return "it has files but no format" if strangers else None
        if len(data) != _FORMAT_BYTES or data[: len(MAGIC)] != MAGIC:
            return "its format file is damaged"
        _, version, flags, block_bytes = _FORMAT.unpack_from(data)
        if digest(data[: _FORMAT.size]) != data[_FORMAT.size :]:
            return "its format file is damaged"
        if version > VERSION or flags:
            return f"its format {version} was written by a newer version"
        if block_bytes != self._block_bytes:
            return f"it was made for blocks of {block_bytes} bytes"
        return None

    def _set_aside(self, reason: str) -> None:
        """Move the directory away and start with an empty one; refused where it holds the only copy of something."""
        try:
            holds_staged = any(True for _ in self._disk.names(self.staged))
        except FileNotFoundError:
            holds_staged = False
        if holds_staged:
            raise FormatUnsupported(
                f"cache directory {self.root} cannot be used ({reason}) and holds data that are not uploaded: "
                "mount once with the version that wrote it, or move the directory away to give them up"
            )
        number = 1
        while os.path.exists(aside := f"{self.root}.aside-{number}"):
            number += 1
        os.rename(self.root, aside)
        log.warning("cache directory %s cannot be used (%s): moved to %s, delete it", self.root, reason, aside)
        self.close()
        self.root.mkdir(mode=0o700)
        self._lock = self._take_lock()

    def _make(self) -> None:
        path = f"{self.root}/format"
        if not os.path.exists(path):
            head = _FORMAT.pack(MAGIC, VERSION, 0, self._block_bytes)
            temporary = f"{self.root}/lock.format"
            descriptor = self._disk.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            try:
                self._disk.pwrite(descriptor, head + digest(head), 0)
                self._disk.datasync(descriptor)
            finally:
                self._disk.close(descriptor)
            self._disk.rename(temporary, path)
        for name in _SUBDIRECTORIES:
            self._disk.make_directory(f"{self.root}/{name}")
        # Staged data are promised to survive, so the path to them must.
        self._disk.sync_directory(str(self.root))
        self._disk.sync_directory(str(self.root.parent))
        for name in self._disk.names(self.new):
            self._disk.unlink(f"{self.new}/{name}")
