"""What a service counts, in Prometheus' format.

Owns the names and what they mean (docs/guides/metrics.md has them all, a test compares). Counted on the event loop as things
happen; sizes and ages are looked at when somebody asks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Final

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from metasvc.model import TenantUse

if TYPE_CHECKING:
    from metasvc.server.volumes import Volume

_LATENCIES_S: Final = tuple(0.0001 * 2**power for power in range(18))
"""0.1 ms to 13 s."""
_ROWS: Final = tuple(float(1 << power) for power in range(15))

Gather = Callable[[], "Iterable[Volume]"]
GatherTenants = Callable[[], Mapping[str, TenantUse]]


class ServiceMetrics:
    """All numbers of one service."""

    def __init__(self, volumes: Gather, tenants: GatherTenants) -> None:
        """``volumes`` returns those that are open, ``tenants`` what their tenants hold."""
        self._registry = CollectorRegistry()
        self._requests = Histogram(
            "atoll_meta_request_duration_seconds",
            "Time from a request's arrival in the service to its answer, by operation.",
            ["op"],
            buckets=_LATENCIES_S,
            registry=self._registry,
        )
        self._errors = Counter(
            "atoll_meta_request_errors",
            "Requests answered with an error (ENOENT of a lookup among them), by operation.",
            ["op"],
            registry=self._registry,
        )
        self._batch_rows = Histogram(
            "atoll_meta_batch_rows", "Rows changed by a commit.", buckets=_ROWS, registry=self._registry
        )
        self._commits = Histogram(
            "atoll_meta_commit_duration_seconds",
            "Time that the store took for a commit.",
            buckets=_LATENCIES_S,
            registry=self._registry,
        )
        self._repeated = Counter(
            "atoll_meta_requests_repeated",
            "Requests that came again, after a broken connection, and were answered from a kept reply.",
            registry=self._registry,
        )
        self._by_operation: dict[str, Histogram] = {}
        self.running = 0
        """Requests under way, of all sessions of all volumes."""
        self._registry.register(_Volumes(volumes))
        self._registry.register(_Tenants(tenants))

    def observe_request(self, operation: str, duration_s: float, *, failed: bool) -> None:
        """Count a request that is answered."""
        known = self._by_operation.get(operation)
        if known is None:
            known = self._by_operation[operation] = self._requests.labels(operation)
        known.observe(duration_s)
        if failed:
            self._errors.labels(operation).inc()

    def observe_repeated(self) -> None:
        """Count a request that was answered from a kept reply."""
        self._repeated.inc()

    def observe_commit(self, rows: int, duration_s: float) -> None:
        """Count a batch that is durable."""
        self._batch_rows.observe(rows)
        self._commits.observe(duration_s)

    def text(self) -> str:
        """Return everything. Call on the event loop."""
        return generate_latest(self._registry).decode()


class _Volumes(Collector):
    """What is looked at when somebody asks, for each volume that is open."""

    def __init__(self, volumes: Gather) -> None:
        self._volumes = volumes

    def describe(self) -> Iterable[Metric]:
        """Nothing beforehand: there may be no volume."""
        return ()

    def collect(self) -> Iterator[Metric]:
        gauges = {
            "atoll_meta_sessions": "Sessions that live.",
            "atoll_meta_sessions_connected": "Sessions that have a stream now.",
            "atoll_meta_requests_outstanding": "Requests under way.",
            "atoll_meta_memory_bytes": "Rows in memory.",
            "atoll_meta_memory_limit_bytes": "What rows in memory may take.",
            "atoll_meta_used_bytes": "Bytes of the volume's files.",
            "atoll_meta_used_inodes": "Inodes of the volume.",
            "atoll_meta_leases": "Directories on which sessions have leases, or had them last.",
            "atoll_meta_owner_epoch": "How often the volume got an owner; a step is a change of the owner.",
            "atoll_meta_backup_age_seconds": "Age of the newest backup; infinite while there is none.",
            "atoll_meta_backup_size_bytes": "What the newest backup takes.",
            "atoll_meta_backups": "Backups in the bucket.",
        }
        counters = {
            "atoll_meta_sessions_expired": "Sessions that were ended because nothing was heard of them.",
            "atoll_meta_lease_recalls": "Leases that were called back because another session changed the directory.",
            "atoll_meta_lease_recalls_expired": "Recalls that were not answered before the lease ran out.",
            "atoll_meta_loads": "Trips to the store for rows that were not in memory.",
            "atoll_meta_jobs_runs": "Times that a background job looked for work, by job.",
            "atoll_meta_jobs_failures": "Times that a background job failed, by job.",
            "atoll_meta_jobs_done": "What a background job did: objects or trash deleted, backups made …, by job.",
        }
        families: dict[str, GaugeMetricFamily | CounterMetricFamily] = {
            name: GaugeMetricFamily(name, text, labels=["volume"]) for name, text in gauges.items()
        }
        for name, text in counters.items():
            labels = ["volume", "job"] if "_jobs_" in name else ["volume"]
            families[name] = CounterMetricFamily(name, text, labels=labels)
        for volume in self._volumes():
            for name, value in volume.gauges().items():
                families[f"atoll_meta_{name}"].add_metric([volume.name], value)
            for job, state in volume.jobs().items():
                families["atoll_meta_jobs_runs"].add_metric([volume.name, job], state.runs)
                families["atoll_meta_jobs_failures"].add_metric([volume.name, job], state.failures)
                families["atoll_meta_jobs_done"].add_metric([volume.name, job], state.done)
        yield from families.values()


class _Tenants(Collector):
    """What the volumes of tenants hold together, of those tenants of whose volumes this process owns some."""

    def __init__(self, tenants: GatherTenants) -> None:
        self._tenants = tenants

    def describe(self) -> Iterable[Metric]:
        """Nothing beforehand: there may be no tenant."""
        return ()

    def collect(self) -> Iterator[Metric]:
        texts = {
            "used_bytes": "Bytes of the files of a tenant's volumes, by what their owners said last.",
            "used_inodes": "Inodes of a tenant's volumes, by what their owners said last.",
            "max_bytes": "What a tenant's volumes may hold together; 0: no limit.",
            "max_inodes": "How many inodes a tenant's volumes may have together; 0: no limit.",
        }
        families = {
            name: GaugeMetricFamily(f"atoll_tenant_{name}", text, labels=["tenant"]) for name, text in texts.items()
        }
        for tenant, use in self._tenants().items():
            for name, value in use._asdict().items():
                families[name].add_metric([tenant], value)
        yield from families.values()
