"""The keys in Redis: every one that there is, what it holds, and which place rows have in them.

``P`` is the prefix of the address (``atoll``), ``V`` the id of a volume, in decimal. What stands in braces is the hash tag: a
Redis Cluster keeps keys of one tag on one server, and a script touches keys of one tag only. No key ever expires.

The catalog, of all volumes:

===========================  ======  ==================================================================================
key                          type    holds
===========================  ======  ==================================================================================
``P:{catalog}:schema``       string  Version of the schema, in decimal: what this module says. It rises with each change
                                     that an older AtollFS would misread, and an older one refuses a higher number.
``P:{catalog}:last_volume``  string  The last id that was given to a volume, in decimal. Ids are not given out again.
``P:{catalog}:volumes``      zset    Each volume that has a name. Score 0; member: tenant, name (both ordered_name() of
                                     UTF-8 and END), id in decimal.
``P:{catalog}:doomed``       zset    Each volume whose keys are to be removed. Member: its id in decimal; score: from when
                                     on, in seconds since 1970 by the server's clock. Volumes in the making are here, due in
                                     an hour, until they have a name.
``P:{catalog}:tenants``      zset    Each tenant. Score 0; member: name (ordered_name() of UTF-8 and END), time of its
                                     making in ns since 1970, in decimal.
``P:{catalog}:settings``     hash    What is kept for all processes. Field: name, in UTF-8; value: any bytes.
===========================  ======  ==================================================================================

A volume:

===========================  ======  ==================================================================================
``P:{V}:volume``             hash    Format and owner; its fields are listed below. Every change of the volume checks it.
``P:{V}:T``                  zset    For table T the numbers of its buckets that have a row. Score 0; member:
                                     ordered_int(number). As exact as the buckets: both change in one script.
``P:{V}:T:B``                hash    Bucket B (ordered_int(number), binary) of a table that is keyed by one integer.
                                     Number: id // 64. Field: id % 64, in decimal. Value: Codec.pack().
``P:{V}:T:B``                zset    Bucket B of a table that is keyed by (group, member). Number: group // 64, but the
                                     group itself for dentry. Score 0; member: the group % 64 as one byte (not dentry),
                                     the member in order (ordered_int(), ordered_name()), END, Codec.pack().
                                     ``counter`` is keyed by a text: one bucket, number 0, of members without a group.
===========================  ======  ==================================================================================

Fields of ``P:{V}:volume``, all in decimal or UTF-8. They change in scripts of metasvc.store.redis.ownership only.

==============  ===================================================================================================
``format``      metasvc.model.VolumeFormat as a JSON object with its own version
``epoch``       Fencing number: grows by one with every change of owner, never shrinks, never goes. 0: never owned
``attempt``     Fencing number within an epoch: grows when the owner asks what became of a commit
``last_batch``  Number of the last batch committed, by any owner. 0: none
``nonce``       Random text chosen by the owner. Absent: nobody owns it
``address``     How to reach the owner, for messages. Present if and only if nonce is
``expires``     When the ownership ends, in microseconds since 1970 by the server's clock. Present if and only if nonce is
``deleted``     1: the volume was deleted and its keys are being removed. Absent: it was not
==============  ===================================================================================================

Why buckets: a key of its own costs about 100 bytes, and so does a member of a large sorted set. Hashes of at most 128 fields
and sorted sets of at most 128 members, with values up to 64 bytes each (Redis's defaults), are one block of memory without any
pointer in it (a listpack). docs/adr/0052 has the figures.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from metasvc.store.redis.encoding import BUCKET_BITS, END, IN_BUCKET, name_of, ordered_int, ordered_name, read_int
from metasvc.store.tables import COUNTER, DENTRY, TABLES, Key, Table

__all__ = ["SCHEMA_VERSION", "Catalog", "Shape", "VolumeKeys", "shape_of"]

SCHEMA_VERSION: Final = 1


@dataclass(frozen=True, slots=True)
class Catalog:
    """The names of the catalog's keys."""

    prefix: str

    def key(self, name: str) -> bytes:
        """Return the key of one of the names above."""
        return f"{self.prefix}:{{catalog}}:{name}".encode()


class VolumeKeys:
    """The names of a volume's keys."""

    __slots__ = ("indexes", "tag", "volume")

    def __init__(self, prefix: str, volume_id: int) -> None:
        self.tag = str(volume_id)
        """What the cluster's slot depends on."""
        start = f"{prefix}:{{{volume_id}}}:"
        self.volume = f"{start}volume".encode()
        self.indexes = {table: f"{start}{table.name}".encode() for table in TABLES}

    def bucket(self, table: Table, bucket: bytes) -> bytes:
        """Return the key of a bucket of a table."""
        return self.indexes[table] + b":" + bucket


class Shape:
    """Where the rows of a table lie: in which bucket, and under which bytes there."""

    __slots__ = ("_has_group", "_is_int", "is_hash", "kind", "shift")

    def __init__(self, table: Table) -> None:
        self.is_hash = not table.grouped and table is not COUNTER
        self.kind = b"hash" if self.is_hash else b"zset"
        """As Redis calls it."""
        self.shift = 0 if table is DENTRY else BUCKET_BITS
        self._has_group = table.grouped and table is not DENTRY
        self._is_int = table.grouped and table.name in _INT_MEMBERS

    def number(self, key: Key) -> int:
        """Return the number of the bucket of a key, or of a group. OverflowError for one of more than 64 bits."""
        first: int | str = key[0]
        if isinstance(first, str):
            return 0
        if not -(1 << 63) <= first < 1 << 63:
            raise OverflowError("a key of more than 64 bits")
        return first >> self.shift

    def bucket(self, key: Key) -> bytes:
        """Return the bucket of a key, or of a group, as it stands in names and indexes. OverflowError."""
        return ordered_int(self.number(key))

    def place(self, key: Key) -> bytes:
        """Return the field of a key's row, or what its member begins with, END included."""
        if self.is_hash:
            return _FIELDS[int(key[0]) & IN_BUCKET]
        last = key[-1]
        if isinstance(last, str):
            last = last.encode()
        start = bytes((key[0] & IN_BUCKET,)) if self._has_group else b""
        return start + (ordered_int(last) if self._is_int else ordered_name(last)) + END

    def group(self, group: int) -> tuple[bytes, bytes]:
        """Return the bounds of a group's members, for ZRANGEBYLEX."""
        if not self._has_group:
            return b"-", b"+"
        low = group & IN_BUCKET
        return bytes((0x5B, low)), bytes((0x28, low + 1))

    def key(self, bucket: bytes, place: bytes) -> tuple[Key, int]:
        """Return the key of a field or a member of a bucket, and where the packed row begins in the member."""
        number, _ = read_int(bucket, 0)
        if self.is_hash:
            return ((number << BUCKET_BITS) | int(place),), 0
        first = (number << self.shift) | place[0] if self._has_group else number
        start = int(self._has_group)
        if self._is_int:
            last, end = read_int(place, start)
            return (first, last), end + 1
        end = place.index(END, start)
        name = name_of(place[start:end])
        # Of the tables without a group, dentry has its parent as bucket; counter has nothing but its text.
        return ((first, name) if self._has_group or not self.shift else (name.decode(),)), end + 1


_FIELDS: Final[list[bytes]] = [b"%d" % field for field in range(IN_BUCKET + 1)]
_INT_MEMBERS: Final = frozenset({"chunk", "link", "sustained", "slice_range"})

shape_of: Final = {table: Shape(table) for table in TABLES}
"""For each table where its rows lie."""
