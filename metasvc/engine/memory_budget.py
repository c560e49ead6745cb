"""How much memory the rows of all open volumes of a process may take together.

What it owns: the division of one limit among volumes that each keep two generations of rows (metasvc.engine.memory). It must
not know what a row is.

Rules:

1. A volume may use what the others leave of the limit, and in any case its equal share. So one that is alone uses all of it,
   and no other can take from one that keeps to its share.
2. A volume whose young generation is over half of its allowance drops its old one.
3. If all hold more than the limit, those that hold more than their share drop their old generation, whoever holds most first:
   a volume that holds much because it was alone makes room, although it does nothing itself.

A volume looks when it has grown by a sixty-fourth of its equal share, or by 64 KiB if that is more: so all together may be
over the limit by a few times that much each, and where they are many no look comes sooner than after 90 rows. None drops two
generations in one look, because what an operation has just loaded must be there when it runs.
"""

from __future__ import annotations

from typing import Final, Protocol
from weakref import WeakSet

LOOKS: Final = 64
"""A volume looks at the budget each time it has grown by its equal share divided by this."""
_LEAST_STEP_BYTES: Final = 64 * 1024


class Member(Protocol):
    """The rows of one volume. Estimates, in bytes."""

    @property
    def young_bytes(self) -> int:
        """Return what the rows take that were used since the last turn."""

    @property
    def held_bytes(self) -> int:
        """Return what both generations take."""

    def turn_generation(self) -> None:
        """Drop the old generation; the young one becomes old."""


class MemoryBudget:
    """A limit that several volumes share; members that are no longer used leave by themselves."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self._members: WeakSet[Member] = WeakSet()

    def join(self, member: Member) -> None:
        """Let a volume take part."""
        self._members.add(member)

    @property
    def step_bytes(self) -> int:
        """Return by how much a volume may grow before it looks again."""
        step_bytes = self.limit_bytes // LOOKS
        return max(min(step_bytes, _LEAST_STEP_BYTES), step_bytes // max(1, len(self._members)))

    @property
    def held_bytes(self) -> int:
        """Return what all volumes hold."""
        return sum(member.held_bytes for member in self._members)

    def allowance_bytes(self, member: Member) -> int:
        """Return what a volume may hold now. O(number of volumes)."""
        left = self.limit_bytes - self.held_bytes + member.held_bytes
        return max(left, self.limit_bytes // max(1, len(self._members)))

    def make_room(self, member: Member) -> None:
        """Have old generations dropped as the rules say, because ``member`` has grown. O(n log n) for n volumes."""
        if member.young_bytes > self.allowance_bytes(member) // 2:
            member.turn_generation()
        excess_bytes = self.held_bytes - self.limit_bytes
        if excess_bytes <= 0:
            return
        share_bytes = self.limit_bytes // len(self._members)
        for other in sorted(self._members, key=lambda each: each.held_bytes, reverse=True):
            held_bytes = other.held_bytes
            if excess_bytes <= 0 or held_bytes <= share_bytes:
                break
            if other is not member:
                other.turn_generation()
                excess_bytes -= held_bytes - other.held_bytes
