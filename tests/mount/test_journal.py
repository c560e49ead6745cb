"""The model by which the crash tests judge: it must accept what a real file system does and notice what a bad one would."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.mount.journal import Log, Model, StateDiffers, count_lines, impossible, read_log, read_tree
from tests.mount.programs import writer


@pytest.fixture
def written(tmp_path: Path, seed: int) -> tuple[Path, Log]:
    """Let the writer take some 250 steps in a plain directory, then stop it."""
    root, log, stop = tmp_path / "root", tmp_path / "log", tmp_path / "stop"
    root.mkdir()
    with subprocess.Popen([sys.executable, writer.__file__, str(stop), str(root), str(log), str(seed)]) as process:
        try:
            while count_lines([log]) < 500:
                assert process.poll() is None
                time.sleep(0.01)
        finally:
            stop.touch()
        assert process.wait(60) == 0
    return root, read_log(log)


def test_the_model_agrees_with_a_plain_directory_after_hundreds_of_steps(written: tuple[Path, Log]) -> None:
    root, log = written
    assert log.errno is None
    assert log.under_way is None
    assert len(log.acknowledged) >= 250
    assert {step["op"] for step in log.acknowledged} >= {"new_file", "write", "append", "truncate", "rename", "link"}
    Model().settle(log, root)


def test_the_model_takes_the_last_step_as_done_or_not_if_it_was_under_way(written: tuple[Path, Log]) -> None:
    root, log = written
    Model().settle(Log(log.acknowledged[:-1], log.acknowledged[-1], None, ""), root)
    further = {"step": 0, "op": "mkdir", "name": "under way"}
    Model().settle(Log(log.acknowledged, further, None, ""), root)
    (root / "under way").mkdir(0o755)
    model = Model()
    model.settle(Log(log.acknowledged, further, None, ""), root)
    assert "under way" in model.names


def flip_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut_the_end(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def turn_into_zeros(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


@pytest.mark.parametrize(
    "damage",
    [Path.unlink, flip_a_byte, cut_the_end, turn_into_zeros, lambda path: path.rename(path.with_name("other"))],
)
def test_the_model_notices_one_file_that_is_gone_changed_or_elsewhere(
    written: tuple[Path, Log], damage: Callable[[Path], None], seed: int
) -> None:
    root, log = written
    files = [name for name, node in sorted(read_tree(root).items()) if node.kind == "file" and any(node.data)]
    damage(root / random.Random(seed).choice(files))
    with pytest.raises(StateDiffers):
        Model().settle(log, root)


@pytest.mark.parametrize(
    ("actual", "possible"),
    [
        (b"aaaa", True),
        (b"aabb", True),
        (b"aaba", True),
        (b"aabbb", True),
        (b"aabb\0", True),
        (b"aabbbb", True),
        (b"aaa", False),
        (b"baaa", False),
        (b"aacc", False),
        (b"aabbbbb", False),
    ],
)
def test_a_write_under_way_may_have_come_as_far_as_it_likes_within_its_range(actual: bytes, *, possible: bool) -> None:
    assert (impossible(b"aaaa", b"bbbb", 2, actual) is None) == possible
