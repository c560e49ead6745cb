"""A volume whose keys the service keeps, used from Python without any key."""

from __future__ import annotations

import random
from pathlib import Path

from atollfs import AtollFileSystem
from client.volume import TOKEN_VARIABLE
from tests.mount.keys import MASTER
from tests.mount.mounted import atoll
from tests.mount.service import service
from tests.servers.buckets import Bucket


def test_files_are_written_and_read_without_keys(tmp_path: Path, bucket: Bucket, seed: int) -> None:
    data = random.Random(seed).randbytes(9 << 20)
    with service(tmp_path, environment=MASTER) as running:
        made = atoll(
            "format", running.address(), "--bucket", bucket.url,
            environment={TOKEN_VARIABLE: running.token, **bucket.environment},
        )  # fmt: skip
        assert made.returncode == 0, made
        for number in range(2):
            with AtollFileSystem(
                running.address(), token=running.token, cache_dir=tmp_path / f"cache-{number}", skip_instance_cache=True
            ) as fs:
                if not number:
                    fs.pipe_file("/file", data)
                assert fs.cat_file("/file") == data
                assert fs.cat_file("/file", start=5_000_000, end=5_000_100) == data[5_000_000:5_000_100]
        assert [key for key in bucket.keys() if key.endswith(".1")]  # noqa: SIM118 (no mapping)
