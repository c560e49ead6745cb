"""Garbage and trash: objects that nothing needs any more are deleted, names whose time in the trash is up are removed.

Owns the order of the steps: objects first, then the rows that say that they are garbage. A crash in between leaves the rows,
and deleting twice does no harm.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from chunkstore.geometry import block_count, block_key
from metasvc.api.admin import MetaAdmin
from metasvc.model import Garbage, VolumeFormat

GARBAGE_AT_ONCE: Final = 500
TRASH_AT_ONCE: Final = 200
KEYS_AT_ONCE: Final = 1000

DeleteSlices = Callable[[Sequence[Garbage]], Awaitable[None]]
"""Delete the objects of slices."""


class Deleting(Protocol):
    """What is needed of a bucket here."""

    async def delete(self, keys: Sequence[str], *, timeout_s: float | None = None) -> None:
        """Delete objects, at most 1,000; those that are not there are none the less gone."""
        ...


@dataclass(slots=True)
class Collected:
    """What a collection found, and deleted."""

    slices: int = 0
    objects: int = 0


async def expire_trash(admin: MetaAdmin, *, trash_days: float, progress: Callable[[int], None] = lambda _: None) -> int:
    """Remove for good what lies in the trash for longer than ``trash_days``; how many entries."""
    before_ns = time.time_ns() - int(trash_days * 86400e9)
    removed = 0
    while count := await admin.trash_expire(before_ns=before_ns, limit=TRASH_AT_ONCE):
        removed += count
        progress(removed)
    return removed


async def collect_garbage(
    admin: MetaAdmin,
    delete: DeleteSlices,
    *,
    block_bytes: int,
    min_age_s: float = 0.0,
    held_from_ns: int | None = None,
    dry_run: bool = False,
    progress: Callable[[int], None] = lambda _: None,
) -> Collected:
    """Delete the objects of slices that nothing refers to since ``min_age_s``, then forget them. Errors of the bucket.

    What became garbage behind ``held_from_ns`` is left alone: backups may name it (metasvc.jobs.backups). With ``dry_run`` only
    the first 500 are counted: the owner hands out the first rows only, and they stay.
    """
    collected = Collected()
    before_ns = time.time_ns() - int(min_age_s * 1e9)
    if held_from_ns is not None:
        before_ns = min(before_ns, held_from_ns)
    while rows := await admin.garbage(before_ns=before_ns, limit=GARBAGE_AT_ONCE):
        collected.slices += len(rows)
        collected.objects += sum(block_count(row.length, block_bytes) for row in rows)
        if dry_run:
            break
        await delete(rows)
        await admin.garbage_deleted([row.slice_id for row in rows])
        progress(collected.objects)
    return collected


async def delete_objects(bucket: Deleting, volume_format: VolumeFormat, rows: Sequence[Garbage]) -> None:
    """Delete the objects of slices."""
    keys = [
        block_key(volume_format.uuid, row.slice_id, index)
        for row in rows
        for index in range(block_count(row.length, volume_format.block_bytes))
    ]
    for start in range(0, len(keys), KEYS_AT_ONCE):
        await bucket.delete(keys[start : start + KEYS_AT_ONCE])
