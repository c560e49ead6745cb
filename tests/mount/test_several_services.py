"""Several processes of a service on one store: clients find the owner, and its death, end or sleep is a pause for programs."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from metasvc.api.server import owner_of
from tests.mount.mounted import MountedVolume, atoll
from tests.mount.service import ServiceProcess, mounted_from, services
from tests.mount.writers import Writers


@pytest.fixture(params=["sqlite", "postgresql"])
def store_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A store that several processes may use."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path}/shared.db"
    else:
        yield request.getfixturevalue("own_postgresql").url()


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


def test_programs_go_on_with_the_next_owner_when_theirs_is_killed_or_ends(
    tmp_path: Path, store_url: str, seed: int
) -> None:
    kill_some(tmp_path, store_url, seed, rounds=3)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_programs_go_on_with_the_next_owner_20_times(tmp_path: Path, store_url: str, seed: int) -> None:
    kill_some(tmp_path, store_url, seed, rounds=20)


def kill_some(tmp_path: Path, store_url: str, seed: int, *, rounds: int) -> None:
    rng = random.Random(seed)
    outside = tmp_path / "outside"
    outside.mkdir()
    with (
        services(tmp_path, store_url, count=2) as processes,
        mounted_from(processes[0], tmp_path, "--bucket", bucket_of(tmp_path), "--trash-days", "0") as volume,
    ):
        writers = Writers(volume.path, outside, count=2)
        writers.make_directories()
        for _ in range(rounds):
            owner = owner_among(processes, volume)
            how = rng.choice((signal.SIGKILL, signal.SIGTERM))
            with writers.working(rng.randrange(1 << 32)):
                writers.wait_for_steps(rng.randrange(10, 200))
                began_s = time.monotonic()
                owner.end(how)
                writers.wait_for_steps(writers.steps() + 20)
                print(f"{how.name}: {time.monotonic() - began_s:.1f} s until 20 more steps")  # noqa: T201
                owner.start()
                writers.stop_file.touch()
                exit_codes = writers.wait_for_end()
                logs = writers.logs()
            assert set(exit_codes) == {0}, [log.message for log in logs]
            assert {log.errno for log in logs} == {None}, [log.message for log in logs]
            writers.settle()
        writers.verify()
        volume.remount_with_empty_cache()
        writers.verify()


def test_an_owner_that_slept_through_its_succession_serves_nobody_and_writes_nothing(
    tmp_path: Path, own_postgresql: object
) -> None:
    store_url = own_postgresql.url()  # type: ignore[attr-defined]
    with (
        services(tmp_path, store_url, count=2) as processes,
        mounted_from(processes[0], tmp_path, "--bucket", bucket_of(tmp_path)) as volume,
    ):
        (volume.path / "f").write_bytes(b"before")
        owner = owner_among(processes, volume)
        os.kill(owner.pid, signal.SIGSTOP)
        try:
            # What it gets while it stands still it must not do when it wakes.
            (volume.path / "f").write_bytes(b"after")
            (volume.path / "g").write_bytes(b"new")
            os.rename(volume.path / "g", volume.path / "h")
        finally:
            os.kill(owner.pid, signal.SIGCONT)
        successor = owner_among(processes, volume)
        assert successor is not owner
        # Asked itself, it sends on to its successor.
        alone = f"atoll://127.0.0.1:{owner.port}/acme/data"
        assert owner_of(volume.document("status", alone)["owner"]) == ("127.0.0.1", successor.port)
        assert "volume acme/data was lost" in owner.log_path.read_text()
        assert sorted(os.listdir(volume.path)) == ["f", "h"]
        assert (volume.path / "f").read_bytes() == b"after"
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
