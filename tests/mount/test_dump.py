"""Dumps of live mounts by the real commands, loaded elsewhere; loads whose process is killed in the middle."""

from __future__ import annotations

import errno
import hashlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.mount.mounted import ATOLL, COMMAND_TIMEOUT_S, MountedVolume, atoll, is_mount_point, mounted
from tests.mount.service import ServiceProcess, mounted_from, service
from tests.mount.stores import about_embedded_volumes
from tests.servers.postgresql import PostgreSQL


def content_of(name: str) -> bytes:
    """Return what a file of that name has: up to 200 KB, of which some lie with the metadata and some in objects."""
    digest = hashlib.sha256(name.encode()).digest()
    return digest * (int.from_bytes(digest[:2], "little") % 6000)


class Writer:
    """Writes files whose content follows from their names, until it is stopped."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work)
        self.closed: list[str] = []
        """Names of files that are closed, in order."""
        self.error: BaseException | None = None

    def _work(self) -> None:
        try:
            number = 0
            while not self._stop.is_set():
                directory = self._directory / f"d{number % 7}"
                directory.mkdir(exist_ok=True)
                name = f"{directory.name}/f{number}"
                draft = directory / f"draft{number}"
                draft.write_bytes(content_of(name))
                os.setxattr(draft, "user.name", name.encode())
                draft.rename(self._directory / name)
                if number % 3 == 0:
                    os.link(self._directory / name, self._directory / f"{name}-linked")
                if number % 5 == 0:
                    (directory / "removed").write_bytes(b"x")
                    (directory / "removed").unlink()
                self.closed.append(name)
                number += 1
        except BaseException as error:  # noqa: BLE001 - told by the test's thread
            self.error = error

    def wait_for(self, count: int) -> None:
        deadline = time.monotonic() + COMMAND_TIMEOUT_S
        while len(self.closed) < count:
            assert self.error is None, self.error
            assert time.monotonic() < deadline, f"{len(self.closed)} files of {count}"
            time.sleep(0.005)

    @contextmanager
    def working(self) -> Iterator[None]:
        self._thread.start()
        try:
            yield
        finally:
            self._stop.set()
            self._thread.join(COMMAND_TIMEOUT_S)
        assert self.error is None, self.error


def check_contents(top: Path, closed: list[str]) -> None:
    """Compare a tree with the names of its files; those that were closed must be there."""
    seen = set()
    for path in top.glob("d*/f*"):
        name = str(path.relative_to(top)).removesuffix("-linked")
        assert path.read_bytes() == content_of(name), path
        assert os.getxattr(path, "user.name") == name.encode()
        seen.add(name)
    assert set(closed) <= seen


def dump_while_writing(volume: MountedVolume, address: str, file: Path) -> list[str]:
    """Dump a volume that is written; the files that were closed when the dump began."""
    writer = Writer(volume.path)
    with writer.working():
        writer.wait_for(40)
        closed = list(writer.closed)
        document = volume.document("dump", address, str(file))
        writer.wait_for(len(writer.closed) + 5)
    assert document["size_bytes"] == file.stat().st_size
    assert document["inodes"] > 40
    assert file.stat().st_mode & 0o777 == 0o600
    return closed


@about_embedded_volumes
def test_a_mounted_embedded_volume_is_dumped_and_loaded_beside_its_objects(tmp_path: Path) -> None:
    with mounted(tmp_path) as volume:
        closed = dump_while_writing(volume, volume.address, tmp_path / "dump")
        volume.unmount()
        copy = tmp_path / "copy"
        bucket = f"file://{volume.address}/objects"
        loaded = volume.document("load", str(tmp_path / "dump"), str(copy), "--bucket", bucket)
        assert loaded["format"]["bucket_url"] == bucket
        assert loaded["rows"] > 100
        assert not (tmp_path / "copy.loading").exists()
        volume.atoll("fsck", "--data", str(copy))
        # What the original wrote after the dump belongs to nothing in the copy: its gc would take it. Nobody else does.
        assert volume.document("gc", "--dry-run", str(copy))["leaked_objects"] > 0
        mountpoint = tmp_path / "mnt"
        mountpoint.mkdir()
        second = MountedVolume(str(copy), mountpoint, tmp_path / "second-cache", volume.environment)
        second.cache_dir.mkdir()
        try:
            second.mount("--read-only")
            check_contents(second.path, closed)
            second.unmount()
        finally:
            second.abandon()
        # The objects of the original are as they were: its own fsck, at the end, finds nothing missing.


def test_a_live_volume_of_a_service_on_sqlite_moves_to_one_on_postgresql(
    tmp_path: Path, own_postgresql: PostgreSQL
) -> None:
    (tmp_path / "bucket").mkdir()
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    file = tmp_path / "dump"
    with service(tmp_path / "one") as first:
        with mounted_from(first, tmp_path, "--bucket", f"file://{tmp_path}/bucket") as volume:
            closed = dump_while_writing(volume, volume.address, tmp_path / "live.dump")
        volume.document("dump", first.address(), str(file))
    with service(tmp_path / "two", store_url=own_postgresql.url()) as second:
        environment = {"ATOLL_TOKEN": second.token}
        copy = MountedVolume(second.address("moved"), tmp_path / "mnt", tmp_path / "copy-cache", environment)
        copy.path.mkdir()
        copy.cache_dir.mkdir()
        # Of the time when it was written first: its objects are those of the live one, none of which was deleted.
        copy.document("load", str(tmp_path / "live.dump"), copy.address)
        copy.fsck()
        beside = atoll("load", str(file), second.address("beside"), environment=environment)
        assert (beside.returncode, beside.stdout) == (1, "")
        assert "delete each other's" in beside.stderr
        try:
            copy.mount()
            check_contents(copy.path, closed)
            writer = Writer(copy.path / "more")
            (copy.path / "more").mkdir()
            with writer.working():
                writer.wait_for(30)
            copy.remount_with_empty_cache()
            check_contents(copy.path / "more", writer.closed)
            check_contents(copy.path, closed)
            copy.unmount()
            copy.atoll("fsck", "--data", copy.address, timeout_s=120)
        finally:
            copy.abandon()


def begin_load(address: str, data: bytes, environment: dict[str, str] | None = None) -> subprocess.Popen[bytes]:
    """Begin a load from a pipe that stays open behind some bytes."""
    process = subprocess.Popen(
        [ATOLL, "load", "-", address],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, **(environment or {})},
    )
    assert process.stdin is not None
    process.stdin.write(data)
    process.stdin.flush()
    return process


def end(process: subprocess.Popen[bytes]) -> bytes:
    """Reap a process; its stderr."""
    assert process.stdin is not None
    process.stdin.close()
    process.stdin = None
    return process.communicate(timeout=COMMAND_TIMEOUT_S)[1]


def a_dump(tmp_path: Path, volume: MountedVolume, address: str) -> bytes:
    for number in range(300):
        (volume.path / f"f{number}").write_bytes(b"%d" % number)
    volume.atoll("dump", address, str(tmp_path / "dump"))
    return (tmp_path / "dump").read_bytes()


@about_embedded_volumes
def test_a_load_into_a_directory_that_is_killed_leaves_no_volume_and_the_next_one_replaces_it(tmp_path: Path) -> None:
    with mounted(tmp_path) as volume:
        data = a_dump(tmp_path, volume, volume.address)
    target, draft = tmp_path / "copy", tmp_path / "copy.loading"
    process = begin_load(str(target), data[:-10])
    deadline = time.monotonic() + COMMAND_TIMEOUT_S
    while not (draft / "meta.db").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    busy = atoll("load", str(tmp_path / "dump"), str(target))
    assert busy.returncode == 1
    assert "is being loaded by another process" in busy.stderr
    process.send_signal(signal.SIGKILL)
    end(process)
    assert draft.exists()
    assert not target.exists()
    missing = atoll("status", str(target))
    assert missing.returncode == 1
    assert "no volume" in missing.stderr
    loaded = atoll("load", str(tmp_path / "dump"), str(target))
    assert loaded.returncode == 0, loaded.stderr
    assert not draft.exists()
    (target / "objects").rmdir()
    (tmp_path / "volume" / "objects").rename(target / "objects")
    assert atoll("fsck", "--data", str(target)).returncode == 0


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_a_service_that_is_killed_in_a_load_leaves_nothing_that_opens(
    tmp_path: Path, own_postgresql: PostgreSQL, kind: str
) -> None:
    (tmp_path / "bucket").mkdir()
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    with (
        service(tmp_path / "one") as first,
        mounted_from(first, tmp_path, "--bucket", f"file://{tmp_path}/bucket") as volume,
    ):
        data = a_dump(tmp_path, volume, volume.address)
    url = own_postgresql.url() if kind == "postgresql" else ""
    with service(tmp_path / "two", store_url=url) as running:
        environment = {"ATOLL_TOKEN": running.token}
        process = begin_load(running.address(), data[:-10], environment)
        wait_until_it_is_there(running, environment)
        running.kill()
        assert b"not reachable" in (said := end(process)) or b"the connection was lost" in said, said
        running.start()
        mountpoint = tmp_path / "mnt"
        mountpoint.mkdir()
        refused = atoll("mount", running.address(), str(mountpoint), environment=environment)
        assert refused.returncode == 1
        assert "was not loaded whole" in refused.stderr
        assert not is_mount_point(mountpoint)
        loaded = atoll("load", str(tmp_path / "dump"), running.address(), environment=environment)
        assert loaded.returncode == 0, loaded.stderr
        checked = atoll("fsck", "--data", running.address(), environment=environment)
        assert checked.returncode == 0, checked
        usage = atoll("info", f"{running.address()}:/f299", "--json", environment=environment)
        assert usage.returncode == 0, usage.stderr


def wait_until_it_is_there(running: ServiceProcess, environment: dict[str, str]) -> None:
    deadline = time.monotonic() + COMMAND_TIMEOUT_S
    while "was not loaded whole" not in atoll("status", running.address(), environment=environment).stderr:
        assert time.monotonic() < deadline, "nothing is being loaded"


def test_a_full_disk_leaves_no_dump(tmp_path: Path) -> None:
    with mounted(tmp_path) as volume:
        for number in range(200):
            (volume.path / f"f{number}").write_bytes(os.urandom(20_000))
        disk = tmp_path / "disk"
        disk.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1M", "none", disk], check=True)
        try:
            (disk / "older").write_bytes(b"an older dump")
            failed = atoll("dump", volume.address, str(disk / "older"), environment=volume.environment)
            assert failed.returncode == 1
            assert os.strerror(errno.ENOSPC) in failed.stderr
            assert os.listdir(disk) == ["older"]
            assert (disk / "older").read_bytes() == b"an older dump"
        finally:
            subprocess.run(["umount", disk], check=True)
