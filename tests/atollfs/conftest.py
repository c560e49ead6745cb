"""A service for all tests of a run, a volume of each kind, and a directory in it for each test."""

from __future__ import annotations

import uuid
from collections.abc import Iterator

import pytest

from atollfs import AtollFileSystem
from tests.atollfs.places import Place, embedded_place, service_place
from tests.mount.service import ServiceProcess, service


@pytest.fixture(scope="session")
def running_service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceProcess]:
    """Return a service that nobody stops."""
    with service(tmp_path_factory.mktemp("service")) as running:
        yield running


@pytest.fixture(scope="session", params=["embedded", "service"])
def place(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Place:
    """Return a volume of either kind."""
    directory = tmp_path_factory.mktemp(request.param)
    if request.param == "embedded":
        return embedded_place(directory)
    return service_place(request.getfixturevalue("running_service"), directory)


@pytest.fixture(scope="session")
def service_volume(running_service: ServiceProcess, tmp_path_factory: pytest.TempPathFactory) -> Place:
    """Return a volume of the service for tests that need several sessions."""
    return service_place(running_service, tmp_path_factory.mktemp("shared"))


@pytest.fixture(scope="session")
def open_fs(place: Place) -> Iterator[AtollFileSystem]:
    """Return an open file system that all tests share."""
    with place.opened() as fs:
        yield fs


@pytest.fixture
def fs(open_fs: AtollFileSystem) -> AtollFileSystem:
    return open_fs


@pytest.fixture
def here(fs: AtollFileSystem) -> str:
    """Return an empty directory of the volume."""
    path = f"/{uuid.uuid4().hex}"
    fs.mkdir(path)
    return path
