"""Volumes of a service on real mounts: two mounts see each other, and its death is a pause."""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

import pytest

from tests.mount.mounted import CommandFailed, MountedVolume, atoll, detach
from tests.mount.service import ServiceProcess, also_mounted, mounted_from, service
from tests.mount.writers import Writers
from tests.servers.buckets import Bucket


def directory_bucket(directory: Path) -> str:
    (directory / "bucket").mkdir()
    return f"file://{directory}/bucket"


def test_what_one_mount_closed_another_opens(tmp_path: Path) -> None:
    with service(tmp_path) as running:
        with (
            mounted_from(running, tmp_path, "--bucket", directory_bucket(tmp_path)) as one,
            also_mounted(one, tmp_path) as other,
        ):
            for size in (0, 5, 40_000, 5_000_000):
                content = os.urandom(size)
                (one.path / f"f{size}").write_bytes(content)
                assert (other.path / f"f{size}").read_bytes() == content
            # Changed in one, read in the other, again and again: close-to-open.
            for number in range(20):
                writer, reader = (one, other) if number % 2 else (other, one)
                (writer.path / "shared").write_bytes(b"%d" % number * 1000)
                assert (reader.path / "shared").read_bytes() == b"%d" % number * 1000
            (one.path / "tree" / "below").mkdir(parents=True)
            shutil.copytree(Path(__file__).parent / "programs", other.path / "tree" / "copy")
            assert sorted(os.listdir(one.path / "tree")) == ["below", "copy"]
            with (other.path / "held").open("w+b") as held:
                held.write(b"still here")
                held.flush()
                os.fsync(held.fileno())
                os.unlink(one.path / "held")
                held.seek(0)
                assert held.read() == b"still here"
        status = one.document("status", one.address)
        assert len(status["sessions"]) == 1, "the command's own"


@pytest.mark.parametrize("trash_days", ["0", "1"])
def test_what_one_mount_replaces_or_removes_another_opens_under_its_name_or_misses(
    tmp_path: Path, trash_days: str
) -> None:
    with (
        service(tmp_path) as running,
        mounted_from(running, tmp_path, "--bucket", directory_bucket(tmp_path), "--trash-days", trash_days) as one,
        also_mounted(one, tmp_path) as other,
    ):
        directory = one.path / "d"
        directory.mkdir()
        for number in range(20):
            (directory / f"f{number}").write_bytes(b"0")
        for round_ in range(1, 6):
            # The other one's kernel knows every name now, and its daemon those that it looked up with them.
            assert {path.read_bytes() for path in (other.path / "d").iterdir()} == {b"%d" % (round_ - 1)}
            for number in range(20):
                (directory / "new").write_bytes(b"%d" % round_)
                (directory / "new").rename(directory / f"f{number}")
                assert (other.path / "d" / f"f{number}").read_bytes() == b"%d" % round_
        assert [(other.path / "d" / f"f{number}").stat().st_size for number in range(20)] == [1] * 20
        (directory / "f3").unlink()
        with pytest.raises(FileNotFoundError):
            (other.path / "d" / "f3").read_bytes()


KNOWN_BY: Final[dict[str, Callable[[Path, list[str]], int]]] = {
    "listed": lambda seen, names: len([entry.stat() for entry in os.scandir(seen)]),
    "looked up": lambda seen, names: len([(seen / name).stat() for name in names]),
    "neighbours": lambda seen, names: len(names) - 6 + len([(seen / name).stat() for name in names[:6]]),
    "read before": lambda seen, names: len([(seen / name).read_bytes() for name in names]),
}


def test_what_open_finds_is_as_long_as_it_was_when_another_closed_it(tmp_path: Path) -> None:
    with (
        service(tmp_path) as running,
        mounted_from(running, tmp_path, "--bucket", directory_bucket(tmp_path)) as one,
        also_mounted(one, tmp_path) as other,
    ):
        names = [f"f{number:03}" for number in range(40)]
        for how in KNOWN_BY:
            (one.path / how).mkdir()
            for name in names:
                (one.path / how / name).write_bytes(b"")
        for round_ in range(1, 4):
            time.sleep(1.3)  # until the kernel of the other knows nothing
            for how, look in KNOWN_BY.items():
                assert look(other.path / how, names) == len(names)
                content = os.urandom(1000 * round_)
                for name in names[-20:]:
                    (one.path / how / name).write_bytes(content)
                    descriptor = os.open(other.path / how / name, os.O_RDONLY)
                    try:
                        assert os.read(descriptor, 10_000) == content, how
                        assert os.fstat(descriptor).st_size == len(content), how
                    finally:
                        os.close(descriptor)


def test_commands_work_at_the_address_and_under_the_mount(tmp_path: Path) -> None:
    with (
        service(tmp_path) as running,
        mounted_from(running, tmp_path, "--bucket", directory_bucket(tmp_path)) as volume,
    ):
        (volume.path / "d").mkdir()
        (volume.path / "d" / "file").write_bytes(os.urandom(100_000))
        by_path = volume.document("info", str(volume.path / "d" / "file"))
        by_address = volume.document("info", f"{volume.address}:/d/file")
        assert by_path["inode"] == by_address["inode"]
        assert volume.document("status", str(volume.path))["holder"]["mountpoint"] == str(volume.path)
        volume.atoll("clone", str(volume.path / "d"), str(volume.path / "e"))
        assert (volume.path / "e" / "file").read_bytes() == (volume.path / "d" / "file").read_bytes()
        shutil.rmtree(volume.path / "d")
        (removed,) = [
            row for row in volume.document("trash", "list", volume.address)["entries"] if row["name"] == "file"
        ]
        volume.atoll("trash", "restore", volume.address, str(removed["trash_id"]))
        assert (volume.path / "d" / "file").stat().st_size == 100_000
        assert volume.document("fsck", volume.address)["clean"]
        assert volume.document("gc", volume.address)["leaked_objects"] == 0


def test_a_wrong_or_missing_token_and_a_wrong_address_are_told_in_one_line(tmp_path: Path) -> None:
    with service(tmp_path) as running:
        url = directory_bucket(tmp_path)
        refused = (
            ("", running.address(), "there is no token"),
            ("nonsense", running.address(), "refuses"),
            (running.token, running.address("absent"), "no volume"),
            (running.token, f"atoll://127.0.0.1:{running.port}", "is no address"),
            (running.token, "atoll://127.0.0.1:1/a/b", "not reachable"),
        )
        with ThreadPoolExecutor(len(refused)) as at_once:
            runs = at_once.map(lambda case: atoll("status", case[1], environment={"ATOLL_TOKEN": case[0]}), refused)
            for (_, _, reason), ran in zip(refused, runs, strict=True):
                assert ran.returncode == 1
                (line,) = ran.stderr.splitlines()
                assert reason in line
        given = {"ATOLL_TOKEN": running.token}
        assert atoll("format", running.address(), "--bucket", url, environment=given).returncode == 0
        again = atoll("format", running.address(), "--bucket", url, environment=given)
        assert again.returncode == 1
        assert "exists already" in again.stderr
        prepared = atoll("serve", "--init", "--store", running.store)
        assert (prepared.returncode, prepared.stdout) == (1, "")
        second = atoll("serve", "--store", running.store, "--listen", f"127.0.0.1:{running.port}")
        assert second.returncode == 1
        open_to_all = atoll("serve", "--store", running.store, "--listen", "0.0.0.0:0")
        assert open_to_all.returncode == 2
        assert "--insecure" in open_to_all.stderr


def test_programs_see_a_pause_and_no_error_while_the_service_is_away(tmp_path: Path) -> None:
    with (
        service(tmp_path) as running,
        mounted_from(running, tmp_path, "--bucket", directory_bucket(tmp_path)) as volume,
    ):
        (volume.path / "before").write_bytes(b"before")
        running.kill()
        failures: list[OSError] = []

        def work() -> None:
            try:
                (volume.path / "during").write_bytes(b"during" * 100_000)
                os.mkdir(volume.path / "directory")
                os.rename(volume.path / "before", volume.path / "directory" / "after")
            except OSError as error:
                failures.append(error)

        thread = threading.Thread(target=work)
        thread.start()
        time.sleep(1.0)
        assert thread.is_alive()
        running.start()
        thread.join(60)
        assert not thread.is_alive()
        assert failures == []
        assert (volume.path / "directory" / "after").read_bytes() == b"before"
        assert (volume.path / "during").read_bytes() == b"during" * 100_000


def test_a_service_that_stays_away_is_eio_after_the_time_that_was_given(tmp_path: Path) -> None:
    with (
        service(tmp_path) as running,
        mounted_from(running, tmp_path, "--bucket", directory_bucket(tmp_path)) as volume,
    ):
        volume.remount("--meta-timeout", "2")
        running.kill()
        with pytest.raises(OSError, match="Input/output") as failure:
            (volume.path / "file").write_bytes(b"x")
        assert failure.value.errno == errno.EIO
        running.start()
        deadline = time.monotonic() + 60
        while True:
            try:
                (volume.path / "file").write_bytes(b"x")
                break
            except OSError:
                assert time.monotonic() < deadline
        assert (volume.path / "file").read_bytes() == b"x"


def disturb(what: str, running: ServiceProcess, volume: MountedVolume, rng: random.Random) -> None:
    """Kill the service, the mount, or both."""
    if what in ("service", "both"):
        running.kill()
        time.sleep(rng.random() * 0.5)
    if what in ("mount", "both"):
        volume.kill_daemon()
    if what in ("service", "both"):
        running.start()


def survive(running: ServiceProcess, volume: MountedVolume, outside: Path, seed: int, rounds: int) -> None:
    rng = random.Random(seed)
    whats = ["service", "mount", "both"]
    rng.shuffle(whats)
    outside.mkdir()
    writers = Writers(volume.path, outside, count=2)
    writers.make_directories()
    for number in range(rounds):
        what = whats[number % len(whats)]
        with writers.working(rng.randrange(1 << 32)):
            writers.wait_for_steps(rng.choice((0, rng.randrange(30), rng.randrange(300))))
            time.sleep(rng.random() * 0.01)
            disturb(what, running, volume, rng)
            if what == "service":
                writers.wait_for_steps(writers.steps() + 20)
                writers.stop_file.touch()
            exit_codes = writers.wait_for_end()
            logs = writers.logs()
        print(f"round {writers.round}: {what}, acknowledged {[len(log.acknowledged) for log in logs]}")  # noqa: T201
        if what == "service":
            assert set(exit_codes) == {0}, [log.message for log in logs]
            assert {log.errno for log in logs} == {None}, [log.message for log in logs]
        else:
            assert set(exit_codes) <= {0, -signal.SIGBUS}
            if rng.random() < 0.5:
                detach(volume.path)
            volume.mount()
        writers.settle()
    writers.verify()
    volume.remount_with_empty_cache()
    writers.verify()


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("rounds", [3, pytest.param(50, marks=pytest.mark.slow)])
def test_kills_of_service_mount_or_both_lose_nothing_and_repeat_nothing(
    tmp_path: Path, bucket: Bucket, seed: int, rounds: int
) -> None:
    with (
        service(tmp_path, environment=bucket.environment) as running,
        mounted_from(
            running, tmp_path, "--bucket", bucket.url, "--trash-days", "0", environment=bucket.environment
        ) as volume,
    ):
        survive(running, volume, tmp_path / "logs", seed, rounds)


def test_the_service_ends_cleanly_and_sessions_go_on_with_the_next(tmp_path: Path) -> None:
    with (
        service(tmp_path) as running,
        mounted_from(running, tmp_path, "--bucket", directory_bucket(tmp_path)) as volume,
    ):
        (volume.path / "f").write_bytes(b"1")
        before = volume.document("status", volume.address)["sessions"][0]["session_id"]
        assert running.end() == 0
        running.start()
        (volume.path / "g").write_bytes(b"2")
        assert volume.document("status", volume.address)["sessions"][0]["session_id"] == before
        with pytest.raises(CommandFailed):
            volume.atoll("mount", volume.address, str(volume.path))
        assert subprocess.run(["ls", volume.path], check=True, capture_output=True, timeout=60).stdout == b"f\ng\n"
