"""Fixtures of the real servers: one S3 server, one PostgreSQL, one Redis for a run of pytest, fresh buckets, fault proxies.

A test that stops or damages a server takes `own_s3_server`, `own_postgresql`, `own_redis`; all others share `s3_server`,
`postgresql`, `redis`. One that runs on stores of any kind takes `servers`, which starts what it is asked for.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.servers.buckets import Bucket
from tests.servers.faults import FaultProxy
from tests.servers.postgresql import PostgreSQL, installed_programs, postgresql_programs_for_all
from tests.servers.redis import Redis, RedisAt, named_server
from tests.servers.seaweedfs import SeaweedFS

_numbers = itertools.count(1)


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SeaweedFS]:
    """Run SeaweedFS for the whole session (about 4 s to start)."""
    with SeaweedFS(tmp_path_factory.mktemp("seaweedfs")) as server:
        yield server


@pytest.fixture
def own_s3_server(tmp_path: Path) -> Iterator[SeaweedFS]:
    """Run a SeaweedFS that the test may kill, pause and restart."""
    with SeaweedFS(tmp_path / "seaweedfs") as server:
        yield server


@pytest.fixture
def bucket(s3_server: SeaweedFS) -> Iterator[Bucket]:
    """Make an empty bucket, with a prefix as users have one; it is deleted with all that is in it."""
    name = f"atoll-test-{next(_numbers)}"
    s3_server.create_bucket(name)
    yield s3_server.bucket(name, prefix="volumes/one")
    s3_server.delete_bucket(name)


@pytest.fixture
def fault_proxy(s3_server: SeaweedFS, seed: int) -> Iterator[FaultProxy]:
    """Put a proxy before the server; `bucket.at(fault_proxy.endpoint)` goes through it."""
    with FaultProxy(s3_server.endpoint, seed=seed) as proxy:
        yield proxy


@pytest.fixture(scope="session")
def postgresql_programs() -> Iterator[Path]:
    """Find PostgreSQL's programs: a directory that any user may enter. Nothing of it runs yet."""
    with postgresql_programs_for_all() as directory:
        yield directory


@pytest.fixture(scope="session")
def server_programs(request: pytest.FixtureRequest) -> Path:
    """Find the programs of the version that the store is tested on."""
    programs: Path = installed_programs() or request.getfixturevalue("postgresql_programs")
    return programs


@pytest.fixture(scope="session")
def postgresql(server_programs: Path) -> Iterator[PostgreSQL]:
    """Run PostgreSQL for the whole session (about 2 s to make and start)."""
    with PostgreSQL(server_programs) as server:
        yield server


@pytest.fixture
def own_postgresql(server_programs: Path) -> Iterator[PostgreSQL]:
    """Run a PostgreSQL that the test may kill, pause and restart."""
    with PostgreSQL(server_programs) as server:
        yield server


@pytest.fixture(scope="session")
def redis() -> Iterator[RedisAt]:
    """Run Redis for the whole session, or use the one that the environment names."""
    named = named_server()
    if named is not None:
        yield named
        return
    with Redis() as server:
        yield server


@pytest.fixture
def own_redis() -> Iterator[Redis]:
    """Run a Redis that the test may kill, pause and restart."""
    with Redis() as server:
        yield server


class Servers:
    """The servers of databases that all tests share, started when they are first asked for."""

    def __init__(self, request: pytest.FixtureRequest) -> None:
        self._request = request

    @property
    def postgresql(self) -> PostgreSQL:
        """The fixture `postgresql`."""
        server: PostgreSQL = self._request.getfixturevalue("postgresql")
        return server

    @property
    def redis(self) -> RedisAt:
        """The fixture `redis`."""
        server: RedisAt = self._request.getfixturevalue("redis")
        return server


@pytest.fixture
def servers(request: pytest.FixtureRequest) -> Servers:
    """Start servers of databases as a test needs them."""
    return Servers(request)
