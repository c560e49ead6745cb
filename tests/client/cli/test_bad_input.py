"""Bad input: one line with the remedy, exit 1 (2 for usage), nothing half done. A row for each item of the list.

The first table is what commands refuse; the second what system calls on a mount answer. The bucket's errors come from a real
S3 server.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shlex
import shutil
import socket
import sqlite3
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from chunkstore.geometry import MAX_FILE_BYTES
from client.mounts import mounts_at, read_mounts
from tests.client.cli.commands import done, picture, run
from tests.mount.mounted import MountedVolume, is_mount_point
from tests.servers.buckets import Bucket

MIB = 1 << 20
SOME_KEYS = {"AWS_ACCESS_KEY_ID": "SOMEKEY", "AWS_SECRET_ACCESS_KEY": "some-secret"}


class Place:
    """A volume, a mount point and a cache directory that nothing has touched yet."""

    def __init__(self, top: Path, formatted: Path) -> None:
        self.top = top
        self.volume = top / "volume"
        self.mountpoint = top / "mnt"
        self.cache = top / "cache"
        self.mountpoint.mkdir()
        self.cache.mkdir()
        shutil.copytree(formatted, self.volume)

    def set_format_version(self, version: int) -> None:
        with sqlite3.connect(self.volume / "meta.db") as database:
            (text,) = database.execute("SELECT format FROM volume").fetchone()
            changed = json.dumps({**json.loads(text), "version": version})
            database.execute("UPDATE volume SET format = ?", (changed,))
        database.close()

    def set_schema_version(self, version: int) -> None:
        database = sqlite3.connect(self.volume / "meta.db")
        database.execute(f"PRAGMA user_version = {version}")
        database.close()

    def names(self) -> dict[str, str | int]:
        """Return what the commands of the tables may name."""
        return {
            "top": str(self.top),
            "volume": str(self.volume),
            "mnt": str(self.mountpoint),
            "cache": str(self.cache),
            "port": free_port(),
            "name256": "n" * 256,
            "path6000": "/".join(["n" * 200] * 30),
        }

    def mount_command(self, *options: str) -> list[str]:
        return ["mount", str(self.volume), str(self.mountpoint), "--cache-dir", str(self.cache), *options]


@pytest.fixture(scope="module")
def formatted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Format one volume; each test gets a copy."""
    path = tmp_path_factory.mktemp("formatted") / "volume"
    done("format", path)
    return path


@pytest.fixture
def place(tmp_path: Path, formatted: Path) -> Place:
    return Place(tmp_path, formatted)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


@contextmanager
def tmpfs(path: Path, *options: str) -> Iterator[Path]:
    """Mount a small file system of its own. Needs root."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", ",".join(["size=4m", *options]), "tmpfs", path], check=True)
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", path], check=True)


def fill(path: Path) -> None:
    with pytest.raises(OSError, match="No space left"), open(path / "filler", "wb", buffering=0) as file:
        while True:
            file.write(bytes(MIB))


@dataclass(frozen=True, slots=True)
class Refusal:
    """A command that is refused."""

    command: str
    """As in a shell; the names in braces are those of Place.names()."""
    remedy: str
    """A regular expression that the line matches."""
    before: Callable[[Place], object] = field(default=lambda _place: None)


def replace_database(place: Place) -> None:
    (place.volume / "meta.db").write_bytes(b"something else" * 600)


def remove_objects(place: Place) -> None:
    (place.volume / "objects").rmdir()


def use_mountpoint(place: Place) -> None:
    (place.mountpoint / "file").touch()


REFUSALS = {
    "address that is no volume": [
        Refusal("status {top}/absent", r"make one with `atoll format"),
        Refusal("fsck {cache}", r"no meta\.db: give the directory"),
        Refusal("gc {volume}/meta.db", r"no volume but a file: give the directory"),
        Refusal("mount {top}/absent {mnt}", r"make one with `atoll format"),
        Refusal("status atoll://127.0.0.1:1/a", r"give atoll://HOST:PORT/TENANT/VOLUME"),
        Refusal("status s3://bucket", r"bucket URLs go to --bucket"),
        Refusal("status ''", r"give the directory"),
        Refusal("status {volume}", r"meta\.db", before=replace_database),
        Refusal("mount {volume} {mnt} --cache-dir {cache}", r"meta\.db", before=replace_database),
    ],
    "volume that exists": [
        Refusal("format {volume}", r"already: mount it, or choose another"),
        Refusal("format {top}", r"not empty: give a directory"),
        Refusal("format {volume}/meta.db", r"is a file: give a directory"),
        Refusal("format {top}/absent/v", r"create it, or choose another"),
        Refusal("format {top}/{name256}", r"choose another place"),
        Refusal("format {top}/{path6000}", r"give a relative path"),
    ],
    "bucket": [
        Refusal("format {top}/v --bucket file://{top}/absent", r"create it, .*--create-bucket"),
        Refusal("format {top}/v --bucket file://{volume}/meta.db", r"directory"),
        Refusal("format {top}/v --bucket file://relative", r"three slashes"),
        Refusal("format {top}/v --bucket ftp://x", r"write it as one of"),
        Refusal("format {top}/v --bucket 's3://abc?endpoint=http://127.0.0.1:{port}&region=r'", r"check the endpoint"),
        Refusal("mount {volume} {mnt} --cache-dir {cache}", r"mount what belongs there", before=remove_objects),
        Refusal("gc {volume}", r"mount what belongs there", before=remove_objects),
    ],
    "mount point": [
        Refusal("mount {volume} {top}/absent --cache-dir {cache}", r"create it with mkdir"),
        Refusal("mount {volume} {volume}/meta.db --cache-dir {cache}", r"no directory: choose an empty one"),
        Refusal(
            "mount {volume} {mnt} --cache-dir {cache}", r"not empty: choose an empty directory", before=use_mountpoint
        ),
        Refusal("mount {volume} {volume}/objects --cache-dir {cache}", r"choose one outside of it"),
        Refusal("umount {mnt}", r"no volume is mounted .*look at"),
        Refusal("umount {top}/absent", r"no volume is mounted .*look at"),
    ],
    "cache directory": [
        Refusal("mount {volume} {mnt} --cache-dir {volume}/meta.db", r"give another with --cache-dir"),
        Refusal("mount {volume} {mnt} --cache-dir {volume}/meta.db/c", r"give another with --cache-dir"),
        Refusal(
            "mount {volume} {mnt} --cache-dir {cache} --subdir /no", r"--subdir /no: give a directory of the volume"
        ),
    ],
    "unknown format version": [
        Refusal("status {volume}", r"version 99.*upgrade", before=lambda place: place.set_format_version(99)),
        Refusal("mount {volume} {mnt}", r"version 99.*upgrade", before=lambda place: place.set_format_version(99)),
        Refusal("fsck {volume}", r"version 99.*upgrade", before=lambda place: place.set_schema_version(99)),
    ],
    "names and paths": [
        Refusal("info {volume}:/{name256}", r"too long: .*check the path"),
        Refusal("clone {volume}:/ {volume}:/{name256}", r"at most 255 bytes: choose a shorter"),
        Refusal("info {volume}:/{path6000}", r"over 4095 bytes"),
        Refusal("info {volume}:/absent", r"/absent: check the path"),
        Refusal("info {cache}", r"give a path under a mount, or ADDRESS:/path"),
        Refusal("clone {volume}:/ {volume}:/", r"give a path below it"),
        Refusal("trash restore {volume} 7", r"look at `atoll trash list`"),
        Refusal("quota get {volume}:/absent", r"check the path"),
    ],
}
USAGE = [
    Refusal("mount {volume}:/sub {mnt}", r"--subdir"),
    Refusal("mount {volume} {mnt} --cache-size 1KiB", r"at least .*give more"),
    Refusal("format {volume}:/sub", r"give the directory of the volume only"),
    Refusal("format {top}/v --create-bucket", r"goes with --bucket"),
    Refusal("format {top}/v --capacity lots", r"give bytes, or"),
    Refusal("format {top}/v --block-size 3MiB", r"power of two"),
    Refusal("format {top}/v --compression lzma", r"use none or zstd"),
    Refusal("format {top}/v --inline-limit 1MiB", r"give a smaller"),
    Refusal("format {top}/v --trash-days=-1", r"give 0 to 36500"),
    Refusal("quota set {volume}:/ --capacity 9999PiB", r"at most 8191PiB"),
    Refusal("quota set {volume}:/", r"give --capacity, --inodes or both"),
    Refusal("clone {volume}:/a {top}/other:/a", r"two volumes: copy instead"),
    Refusal("frobnicate", r"atoll --help"),
    Refusal("status {volume} --frobnicate", r"atoll status --help"),
    Refusal("mount", r"atoll mount --help"),
]


def refuse(place: Place, row: Refusal, *, code: int) -> None:
    row.before(place)
    before = picture(place.top)
    arguments = [word.format_map(place.names()) for word in shlex.split(row.command)]
    line = run(*arguments, environment=SOME_KEYS).error(code)
    assert re.search(row.remedy, line), line
    assert picture(place.top) == before
    assert not is_mount_point(place.mountpoint)


@pytest.mark.parametrize(
    "row", [pytest.param(row, id=f"{kind}: {row.command}") for kind, rows in REFUSALS.items() for row in rows]
)
def test_bad_input_is_refused_in_one_line_and_nothing_is_half_done(place: Place, row: Refusal) -> None:
    refuse(place, row, code=1)


@pytest.mark.parametrize("row", [pytest.param(row, id=row.command) for row in USAGE])
def test_a_wrong_command_line_is_told_in_one_line_with_exit_2(place: Place, row: Refusal) -> None:
    refuse(place, row, code=2)


def test_a_wrong_key_is_told_at_format_and_at_mount(place: Place, bucket: Bucket) -> None:
    wrong = {**bucket.environment, "AWS_SECRET_ACCESS_KEY": "not-the-secret"}
    other = place.top / "other"
    before = picture(place.top)
    assert "key" in run("format", other, "--bucket", bucket.url, environment=wrong).error()
    assert picture(place.top) == before
    assert bucket.keys() == []
    done("format", other, "--bucket", bucket.url, environment=bucket.environment)
    assert bucket.keys() == []
    line = run("mount", other, place.mountpoint, "--cache-dir", place.cache, environment=wrong).error()
    assert "key" in line
    assert not is_mount_point(place.mountpoint)
    without = dict.fromkeys(bucket.environment, "") | {"AWS_EC2_METADATA_DISABLED": "true"}
    assert "key" in run("gc", other, environment=without).error()


def test_an_unreachable_bucket_is_told_at_mount(place: Place, bucket: Bucket) -> None:
    """The volume is formatted while the bucket can be reached, and mounted when its endpoint is gone."""
    other = place.top / "other"
    done("format", other, "--bucket", bucket.url, environment=bucket.environment)
    database = sqlite3.connect(other / "meta.db")
    (text,) = database.execute("SELECT format FROM volume").fetchone()
    url = bucket.at(f"http://127.0.0.1:{free_port()}").url
    with database:
        database.execute("UPDATE volume SET format = ?", (json.dumps({**json.loads(text), "bucket_url": url}),))
    database.close()
    ran = run("mount", other, place.mountpoint, "--cache-dir", place.cache, environment=bucket.environment)
    assert "check the endpoint" in ran.error()
    assert not is_mount_point(place.mountpoint)


def test_a_cache_directory_that_is_full_or_read_only_is_refused(place: Place) -> None:
    """Needs root, to mount file systems."""
    with tmpfs(place.cache):
        fill(place.cache)
        assert "make room" in run(*place.mount_command()).error()
        assert {path.name for path in place.cache.iterdir()} == {"filler"}
        (place.cache / "filler").unlink()
        assert "16.0 MiB are needed" in run(*place.mount_command()).error()
        assert list(place.cache.iterdir()) == []
    with tmpfs(place.cache, "ro"):
        assert "give another with --cache-dir" in run(*place.mount_command()).error()
    assert not is_mount_point(place.mountpoint)


def test_a_mount_point_where_something_is_mounted_is_refused(place: Place) -> None:
    """Needs root, to mount file systems."""
    with tmpfs(place.mountpoint):
        assert "mount point already (tmpfs): unmount that" in run(*place.mount_command()).error()
        assert mounts_at(str(place.mountpoint), read_mounts())[-1].fstype == "tmpfs"
        assert "no volume is mounted" in run("umount", place.mountpoint).error()


def test_a_second_mount_is_refused_with_process_and_mount_point(mounted_volume: MountedVolume, tmp_path: Path) -> None:
    second = tmp_path / "second"
    second.mkdir()
    cache = ["--cache-dir", str(mounted_volume.cache_dir)]
    line = run("mount", mounted_volume.address, second, *cache).error()
    assert str(mounted_volume.pid) in line
    assert str(mounted_volume.path) in line
    assert "atoll umount" in line
    assert not is_mount_point(second)
    line = run("mount", mounted_volume.address, mounted_volume.path, *cache).error()
    assert str(mounted_volume.pid) in line
    done("format", tmp_path / "other")
    line = run("mount", tmp_path / "other", mounted_volume.path, *cache).error()
    assert f"{mounted_volume.address} is mounted at {mounted_volume.path} already" in line
    assert mounted_volume.document("status", mounted_volume.address)["holder"]["pid"] == mounted_volume.pid


def test_a_mount_point_in_use_is_not_taken_away(mounted_volume: MountedVolume) -> None:
    path = mounted_volume.path / "file"
    with open(path, "wb") as file:
        file.write(b"kept")
        line = run("umount", mounted_volume.path).error()
        assert "in use: end what uses it" in line
        assert is_mount_point(mounted_volume.path)
    assert path.read_bytes() == b"kept"


# -- what a mount answers ---------------------------------------------------------------------------------------------------


def objects_of(volume: MountedVolume) -> list[Path]:
    """Return the objects in the bucket, in order of their blocks."""
    root = Path(volume.address) / "objects"
    return sorted((path for path in root.rglob("*") if path.is_file()), key=lambda path: int(path.suffix[1:]))


def remove(path: Path) -> None:
    path.unlink()


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def alter(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x01
    path.chmod(0o600)
    path.write_bytes(content)


def make_newer(path: Path) -> None:
    """Set the version in the block's header: bytes 4 and 5."""
    content = bytearray(path.read_bytes())
    content[4] = 99
    path.chmod(0o600)
    path.write_bytes(content)


@pytest.mark.parametrize("harm", [remove, truncate, alter])
def test_a_bad_block_is_eio_and_a_line_in_the_log_and_never_wrong_bytes(
    mounted_volume: MountedVolume, harm: Callable[[Path], None]
) -> None:
    read_a_bad_block(mounted_volume, harm, expected=errno.EIO)


def test_a_block_of_a_newer_format_is_refused_and_named_in_the_log(mounted_volume: MountedVolume) -> None:
    read_a_bad_block(mounted_volume, make_newer, expected=errno.EPROTONOSUPPORT)


def read_a_bad_block(mounted_volume: MountedVolume, harm: Callable[[Path], None], *, expected: int) -> None:
    refusal = re.escape(os.strerror(expected))
    volume = mounted_volume
    content = os.urandom(9 * MIB)
    path = volume.path / "data"
    path.write_bytes(content)
    inode = path.stat().st_ino
    good, bad, _ = objects_of(volume)
    harm(bad)
    volume.remount_with_empty_cache()
    with open(path, "rb", buffering=0) as file:
        assert os.pread(file.fileno(), 4 * MIB, 0) == content[: 4 * MIB]
        for offset in range(4 * MIB, 8 * MIB, MIB):
            # Frames before an altered one are good, and may be handed out.
            with suppress(OSError):
                piece = os.pread(file.fileno(), MIB, offset)
                assert piece == content[offset : offset + len(piece)]
    with open(path, "rb") as file, open(os.devnull, "wb") as null, pytest.raises(OSError, match=refusal) as refused:
        shutil.copyfileobj(file, null)
    assert refused.value.errno == expected
    with open(path, "rb", buffering=0) as file:
        assert os.pread(file.fileno(), MIB, 8 * MIB) == content[8 * MIB :]
    key = str(bad.relative_to(Path(volume.address) / "objects"))
    log = Path(volume.document("status", volume.address)["holder"]["log_path"]).read_text()
    slice_id = int(bad.name.partition(".")[0], 16)
    lines = [line for line in log.splitlines() if "read failed" in line]
    assert lines
    for line in lines:
        assert f"volume={volume.address}" in line
        assert f"inode={inode}" in line
        assert f"slice {slice_id}" in line
        assert key in line
    found = run("fsck", volume.address, "--data", "--json")
    assert found.code == 1
    problems = found.document["problems"]
    assert [(row["object"], row["slice_id"]) for row in problems] == [(key, slice_id)]
    assert problems[0]["files"] == [{"inode": inode, "paths": ["/data"]}]
    assert good.exists()
    # The volume is to be clean again when the fixture looks: the file goes, and with it the block.
    path.unlink()
    done("trash", "empty", volume.address)
    done("gc", volume.address)


def test_a_bad_block_is_named_in_an_offline_check_too(mounted_volume: MountedVolume) -> None:
    volume = mounted_volume
    (volume.path / "data").write_bytes(os.urandom(MIB))
    (block,) = objects_of(volume)
    volume.unmount()
    kept = block.read_bytes()
    block.unlink()
    problems = run("fsck", volume.address, "--json").document["problems"]
    assert [row["code"] for row in problems] == ["object-missing"]
    block.write_bytes(kept)
    done("fsck", volume.address)


def test_names_over_255_bytes_are_refused(mounted_volume: MountedVolume) -> None:
    top = mounted_volume.path
    long = top / ("n" * 256)
    operations: list[Callable[[], object]] = [
        lambda: long.touch(),
        lambda: long.mkdir(),
        lambda: long.symlink_to("x"),
        lambda: os.mkfifo(long),
        lambda: long.stat(),
        lambda: (top / "short").rename(long),
        lambda: os.link(top / "short", long),
    ]
    (top / "short").touch()
    for operation in operations:
        with pytest.raises(OSError, match="File name too long") as refused:
            operation()
        assert refused.value.errno == errno.ENAMETOOLONG
    (top / ("n" * 255)).touch()
    assert sorted(os.listdir(top)) == sorted(["short", "n" * 255])


def test_paths_and_targets_over_the_limit_are_refused(mounted_volume: MountedVolume) -> None:
    top = mounted_volume.path
    with pytest.raises(OSError, match="File name too long"):
        os.stat(f"{top}/{'d/' * 2048}")
    with pytest.raises(OSError, match="File name too long"):
        (top / "link").symlink_to("x" * 4096)
    assert os.listdir(top) == []


def test_sizes_beyond_the_maximum_are_efbig(mounted_volume: MountedVolume) -> None:
    path = mounted_volume.path / "file"
    with open(path, "w+b", buffering=0) as file:
        file.write(b"start")
        for operation in (
            lambda: os.truncate(path, MAX_FILE_BYTES + 1),
            lambda: os.pwrite(file.fileno(), b"x", MAX_FILE_BYTES),
        ):
            with pytest.raises(OSError, match="File too large") as refused:
                operation()
            assert refused.value.errno == errno.EFBIG
        assert os.fstat(file.fileno()).st_size == 5
    assert path.read_bytes() == b"start"


def test_a_full_quota_is_told_by_write_and_truncate_and_never_first_by_close(mounted_volume: MountedVolume) -> None:
    volume = mounted_volume
    limited = volume.path / "limited"
    limited.mkdir()
    done("quota", "set", limited, "--capacity", "8MiB", "--inodes", "3")
    _fill_up(limited / "file", errno.EDQUOT)
    with pytest.raises(OSError, match="Disk quota exceeded"):
        os.truncate(limited / "file", 64 * MIB)
    (limited / "second").touch()
    (limited / "third").touch()
    with pytest.raises(OSError, match="Disk quota exceeded"):
        (limited / "fourth").touch()
    (volume.path / "elsewhere").write_bytes(bytes(16 * MIB))
    done("quota", "set", volume.path, "--capacity", "40MiB")
    _fill_up(volume.path / "full", errno.ENOSPC)
    done("quota", "set", volume.path, "--capacity", "0")


def _fill_up(path: Path, expected: int) -> None:
    """Write until it is refused; what was taken before must be there, and closing must succeed."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT)
    written = 0
    try:
        with pytest.raises(OSError, match=os.strerror(expected)) as refused:
            while written < 256 * MIB:
                written += os.write(descriptor, bytes(MIB))
        assert refused.value.errno == expected
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    assert 0 < written == path.stat().st_size
