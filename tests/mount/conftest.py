"""Fixtures for tests on a real mount: a fresh volume for each test, unmounted and checked with `atoll fsck` after it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.mount.mounted import MountedVolume, mounted
from tests.servers.buckets import Bucket


@pytest.fixture
def mounted_volume(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[MountedVolume]:
    """Yield a fresh volume whose bucket is a directory, mounted; afterwards it must be clean.

    With ATOLL_TEST_BUCKET=s3 in the environment the bucket is on a real S3 server.
    """
    if os.environ.get("ATOLL_TEST_BUCKET") == "s3":
        yield request.getfixturevalue("s3_volume")
        return
    with mounted(tmp_path) as volume:
        yield volume


@pytest.fixture
def s3_volume(tmp_path: Path, bucket: Bucket) -> Iterator[MountedVolume]:
    """Yield a fresh volume whose bucket is on a real S3 server, mounted; afterwards it must be clean."""
    with mounted(tmp_path, "--bucket", bucket.url, environment=bucket.environment) as volume:
        yield volume


@pytest.fixture(params=["directory", "s3"])
def volume_on_each_bucket(request: pytest.FixtureRequest) -> MountedVolume:
    """Run the test twice: with a directory as the bucket and with S3."""
    volume = request.getfixturevalue("mounted_volume" if request.param == "directory" else "s3_volume")
    assert isinstance(volume, MountedVolume)
    return volume
