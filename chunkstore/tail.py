"""The tail of a slice being written: its last, incomplete block, in memory.

Owns the buffer and its charge to the memory for written data. All on the event loop, atomic for lack of an await.

A small tail grows like any bytearray and is charged what it holds. One over 256 KiB gets room for 1 MiB, then for the whole
block, at once, and is charged that. (Growing to 4 MiB by steps costs 3.3 ms in the kernel for moved and faulted pages,
writing into a buffer of the final size 0.05 ms, as malloc reuses the last one.)
"""

from __future__ import annotations

from typing import Final

from chunkstore.budget import WriteMemory
from chunkstore.geometry import KIB, MIB, Buffer

_GROWN_BYTES: Final = 256 * KIB
_MIDDLE_BYTES: Final = 1 * MIB


class Tail:
    """Hold the bytes of an incomplete block."""

    __slots__ = ("_block_bytes", "_buffer", "_charged_bytes", "_memory", "length")

    def __init__(self, memory: WriteMemory, block_bytes: int) -> None:
        """Start empty and uncharged."""
        self._memory = memory
        self._block_bytes = block_bytes
        self._buffer = bytearray()
        self._charged_bytes = 0
        self.length = 0

    def _capacity_for(self, length: int) -> int:
        if length <= _GROWN_BYTES:
            return length
        return _MIDDLE_BYTES if length <= _MIDDLE_BYTES < self._block_bytes else self._block_bytes

    def charge_for(self, size_bytes: int) -> int:
        """Return how much more memory it would be charged to take so many bytes more."""
        return max(0, self._capacity_for(self.length + size_bytes) - self._charged_bytes)

    def try_append(self, data: Buffer) -> bool:
        """Take bytes, which fit into the block, if memory has room for them."""
        start, end = self.length, self.length + len(data)
        if end > self._charged_bytes:
            capacity = self._capacity_for(end)
            if not self._memory.try_take_tail(capacity - self._charged_bytes):
                return False
            self._charged_bytes = capacity
            if capacity == end <= _GROWN_BYTES:
                self._buffer += data
                self.length = end
                return True
            bigger = bytearray(capacity)
            bigger[:start] = self._buffer
            self._buffer = bigger
        self._buffer[start:end] = data
        self.length = end
        return True

    def overwrite(self, offset: int, data: Buffer) -> None:
        """Replace bytes that are there."""
        assert offset + len(data) <= self.length
        self._buffer[offset : offset + len(data)] = data

    def copy(self, start: int, end: int) -> bytes:
        """Return bytes `[start, end)`. A copy: a view would keep the tail from growing."""
        return bytes(memoryview(self._buffer)[start:end])

    def view(self) -> memoryview:
        """Return all bytes as they lie there; only while nothing is appended or overwritten."""
        return memoryview(self._buffer)[: self.length].toreadonly()

    def take(self) -> tuple[Buffer, int]:
        """Return the bytes, private from now on, and their charge, which counts as in flight; start again empty."""
        raw: Buffer = self._buffer
        charged_bytes = self._charged_bytes
        if charged_bytes > 2 * self.length:
            raw = self.copy(0, self.length)
            self._memory.release_tail(charged_bytes - self.length)
            charged_bytes = self.length
        elif len(self._buffer) > self.length:
            raw = self.view()
        self._memory.tail_to_flight(charged_bytes)
        self._buffer, self._charged_bytes, self.length = bytearray(), 0, 0
        return raw, charged_bytes

    def drop(self) -> None:
        """Let the bytes go; start again empty."""
        self._memory.release_tail(self._charged_bytes)
        self._buffer, self._charged_bytes, self.length = bytearray(), 0, 0
