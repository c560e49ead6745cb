"""The rules are the same over the wire: tests of them run both ways."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.metasvc.engine.volumes import Way

BOTH_WAYS = {"test_rules"}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run the tests of some modules twice."""
    if metafunc.module.__name__.rpartition(".")[2] in BOTH_WAYS:
        metafunc.parametrize("_way", ["direct", "wire"], indirect=True)


@pytest.fixture(autouse=True)
def _way(request: pytest.FixtureRequest) -> Iterator[None]:
    Way.over_the_wire = getattr(request, "param", "direct") == "wire"
    yield
    Way.over_the_wire = False
