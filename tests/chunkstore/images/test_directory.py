"""A cache directory: locked, versioned, and set aside rather than guessed at."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from chunkstore.block import digest
from chunkstore.errors import FormatUnsupported
from chunkstore.geometry import MIB, SliceId
from chunkstore.images.directory import CacheDirectory, CacheLocked, ImageName, StagedName
from chunkstore.images.disk import Disk
from tests.chunkstore.stores import Workshop, content, settled, written


def opened(root: Path, *, block_bytes: int = 2 * MIB) -> CacheDirectory:
    """Open a cache directory."""
    directory = CacheDirectory(root, block_bytes=block_bytes, disk=Disk())
    directory.open()
    return directory


def test_its_format_file_is_as_documented(tmp_path: Path) -> None:
    opened(tmp_path / "cache").close()
    head = bytes.fromhex("41544c43 0100 0000 00002000")
    assert (tmp_path / "cache" / "format").read_bytes() == head + digest(head)
    assert os.stat(tmp_path / "cache").st_mode & 0o777 == 0o700


def test_names_are_read_back_and_strangers_are_ignored(tmp_path: Path) -> None:
    directory = opened(tmp_path)
    Path(directory.image(SliceId(0xABC), 0x1234, 0xDEADBEEF)).touch()
    Path(directory.image(SliceId(0xABD), 5 * MIB, None)).touch()
    staged = StagedName(SliceId(9), 77, bytes(range(16)))
    Path(directory.staged_image(staged)).touch()
    for stranger in ("images/readme", "images/1-2-3", "staged/1-2", "images/XYZ-1"):
        (tmp_path / stranger).touch()
    assert sorted(directory.image_names()) == [
        ImageName(SliceId(0xABC), 0x1234, 0xDEADBEEF),
        ImageName(SliceId(0xABD), 5 * MIB, None),
    ]
    assert os.path.basename(directory.image(SliceId(0xABC), 0x1234, 0xDEADBEEF)) == "abc-1234-deadbeef"
    assert directory.staged_names() == [staged]
    directory.close()


def test_unsealed_slices_of_an_earlier_process_are_removed(tmp_path: Path) -> None:
    directory = opened(tmp_path)
    Path(directory.draft(SliceId(1))).write_bytes(b"half a slice")
    directory.close()
    opened(tmp_path).close()
    assert os.listdir(tmp_path / "new") == []


def test_another_process_is_refused_until_the_lock_is_free_also_by_its_death(tmp_path: Path) -> None:
    program = "; ".join(
        (
            "import sys",
            "from pathlib import Path",
            "from chunkstore.images.directory import CacheDirectory",
            "from chunkstore.images.disk import Disk",
            f"CacheDirectory(Path({str(tmp_path)!r}), block_bytes={2 * MIB}, disk=Disk()).open()",
            "print('locked', flush=True)",
            "sys.stdin.read()",
        )
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "locked\n"
        with pytest.raises(CacheLocked, match=f"process {process.pid}: unmount there"):
            opened(tmp_path)
    finally:
        process.kill()
        process.communicate()
    opened(tmp_path).close()


def test_one_of_other_blocks_or_of_a_newer_or_no_format_is_set_aside_and_an_empty_one_made(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = tmp_path / "cache"
    opened(root).close()
    (root / "images" / "1-1-00000000").write_bytes(b"x")
    opened(root, block_bytes=4 * MIB).close()
    assert os.listdir(root / "images") == []
    assert (tmp_path / "cache.aside-1" / "images" / "1-1-00000000").exists()

    newer = bytearray((root / "format").read_bytes())
    newer[4] = 2
    newer[12:] = digest(newer[:12])
    (root / "format").write_bytes(newer)
    opened(root, block_bytes=4 * MIB).close()
    assert (tmp_path / "cache.aside-2").is_dir()

    (root / "format").write_bytes(b"nonsense")
    opened(root, block_bytes=4 * MIB).close()
    (root / "format").unlink()
    opened(root, block_bytes=4 * MIB).close()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cache", *(f"cache.aside-{n}" for n in (1, 2, 3, 4))]
    texts = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert len(texts) == 4
    assert "newer version" in texts[1]


def test_one_that_holds_staged_data_is_never_set_aside(tmp_path: Path) -> None:
    root = tmp_path / "cache"
    directory = opened(root)
    Path(directory.staged_image(StagedName(SliceId(1), 1, bytes(16)))).write_bytes(b"x")
    directory.close()
    with pytest.raises(FormatUnsupported, match="not uploaded"):
        opened(root, block_bytes=4 * MIB)
    opened(root).close()


def test_one_that_cannot_be_written_is_an_error_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OSError, match="file"):
        opened(tmp_path / "file" / "cache")


async def test_a_side_file_of_a_newer_version_costs_a_fetch_and_nothing_else(tmp_path: Path) -> None:
    workshop = Workshop(tmp_path)
    data = content(5 * MIB)
    async with workshop.opened() as store:
        info = await written(store, 1, data)
        await settled(store)
    side = workshop.cache / "sides" / "1"
    newer = bytearray(side.read_bytes())
    newer[4] = 2
    newer[48:64] = digest(newer[:48])
    side.write_bytes(newer)
    async with workshop.opened() as store:
        assert await store.read(info, 0, len(data)) == data
        assert workshop.bucket.requests["get"] == 3
        await settled(store)
    async with workshop.opened() as store:
        assert await store.read(info, 0, len(data)) == data
        assert workshop.bucket.requests["get"] == 3
