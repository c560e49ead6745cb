"""What the last mount of a volume left on this node: where its cache is, and which slices in it wait for upload.

Owns the file ``mount.json`` in the directory of a holder (client.holder): one JSON object that the mount writes when it
starts and leaves there. Commands that find no holder look there: data that durability ``local`` acknowledged lie in that cache
until the volume is mounted again, and are no loss.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from chunkstore.geometry import SliceId
from client.address import Address, EmbeddedAddress
from metasvc.model import VolumeFormat

if TYPE_CHECKING:
    from chunkstore.slices import ChunkStore
    from metasvc.api.admin import MetaAdmin

RECORD_NAME: Final = "mount.json"
VERSION: Final = 1
MAX_RECORD_BYTES: Final = 64 << 10


@dataclass(frozen=True, slots=True)
class MountRecord:
    """What a mount says of itself."""

    pid: int
    host: str
    mountpoint: str
    cache_dir: str
    """The directory for the caches of all volumes."""
    log_path: str
    started_ns: int


def write_record(directory: str, record: MountRecord) -> None:
    """Replace the record. OSError where the directory cannot be written."""
    path = os.path.join(directory, RECORD_NAME)
    temporary = f"{path}.{os.getpid()}"
    with open(temporary, "w", encoding="ascii", opener=_private) as file:
        json.dump({"version": VERSION, **asdict(record)}, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def read_record(directory: str) -> MountRecord | None:
    """Return what the last mount wrote; None if there was none, or what is there cannot be read."""
    try:
        with open(os.path.join(directory, RECORD_NAME), "rb") as file:
            document = json.loads(file.read(MAX_RECORD_BYTES))
        if document.pop("version") != VERSION:
            return None
        record = MountRecord(**document)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
    texts = (record.host, record.mountpoint, record.cache_dir, record.log_path)
    numbers = (record.pid, record.started_ns)
    sound = all(isinstance(text, str) for text in texts) and all(type(number) is int for number in numbers)
    return record if sound else None


@dataclass(frozen=True, slots=True)
class Staged:
    """Slices that are sealed, maybe committed, and not in the bucket yet."""

    cache_dir: str
    """Where they lie; empty if nothing is known."""
    lengths: Mapping[SliceId, int]

    @property
    def size_bytes(self) -> int:
        """Return how many bytes they are."""
        return sum(self.lengths.values())


def staged_before(address: Address, volume_format: VolumeFormat) -> Staged:
    """Return what earlier mounts left staged in the cache that the last one used; of a service's mounts nothing is known."""
    record = read_record(address.directory) if isinstance(address, EmbeddedAddress) else None
    return Staged("", {}) if record is None else staged_in(Path(record.cache_dir), volume_format)


def staged_in(cache_dir: Path, volume_format: VolumeFormat) -> Staged:
    """Return what is staged in a cache directory. Reads one directory; what cannot be read holds nothing."""
    from chunkstore.images.directory import CacheDirectory
    from chunkstore.images.disk import Disk

    directory = CacheDirectory(cache_dir / volume_format.uuid, block_bytes=volume_format.block_bytes, disk=Disk())
    try:
        names = directory.staged_names()
    except OSError:
        names = []
    return Staged(str(cache_dir), {name.slice_id: name.length for name in names})


async def settle_staged(
    admin: MetaAdmin, chunks: ChunkStore, lengths: Mapping[SliceId, int], staged: Sequence[SliceId], *, log: Any
) -> None:
    """Give up what an earlier mount staged and never committed; what was committed is being uploaded.

    ``lengths`` are those of the staged slices, read before.
    """
    given_up = 0
    for slice_id in staged:
        # A commit of the killed mount may still be on its way: in this order, as in gc.
        if await admin.is_live(slice_id) or await admin.is_pending(slice_id):
            continue
        if not await admin.is_live(slice_id):
            await chunks.delete(slice_id, lengths.get(slice_id, 0))
            given_up += 1
    if staged:
        log.info("data of an earlier mount are uploaded", slices=len(staged) - given_up, never_committed=given_up)
