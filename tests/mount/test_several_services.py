"""Several processes of a service on one store: clients find the owner, and volumes find one.

What programs notice of an owner's death, end or sleep: tests/mount/test_acknowledged.py.
"""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from metasvc.api.server import owner_of
from tests.mount import stores
from tests.mount.mounted import MountedVolume, atoll
from tests.mount.service import ServiceProcess, mounted_from, services
from tests.servers.postgresql import PostgreSQL
from tests.servers.redis import Redis


@pytest.fixture(params=["sqlite", "postgresql", pytest.param("redis", marks=pytest.mark.slow)])
def store_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A store that several processes may use."""
    if request.param == "sqlite":
        return stores.in_directory(tmp_path)
    server: PostgreSQL | Redis = request.getfixturevalue(f"own_{request.param}")
    return server.url()


def bucket_of(directory: Path) -> str:
    (directory / "bucket").mkdir()
    return f"file://{directory}/bucket"


def owner_among(processes: list[ServiceProcess], volume: MountedVolume) -> ServiceProcess:
    """Return the process that owns the volume, as the service itself says."""
    server = owner_of(volume.document("status", volume.address)["owner"])
    assert server is not None
    (found,) = [process for process in processes if process.port == server.port]
    return found


def test_whoever_is_asked_the_owner_answers(tmp_path: Path, store_url: str) -> None:
    with (
        services(tmp_path, store_url, count=3) as processes,
        mounted_from(processes[0], tmp_path, "--bucket", bucket_of(tmp_path)) as volume,
    ):
        (volume.path / "f").write_bytes(b"1")
        owner = owner_among(processes, volume)
        for process in processes:
            # Its own address only: it does not know the others but by the store.
            alone = f"atoll://127.0.0.1:{process.port}/acme/data"
            status = volume.document("status", alone)
            assert owner_of(status["owner"]) == ("127.0.0.1", owner.port)
            assert [session["mountpoint"] for session in status["sessions"]] == [str(volume.path), ""]
            assert volume.document("fsck", alone)["clean"]


def test_a_volume_whose_owner_has_gone_is_taken_although_no_client_comes(tmp_path: Path, store_url: str) -> None:
    with services(tmp_path, store_url, count=2) as processes:
        given = {"ATOLL_TOKEN": processes[0].token}
        bucket = bucket_of(tmp_path)
        assert atoll("format", processes[0].address(), "--bucket", bucket, environment=given).returncode == 0
        deadline = time.monotonic() + 60
        while not (owners := [each for each in processes if "acme/data is open" in each.log_path.read_text()]):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        (owner,) = owners
        (other,) = [each for each in processes if each is not owner]
        owner.kill()
        while "acme/data is open" not in other.log_path.read_text():
            assert time.monotonic() < deadline
            time.sleep(0.1)


def test_a_mount_knows_one_process_and_finds_the_others_by_the_store(tmp_path: Path, store_url: str) -> None:
    with services(tmp_path, store_url, count=2) as processes:
        first, second = processes
        second.end()
        one = ServiceProcess(first.directory, first.port, token=first.token)
        with mounted_from(one, tmp_path, "--bucket", bucket_of(tmp_path)) as volume:
            (volume.path / "f").write_bytes(b"1")
            second.start()
            failures: list[OSError] = []

            def work() -> None:
                try:
                    (volume.path / "g").write_bytes(b"2")
                except OSError as error:
                    failures.append(error)

            first.end()
            thread = threading.Thread(target=work)
            thread.start()
            time.sleep(0.5)
            # The only address that it knows is there again, and says who owns the volume now, or takes it.
            first.start()
            thread.join(60)
            assert not thread.is_alive()
            assert failures == []
            assert (volume.path / "g").read_bytes() == b"2"
