"""Quotas of tenants: what all volumes of a tenant may hold together, though each is owned by another process.

Each volume has a share of its tenant's quota, which its owner takes before it is used: what it holds, and some more for what
comes next. Shares are a setting of the store that all processes replace by comparing (`Store.replace_setting`). A volume never
holds more than its share, and shares together are never more than the quota; but for what was there before the quota was set
or lowered, which stays, and nothing is added to it. So the quota is exact, and a write costs nothing as long as its volume's
share is large enough.

Settings: ``tenant/NAME``, the limits, {"max_bytes", "max_inodes"}; 0: none. ``tenant-space/NAME``, the shares, and what the
volumes held when their owners last looked: {"UUID": [share bytes, share inodes, used bytes, used inodes, epoch of the owner,
wanting]}.

Interleavings. The engine checks its allowance (metasvc.engine.accounts) in the step in which something is added.

- *A share becomes larger*: first in the store, then in the engine. A process that ends between has taken what it does not
  use: the next owner finds it, and gives back what is too much.
- *A share becomes smaller*: first in the engine, in the step in which it was found to be too large, then in the store. If the
  store does not take it, it is larger there than it has to be, until the next look.
- *Two in one process want to change shares of a tenant*: by turns (`_turn`), since each tells engines what it found.
- *An owner was succeeded and does not know yet*: shares have the epoch of the owner that set them. Who becomes the owner sets
  it (`admit`), and then one of an older epoch changes nothing any more. What it took before, its successor finds.
- *A volume does not get what it needs*, and says so in its share (``wanting``): others give back at their next look what they
  took ahead. So for some seconds a little of the quota may be free and not to be had.
- *A volume was deleted*: its share goes with it, or when somebody next looks for room and does not find it.

Costs: for each tenant two trips every five seconds, one more if something has changed; three for a change that needs a larger
share.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable
from typing import Final, NamedTuple, TypeVar

from chunkstore.errors import AtollError
from metasvc.engine import Engine
from metasvc.engine.accounts import USED_BYTES, USED_INODES, VOLUME_RESERVATION
from metasvc.engine.tx import Allowance
from metasvc.errors import StoreError, TenantFull
from metasvc.model import TenantUse
from metasvc.store import Store

__all__ = ["Limits", "Share", "TenantSpace", "limits_name", "read_limits", "read_shares", "shares_name", "use_of"]

LOOK_S: Final = 5.0
FULL_S: Final = 0.5
"""So long nobody asks again for a volume that was told that there is no room."""
AHEAD_BYTES: Final = 1 << 30
AHEAD_INODES: Final = 10_000
_WANTING_LOOKS: Final = 3
AHEAD_PART: Final = 16
"""Never take ahead more than this part of what is left of the quota."""
_TRIES: Final = 100

log = logging.getLogger(__name__)


class Limits(NamedTuple):
    """What all volumes of a tenant may hold together; 0: no limit."""

    max_bytes: int = 0
    max_inodes: int = 0


class Share(NamedTuple):
    """What a volume may hold of its tenant's quota, and what it held when its owner last looked."""

    max_bytes: int = 0
    max_inodes: int = 0
    used_bytes: int = 0
    used_inodes: int = 0
    epoch: int = 0
    """Of the owner that set it."""
    wanting: int = 0
    """For so many more looks of its owner others take nothing ahead."""


Shares = dict[str, Share]
"""By the uuid of the volume."""
T = TypeVar("T")


def limits_name(tenant: str) -> str:
    """Return the name of the setting with a tenant's limits."""
    return f"tenant/{tenant}"


def shares_name(tenant: str) -> str:
    """Return the name of the setting with a tenant's shares."""
    return f"tenant-space/{tenant}"


async def read_limits(store: Store, tenant: str) -> Limits:
    """Return the limits of a tenant. One trip."""
    found = await store.setting(limits_name(tenant))
    return Limits() if found is None else Limits(**json.loads(found))


async def read_shares(store: Store, tenant: str) -> Shares:
    """Return the shares of a tenant's volumes. One trip."""
    return _shares_of(await store.setting(shares_name(tenant)))


def use_of(limits: Limits, shares: Shares) -> TenantUse:
    """Return what a tenant's volumes hold together."""
    used_bytes = sum(share.used_bytes for share in shares.values())
    used_inodes = sum(share.used_inodes for share in shares.values())
    return TenantUse(used_bytes, used_inodes, limits.max_bytes, limits.max_inodes)


class TenantSpace:
    """The shares of the volumes that this process owns."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._engines: dict[str, Engine] = {}
        """By uuid."""
        self._full_until_s: dict[str, float] = {}
        self._turns: dict[str, asyncio.Lock] = {}
        self.uses: dict[str, TenantUse] = {}
        """By tenant, of those of whose volumes this process owns some, some seconds old."""

    def _turn(self, tenant: str) -> asyncio.Lock:
        return self._turns.setdefault(tenant, asyncio.Lock())

    async def admit(self, engine: Engine) -> None:
        """Look after a volume from now on; it may be used when this returns. StoreError."""
        engine.more_room = self._more_room(engine)
        await self._look(engine.format.tenant, [engine], is_new=True)
        self._engines[engine.format.uuid] = engine

    def leave(self, engine: Engine) -> None:
        """Look after a volume no longer: its share stays for its next owner."""
        if self._engines.get(engine.format.uuid) is engine:
            del self._engines[engine.format.uuid]
            self._full_until_s.pop(engine.format.uuid, None)
            if not any(other.format.tenant == engine.format.tenant for other in self._engines.values()):
                self.uses.pop(engine.format.tenant, None)

    async def forget(self, tenant: str, uuid: str) -> None:
        """Take back the share of a volume that was deleted. StoreError."""
        await self._change(tenant, lambda shares: shares.pop(uuid, None))

    async def watch(self) -> None:
        """Keep shares as large as they have to be, until cancelled."""
        told = ""
        while True:
            await asyncio.sleep(LOOK_S)
            by_tenant = defaultdict(list)
            for engine in self._engines.values():
                if engine.failure is None:
                    by_tenant[engine.format.tenant].append(engine)
            for tenant, engines in by_tenant.items():
                try:
                    await self._look(tenant, engines)
                    told = ""
                except AtollError as error:
                    if str(error) != told:
                        told = str(error)
                        log.warning("the quota of tenant %s is looked at again later: %s", tenant, error)

    async def _look(self, tenant: str, engines: list[Engine], *, is_new: bool = False) -> None:
        """Bring the shares of volumes up to date, and what is known of their use; ``is_new``: those of earlier owners, too."""
        limits = await read_limits(self._store, tenant)

        def adapt(shares: Shares) -> tuple[list[tuple[Engine, Allowance]], TenantUse]:
            mine = [engine for engine in engines if is_new or not _is_succeeded(engine, shares)]
            return [(engine, _adapted(engine, limits, shares)) for engine in mine], use_of(limits, shares)

        async with self._turn(tenant):
            adapted, self.uses[tenant] = await self._change(tenant, adapt)
            for engine, allowance in adapted:
                engine.allowance = allowance

    def _more_room(self, engine: Engine) -> Callable[[TenantFull], Awaitable[bool]]:
        async def more_room(wanted: TenantFull) -> bool:
            uuid, tenant = engine.format.uuid, engine.format.tenant
            if time.monotonic() < self._full_until_s.get(uuid, 0.0):
                return False
            if await self._take(engine, wanted):
                return True
            if await self._forget_deleted(tenant) and await self._take(engine, wanted):
                return True
            self._full_until_s[uuid] = time.monotonic() + FULL_S
            return False

        return more_room

    async def _take(self, engine: Engine, wanted: TenantFull) -> bool:
        """Make a share larger; whether it is enough now."""
        tenant = engine.format.tenant
        limits = await read_limits(self._store, tenant)

        def adapt(shares: Shares) -> Allowance:
            if _is_succeeded(engine, shares):
                raise StoreError(f"volume {tenant}/{engine.format.name} has another owner")
            return _adapted(engine, limits, shares, bytes_more=wanted.bytes_more, inodes_more=wanted.inodes_more)

        async with self._turn(tenant):
            allowance = engine.allowance = await self._change(tenant, adapt)
        used = _held(engine)
        return (allowance.max_bytes is None or used.used_bytes + wanted.bytes_more <= allowance.max_bytes) and (
            allowance.max_inodes is None or used.used_inodes + wanted.inodes_more <= allowance.max_inodes
        )

    async def _forget_deleted(self, tenant: str) -> bool:
        """Take back shares of volumes that are no more; whether there were any."""
        there = {form.uuid for form in await self._store.list_volumes() if form.tenant == tenant}
        gone = (await read_shares(self._store, tenant)).keys() - there
        if gone:
            await self._change(tenant, lambda shares: [shares.pop(uuid, None) for uuid in gone])
        return bool(gone)

    async def _change(self, tenant: str, change: Callable[[Shares], T]) -> T:
        """Change the shares of a tenant as ``change`` does, which may be called several times; what it returned."""
        name = shares_name(tenant)
        for _ in range(_TRIES):
            before = await self._store.setting(name)
            shares = _shares_of(before)
            result = change(shares)
            after = json.dumps(shares).encode()
            if after == (before or b"{}"):
                return result
            if before is None:
                is_done = await self._store.create_setting(name, after)
            else:
                is_done = await self._store.replace_setting(name, after, expected=before)
            if is_done:
                return result
        raise StoreError(f"the shares of tenant {tenant} are changed by others all the time: try again")


def _shares_of(data: bytes | None) -> Shares:
    return {} if data is None else {uuid: Share(*share) for uuid, share in json.loads(data).items()}


def _held(engine: Engine) -> Share:
    """Return what a volume holds, what is promised to writers included, as what it needs at least."""
    used_bytes = engine.counter(USED_BYTES) + engine.reserved_bytes(VOLUME_RESERVATION)
    used_inodes = engine.counter(USED_INODES)
    return Share(used_bytes, used_inodes, used_bytes, used_inodes)


def _is_succeeded(engine: Engine, shares: Shares) -> bool:
    """Return whether a later owner has set the share of a volume."""
    return shares.get(engine.format.uuid, Share()).epoch > engine.owner.ownership.epoch


def _adapted(engine: Engine, limits: Limits, shares: Shares, *, bytes_more: int = 0, inodes_more: int = 0) -> Allowance:
    """Put the share of a volume among the others as it is to be; what the volume may hold when that is durable.

    If it is less than now, the engine is told at once: see the module's text.
    """
    uuid = engine.format.uuid
    held, before = _held(engine), shares.get(uuid, Share())
    others = [share for other, share in shares.items() if other != uuid]
    is_scarce = any(share.wanting for share in others)
    room_bytes = limits.max_bytes - sum(share.max_bytes for share in others)
    room_inodes = limits.max_inodes - sum(share.max_inodes for share in others)
    max_bytes = _part(
        room_bytes, held.max_bytes, bytes_more, before.max_bytes, most_ahead=0 if is_scarce else AHEAD_BYTES
    )
    max_inodes = _part(
        room_inodes, held.max_inodes, inodes_more, before.max_inodes, most_ahead=0 if is_scarce else AHEAD_INODES
    )
    is_refused = (limits.max_bytes and held.max_bytes + bytes_more > max_bytes) or (
        limits.max_inodes and held.max_inodes + inodes_more > max_inodes
    )
    shares[uuid] = Share(
        max_bytes if limits.max_bytes else 0,
        max_inodes if limits.max_inodes else 0,
        engine.counter(USED_BYTES),
        engine.counter(USED_INODES),
        engine.owner.ownership.epoch,
        _WANTING_LOOKS if is_refused else max(0, before.wanting - 1),
    )
    allowance = Allowance(
        max_bytes if limits.max_bytes else None,
        max_inodes if limits.max_inodes else None,
        max(0, room_bytes - max_bytes),
        max(0, room_inodes - max_inodes),
    )
    now = engine.allowance
    engine.allowance = now._replace(
        max_bytes=_less(now.max_bytes, allowance.max_bytes), max_inodes=_less(now.max_inodes, allowance.max_inodes)
    )
    return allowance


def _part(room: int, held: int, more: int, before: int, *, most_ahead: int) -> int:
    """Return the share of a volume that holds so much and needs so much more, where others leave ``room``."""
    needed = held + more
    if needed > room:
        # It does not get it. What it holds stays, although it may be more than there is room.
        return max(held, min(before, room))
    ahead = min(most_ahead, (room - needed) // AHEAD_PART)
    if needed <= before <= min(room, needed + 2 * ahead):
        return before
    return needed + ahead


def _less(one: int | None, other: int | None) -> int | None:
    """Return the lower limit; None is none."""
    if one is None or other is None:
        return one if other is None else other
    return min(one, other)
