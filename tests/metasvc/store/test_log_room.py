"""Zeros ahead of the end of the write-ahead log."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from metasvc.model import Counter
from metasvc.store.sqlite.log_room import LogRoom
from metasvc.store.tables import COUNTER
from tests.metasvc.store.contract import acquire
from tests.metasvc.store.rows_of import batch_of
from tests.metasvc.store.sqlite_world import SqliteWorld

KIB = 1 << 10
MIB = 1 << 20


class Log:
    """A file that grows as SQLite's log does."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "meta.db-wal"
        self.path.touch()
        self.end = 0

    @property
    def size(self) -> int:
        """Length of the file."""
        return self.path.stat().st_size

    def append(self, size: int) -> None:
        """Write behind the last frame."""
        with self.path.open("r+b") as file:
            file.seek(self.end)
            file.write(b"\xff" * size)
        self.end += size


@pytest.fixture
def log(tmp_path: Path) -> Log:
    return Log(tmp_path)


def _room(log: Log, *, limit_bytes: int = 4 * MIB) -> LogRoom:
    return LogRoom(str(log.path).removesuffix("-wal"), limit_bytes=limit_bytes)


def test_a_process_with_few_commits_makes_no_room(log: Log) -> None:
    room = _room(log)
    for _ in range(6):
        room.keep_ahead()
        log.append(20 * KIB)
    assert log.size == log.end


def test_small_commits_get_room_up_to_the_limit_and_what_was_written_stays(log: Log) -> None:
    room = _room(log)
    sizes = set()
    for _ in range(250):
        room.keep_ahead()
        log.append(20 * KIB)
        sizes.add(log.size)
    assert log.end > 4 * MIB
    assert len([size for size in sizes if MIB < size < 4 * MIB]) < 20  # grew in few steps
    assert log.size == log.end
    content = log.path.read_bytes()
    assert content == b"\xff" * log.end
    room = _room(log)
    log.end = 0  # the log begins anew
    for _ in range(20):
        room.keep_ahead()
        log.append(20 * KIB)
    assert log.path.read_bytes() == content


def test_the_room_is_zeros(log: Log) -> None:
    room = _room(log)
    while log.size == log.end:
        log.append(20 * KIB)
        room.keep_ahead()
    assert log.size == log.end + MIB
    assert log.path.read_bytes() == b"\xff" * log.end + bytes(MIB)
    room.keep_ahead()
    assert log.size == log.end + MIB


def test_big_commits_get_no_room(log: Log) -> None:
    room = _room(log)
    for _ in range(20):
        room.keep_ahead()
        log.append(100 * KIB)
    assert log.size == log.end


def test_a_log_that_was_there_or_is_missing_or_was_cut_is_let_be(log: Log) -> None:
    log.append(MIB)
    room = _room(log)
    room.keep_ahead()
    assert log.size == MIB
    log.path.write_bytes(bytes(MIB // 2))
    room.keep_ahead()
    assert log.size == MIB // 2
    log.path.unlink()
    room.keep_ahead()
    assert not log.path.exists()


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """Mount 512 KiB of memory (needs root)."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(tmp_path)], check=True)
    yield tmp_path
    subprocess.run(["umount", "-l", str(tmp_path)], check=True)


def test_what_is_left_of_a_full_disk_is_left_to_sqlite(full_disk: Path) -> None:
    log = Log(full_disk)
    room = _room(log)
    for _ in range(20):
        room.keep_ahead()
        log.append(20 * KIB)
    assert log.size == log.end


async def test_other_processes_read_a_log_with_room(tmp_path: Path) -> None:
    world = SqliteWorld(tmp_path, journal_after=1000)
    async with world.running():
        volume = await world.volume()
        owner = await acquire(volume)
        log = Path(f"{world.path}-wal")
        for number in range(1, 60):
            await volume.commit(owner, number, batch_of(Counter(f"{number:02}", number)))
        assert log.read_bytes()[-512 * KIB :] == bytes(512 * KIB)
        reader = await world.volume()
        assert [row[1] for row in await reader.scan(COUNTER, after=None, limit=99)] == list(range(1, 60))
