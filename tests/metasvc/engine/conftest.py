"""The rules are the same over the wire and on every store: tests of some modules run several ways."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest

from metasvc.store import Store
from tests.metasvc.engine.volumes import Way
from tests.metasvc.store.kinds import KINDS, new_store_of
from tests.servers.fixtures import Servers

WAYS = {
    "test_rules": ["direct", "wire", "sqlite", "postgresql", "redis"],
    "test_random_operations": ["direct", "sqlite", "postgresql", "redis"],
    "test_dump": ["direct", "sqlite", "postgresql", "redis"],
    "test_load": ["direct", "sqlite", "postgresql", "redis"],
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
    if way in KINDS:
        servers = Servers(request)
        numbers = itertools.count()
        tmp_path: Path = request.getfixturevalue("tmp_path")

        async def make_store() -> Store:
            directory = tmp_path / f"store-{next(numbers)}"
            directory.mkdir()
            return await new_store_of(way, directory, servers)

        Way.make_store = staticmethod(make_store)
    yield
    Way.over_the_wire = False
    Way.make_store = before
