"""A real mount: what reaches the daemon and what the kernel keeps, and every way in which a mount ends."""

from __future__ import annotations

import errno as E
import mmap
import os
import re
import signal
import subprocess
import threading
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from chunkstore.geometry import MIB
from client.vfs.vfs import AT_HAND_BYTES
from tests.mount.mounted import MountedVolume, is_mount_point, mounted, wait_until_gone
from tests.mount.stores import about_embedded_volumes


def requests(volume: MountedVolume) -> dict[str, int]:
    """Return how many requests of each kind have reached the daemon. Looking costs some itself."""
    descriptor = os.open(volume.path / ".atoll" / "stats", os.O_RDONLY)
    try:
        text = os.read(descriptor, MIB).decode()
    finally:
        os.close(descriptor)
    return {
        sample.labels["op"]: int(sample.value)
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == "atoll_fuse_requests_total"
    }


def drop_page_cache() -> None:
    """Make the kernel forget pages, names and inodes that nobody uses."""
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3\n")


def mount_line(path: Path) -> list[str]:
    lines = [line.split() for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    return next(line for line in lines if line[4] == str(path))


def test_a_mount_shows_its_type_its_address_and_its_read_ahead(tmp_path: Path) -> None:
    with mounted(tmp_path) as volume:
        line = mount_line(volume.path)
        separator = line.index("-")
        assert line[separator + 1 : separator + 3] == ["fuse.atoll", volume.address]
        options = line[separator + 3].split(",")
        assert {"default_permissions", "allow_other"} <= set(options)
        assert Path(f"/sys/class/bdi/{line[2]}/read_ahead_kb").read_text() == "1024\n"


def test_an_address_of_unusual_characters_can_be_mounted(tmp_path: Path) -> None:
    directory = tmp_path / "a,b größe \\"
    directory.mkdir()
    with mounted(directory) as volume:
        (volume.path / "file").write_bytes(b"x")
        assert (volume.path / "file").read_bytes() == b"x"


def test_sequential_reads_come_in_requests_of_a_mebibyte(tmp_path: Path) -> None:
    with mounted(tmp_path) as volume:
        path = volume.path / "file"
        path.write_bytes(os.urandom(MIB) * 32)
        drop_page_cache()
        before = requests(volume)["READ"]
        with path.open("rb") as file:
            while file.read(MIB):
                pass
        assert requests(volume)["READ"] - before <= 32 + 8


def test_small_files_are_read_without_a_request_for_their_bytes(tmp_path: Path) -> None:
    contents = {f"file{number}": os.urandom(1 + 1500 * number) for number in range(12)}
    with mounted(tmp_path) as volume:
        for name, content in contents.items():
            (volume.path / name).write_bytes(content)
        volume.unmount()
        volume.mount()
        before = requests(volume)["READ"]
        for name, content in contents.items():
            descriptor = os.open(volume.path / name, os.O_RDONLY)
            assert os.pread(descriptor, 4096, 100) == content[100:4196]
            assert os.read(descriptor, MIB) == content
            os.close(descriptor)
        large = sum(len(content) > AT_HAND_BYTES for content in contents.values())
        assert requests(volume)["READ"] - before <= large + 1, "and that of looking at the counters"
        # What is open already is asked for, and what was written since is seen.
        path = volume.path / "file3"
        with path.open("rb") as first, path.open("r+b") as second:
            second.write(b"changed")
            second.flush()
            with path.open("rb") as third:
                assert third.read() == b"changed" + contents["file3"][7:] == first.read()
        path.write_bytes(b"short")
        assert path.read_bytes() == b"short"
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as pages:
            assert bytes(pages) == b"short"


@about_embedded_volumes  # of others the kernel keeps them for a second
def test_the_kernel_keeps_names_absences_attributes_and_pages(tmp_path: Path) -> None:
    with mounted(tmp_path) as volume:
        path = volume.path / "file"
        path.write_bytes(b"x" * 100_000)
        path.read_bytes()
        assert not (volume.path / "absent").exists()
        path.stat()
        before = requests(volume)
        for _ in range(10):
            path.stat()
            path.read_bytes()
            assert not (volume.path / "absent").exists()
        after = requests(volume)
        assert after["LOOKUP"] - before["LOOKUP"] <= 2, "those of looking at the counters"
        # After a read the kernel asks for the time of access once; pages stay.
        assert after["GETATTR"] - before["GETATTR"] <= 12
        assert after["READ"] - before["READ"] <= 2


def test_a_new_name_is_seen_although_its_absence_was_kept(tmp_path: Path) -> None:
    with mounted(tmp_path) as volume:
        path = volume.path / "name"
        assert not path.exists()
        path.touch()
        assert path.exists()
        path.rename(volume.path / "other")
        assert not path.exists()
        assert (volume.path / "other").exists()


def test_a_name_that_came_back_past_the_kernel_is_seen_at_once(tmp_path: Path) -> None:
    with mounted(tmp_path) as volume:
        path = volume.path / "precious"
        path.write_bytes(b"data")
        path.unlink()
        assert not path.exists()
        listed = volume.document("trash", "list", volume.address)
        volume.atoll("trash", "restore", volume.address, str(listed["entries"][0]["trash_id"]))
        assert path.read_bytes() == b"data"


def test_the_access_log_shows_what_is_done_while_it_is_read(tmp_path: Path) -> None:
    with mounted(tmp_path) as volume:
        with (volume.path / ".atoll" / "accesslog").open("rb", buffering=0) as log:
            (volume.path / "seen").mkdir()
            lines = b""
            while b"MKDIR" not in lines:
                lines += log.read(65536)
        pattern = (
            rb"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{6} \[0,0,%d\] MKDIR-\d+ \(1,seen,\d+\): OK <\d\.\d{6}>" % os.getpid()
        )
        assert re.search(pattern, lines)


def test_who_reads_the_access_log_does_not_read_of_that(tmp_path: Path) -> None:
    with mounted(tmp_path) as volume, (volume.path / ".atoll" / "accesslog").open("rb", buffering=0) as log:
        for number in range(3):
            (volume.path / str(number)).mkdir()
            lines = log.read(65536)
            while b"MKDIR" not in lines:
                lines += log.read(65536)
            assert b"READ-" not in lines


def test_umount_8_ends_the_daemon_after_what_was_written_is_safe(tmp_path: Path) -> None:
    with mounted(tmp_path) as volume:
        data = os.urandom(5 * MIB)
        (volume.path / "file").write_bytes(data)
        subprocess.run(["umount", volume.path], check=True, timeout=60)
        wait_until_gone(volume.pid)
        volume.mount()
        assert (volume.path / "file").read_bytes() == data


def test_sigterm_ends_a_mount_that_is_in_use_and_keeps_what_was_written(tmp_path: Path) -> None:
    with mounted(tmp_path) as volume:
        data = os.urandom(MIB + 5)
        descriptor = os.open(volume.path / "file", os.O_CREAT | os.O_RDWR)
        os.write(descriptor, data)
        os.kill(volume.pid, signal.SIGTERM)
        wait_until_gone(volume.pid)
        assert not is_mount_point(volume.path)
        with pytest.raises(OSError, match=None) as cut_off:
            os.pread(descriptor, 1, 0)
        assert cut_off.value.errno in (E.ENOTCONN, E.ECONNABORTED, E.EIO)
        with pytest.raises(OSError, match=None):
            os.close(descriptor)
        volume.mount()
        assert (volume.path / "file").read_bytes() == data


def test_sigterm_in_the_middle_of_many_requests_ends_the_mount(tmp_path: Path) -> None:
    with mounted(tmp_path) as volume:
        stop = threading.Event()
        acknowledged: list[str] = []

        def make_files() -> None:
            number = 0
            while not stop.is_set():
                try:
                    with (volume.path / f"f{number}").open("wb") as file:
                        file.write(b"%d" % number)
                except OSError:
                    return
                acknowledged.append(f"f{number}")
                number += 1

        worker = threading.Thread(target=make_files)
        worker.start()
        try:
            while len(acknowledged) < 50:
                assert worker.is_alive()
            os.kill(volume.pid, signal.SIGTERM)
            wait_until_gone(volume.pid)
        finally:
            stop.set()
            worker.join(60)
        assert not worker.is_alive()
        assert not is_mount_point(volume.path)
        # What the thread wrote after the mount was gone lies beneath the mount point.
        for left in volume.path.iterdir():
            acknowledged.remove(left.name)
            left.unlink()
        volume.mount()
        for name in acknowledged:
            assert (volume.path / name).read_bytes() == name[1:].encode()
