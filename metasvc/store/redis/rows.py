"""Rows as keys and arguments of scripts, and back: the one place that knows how scripts read and write the tables.

Owns the scripts of loads and scans, and the part of a script that changes rows. Knows no ownership; where rows lie says keys.

Two things hold for all scripts here. A script that changes rows looks at every key and counts every argument before it
changes anything (see scripts). A script that reads compares ``last_batch`` with the number that the handle has committed
or seen: connections of one process may lead to different servers for a moment, while one takes over from another, and rows
from before a commit of our own must not come back.

Scans find their buckets by the index, which is among the keys that a script declares; the buckets are not. A cluster that
moves a volume from one server to another does so key by key, and answers scripts by their declared keys: so a bucket that the
index has and that is not there has not come yet, and the scan is tried again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any, Final

from metasvc.errors import StoreRefused
from metasvc.model import Dentry, Inode
from metasvc.store import Loaded
from metasvc.store.redis.encoding import END, NO_ROW, codec_of, ordered_int
from metasvc.store.redis.keys import VolumeKeys, shape_of
from metasvc.store.redis.scripts import Script
from metasvc.store.tables import DENTRY, INODE, Batch, Key, Row, Table

__all__ = ["CHANGES_LUA", "Changes", "Load", "Scan", "ScanDir"]

_MAX_BYTES: Final = 512 << 20
"""Of a batch: half of what a server reads from a client at once (client-query-buffer-limit), and of an argument's limit."""
_GROUP_PAGE: Final = 2048
"""Rows of a group in one answer: a few milliseconds of the server's time."""
_AFTER_END: Final = b"\1"
_NOTHING: Final = b""


# -- changes ----------------------------------------------------------------------------------------------------------

# What a script that changes rows has before its own lines. KEYS[1] is the volume; for each table follow its index and its
# buckets. ARGV has its own arguments first; from `at` on: the number of tables; for each of them the type of its buckets and
# how many they are; for each bucket its number, how many rows are put and how many are deleted, (place, packed row) of those
# that are put, the places of those that are deleted. Lua puts at most some 8,000 values on its stack, hence the pieces.
CHANGES_LUA: Final = r"""
local PIECE = 1000

local function misfit(text)
    return redis.error_reply('ATOLLMISFIT ' .. text)
end

-- Returns what each bucket is now, or nil and an error. Changes nothing.
local function look(at)
    local volume = KEYS[1]
    for _, command in ipairs({
        {'HSET', volume, 'f', 'v'}, {'HDEL', volume, 'f'}, {'EXISTS', volume},
        {'ZADD', volume, '0', 'm'}, {'ZREM', volume, 'm'}, {'ZREMRANGEBYLEX', volume, '-', '+'},
    }) do
        if not redis.acl_check_cmd(unpack(command)) then
            return nil, redis.error_reply('NOPERM the user may not run ' .. command[1])
        end
    end
    local kinds = {}
    local key = 2
    local tables = tonumber(ARGV[at])
    at = at + 1
    for _ = 1, tables do
        local kind, count = ARGV[at], tonumber(ARGV[at + 1])
        at = at + 2
        local index = redis.call('TYPE', KEYS[key]).ok
        if index ~= 'zset' and index ~= 'none' then
            return nil, misfit('index of type ' .. index)
        end
        for bucket = key + 1, key + count do
            local found = redis.call('TYPE', KEYS[bucket]).ok
            if found ~= kind and found ~= 'none' then
                return nil, misfit('bucket of type ' .. found .. ', not ' .. kind)
            end
            kinds[bucket] = found
            at = at + 3 + 2 * tonumber(ARGV[at + 1]) + tonumber(ARGV[at + 2])
        end
        key = key + count + 1
    end
    if at ~= #ARGV + 1 or key ~= #KEYS + 1 then
        return nil, misfit('arguments')
    end
    return kinds
end

local function in_pieces(command, key, values)
    for from = 1, #values, PIECE do
        redis.call(command, key, unpack(values, from, math.min(from + PIECE - 1, #values)))
    end
end

local function change_hash(bucket, at, puts, deletes)
    local last = at + 2 * puts - 1
    for from = at, last, PIECE do
        redis.call('HSET', bucket, unpack(ARGV, from, math.min(from + PIECE - 1, last)))
    end
    for from = last + 1, last + deletes, PIECE do
        redis.call('HDEL', bucket, unpack(ARGV, from, math.min(from + PIECE - 1, last + deletes)))
    end
end

-- A place ends with a byte 0, so all members that begin with it lie between it and what it is with a 1 in its place.
local function forget(bucket, place)
    redis.call('ZREMRANGEBYLEX', bucket, '[' .. place, '(' .. place:sub(1, -2) .. '\1')
end

local function change_zset(bucket, at, puts, deletes, is_new)
    local members = {}
    for put = at, at + 2 * puts - 1, 2 do
        local place = ARGV[put]
        if not is_new then
            forget(bucket, place)
        end
        members[#members + 1] = '0'
        members[#members + 1] = place .. ARGV[put + 1]
    end
    in_pieces('ZADD', bucket, members)
    local first = at + 2 * puts
    for delete = first, first + deletes - 1 do
        forget(bucket, ARGV[delete])
    end
end

-- Changes the rows. Must not fail: look() was satisfied.
local function change(at, kinds)
    local key = 2
    local tables = tonumber(ARGV[at])
    at = at + 1
    for _ = 1, tables do
        local kind, count = ARGV[at], tonumber(ARGV[at + 1])
        at = at + 2
        local index, made, gone = KEYS[key], {}, {}
        for bucket = key + 1, key + count do
            local number, puts, deletes = ARGV[at], tonumber(ARGV[at + 1]), tonumber(ARGV[at + 2])
            local is_new = kinds[bucket] == 'none'
            at = at + 3
            if kind == 'hash' then
                change_hash(KEYS[bucket], at, puts, deletes)
            else
                change_zset(KEYS[bucket], at, puts, deletes, is_new)
            end
            at = at + 2 * puts + deletes
            if puts > 0 and is_new then
                made[#made + 1] = '0'
                made[#made + 1] = number
            elseif puts == 0 and not is_new and redis.call('EXISTS', KEYS[bucket]) == 0 then
                gone[#gone + 1] = number
            end
        end
        in_pieces('ZADD', index, made)
        in_pieces('ZREM', index, gone)
        key = key + count + 1
    end
end
"""


class Changes:
    """A batch as what CHANGES_LUA reads."""

    __slots__ = ("arguments", "keys")

    def __init__(self, keys: VolumeKeys, batch: Batch) -> None:
        """StoreRefused for rows that no table has room for, and for too many of them."""
        self.keys: list[bytes] = []
        self.arguments: list[bytes] = []
        parts: list[list[bytes]] = []
        for table in dict.fromkeys(chain(batch.puts, batch.deletes)):
            try:
                parts.append(self._table(keys, table, batch))
            except NO_ROW as exc:
                raise StoreRefused(f"a row of {table.name} does not fit: this is a bug, please report it") from exc
        self.arguments = [b"%d" % sum(bool(part) for part in parts), *chain.from_iterable(parts)]
        if sum(map(len, self.arguments)) > _MAX_BYTES:
            raise StoreRefused(f"a batch of more than {_MAX_BYTES >> 20} MiB is too large for Redis: this is a bug")

    def _table(self, keys: VolumeKeys, table: Table, batch: Batch) -> list[bytes]:
        shape, pack = shape_of[table], codec_of[table].pack
        number_of, place_of, key_size = shape.number, shape.place, table.key_size
        buckets: dict[int, tuple[list[bytes], list[bytes]]] = {}
        for row in batch.puts.get(table, ()):
            key = row[:key_size]
            puts, _ = buckets.setdefault(number_of(key), ([], []))
            puts += (place_of(key), pack(row))
        for key in batch.deletes.get(table, ()):
            _, deletes = buckets.setdefault(number_of(key), ([], []))
            deletes.append(place_of(key))
        if not buckets:
            return []
        start = keys.indexes[table]
        self.keys.append(start)
        arguments = [shape.kind, b"%d" % len(buckets)]
        for number, (puts, deletes) in buckets.items():
            bucket = ordered_int(number)
            self.keys.append(start + b":" + bucket)
            arguments += (bucket, b"%d" % (len(puts) // 2), b"%d" % len(deletes), *puts, *deletes)
        return arguments


# -- reads ------------------------------------------------------------------------------------------------------------

# What a script that reads has before its own lines. KEYS[1] is the volume, ARGV[1] the batch that must be there; "" for who
# owns nothing.
_READ_LUA: Final = r"""#!lua flags=no-writes
local behind = nil
if ARGV[1] ~= '' then
    local last = redis.call('HGET', KEYS[1], 'last_batch')
    if not last then
        behind = redis.error_reply('ATOLLGONE no volume')
    elseif tonumber(last) < tonumber(ARGV[1]) then
        behind = redis.error_reply('ATOLLSTALE batch ' .. last .. ' is the last one, ' .. ARGV[1] .. ' was committed')
    end
end
if behind then
    return behind
end
local function moving(key)
    return redis.error_reply('TRYAGAIN there is no ' .. key .. ', which the index has')
end
"""

# For each further key what to find there: "fields" of a hash, "places" of a zset (at most one member begins with each), or
# "range", a lower bound, an upper bound, and a limit.
_LOAD: Final = Script(
    _READ_LUA
    + r"""
local found = {}
local at = 2
for key = 2, #KEYS do
    local what = ARGV[at]
    if what == 'range' then
        found[key - 1] = redis.call('ZRANGEBYLEX', KEYS[key], ARGV[at + 1], ARGV[at + 2], 'LIMIT', 0, ARGV[at + 3])
        at = at + 4
    else
        local first, last = at + 2, at + 1 + tonumber(ARGV[at + 1])
        if what == 'fields' then
            found[key - 1] = redis.call('HMGET', KEYS[key], unpack(ARGV, first, last))
        else
            local members = {}
            for place = first, last do
                local text = ARGV[place]
                local upper = '(' .. text:sub(1, -2) .. '\1'
                members[#members + 1] = redis.call('ZRANGEBYLEX', KEYS[key], '[' .. text, upper, 'LIMIT', 0, 1)[1] or false
            end
            found[key - 1] = members
        end
        at = last + 1
    end
end
return found
"""
)

# KEYS[2] is a table's index; the buckets' keys begin with it. ARGV: the type of the buckets; the bound of the first bucket in
# the index; that bucket's number, and the field or the bound of the member behind which to begin there; the limit. Answers
# bucket, field, value, bucket … for hashes and bucket, member, bucket … for sorted sets.
_SCAN: Final = Script(
    _READ_LUA
    + r"""
local kind, from, first, after, left = ARGV[2], ARGV[3], ARGV[4], ARGV[5], tonumber(ARGV[6])
local found = {}

local function add(...)
    for _, value in ipairs({...}) do
        found[#found + 1] = value
    end
end

local function scan_hash(bucket, key)
    local least = -1
    if bucket == first then
        least = tonumber(after)
    end
    local fields = {}
    local all = redis.call('HKEYS', key)
    if #all == 0 then
        return false
    end
    for _, field in ipairs(all) do
        if tonumber(field) > least then
            fields[#fields + 1] = tonumber(field)
        end
    end
    table.sort(fields)
    for index = 1, math.min(left, #fields) do
        add(bucket, tostring(fields[index]), redis.call('HGET', key, fields[index]))
    end
    left = left - math.min(left, #fields)
    return true
end

local function scan_zset(bucket, key)
    local lower = '-'
    if bucket == first then
        lower = after
    end
    local members = redis.call('ZRANGEBYLEX', key, lower, '+', 'LIMIT', 0, left)
    for _, member in ipairs(members) do
        add(bucket, member)
    end
    left = left - #members
    return #members > 0 or redis.call('EXISTS', key) == 1
end

while left > 0 do
    local buckets = redis.call('ZRANGEBYLEX', KEYS[2], from, '+', 'LIMIT', 0, 64)
    for _, bucket in ipairs(buckets) do
        if left > 0 then
            local key = KEYS[2] .. ':' .. bucket
            local is_here
            if kind == 'hash' then
                is_here = scan_hash(bucket, key)
            else
                is_here = scan_zset(bucket, key)
            end
            if not is_here then
                return moving(key)
            end
        end
    end
    if #buckets < 64 then
        break
    end
    from = '(' .. buckets[#buckets]
end
return found
"""
)

# KEYS[2] is a directory's bucket, KEYS[3] the index of the inodes, with which their buckets' keys begin. ARGV: lower bound,
# limit. Answers member, inode … where an inode's value may be missing. Where in a member the inode's number is says encoding.
_SCAN_DIR: Final = Script(
    _READ_LUA
    + r"""
local found = {}
for _, member in ipairs(redis.call('ZRANGEBYLEX', KEYS[2], ARGV[2], '+', 'LIMIT', 0, ARGV[3])) do
    local ends = member:find('\0', 1, true)
    local field, size = member:byte(ends + 1, ends + 2)
    if size >= 128 then
        size = size - 128
    else
        size = 127 - size
    end
    local number = member:sub(ends + 2, ends + 2 + size)
    local bucket = KEYS[3] .. ':' .. number
    local value = redis.call('HGET', bucket, field)
    if not value and redis.call('EXISTS', bucket) == 0 and redis.call('ZSCORE', KEYS[3], number) then
        return moving(bucket)
    end
    found[#found + 1] = member
    found[#found + 1] = value
end
return found
"""
)

_Decode = Callable[[Any], Iterator[Row]]


class Load:
    """One call of load(): what it asks for, and the rows in the answer.

    What is left of large groups is asked for in further steps.
    """

    script: Final = _LOAD

    def __init__(self, keys: VolumeKeys, by_key: dict[Table, list[Key]], by_group: dict[Table, list[int]]) -> None:
        self.keys: list[bytes] = [keys.volume]
        self.arguments: list[bytes] = []
        self._decode: list[tuple[Table, _Decode]] = []
        self._volume_keys = keys
        self._rows: dict[Table, list[Row]] = {}
        for table, wanted in by_key.items():
            self._add_keys(table, wanted)
        for table, groups in by_group.items():
            for group in groups:
                self._add_group(table, group, *shape_of[table].group(group))

    @property
    def is_done(self) -> bool:
        """Whether there is nothing to ask for."""
        return not self._decode

    def take(self, answer: list[Any]) -> None:
        """Take the answer to what ``keys`` and ``arguments`` ask for; they ask for the rest then. StoreRefused."""
        decode, self._decode = self._decode, []
        del self.keys[1:]
        self.arguments.clear()
        for (table, rows), found in zip(decode, answer, strict=True):
            self._rows.setdefault(table, []).extend(_checked(rows, found))

    def loaded(self) -> Loaded:
        """Return all rows that were found."""
        return Loaded(self._rows)

    def _add_keys(self, table: Table, wanted: list[Key]) -> None:
        shape, codec = shape_of[table], codec_of[table]
        buckets: dict[bytes, list[Key]] = {}
        for key in wanted:
            buckets.setdefault(shape.bucket(key), []).append(key)
        for bucket, keys in buckets.items():
            # A field that is asked for 500 times would be a stack of 500.
            keys = list(dict.fromkeys(keys))
            places = [shape.place(key) for key in keys]
            self.keys.append(self._volume_keys.bucket(table, bucket))
            self.arguments += (b"fields" if shape.is_hash else b"places", b"%d" % len(keys), *places)

            def rows(found: list[Any], keys: list[Key] = keys, places: list[bytes] = places) -> Iterator[Row]:
                for key, place, value in zip(keys, places, found, strict=True):
                    if value is not None:
                        yield codec.unpack(key, value, 0 if shape.is_hash else len(place))

            self._decode.append((table, rows))

    def _add_group(self, table: Table, group: int, lower: bytes, upper: bytes) -> None:
        shape, codec = shape_of[table], codec_of[table]
        bucket = shape.bucket((group,))
        self.keys.append(self._volume_keys.bucket(table, bucket))
        self.arguments += (b"range", lower, upper, b"%d" % _GROUP_PAGE)

        def rows(found: list[bytes]) -> Iterator[Row]:
            for member in found:
                key, start = shape.key(bucket, member)
                yield codec.unpack(key, member, start)
            if len(found) == _GROUP_PAGE:
                self._add_group(table, group, b"(" + found[-1], upper)

        self._decode.append((table, rows))


class Scan:
    """One call of scan(): a page of a table in order of its key."""

    script: Final = _SCAN

    def __init__(self, keys: VolumeKeys, table: Table, after: Key | None, limit: int) -> None:
        shape = shape_of[table]
        self._table = table
        self.keys = [keys.volume, keys.indexes[table]]
        if after is None:
            start = (b"-", _NOTHING, _NOTHING)
        else:
            bucket, place = shape.bucket(after), shape.place(after)
            start = (b"[" + bucket, bucket, place if shape.is_hash else _behind(place))
        self.arguments = [shape.kind, *start, b"%d" % limit]

    def rows(self, answer: list[bytes]) -> list[Row]:
        """Return the rows in the answer. StoreRefused."""
        return list(_checked(self._decode, answer))

    def _decode(self, answer: list[bytes]) -> Iterator[Row]:
        shape, unpack = shape_of[self._table], codec_of[self._table].unpack
        if shape.is_hash:
            for bucket, field, value in zip(answer[::3], answer[1::3], answer[2::3], strict=True):
                key, _ = shape.key(bucket, field)
                yield unpack(key, value)
        else:
            for bucket, member in zip(answer[::2], answer[1::2], strict=True):
                key, start = shape.key(bucket, member)
                yield unpack(key, member, start)


class ScanDir:
    """One call of scan_dir(): a page of a directory, with inodes."""

    script: Final = _SCAN_DIR

    def __init__(self, keys: VolumeKeys, parent: int, after: bytes | None, limit: int) -> None:
        shape = shape_of[DENTRY]
        self._bucket = shape.bucket((parent,))
        self.keys = [keys.volume, keys.bucket(DENTRY, self._bucket), keys.indexes[INODE]]
        lower = b"-" if after is None else _behind(shape.place((parent, after)))
        self.arguments = [lower, b"%d" % limit]

    def entries(self, answer: list[Any]) -> list[tuple[Dentry, Inode | None]]:
        """Return the dentries in the answer, each with its inode. StoreRefused."""
        return list(_checked(self._decode, answer))

    def _decode(self, answer: list[Any]) -> Iterator[Any]:
        key_of, dentry, inode = shape_of[DENTRY].key, codec_of[DENTRY].unpack, codec_of[INODE].unpack
        for member, value in zip(answer[::2], answer[1::2], strict=True):
            key, start = key_of(self._bucket, member)
            entry = dentry(key, member, start)
            yield entry, None if value is None else inode((entry[2],), value)


def _behind(place: bytes) -> bytes:
    """Return the bound behind all members that begin with a place."""
    assert place[-1:] == END
    return b"[" + place[:-1] + _AFTER_END


def _checked(decode: Callable[[Any], Iterator[Any]], found: Any) -> Iterator[Any]:
    """Decode what a server answered. StoreRefused for what we never wrote."""
    try:
        yield from decode(found)
    except NO_ROW as exc:
        raise StoreRefused("a row in Redis is not as AtollFS packed it: restore the metadata from a backup") from exc
