"""The works of the benchmark do what they say on a plain directory, and see what is wrong in a file system."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

from bench.works import MIB, WORKS, Mismatch, Options, Scale, Timing, small_files, source_tree

SCALE = Scale(files_4k=12, files_64k=3, tree_files=25, random_reads=40, big_size_bytes=3 * MIB)
OPTIONS = Options(SCALE, check_modes=True)


def run(name: str, directory: Path) -> Timing:
    return WORKS[name](directory, OPTIONS)


@pytest.fixture
def filled(tmp_path: Path) -> Path:
    for name in ("create_4k", "create_64k", "write_big"):
        run(name, tmp_path)
    return tmp_path


def flip_byte(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)


def test_each_work_counts_what_it_did(tmp_path: Path) -> None:
    operations = {}
    sizes_bytes = {}
    for name in WORKS:
        timing = run(name, tmp_path)
        assert timing.elapsed_ns > 0
        operations[name], sizes_bytes[name] = timing.operations, timing.size_bytes
    directories = len(source_tree(OPTIONS))
    assert operations == {
        "create_4k": 12,
        "create_64k": 3,
        "build_tree": directories + 3 * 25,
        "remove_tree": directories + 25,
        "write_big": 1,
        # Two directories that hold files, and the two above them by size.
        "walk": 12 + 3 + 4,
        "stat_by_path": 15,
        "read_4k": 12,
        "read_64k": 3,
        "read_big": 1,
        "read_random": 40,
    }
    assert sizes_bytes["read_4k"] == 12 * 4096
    assert sizes_bytes["read_64k"] == 3 * 65536
    assert sizes_bytes["write_big"] == sizes_bytes["read_big"] == 3 * MIB


def test_the_source_tree_is_as_large_and_as_deep_as_it_says() -> None:
    tree = source_tree(Options(Scale(1, 1, 1500, 1, MIB), check_modes=True))
    files = [file for files in tree.values() for file in files]
    assert len(files) == len({file.path for file in files}) == 1500
    assert max(name.count("/") for name in tree) == 4
    assert all(1024 <= len(file.content) <= 20 * 1024 for file in files)
    assert {file.mode for file in files} == {0o644, 0o755}
    seen: set[str] = set()
    for name in tree:
        assert name == "" or name.rpartition("/")[0] in seen
        seen.add(name)


@pytest.mark.parametrize(
    ("work", "damage"),
    [
        ("read_4k", lambda root: flip_byte(root / "small/4k/d000/f000007", 4095)),
        ("read_64k", lambda root: flip_byte(root / "small/64k/d000/f000002", 0)),
        ("read_4k", lambda root: os.truncate(root / "small/4k/d000/f000007", 4095)),
        ("read_4k", lambda root: os.truncate(root / "small/4k/d000/f000007", 4097)),
        ("walk", lambda root: (root / "small/4k/d000/extra").touch()),
        ("walk", lambda root: os.truncate(root / "small/64k/d000/f000002", 1)),
        ("stat_by_path", lambda root: os.truncate(root / "small/64k/d000/f000002", 1)),
        ("read_big", lambda root: flip_byte(root / "big", 2 * MIB + 77)),
        ("read_big", lambda root: flip_byte(root / "big", 0)),
        ("read_big", lambda root: os.truncate(root / "big", 3 * MIB + 1)),
        ("read_big", lambda root: os.truncate(root / "big", 3 * MIB - 1)),
        ("read_random", lambda root: (root / "big").write_bytes(bytes(3 * MIB))),
    ],
)
def test_a_work_that_reads_finds(work: str, damage: Callable[[Path], None], filled: Path) -> None:
    run(work, filled)
    damage(filled)
    with pytest.raises(Mismatch):
        run(work, filled)


def test_the_random_reads_expect_what_the_big_file_holds_at_every_page(filled: Path) -> None:
    many = Options(Scale(1, 1, 1, 3000, SCALE.big_size_bytes), check_modes=True)
    assert WORKS["read_random"](filled, many).operations == 3000


def test_the_contents_cannot_be_compressed_within_the_largest_block(tmp_path: Path) -> None:
    options = Options(Scale(1, 1, 1, 1, 16 * MIB), check_modes=True)
    WORKS["write_big"](tmp_path, options)
    packed = zstandard.ZstdCompressor(level=3).compress((tmp_path / "big").read_bytes())
    assert len(packed) >= 16 * MIB
    for file in small_files(tmp_path, OPTIONS, size_kib=64):
        assert len(zstandard.ZstdCompressor().compress(file.content)) > 65_000


def test_a_work_in_a_process_of_its_own_tells_its_timing_or_one_line_of_error(tmp_path: Path) -> None:
    scale = {"files_4k": 2, "files_64k": 1, "tree_files": 1, "random_reads": 1, "big_size_bytes": MIB}
    arguments = [sys.executable, "-m", "bench.works"]
    options = json.dumps({"scale": scale, "check_modes": True})

    def process(work: str) -> subprocess.CompletedProcess[str]:
        command = [*arguments, work, str(tmp_path), options]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)

    failed = process("read_4k")
    assert failed.returncode == 1
    assert failed.stderr.startswith("FileNotFoundError")
    assert len(failed.stderr.splitlines()) == 1
    done = process("create_4k")
    assert done.returncode == 0
    assert Timing(**json.loads(done.stdout)).operations == 2
