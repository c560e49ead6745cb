"""Counters of requests, cheap enough for every one of them, and their text in Prometheus' format.

Owns numbers only. prometheus-client is not used here: observing through it costs more than answering a cached read.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

# Buckets are powers of two of nanoseconds: 2^10 (1 us) to 2^36 (69 s).
_FIRST_BIT: Final = 10
_LAST_BIT: Final = 36


class OperationMetrics:
    """Count the requests of one operation."""

    __slots__ = ("bits", "errors", "name", "total_ns")

    def __init__(self, name: str) -> None:
        self.name = name
        self.bits = [0] * 65
        """Requests by the number of bits of their duration in nanoseconds."""
        self.errors = 0
        self.total_ns = 0

    def observe(self, duration_ns: int) -> None:
        """Count a request that is answered."""
        self.bits[duration_ns.bit_length()] += 1
        self.total_ns += duration_ns

    @property
    def count(self) -> int:
        """Return how many requests were answered."""
        return sum(self.bits)


class VfsMetrics:
    """All numbers of one vfs."""

    def __init__(self) -> None:
        self.operations: dict[str, OperationMetrics] = {}
        self.read_bytes = 0
        self.written_bytes = 0
        self.flush_failures = 0
        self.lost_bytes = 0
        self.neighbour_fetched_bytes = 0
        self.neighbour_read_bytes = 0
        self.neighbour_unread_bytes = 0

    def operation(self, name: str) -> OperationMetrics:
        """Return the counters of an operation, by the name that FUSE gives it (`READ`); made at first use."""
        found = self.operations.get(name)
        if found is None:
            found = self.operations[name] = OperationMetrics(name)
        return found

    def text(self, gauges: Mapping[str, int | float]) -> str:
        """Return Prometheus text; `gauges` are added as `atoll_{name}`."""
        operations = sorted(self.operations.values(), key=lambda operation: operation.name)
        lines = [
            "# HELP atoll_fuse_requests_total Requests that reached the daemon.",
            "# TYPE atoll_fuse_requests_total counter",
        ]
        lines += [f'atoll_fuse_requests_total{{op="{op.name}"}} {op.count}' for op in operations]
        lines += [
            "# HELP atoll_fuse_errors_total Requests answered with an error (ENOENT of a lookup among them).",
            "# TYPE atoll_fuse_errors_total counter",
        ]
        lines += [f'atoll_fuse_errors_total{{op="{op.name}"}} {op.errors}' for op in operations]
        lines += [
            "# HELP atoll_fuse_request_duration_seconds Time from a request's arrival in the daemon to its answer.",
            "# TYPE atoll_fuse_request_duration_seconds histogram",
        ]
        for op in operations:
            lines += _histogram("atoll_fuse_request_duration_seconds", op)
        counters = {
            "read_bytes_total": ("Bytes handed to readers.", self.read_bytes),
            "written_bytes_total": ("Bytes taken from writers.", self.written_bytes),
            "flush_failures_total": ("Flushes of a file that failed; its data are kept.", self.flush_failures),
            "lost_bytes_total": ("Written bytes that were lost because their session had ended.", self.lost_bytes),
            "neighbour_fetched_bytes_total": (
                "Bytes of small files fetched because others of their directory were read.",
                self.neighbour_fetched_bytes,
            ),
            "neighbour_read_bytes_total": ("Those of them that were read then.", self.neighbour_read_bytes),
            "neighbour_unread_bytes_total": ("Those that were not read in time.", self.neighbour_unread_bytes),
        }
        for name, (text, value) in counters.items():
            lines += [f"# HELP atoll_{name} {text}", f"# TYPE atoll_{name} counter", f"atoll_{name} {value}"]
        for name, number in gauges.items():
            lines += [f"# TYPE atoll_{name} gauge", f"atoll_{name} {number}"]
        return "\n".join(lines) + "\n"


def _histogram(name: str, op: OperationMetrics) -> list[str]:
    lines = []
    below = sum(op.bits[:_FIRST_BIT])
    for bit in range(_FIRST_BIT, _LAST_BIT + 1):
        below += op.bits[bit]
        # All of at most `bit` bits are below 2^bit ns.
        lines.append(f'{name}_bucket{{op="{op.name}",le="{(1 << bit) / 1e9:.9g}"}} {below}')
    lines.append(f'{name}_bucket{{op="{op.name}",le="+Inf"}} {op.count}')
    lines.append(f'{name}_sum{{op="{op.name}"}} {op.total_ns / 1e9:.9f}')
    lines.append(f'{name}_count{{op="{op.name}"}} {op.count}')
    return lines
