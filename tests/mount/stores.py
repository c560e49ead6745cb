"""What lies below the services of tests: SQLite, PostgreSQL or Redis, as the environment says.

ATOLL_TEST_STORE is `sqlite`, `postgresql` or `redis`: the kind of store of a service that a test starts without naming one
(SQLite where it is not set). Where it is set, tests that mount without asking for a service mount through one.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import pytest

from tests.servers.fixtures import Servers
from tests.servers.postgresql import ROLE

KINDS: Final = ("sqlite", "postgresql", "redis")
_VARIABLE: Final = "ATOLL_TEST_STORE"
_numbers = itertools.count(1)


def in_directory(directory: Path) -> str:
    """Return the URL of a SQLite database in that directory."""
    return f"sqlite:///{directory}/service.db"


_new_url: Callable[[Path], str] = in_directory


def new_url(directory: Path) -> str:
    """Return the URL of a store that nobody has prepared: in the directory, or on a server that all tests share."""
    return _new_url(directory)


def goes_through_a_service() -> bool:
    """Return whether tests that mount without asking for a service do so through one."""
    return _VARIABLE in os.environ or os.environ.get("ATOLL_TEST_METADATA") == "service"


def maker_of(kind: str, servers: Servers) -> Callable[[Path], str]:
    """Return what makes URLs of fresh stores of a kind. Its server is started now."""
    if kind == "postgresql":
        postgresql = servers.postgresql

        def in_schema(_directory: Path) -> str:
            name = f"service_{next(_numbers)}"
            postgresql.sql(f"CREATE SCHEMA {name} AUTHORIZATION {ROLE}")
            return postgresql.url(search_path=name)

        return in_schema
    if kind == "redis":
        redis = servers.redis
        return lambda _directory: redis.url(prefix=redis.new_prefix())
    assert kind == "sqlite", f"{_VARIABLE} is one of {', '.join(KINDS)}"
    return in_directory


about_embedded_volumes = pytest.mark.skipif(goes_through_a_service(), reason="this one is about embedded volumes")


@pytest.fixture(scope="session", autouse=True)
def _of_the_environment(request: pytest.FixtureRequest) -> Iterator[None]:
    """Let `new_url` make what the environment says; its server is started now."""
    global _new_url
    _new_url = maker_of(os.environ.get(_VARIABLE, "sqlite"), Servers(request))
    yield
    _new_url = in_directory
