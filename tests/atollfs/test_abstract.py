"""fsspec's own suite for file systems, on an embedded volume and on a service's."""

from __future__ import annotations

import posixpath
import uuid
from collections.abc import Callable

import pytest
from fsspec.tests.abstract import (  # type: ignore[import-untyped]
    AbstractCopyTests,
    AbstractFixtures,
    AbstractGetTests,
    AbstractOpenTests,
    AbstractPipeTests,
    AbstractPutTests,
)

from atollfs import AtollFileSystem


class Fixtures(AbstractFixtures):  # type: ignore[misc]
    """What the suite needs to know of a file system."""

    @pytest.fixture
    def fs(self, open_fs: AtollFileSystem) -> AtollFileSystem:
        return open_fs

    @pytest.fixture
    def fs_path(self, fs: AtollFileSystem) -> str:
        path = f"/{uuid.uuid4().hex}"
        fs.mkdir(path)
        return path

    @pytest.fixture
    def fs_join(self) -> Callable[..., str]:
        return posixpath.join


class TestCopy(AbstractCopyTests, Fixtures):  # type: ignore[misc]
    """cp."""


class TestGet(AbstractGetTests, Fixtures):  # type: ignore[misc]
    """get."""


class TestPut(AbstractPutTests, Fixtures):  # type: ignore[misc]
    """put."""


class TestOpen(AbstractOpenTests, Fixtures):  # type: ignore[misc]
    """open."""


class TestPipe(AbstractPipeTests, Fixtures):  # type: ignore[misc]
    """pipe."""
