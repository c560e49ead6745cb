"""The ownership of a volume, seen from the owner: a lease on its own clock.

Invariant: between two successful renewals the owner acts for at most ``ttl_s`` counted from *before* the
earlier renewal was sent, on a clock that runs on while the machine sleeps (CLOCK_BOOTTIME). The store counts
from when it received it, hence later, so a successor never starts while this owner still answers.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable

from metasvc.errors import Fenced, StoreError
from metasvc.store import Ownership, VolumeStore

OWNER_TTL_S = 10.0


def boottime_s() -> float:
    """Return seconds of CLOCK_BOOTTIME."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class Owner:
    """Holds and renews the ownership of one volume."""

    def __init__(
        self,
        store: VolumeStore,
        ownership: Ownership,
        *,
        address: str,
        sent_s: float,
        ttl_s: float,
        clock_s: Callable[[], float],
    ) -> None:
        self._store = store
        self.ownership = ownership
        self.address = address
        """As others see the owner."""
        self._ttl_s = ttl_s
        self._clock_s = clock_s
        self._ends_s = sent_s + ttl_s

    @classmethod
    async def acquire(
        cls, store: VolumeStore, *, address: str, ttl_s: float = OWNER_TTL_S, clock_s: Callable[[], float] = boottime_s
    ) -> Owner:
        """Take the ownership. NotOwner while another holds it."""
        sent_s = clock_s()
        ownership = await store.acquire(nonce=secrets.token_hex(16), address=address, ttl_s=ttl_s)
        return cls(store, ownership, address=address, sent_s=sent_s, ttl_s=ttl_s, clock_s=clock_s)

    @property
    def remaining_s(self) -> float:
        """Seconds for which this owner may still answer."""
        return self._ends_s - self._clock_s()

    def check(self) -> None:
        """Raise Fenced if the lease has run out: then nothing may be answered, reads included."""
        if self._clock_s() >= self._ends_s:
            raise Fenced("the ownership of the volume ran out: the store did not take its renewal in time")

    async def renew_forever(self) -> None:
        """Renew at a third of the lease. Ends with Fenced when another took over or the lease ran out."""
        while True:
            await asyncio.sleep(self._ttl_s / 3)
            try:
                await self.renew()
            except StoreError:
                self.check()

    async def renew(self) -> None:
        """Renew now. Fenced if another took over since this ownership began; else all changes until now were its own."""
        sent_s = self._clock_s()
        await self._store.renew(self.ownership, ttl_s=self._ttl_s)
        self._ends_s = sent_s + self._ttl_s

    async def release(self) -> None:
        """Give the ownership up; the next owner need not wait."""
        self._ends_s = self._clock_s()
        await self._store.release(self.ownership)
