"""The volume's hash as scripts: who owns a volume, and the commit that only its owner can make.

Owns the scripts that write ``P:{V}:volume`` (keys has its fields). Each is one step of the server.

Why this fences: every script here that changes anything first reads the hash, and changes nothing where it is not as the script
expects. The server runs one script at a time, so they have an order, whichever way and however late they came, and after

- a takeover (``epoch`` grows) scripts of the owner before change nothing, whenever they were sent;
- settle() (``attempt`` grows) commits that the same owner sent before change nothing, those included that the network or a
  frozen server still holds back. So what settle() answers is final;
- a commit (``last_batch`` grows) the same batch changes nothing, so it is applied once.

Interleavings of two owners, A and then B, with "c" a commit of A and "t" the takeover: c t: B reads ``last_batch`` in the
step of the takeover, behind c, and loads rows only after that. t c: c finds another nonce and epoch. There is no third.

What a loss of the server's last moments does (appendfsync not always, a fail-over): the hash is as old as the rows, for both
change in one step, which is found in the append-only file or in a replica wholly or not at all. ``last_batch`` is lower than
the owner thinks then, so its next commit is refused, and it stops: it never adds batch n + 1 where n is missing. A nonce is
part of the fence because an epoch that was lost may be given out again.

The expiry is by the server's clock, read inside the scripts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from metasvc.errors import Fenced, NotOwner, StoreError
from metasvc.store import Ownership
from metasvc.store.redis.keys import VolumeKeys
from metasvc.store.redis.link import Link
from metasvc.store.redis.rows import CHANGES_LUA, Changes
from metasvc.store.redis.scripts import Script

__all__ = ["Settled", "acquire", "commit", "create", "disown", "release", "renew", "replace_format", "settle"]

_US: Final = 1_000_000
_MAKING_S: Final = 60
"""The first rows of a volume may arrive so long after its id was given out: later, somebody may have cleaned up behind it."""

# Scripts that keep, change and end an ownership run where memory is full, too: who cannot renew would lose the volume, and
# deleting a volume is one way to have memory again.
_HEAD: Final = "#!lua"
_SMALL_HEAD: Final = "#!lua flags=allow-oom"
# All times are microseconds: below 2^53, hence exact in Lua's numbers.
_NOW_LUA: Final = """
local function now()
    local time = redis.call('TIME')
    return time[1] * 1000000 + time[2]
end
local function whole(number)
    return string.format('%.0f', number)
end
"""
# The answer of a script that was refused: the hash as it is.
_STATE_LUA: Final = """
local own = redis.call('HMGET', KEYS[1], 'nonce', 'epoch', 'attempt', 'last_batch', 'address', 'deleted', 'expires')
"""
_OWNED_LUA: Final = f"""
{_STATE_LUA}
if own[1] ~= ARGV[1] or own[2] ~= ARGV[2] then
    return own
end
"""

# ARGV: nonce, address, microseconds, the epoch that is to be followed. Answers 0, epoch and last batch; 1, address and
# microseconds that are left of another's ownership; 2 and the epoch that is there; 3: no such volume.
_ACQUIRE: Final = Script(
    f"""{_SMALL_HEAD}
{_STATE_LUA}{_NOW_LUA}
if not own[2] or own[6] then
    return {{3}}
end
local time = now()
if own[1] and own[1] ~= ARGV[1] and tonumber(own[7]) > time then
    return {{1, own[5], whole(tonumber(own[7]) - time)}}
end
if own[2] ~= ARGV[4] then
    return {{2, own[2]}}
end
local epoch = whole(tonumber(own[2]) + 1)
redis.call(
    'HSET', KEYS[1], 'nonce', ARGV[1], 'address', ARGV[2], 'expires', whole(time + tonumber(ARGV[3])),
    'epoch', epoch, 'attempt', '0'
)
return {{0, epoch, own[4]}}
"""
)
# ARGV: nonce, epoch, microseconds.
_RENEW: Final = Script(
    f"""{_SMALL_HEAD}{_OWNED_LUA}{_NOW_LUA}
redis.call('HSET', KEYS[1], 'expires', whole(now() + tonumber(ARGV[3])))
return 0
"""
)
# ARGV: nonce, epoch.
_RELEASE: Final = Script(
    f"""{_SMALL_HEAD}{_OWNED_LUA}
redis.call('HDEL', KEYS[1], 'nonce', 'address', 'expires')
return 0
"""
)
# ARGV: nonce, epoch. Answers attempt and last batch, behind a 0.
_SETTLE: Final = Script(
    f"""{_SMALL_HEAD}{_OWNED_LUA}
local attempt = string.format('%.0f', tonumber(own[3]) + 1)
redis.call('HSET', KEYS[1], 'attempt', attempt)
return {{0, attempt, own[4]}}
"""
)
# ARGV: nonce, epoch, attempt, format.
_REPLACE_FORMAT: Final = Script(
    f"""{_HEAD}{_OWNED_LUA}
if own[3] ~= ARGV[3] then
    return own
end
redis.call('HSET', KEYS[1], 'format', ARGV[4])
return 0
"""
)
# ARGV: nonce, epoch, attempt, the batch before, the batch; then the rows.
_COMMIT: Final = Script(
    f"""{_HEAD}{_OWNED_LUA}{CHANGES_LUA}
if own[3] ~= ARGV[3] or own[4] ~= ARGV[4] then
    return own
end
local kinds, wrong = look(6)
if not kinds then
    return wrong
end
redis.call('HSET', KEYS[1], 'last_batch', ARGV[5])
change(6, kinds)
return 0
"""
)
# ARGV: format, the time after which this is too late; then the rows. Answers 0; 1: there is such a volume; 2: too late.
_CREATE: Final = Script(
    f"""{_HEAD}
{_NOW_LUA}{CHANGES_LUA}
if redis.call('EXISTS', KEYS[1]) == 1 then
    return 1
end
if now() > tonumber(ARGV[2]) then
    return 2
end
local kinds, wrong = look(3)
if not kinds then
    return wrong
end
redis.call('HSET', KEYS[1], 'format', ARGV[1], 'epoch', '0', 'attempt', '0', 'last_batch', '0')
change(3, kinds)
return 0
"""
)
# Answers 0; 1, address and microseconds that are left; 2: it was deleted before, or is not there.
_DISOWN: Final = Script(
    f"""{_SMALL_HEAD}
{_STATE_LUA}{_NOW_LUA}
if not own[2] or own[6] then
    return {{2}}
end
local time = now()
if own[1] and tonumber(own[7]) > time then
    return {{1, own[5], whole(tonumber(own[7]) - time)}}
end
redis.call('HSET', KEYS[1], 'deleted', '1', 'epoch', whole(tonumber(own[2]) + 1))
redis.call('HDEL', KEYS[1], 'nonce', 'address', 'expires')
return {{0}}
"""
)


@dataclass(frozen=True, slots=True)
class Settled:
    """What is final about an ownership's commits."""

    attempt: int
    """Commits carry it from now on."""
    last_batch: int


async def acquire(link: Link, keys: VolumeKeys, nonce: str, address: str, ttl_s: float) -> Ownership:
    """Take the ownership. NotOwner, Fenced for a volume that was deleted. Two trips.

    The epoch must be the one that was read: an acquisition that was thought lost and comes late must not end this one.
    """
    epoch = b""
    while True:
        arguments = [nonce.encode(), address.encode(), _microseconds(ttl_s), epoch]
        answer = await _ACQUIRE.run(link, [keys.volume], arguments)
        match answer[0]:
            case 0:
                return Ownership(nonce=nonce, epoch=int(answer[1]), last_batch=int(answer[2]))
            case 1:
                raise _not_owner(answer)
            case 2:
                epoch = answer[1]
            case _:
                raise Fenced("the volume was deleted")


async def renew(link: Link, keys: VolumeKeys, ownership: Ownership, ttl_s: float) -> None:
    """Set the expiry, counted from now. Fenced."""
    answer = await _RENEW.run(link, [keys.volume], [*_owner(ownership), _microseconds(ttl_s)])
    if answer != 0:
        raise _refusal(answer, ownership, None)


async def release(link: Link, keys: VolumeKeys, ownership: Ownership) -> None:
    """Clear the owner; nothing if the ownership is not the stored one."""
    await _RELEASE.run(link, [keys.volume], _owner(ownership))


async def settle(link: Link, keys: VolumeKeys, ownership: Ownership) -> Settled:
    """Void the commits of this owner that are under way; what is so then. Fenced."""
    answer = await _SETTLE.run(link, [keys.volume], _owner(ownership))
    if answer[0] != 0:
        raise _refusal(answer, ownership, None)
    return Settled(int(answer[1]), int(answer[2]))


async def commit(
    link: Link, keys: VolumeKeys, ownership: Ownership, attempt: int, number: int, changes: Changes
) -> bool:
    """Check the ownership and apply a batch, in one script: one trip. Fenced.

    False if only ``attempt`` is not the stored one: settle, then commit again.
    """
    owner = [*_owner(ownership), b"%d" % attempt, b"%d" % (number - 1), b"%d" % number]
    answer = await _COMMIT.run(link, [keys.volume, *changes.keys], owner + changes.arguments)
    if answer == 0:
        return True
    if _is_of(answer, ownership) and answer[3] == b"%d" % (number - 1):
        return False
    raise _refusal(answer, ownership, number)


async def replace_format(link: Link, keys: VolumeKeys, ownership: Ownership, attempt: int, text: str) -> bool:
    """Store another format; False if only ``attempt`` is not the stored one. Fenced."""
    answer = await _REPLACE_FORMAT.run(link, [keys.volume], [*_owner(ownership), b"%d" % attempt, text.encode()])
    if answer == 0:
        return True
    if not _is_of(answer, ownership):
        raise _refusal(answer, ownership, None)
    return False


async def create(link: Link, keys: VolumeKeys, text: str, now_us: int, changes: Changes) -> None:
    """Make a volume without a name, with its first rows, in one script. StoreError where it comes too late.

    ``now_us`` is the server's time when its id was given out.
    """
    arguments = [text.encode(), b"%d" % (now_us + _MAKING_S * _US), *changes.arguments]
    if await _CREATE.run(link, [keys.volume, *changes.keys], arguments) != 0:
        raise StoreError("to make the volume took too long: try again")


async def disown(link: Link, keys: VolumeKeys) -> bool:
    """Mark a volume as deleted: nobody can take or change it from now on. NotOwner; False if it was so before."""
    answer = await _DISOWN.run(link, [keys.volume], [])
    if answer[0] == 1:
        raise _not_owner(answer)
    return bool(answer[0] == 0)


def _owner(ownership: Ownership) -> list[bytes]:
    return [ownership.nonce.encode(), b"%d" % ownership.epoch]


def _microseconds(seconds: float) -> bytes:
    return b"%d" % round(seconds * _US)


def _not_owner(answer: list[Any]) -> NotOwner:
    return NotOwner(answer[1].decode(), int(answer[2]) / _US)


def _refusal(state: list[Any], ownership: Ownership, number: int | None) -> Fenced:
    """Return the error that says what is stored instead."""
    nonce, epoch, _, last_batch, address, deleted, _ = state
    if epoch is None or deleted is not None:
        return Fenced("the volume was deleted")
    if _is_of(state, ownership):
        return Fenced(f"batch {number} does not follow the stored batch {last_batch.decode()}")
    now_owner = f"nobody since epoch {int(epoch)}" if nonce is None else f"{address.decode()} with epoch {int(epoch)}"
    return Fenced(f"the ownership with epoch {ownership.epoch} is over: the volume is owned by {now_owner}")


def _is_of(state: list[Any], ownership: Ownership) -> bool:
    return bool(state[0] == ownership.nonce.encode() and state[1] == b"%d" % ownership.epoch)
