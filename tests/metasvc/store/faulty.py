"""A store that is slow, fails or dies where a test says so, around any other store.

    faults = Faults(seed=7, max_yields=5)              # every call is delayed, differently each time, the same for a seed
    store = FaultyStore(MemoryStore(), faults)
    faults.fail("commit")                              # the next commit raises StoreError and is not applied
    faults.fail("commit", nth=3, when="after")         # the third from now raises StoreError although it is durable
    held = faults.hold("load", when="after")           # the next load has read its rows but does not return yet
    await held.reached(); ...; held.release()
    faults.die(nth=10)                                 # the tenth call from now and all later ones raise, unapplied
    faults.chances(before=0.1, after=0.1)              # random failures of commits, by the seed

Faults are counted in calls of the methods of VolumeStore ("acquire", "renew", "release", "commit", "last_batch", "load",
"scan_dir", "scan", "put_format"); the methods of Store and close() pass through. All handles opened from one FaultyStore
share its Faults. ``faults.calls`` counts the calls by method, for tests about the number of round trips.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeVar

from metasvc.errors import StoreError
from metasvc.model import Dentry, Inode, VolumeFormat
from metasvc.store import Loaded, Ownership, Store, VolumeStore
from metasvc.store.tables import Batch, Key, Row, Table

T = TypeVar("T")

When = Literal["before", "after"]
"""Of a fault: before the inner call (nothing is applied) or after it (it is)."""


class Hold:
    """One call that waits in the middle until the test lets it go on."""

    def __init__(self) -> None:
        self._reached = asyncio.Event()
        self._released = asyncio.Event()

    async def reached(self) -> None:
        """Wait until the call is there. Raises TimeoutError after 10 s: the call never came."""
        async with asyncio.timeout(10):
            await self._reached.wait()

    def release(self) -> None:
        """Let the call go on. May be called before the call is there."""
        self._released.set()

    async def wait_here(self) -> None:
        """Called by the store."""
        self._reached.set()
        await self._released.wait()


@dataclass(slots=True)
class _Planned:
    """What happens at one call of a method; counted down by ``nth``."""

    method: str
    nth: int
    when: When
    action: Exception | Hold


@dataclass(slots=True)
class Faults:
    """The plan of what goes wrong. All randomness comes from ``seed``."""

    seed: int = 0
    max_yields: int = 0
    """Each call yields to the loop 0 to this many times before the inner call, and again after it."""
    sleep: Callable[[float], Awaitable[None]] | None = None
    """With VirtualClock.sleep: each call waits 0 to max_delay_s before and again after."""
    max_delay_s: float = 0.0
    calls: Counter[str] = field(default_factory=Counter)
    dead: bool = False
    """Every call raises StoreError. Set it, or let die() do it."""
    _random: random.Random = field(init=False)
    _planned: list[_Planned] = field(default_factory=list)
    _calls_to_death: int = 0
    _death: When = "before"
    _chance_before: float = 0.0
    _chance_after: float = 0.0

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)

    def fail(self, method: str, *, nth: int = 1, when: When = "before", error: Exception | None = None) -> None:
        """Let the nth call of a method from now on raise: a StoreError unless ``error`` is given."""
        self._planned.append(_Planned(method, nth, when, error or StoreError(f"injected: {method} failed {when}")))

    def hold(self, method: str, *, nth: int = 1, when: When = "before") -> Hold:
        """Let the nth call of a method from now on wait for Hold.release()."""
        hold = Hold()
        self._planned.append(_Planned(method, nth, when, hold))
        return hold

    def die(self, *, nth: int = 1, when: When = "before") -> None:
        """Let the nth call from now on, of any method, and all later ones raise StoreError.

        With ``when="after"`` the nth call itself is still applied.
        """
        self._calls_to_death, self._death = nth, when

    def chances(self, *, before: float = 0.0, after: float = 0.0) -> None:
        """Let commits fail with these probabilities, unapplied and applied; chances() stops that."""
        self._chance_before, self._chance_after = before, after

    async def around(self, method: str, call: Callable[[], Awaitable[T]]) -> T:
        """Run one call of the inner store with the faults that are due."""
        self.calls[method] += 1
        dies = self._counts_down_to_death()
        due = self._due(method)
        await self._delay()
        await self._strike(method, due, "before", dies=dies)
        result = await call()
        await self._delay()
        await self._strike(method, due, "after", dies=dies)
        return result

    def _counts_down_to_death(self) -> bool:
        if self._calls_to_death == 0:
            return False
        self._calls_to_death -= 1
        return self._calls_to_death == 0

    def _due(self, method: str) -> list[_Planned]:
        due: list[_Planned] = []
        for planned in self._planned:
            if planned.method == method:
                planned.nth -= 1
                if planned.nth == 0:
                    due.append(planned)
        self._planned = [planned for planned in self._planned if planned.nth > 0]
        return due

    async def _strike(self, method: str, due: Sequence[_Planned], when: When, *, dies: bool) -> None:
        for planned in due:
            if planned.when == when and isinstance(planned.action, Hold):
                await planned.action.wait_here()
        if dies and self._death == when:
            self.dead = True
        if self.dead:
            raise StoreError("injected: the store is dead")
        for planned in due:
            if planned.when == when and isinstance(planned.action, Exception):
                raise planned.action
        chance = self._chance_before if when == "before" else self._chance_after
        if method == "commit" and chance and self._random.random() < chance:
            raise StoreError(f"injected: commit failed {when}")

    async def _delay(self) -> None:
        if self.max_yields:
            for _ in range(self._random.randint(0, self.max_yields)):
                await asyncio.sleep(0)
        if self.sleep is not None:
            await self.sleep(self._random.uniform(0, self.max_delay_s))


class FaultyVolume:
    """A handle around another handle: metasvc.store.VolumeStore."""

    def __init__(self, inner: VolumeStore, faults: Faults) -> None:
        self._inner = inner
        self._faults = faults

    @property
    def format(self) -> VolumeFormat:
        return self._inner.format

    async def acquire(self, *, nonce: str, address: str, ttl_s: float) -> Ownership:
        return await self._faults.around(
            "acquire", lambda: self._inner.acquire(nonce=nonce, address=address, ttl_s=ttl_s)
        )

    async def renew(self, ownership: Ownership, *, ttl_s: float) -> None:
        await self._faults.around("renew", lambda: self._inner.renew(ownership, ttl_s=ttl_s))

    async def release(self, ownership: Ownership) -> None:
        await self._faults.around("release", lambda: self._inner.release(ownership))

    async def commit(self, ownership: Ownership, number: int, batch: Batch, *, here: bool = False) -> None:
        await self._faults.around("commit", lambda: self._inner.commit(ownership, number, batch, here=here))

    async def last_batch(self, ownership: Ownership) -> int:
        return await self._faults.around("last_batch", lambda: self._inner.last_batch(ownership))

    async def load(self, keys: dict[Table, list[Key]], groups: dict[Table, list[int]]) -> Loaded:
        return await self._faults.around("load", lambda: self._inner.load(keys, groups))

    async def scan_dir(self, parent: int, *, after: bytes | None, limit: int) -> list[tuple[Dentry, Inode | None]]:
        return await self._faults.around("scan_dir", lambda: self._inner.scan_dir(parent, after=after, limit=limit))

    async def scan(self, table: Table, *, after: Key | None, limit: int) -> list[Row]:
        return await self._faults.around("scan", lambda: self._inner.scan(table, after=after, limit=limit))

    async def put_format(self, ownership: Ownership, volume_format: VolumeFormat) -> None:
        await self._faults.around("put_format", lambda: self._inner.put_format(ownership, volume_format))

    async def close(self) -> None:
        await self._inner.close()


class FaultyStore:
    """A store around another store: metasvc.store.Store."""

    def __init__(self, inner: Store, faults: Faults) -> None:
        self._inner = inner
        self.faults = faults

    async def create_volume(self, volume_format: VolumeFormat, rows: Batch) -> None:
        await self._inner.create_volume(volume_format, rows)

    async def open_volume(self, tenant: str, name: str) -> FaultyVolume:
        return FaultyVolume(await self._inner.open_volume(tenant, name), self.faults)

    async def list_volumes(self) -> Sequence[VolumeFormat]:
        return await self._inner.list_volumes()

    async def delete_volume(self, tenant: str, name: str) -> None:
        await self._inner.delete_volume(tenant, name)

    async def setting(self, name: str) -> bytes | None:
        return await self._inner.setting(name)

    async def create_setting(self, name: str, value: bytes) -> bool:
        return await self._inner.create_setting(name, value)

    async def remove_tenant(self, name: str) -> bool:
        return await self._inner.remove_tenant(name)

    async def settings(self, prefix: str) -> dict[str, bytes]:
        return await self._inner.settings(prefix)

    async def replace_setting(self, name: str, value: bytes, *, expected: bytes) -> bool:
        return await self._inner.replace_setting(name, value, expected=expected)

    async def delete_setting(self, name: str) -> bool:
        return await self._inner.delete_setting(name)

    async def add_tenant(self, name: str, *, created_ns: int) -> bool:
        return await self._inner.add_tenant(name, created_ns=created_ns)

    async def tenants(self) -> Sequence[str]:
        return await self._inner.tenants()

    async def close(self) -> None:
        await self._inner.close()
