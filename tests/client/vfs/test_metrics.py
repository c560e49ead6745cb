"""The text of the counters, read by Prometheus' own parser."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families

from client.vfs.metrics import VfsMetrics


def samples(text: str) -> dict[tuple[str, str, str], float]:
    return {
        (sample.name, sample.labels.get("op", ""), sample.labels.get("le", "")): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_requests_are_counted_by_operation_with_a_histogram_of_their_durations() -> None:
    metrics = VfsMetrics()
    read = metrics.operation("READ")
    for duration_ns in (500, 1023, 1024, 5_000, 2_000_000_000, 1 << 50):
        read.observe(duration_ns)
    metrics.operation("LOOKUP").errors += 1
    metrics.read_bytes = 4096
    found = samples(metrics.text({"open_files": 3}))
    assert found["atoll_fuse_requests_total", "READ", ""] == 6
    assert found["atoll_fuse_requests_total", "LOOKUP", ""] == 0
    assert found["atoll_fuse_errors_total", "LOOKUP", ""] == 1
    assert found["atoll_read_bytes_total", "", ""] == 4096
    assert found["atoll_open_files", "", ""] == 3
    name = "atoll_fuse_request_duration_seconds"
    buckets = {
        float(le): value for (sample, op, le), value in found.items() if sample == f"{name}_bucket" and op == "READ"
    }
    assert buckets[1.024e-06] == 2
    assert buckets[2.048e-06] == 3
    assert buckets[float("inf")] == 6 == found[f"{name}_count", "READ", ""]
    assert list(buckets.values()) == sorted(buckets.values())
    assert abs(found[f"{name}_sum", "READ", ""] - (2_000_007_547 + (1 << 50)) / 1e9) < 1


def test_the_counters_of_an_operation_are_one_object() -> None:
    metrics = VfsMetrics()
    assert metrics.operation("READ") is metrics.operation("READ")
