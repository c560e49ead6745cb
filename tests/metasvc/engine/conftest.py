"""The rules are the same over the wire and on every store: tests of some modules run several ways."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest

from metasvc.store import Store
from metasvc.store.sqlite import SqliteStore
from tests.metasvc.engine.volumes import Way
from tests.metasvc.store.postgresql_world import PostgresqlWorld
from tests.servers.postgresql import PostgreSQL

WAYS = {
    "test_rules": ["direct", "wire", "sqlite", "postgresql"],
    "test_random_operations": ["direct", "sqlite", "postgresql"],
}
"""By module. "direct" and "wire" are on the store in memory, the others are direct."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run the tests of some modules several times."""
    ways = WAYS.get(metafunc.module.__name__.rpartition(".")[2])
    if ways is not None:
        metafunc.parametrize("_way", ways, indirect=True)


@pytest.fixture(autouse=True)
def _way(request: pytest.FixtureRequest) -> Iterator[None]:
    way = getattr(request, "param", "direct")
    before = Way.make_store
    Way.over_the_wire = way == "wire"
    if way == "sqlite":
        Way.make_store = _Sqlite(request.getfixturevalue("tmp_path"))
    elif way == "postgresql":
        Way.make_store = _Postgresql(request.getfixturevalue("postgresql"))
    yield
    Way.over_the_wire = False
    Way.make_store = before


class _Sqlite:
    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._numbers = itertools.count()

    async def __call__(self) -> Store:
        return await SqliteStore.open(str(self._directory / f"meta-{next(self._numbers)}.db"), create=True)


class _Postgresql:
    def __init__(self, server: PostgreSQL) -> None:
        self._server = server

    async def __call__(self) -> Store:
        return await PostgresqlWorld(self._server).open_store()
