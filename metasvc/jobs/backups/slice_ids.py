"""Above which slice id no object of a volume lies: where the ids of one that is restored may begin.

Ids of a loaded volume begin at the time (metasvc.engine.load), which no earlier one has reached by handing them out: that holds
as long as no clock was wrong. Where the bucket is at hand it is asked besides, so that what was written after the backup is
never overwritten, nor taken for something new, whatever the clocks said.
"""

from __future__ import annotations

from typing import Final

from chunkstore.buckets import ObjectStore
from chunkstore.geometry import SLICES_PER_PREFIX

_GROUPS_MAX: Final = (1 << 53) // SLICES_PER_PREFIX
"""No id reaches 2^53, so what looks like a group behind this is none."""


async def first_free_slice(bucket: ObjectStore, uuid: str) -> int:
    """Return a slice id above those of all objects of a volume; 1 if there is none.

    One listing for each group of 2^20 slices of which there are objects: the next group begins behind the last key that one
    can have.
    """
    prefix = f"{uuid}/"
    largest = -1
    after: str | None = None
    while (info := await anext(bucket.list(prefix, start_after=after), None)) is not None:
        name, separator, _ = info.key.removeprefix(prefix).partition("/")
        number = _group(name) if separator else None
        if number is not None:
            largest = max(largest, number)
        after = info.key if number is None else max(info.key, f"{prefix}{name}/~")
    return max(1, (largest + 1) * SLICES_PER_PREFIX)


def _group(name: str) -> int | None:
    """Return the number of a group by its name, None for what is none."""
    try:
        number = int(name, 16)
    except ValueError:
        return None
    return number if f"{number:x}" == name and number < _GROUPS_MAX else None
