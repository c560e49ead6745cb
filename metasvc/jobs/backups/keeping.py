"""The job of an owner: a backup when one is due, fewer of those that grow old, and which garbage waits for them.

Owns the list of backups, as far as this owner knows it (the package's text says why that is enough), when the next one is due,
and rests after failures, each twice as long as the one before. One task makes backups, another one asks which garbage waits;
between their awaits they share nothing but that list.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Final

from chunkstore.errors import AtollError
from metasvc.jobs.backups.ladder import DAY_S, to_remove
from metasvc.jobs.backups.making import make_backup
from metasvc.jobs.backups.shelf import Manifest, Shelf
from metasvc.model import DumpPart

WINDOW_S: Final = DAY_S
"""What a backup promises where nobody says: as long as the trash keeps by default."""
CLOCKS_APART_S: Final = 15 * 60
LOOK_S: Final = 600.0
PARTS_AGE_S: Final = float(DAY_S)
FIRST_REST_S: Final = 60.0
"""After a first failure; then twice as long each time, up to the interval of backups."""
AT_ONCE: Final = 2
"""Backups that a process makes at a time: each takes a core."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BackupPolicy:
    """How often, and for how long objects are kept for them."""

    every_s: float
    window_s: int = WINDOW_S
    clocks_apart_s: float = CLOCKS_APART_S


def held_from_ns(
    backups: Sequence[Manifest],
    *,
    now_ns: int,
    goes_on: bool,
    clocks_apart_s: float = CLOCKS_APART_S,
) -> int | None:
    """Return the time behind which garbage waits; None if none does. See the package's text.

    ``goes_on``: backups are being made, so the newest one is protected however old it is, and while there is none all waits.
    """
    protected = [each.made_ns for each in backups if each.kept_until_ns >= now_ns]
    if goes_on:
        protected.append(max((each.made_ns for each in backups), default=0))
    if not protected:
        return None
    return min(protected) - int(clocks_apart_s * 1e9)


class Backups:
    """The backups of one volume, for the process that owns it now."""

    def __init__(
        self,
        shelf: Callable[[], Awaitable[Shelf]],
        dump: Callable[[], AsyncGenerator[DumpPart, None]],
        *,
        policy: BackupPolicy | None,
        check_owned: Callable[[], None],
        log: Any,
        turn: asyncio.Semaphore | None = None,
        clock_ns: Callable[[], int] = time.time_ns,
        clock_s: Callable[[], float] = time.monotonic,
    ) -> None:
        """Without a policy none are made, and what is promised is kept. ``turn`` bounds how many are made at a time.

        ``shelf`` may raise what opening the bucket raises.
        """
        self.policy = policy
        self._shelf = shelf
        self._dump = dump
        self._check_owned = check_owned
        self._log = log
        self._turn = turn
        self._clock_ns = clock_ns
        self._clock_s = clock_s
        self._known: list[Manifest] | None = None
        self._looked_s = -math.inf
        self._not_before_s = -math.inf
        self._rest_s = FIRST_REST_S
        self._swept_s = -math.inf

    async def held_from_ns(self) -> int | None:
        """Return the time behind which garbage waits now. Errors of the bucket, and of its manifests: delete nothing then."""
        policy = self.policy
        if policy is None:
            if self._clock_s() - self._looked_s >= LOOK_S:
                await self._look()
            return held_from_ns(self._known or (), now_ns=self._clock_ns(), goes_on=False)
        known = await self._look() if self._known is None else self._known
        return held_from_ns(known, now_ns=self._clock_ns(), goes_on=True, clocks_apart_s=policy.clocks_apart_s)

    async def back_up(self) -> int:
        """Make a backup if one is due; how many were made. Errors of the dump and of the bucket: it is tried again later."""
        assert self.policy is not None
        if self._clock_s() < self._not_before_s:
            return 0
        try:
            known = await self._look() if self._known is None else self._known
            if not self._is_due(known):
                return 0
            async with self._turn or nullcontext():
                await self._make()
            await self._tidy()
        except Exception:
            self._not_before_s = self._clock_s() + self._rest_s
            self._rest_s = min(2 * self._rest_s, max(FIRST_REST_S, self.policy.every_s))
            raise
        self._rest_s = FIRST_REST_S
        return 1

    def gauges(self) -> dict[str, float]:
        """Return what there is now, by the names of metrics without their prefix.

        The age is infinite while there is no backup, or the bucket has not told yet.
        """
        known = self._known or ()
        return {
            "backup_age_seconds": (max(0.0, (self._clock_ns() - known[-1].made_ns) / 1e9) if known else math.inf),
            "backup_size_bytes": known[-1].size_bytes if known else 0,
            "backups": len(known),
        }

    async def _look(self) -> list[Manifest]:
        self._known = await (await self._shelf()).manifests(self._known or ())
        self._looked_s = self._clock_s()
        return self._known

    def _is_due(self, known: Sequence[Manifest]) -> bool:
        assert self.policy is not None
        if not known:
            return True
        age_s = (self._clock_ns() - known[-1].made_ns) / 1e9
        # One from the future: the clock was set back.
        return age_s >= self.policy.every_s or age_s < -self.policy.clocks_apart_s

    async def _make(self) -> None:
        assert self.policy is not None
        began_s = self._clock_s()
        made = await make_backup(
            await self._shelf(),
            self._dump,
            window_s=self.policy.window_s,
            check_owned=self._check_owned,
            clock_ns=self._clock_ns,
        )
        # No await since the manifest is there: who asks which garbage waits sees it.
        self._known = sorted([*(self._known or ()), made], key=lambda each: (each.made_ns, each.name))
        self._log.info(
            "backup made",
            backup=made.name,
            inodes=made.inodes,
            rows=made.rows,
            bytes=made.size_bytes,
            seconds=round(self._clock_s() - began_s, 3),
        )

    async def _tidy(self) -> None:
        """Remove backups that the ladder drops and, once a day, parts that belong to none. What stays goes the next time."""
        try:
            shelf = await self._shelf()
            known = await self._look()
            dropped = to_remove({each.name: each.made_ns for each in known}, now_ns=self._clock_ns())
            for name in sorted(dropped):
                await shelf.remove(name)
                self._known = [each for each in self._known or () if each.name != name]
            if self._clock_s() - self._swept_s >= PARTS_AGE_S:
                await self._sweep(shelf)
                self._swept_s = self._clock_s()
        except AtollError as error:
            # The backup was made, which is what counts.
            self._log.warning("old backups are removed later", code=error.code, error=str(error))

    async def _sweep(self, shelf: Shelf) -> None:
        old_ns = self._clock_ns() - int(PARTS_AGE_S * 1e9)
        for name, mtime_ns in await shelf.partial():
            if mtime_ns < old_ns:
                await shelf.remove_parts(name)
                self._log.info("what was left of a backup that was not finished is removed", backup=name)
