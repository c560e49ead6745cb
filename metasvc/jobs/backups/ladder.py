"""Which backups stay: many of the last day, fewer of the last month, some of the last year.

Pure. A ladder has rungs; each divides time into slots of one length, counted from 1970, and reaches back for so long. In each
slot that a rung reaches the *oldest* backup stays. Slots of a rung are whole numbers of those of the rung before, so the oldest
of a week is the oldest of its day and of its hour, too: it is not removed on its way up, however often the ladder is applied.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

HOUR_S: Final = 3600
DAY_S: Final = 24 * HOUR_S


@dataclass(frozen=True, slots=True)
class Rung:
    """One backup in each ``every_s``, for ``for_s``."""

    every_s: int
    for_s: int


LADDER: Final = (Rung(HOUR_S, DAY_S), Rung(DAY_S, 30 * DAY_S), Rung(7 * DAY_S, 364 * DAY_S))
"""Hourly for a day, daily for 30 days, weekly for a year: about 106 backups."""


def to_remove(made_ns: Mapping[str, int], *, now_ns: int, ladder: Sequence[Rung] = LADDER) -> set[str]:
    """Return the names of the backups that do not stay; ``made_ns`` has the time of each by its name.

    Never the newest. A slot is reached as long as its end is; the future is (a clock was set back).
    """
    ordered = sorted(made_ns, key=lambda name: (made_ns[name], name))
    stay = set(ordered[-1:])
    for rung in ladder:
        slot_ns = rung.every_s * 1_000_000_000
        reached_ns = now_ns - rung.for_s * 1_000_000_000
        taken: set[int] = set()
        for name in ordered:
            slot = made_ns[name] // slot_ns
            if (slot + 1) * slot_ns > reached_ns and slot not in taken:
                taken.add(slot)
                stay.add(name)
    return set(ordered) - stay
