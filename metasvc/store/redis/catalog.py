"""The catalog: the schema's version, names of volumes and tenants, settings, and which volumes are being made or removed.

Owns the keys ``P:{catalog}:…`` (keys has them). In a cluster they lie on another server than most volumes, so nothing here is
one step with what happens to a volume's own keys. What takes several steps goes in an order in which a process may end after
each:

- *Make a volume*: ``reserve`` gives an id out and notes it as doomed in an hour; the volume's keys are made; ``enter`` gives it
  the name and takes the note away, in one step, or finds the name taken. A process that ended before has left a volume
  without a name, which goes with the next volume that is deleted an hour later. ``enter`` refuses an id that is due soon or
  no longer noted.
- *Delete one*: its hash says ``deleted`` first, from which on nobody can take or change it; ``strike`` takes the name away
  and notes the id, in one step; then its keys go, its hash last, and the note. A process that ended in between has left a
  name that stands for a deleted volume, which counts as none and is struck by the next one who needs the name; or keys that
  go with the next one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from metasvc.errors import SchemaTooNew, StoreError, VolumeMissing
from metasvc.store.redis.encoding import END, name_of, ordered_name
from metasvc.store.redis.keys import SCHEMA_VERSION, Catalog
from metasvc.store.redis.link import Link
from metasvc.store.redis.scripts import Script

__all__ = [
    "TAG",
    "Reserved",
    "add_tenant",
    "create_setting",
    "delete_setting",
    "due",
    "enter",
    "find",
    "names",
    "prepare",
    "remove_tenant",
    "replace_setting",
    "reserve",
    "setting",
    "settings",
    "settle_doom",
    "strike",
    "tenants",
]

TAG: Final = "catalog"
_MAKING_S: Final = 3600
"""A volume that has no name after so long was given up by who made it."""
_ENTER_S: Final = _MAKING_S // 2
"""It gets its name so long before that at the latest, so that nobody who removes what is due removes a volume with a name."""
_PAGE: Final = 1000

# KEYS: last_volume, doomed. ARGV: seconds. Answers id and time in microseconds.
_RESERVE: Final = Script(
    """#!lua
redis.call('ZCARD', KEYS[2])
local id = redis.call('INCR', KEYS[1])
local time = redis.call('TIME')
redis.call('ZADD', KEYS[2], time[1] + ARGV[1], id)
return {id, string.format('%.0f', time[1] * 1000000 + time[2])}
"""
)
# KEYS: volumes, doomed. ARGV: place, id, seconds. Answers 0; the member that has the name; 1: the id is not noted, or due so
# soon.
_ENTER: Final = Script(
    r"""#!lua
local there = redis.call('ZRANGEBYLEX', KEYS[1], '[' .. ARGV[1], '(' .. ARGV[1]:sub(1, -2) .. '\1', 'LIMIT', 0, 1)[1]
if there then
    return there
end
local due = redis.call('ZSCORE', KEYS[2], ARGV[2])
if not due or tonumber(due) < redis.call('TIME')[1] + ARGV[3] then
    return 1
end
redis.call('ZADD', KEYS[1], '0', ARGV[1] .. ARGV[2])
redis.call('ZREM', KEYS[2], ARGV[2])
return 0
"""
)
# KEYS: volumes, doomed. ARGV: place, id.
_STRIKE: Final = Script(
    """#!lua flags=allow-oom
redis.call('ZCARD', KEYS[1])
redis.call('ZADD', KEYS[2], redis.call('TIME')[1], ARGV[2])
redis.call('ZREM', KEYS[1], ARGV[1] .. ARGV[2])
return 0
"""
)
# KEYS: doomed. Answers ids that are due, the oldest first.
_DUE: Final = Script(
    """#!lua flags=no-writes
return redis.call('ZRANGE', KEYS[1], '-inf', redis.call('TIME')[1], 'BYSCORE', 'LIMIT', 0, 100)
"""
)
# KEYS: tenants. ARGV: place, time. Answers 1 if the tenant is new.
_ADD_TENANT: Final = Script(
    r"""#!lua
if redis.call('ZRANGEBYLEX', KEYS[1], '[' .. ARGV[1], '(' .. ARGV[1]:sub(1, -2) .. '\1', 'LIMIT', 0, 1)[1] then
    return 0
end
return redis.call('ZADD', KEYS[1], '0', ARGV[1] .. ARGV[2])
"""
)

# KEYS: settings. ARGV: what names begin with. Answers name, value, name …
_SETTINGS: Final = Script(
    """#!lua flags=no-writes
local found = {}
for _, name in ipairs(redis.call('HKEYS', KEYS[1])) do
    if name:sub(1, #ARGV[1]) == ARGV[1] then
        found[#found + 1] = name
        found[#found + 1] = redis.call('HGET', KEYS[1], name)
    end
end
return found
"""
)
# KEYS: settings. ARGV: name, value, the value that is to be there. Answers 1 if it was.
_REPLACE_SETTING: Final = Script(
    """#!lua
if redis.call('HGET', KEYS[1], ARGV[1]) ~= ARGV[3] then
    return 0
end
redis.call('HSET', KEYS[1], ARGV[1], ARGV[2])
return 1
"""
)


@dataclass(frozen=True, slots=True)
class Reserved:
    """An id for a new volume."""

    volume_id: int
    now_us: int
    """The server's time when it was given out, in microseconds since 1970."""


async def prepare(link: Link, catalog: Catalog, at: str, *, create: bool) -> None:
    """Make sure that there is our schema, and that it is one that we know.

    Raises VolumeMissing if there is none and ``create`` is false, SchemaTooNew for one of a newer AtollFS, StoreError where
    something else has keys of our names; nothing is changed then. Foreign errors. One trip where nothing is to do.
    """
    stored = await link.command(b"GET", catalog.key("schema"))
    if stored is None:
        if not create:
            raise VolumeMissing(
                f"{at} was not prepared for AtollFS: run `atoll serve --init --store URL`, or check the address"
            )
        ours = [catalog.key(name) for name in ("volumes", "doomed", "tenants", "settings", "last_volume")]
        if await link.command(b"EXISTS", *ours):
            raise StoreError(
                f"{at} has names of volumes and no version of the schema: restore it from a backup, or add another "
                "prefix= to the URL"
            )
        # Another process may be quicker: then its version counts.
        await link.command(b"SET", catalog.key("schema"), b"%d" % SCHEMA_VERSION, b"NX")
        stored = await link.command(b"GET", catalog.key("schema"))
    if not isinstance(stored, bytes) or not stored.isdigit():
        raise StoreError(
            f"{at} has something else under {catalog.key('schema').decode()}: add another prefix= to the URL"
        )
    if int(stored) > SCHEMA_VERSION:
        raise SchemaTooNew(
            f"{at} has schema version {int(stored)}, this AtollFS knows up to {SCHEMA_VERSION}: upgrade AtollFS"
        )


async def find(link: Link, catalog: Catalog, tenant: str, name: str) -> int | None:
    """Return the id of the volume of a name."""
    place = _place(tenant, name)
    found = await link.command(
        b"ZRANGEBYLEX", catalog.key("volumes"), b"[" + place, b"(" + place[:-1] + b"\1", b"LIMIT", 0, 1
    )
    return int(found[0][len(place) :]) if found else None


async def names(link: Link, catalog: Catalog, after: bytes | None) -> tuple[list[int], bytes | None]:
    """Return the ids of some volumes in order of tenant and name, and where the next ones begin; None: there are no more."""
    lower = b"-" if after is None else b"(" + after
    found = await link.command(b"ZRANGEBYLEX", catalog.key("volumes"), lower, b"+", b"LIMIT", 0, _PAGE)
    return [int(member[member.rindex(END) + 1 :]) for member in found], found[-1] if len(found) == _PAGE else None


async def reserve(link: Link, catalog: Catalog) -> Reserved:
    """Give out an id that no volume had, doomed until it is entered."""
    keys = [catalog.key("last_volume"), catalog.key("doomed")]
    volume_id, now_us = await _RESERVE.run(link, keys, [b"%d" % _MAKING_S])
    return Reserved(int(volume_id), int(now_us))


async def enter(link: Link, catalog: Catalog, tenant: str, name: str, volume_id: int) -> int | None:
    """Give a volume its name; the id of the volume that has it, if it is taken. StoreError if it took too long."""
    place = _place(tenant, name)
    answer = await _ENTER.run(link, _volumes(catalog), [place, b"%d" % volume_id, b"%d" % _ENTER_S])
    if answer == 1:
        raise StoreError("to make the volume took too long: try again")
    return None if answer == 0 else int(answer[len(place) :])


async def strike(link: Link, catalog: Catalog, tenant: str, name: str, volume_id: int) -> None:
    """Take the name from a volume, if it has it, and note that its keys are to be removed."""
    await _STRIKE.run(link, _volumes(catalog), [_place(tenant, name), b"%d" % volume_id])


async def due(link: Link, catalog: Catalog) -> Sequence[int]:
    """Return ids of volumes whose keys are to be removed, at most a hundred."""
    return [int(member) for member in await _DUE.run(link, [catalog.key("doomed")], [])]


async def settle_doom(link: Link, catalog: Catalog, volume_id: int) -> None:
    """Forget a volume whose keys are gone."""
    await link.command(b"ZREM", catalog.key("doomed"), volume_id)


async def setting(link: Link, catalog: Catalog, name: str) -> bytes | None:
    """Return what is kept under a name."""
    found: bytes | None = await link.command(b"HGET", catalog.key("settings"), name)
    return found


async def create_setting(link: Link, catalog: Catalog, name: str, value: bytes) -> bool:
    """Keep a value under a name unless there is one; whether it is this one now."""
    return bool(await link.command(b"HSETNX", catalog.key("settings"), name, value))


async def settings(link: Link, catalog: Catalog, prefix: str) -> dict[str, bytes]:
    """Return what is kept under names that begin so, in order of the names. One trip, for all names that there are."""
    found = await _SETTINGS.run(link, [catalog.key("settings")], [prefix.encode()])
    kept = {name.decode(): value for name, value in zip(found[::2], found[1::2], strict=True)}
    return {name: kept[name] for name in sorted(kept)}


async def replace_setting(link: Link, catalog: Catalog, name: str, value: bytes, expected: bytes) -> bool:
    """Keep another value under a name if the expected one is there; whether it was."""
    return bool(await _REPLACE_SETTING.run(link, [catalog.key("settings")], [name.encode(), value, expected]))


async def delete_setting(link: Link, catalog: Catalog, name: str) -> bool:
    """Forget what is kept under a name; whether there was something."""
    return bool(await link.command(b"HDEL", catalog.key("settings"), name))


async def add_tenant(link: Link, catalog: Catalog, name: str, created_ns: int) -> bool:
    """Add a tenant; False if there is one of that name."""
    arguments = [ordered_name(name.encode()) + END, b"%d" % created_ns]
    return bool(await _ADD_TENANT.run(link, [catalog.key("tenants")], arguments))


async def remove_tenant(link: Link, catalog: Catalog, name: str) -> bool:
    """Forget a tenant; whether there was one."""
    place = ordered_name(name.encode()) + END
    bounds = b"[" + place, b"(" + place[:-1] + b"\1"
    return bool(await link.command(b"ZREMRANGEBYLEX", catalog.key("tenants"), *bounds))


async def tenants(link: Link, catalog: Catalog, after: bytes | None) -> tuple[list[str], bytes | None]:
    """Return the names of some tenants in order, and where the next ones begin; None: there are no more."""
    lower = b"-" if after is None else b"(" + after
    found = await link.command(b"ZRANGEBYLEX", catalog.key("tenants"), lower, b"+", b"LIMIT", 0, _PAGE)
    return [name_of(member[: member.index(END)]).decode() for member in found], found[-1] if len(
        found
    ) == _PAGE else None


def _place(tenant: str, name: str) -> bytes:
    return ordered_name(tenant.encode()) + END + ordered_name(name.encode()) + END


def _volumes(catalog: Catalog) -> list[bytes]:
    return [catalog.key("volumes"), catalog.key("doomed")]
