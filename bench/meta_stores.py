"""The servers on which `make bench-meta` compares, the same for both systems, and what they and the processes count.

Owns durability, which is the same for both: PostgreSQL with synchronous_commit and fsync on, Redis with appendfsync always.
Each system has a database of its own in the one server. Only one system is mounted at a time and only one service runs, in
turns of AtollFS: so what a server counts meanwhile is of one system. Counters are exact when they are read (none of
those that a server reports a second late), and those of processes have ticks of 10 ms.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol
from urllib.request import urlopen

from bench.processes import StepFailed
from bench.servers import MetadataService
from tests.servers.postgresql import PostgreSQL, installed_programs
from tests.servers.redis import Redis

_TICKS_PER_S: Final = os.sysconf("SC_CLK_TCK")
_JUICEFS: Final = "juicefs"
# JuiceFS blanks its password in its arguments wherever it occurs: it must not be a word of the mount point.
_JUICEFS_PASSWORD: Final = "open-sesame"
# PostgreSQL's own defaults where the tests have smaller ones; statements are counted for both systems alike.
_POSTGRESQL_SETTINGS: Final = {
    "shared_buffers": "128MB",
    "max_connections": "100",
    "fsync": "on",
    "synchronous_commit": "on",
    "full_page_writes": "on",
    "shared_preload_libraries": "pg_stat_statements",
}
_STATEMENTS: Final = (
    "SELECT coalesce(sum(calls), 0)::bigint, pg_snapshot_xmax(pg_current_snapshot())::text::bigint "
    "FROM pg_stat_statements(false) JOIN pg_database ON pg_database.oid = dbid WHERE datname <> 'postgres'"
)
_OUR_NAMES: Final = {
    "atoll_meta_commit_duration_seconds_count": "batches",
    "atoll_meta_batch_rows_sum": "rows",
    "atoll_meta_loads_total": "loads",
}


@dataclass(frozen=True, slots=True)
class Counters:
    """What was counted up to a moment, or between two; None where nobody counts."""

    statements: int
    """Of PostgreSQL, BEGIN and COMMIT included; commands of Redis."""
    transactions: int
    """That wrote: PostgreSQL's transaction ids, EXEC and scripts of Redis (of which some only read)."""
    server_cpu_s: float
    client_cpu_s: float
    """Of the process that answers the kernel."""
    service_cpu_s: float | None = None
    requests: int | None = None
    """Of the mount, answered by the service."""
    batches: int | None = None
    """Committed by the service."""
    rows: int | None = None
    loads: int | None = None
    """Trips of the service to the store for rows that it did not have."""

    def since(self, before: "Counters") -> "Counters":
        """Return the difference."""
        return self._with(before, -1)

    def plus(self, other: "Counters") -> "Counters":
        """Return the sum."""
        return self._with(other, 1)

    def _with(self, other: "Counters", sign: int) -> "Counters":
        def optional(mine: int | None, theirs: int | None) -> int | None:
            return None if mine is None or theirs is None else mine + sign * theirs

        service = None
        if self.service_cpu_s is not None and other.service_cpu_s is not None:
            service = self.service_cpu_s + sign * other.service_cpu_s
        return Counters(
            self.statements + sign * other.statements,
            self.transactions + sign * other.transactions,
            self.server_cpu_s + sign * other.server_cpu_s,
            self.client_cpu_s + sign * other.client_cpu_s,
            service,
            optional(self.requests, other.requests),
            optional(self.batches, other.batches),
            optional(self.rows, other.rows),
            optional(self.loads, other.loads),
        )


class Store(Protocol):
    """A running server that keeps the names of both systems."""

    @property
    def name(self) -> str: ...

    @property
    def atoll(self) -> str:
        """Return the URL for `atoll serve --store`."""

    @property
    def juicefs(self) -> str:
        """Return the address for JuiceFS."""

    @property
    def pid(self) -> int: ...

    def counts(self) -> tuple[int, int]:
        """Return the statements and the writing transactions so far."""


@dataclass(frozen=True, slots=True)
class PostgresqlStore:
    """PostgreSQL, a database for each system."""

    server: PostgreSQL
    name: str = "postgresql"

    @property
    def atoll(self) -> str:
        return self.server.url()

    @property
    def juicefs(self) -> str:
        return f"postgres://{_JUICEFS}:{_JUICEFS_PASSWORD}@127.0.0.1:{self.server.port}/{_JUICEFS}?sslmode=disable"

    @property
    def pid(self) -> int:
        return self.server.pid

    def counts(self) -> tuple[int, int]:
        statements, transactions = self.server.sql(_STATEMENTS, database="postgres").strip().split("|")
        return int(statements), int(transactions)


@dataclass(frozen=True, slots=True)
class RedisStore:
    """Redis, a database for each system."""

    server: Redis
    name: str = "redis"

    @property
    def atoll(self) -> str:
        return self.server.url()

    @property
    def juicefs(self) -> str:
        # A user and a password for URLs; JuiceFS takes its own from there, too.
        return self.server.url().removesuffix("/0") + "/1"

    @property
    def pid(self) -> int:
        return self.server.pid

    def counts(self) -> tuple[int, int]:
        text: bytes = self.server.command("INFO", "commandstats")
        calls = {}
        for line in text.decode().splitlines():
            if line.startswith("cmdstat_"):
                command, _, values = line.removeprefix("cmdstat_").partition(":")
                calls[command] = int(values.split(",")[0].removeprefix("calls="))
        wrote = sum(calls.get(command, 0) for command in ("exec", "eval", "evalsha", "fcall"))
        return sum(calls.values()) - calls.get("info", 0), wrote


@contextmanager
def postgresql_store() -> Iterator[Store]:
    """Run PostgreSQL with its durability on and a database for JuiceFS."""
    programs = installed_programs()
    if programs is None:
        raise StepFailed("no PostgreSQL here: install Debian's postgresql (scripts/setup.sh test)")
    with PostgreSQL(programs, settings=_POSTGRESQL_SETTINGS) as server:
        server.sql("CREATE EXTENSION pg_stat_statements", database="postgres")
        server.sql(f"CREATE ROLE {_JUICEFS} LOGIN PASSWORD '{_JUICEFS_PASSWORD}'", database="postgres")
        server.sql(f"CREATE DATABASE {_JUICEFS} OWNER {_JUICEFS}", database="postgres")
        yield PostgresqlStore(server)


@contextmanager
def redis_store() -> Iterator[Store]:
    """Run Redis, which syncs each change before it answers."""
    with Redis(maxmemory_policy="noeviction") as server:
        yield RedisStore(server)


STORES: Final = {"postgresql": postgresql_store, "redis": redis_store}


def _cpu_s(pid: int, *, with_ended: bool = False) -> float:
    """Return the processor time of a process, and of its children that have ended; 0 if there is none."""
    with suppress(FileNotFoundError, ProcessLookupError):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return sum(map(int, fields[11 : 15 if with_ended else 13])) / _TICKS_PER_S
    return 0.0


def server_cpu_s(pid: int) -> float:
    """Return the processor time of a server and of all processes that it started."""
    children: list[str] = []
    with suppress(FileNotFoundError, ProcessLookupError):
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return _cpu_s(pid, with_ended=True) + sum(_cpu_s(int(child)) for child in children)


def processes_of(mountpoint: Path) -> list[int]:
    """Find the processes that were told this mount point; JuiceFS rewrites its arguments as one, with blanks between."""
    wanted, found = b" %b " % os.fsencode(mountpoint), []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with suppress(OSError):
                if wanted in b" %b " % (entry / "cmdline").read_bytes().replace(b"\0", b" "):
                    found.append(int(entry.name))
    return found


def _ours(service: MetadataService) -> dict[str, int]:
    with urlopen(service.metrics, timeout=30) as answer:
        lines = answer.read().decode().splitlines()
    found = dict.fromkeys(("batches", "rows", "loads", "requests"), 0)
    for line in lines:
        name, _, value = line.rpartition(" ")
        name = name.partition("{")[0]
        if name == "atoll_meta_request_duration_seconds_count":
            found["requests"] += int(float(value))
        elif name in _OUR_NAMES:
            found[_OUR_NAMES[name]] += int(float(value))
    return found


def counters(store: Store, mountpoint: Path, service: MetadataService | None) -> Counters:
    """Read all counters now."""
    statements, transactions = store.counts()
    return Counters(
        statements,
        transactions,
        server_cpu_s(store.pid),
        sum(map(_cpu_s, processes_of(mountpoint))),
        None if service is None else _cpu_s(service.pid),
        **({} if service is None else _ours(service)),
    )
