"""Random operations on a volume and on a real directory: the same results, the same errors."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from atollfs import AtollFileSystem
from tests.atollfs.places import Place

STEPS: Final = 600
NAMES: Final = ("a", "b", "c")


def outcome(call: Callable[[], Any]) -> Any:
    """Return what a call returns, or the errno that it fails with."""
    try:
        return call()
    except OSError as error:
        return type(error), error.errno


class Pair:
    """A directory of a volume, and one of the local disk that should be its twin."""

    def __init__(self, fs: AtollFileSystem, here: str, twin: Path) -> None:
        self.fs = fs
        self.here = here
        self.twin = twin

    def mkdir(self, path: str) -> tuple[Any, Any]:
        fs, twin = self.fs, self.twin
        return (
            outcome(lambda: fs.mkdir(f"{self.here}/{path}", create_parents=False)),
            outcome(lambda: os.mkdir(twin / path)),
        )

    def write(self, path: str, data: bytes, mode: str, at: int) -> tuple[Any, Any]:
        def put(file: Any) -> int:
            with file:
                if mode == "r+b":
                    file.seek(at)
                file.write(data)
                return int(file.tell())

        return (
            outcome(lambda: put(self.fs.open(f"{self.here}/{path}", mode, block_size=500))),
            outcome(lambda: put(open(self.twin / path, mode))),
        )

    def read(self, path: str, at: int, size: int) -> tuple[Any, Any]:
        def get(file: Any) -> bytes:
            with file:
                file.seek(at)
                data: bytes = file.read(size)
                return data

        return (
            outcome(lambda: get(self.fs.open(f"{self.here}/{path}", block_size=500))),
            outcome(lambda: get(open(self.twin / path, "rb"))),
        )

    def truncate(self, path: str, size: int) -> tuple[Any, Any]:
        def cut(file: Any) -> None:
            with file:
                file.truncate(size)

        return (
            outcome(lambda: cut(self.fs.open(f"{self.here}/{path}", "r+b"))),
            outcome(lambda: cut(open(self.twin / path, "r+b"))),
        )

    def remove(self, path: str) -> tuple[Any, Any]:
        return outcome(lambda: self.fs.rm_file(f"{self.here}/{path}")), outcome(lambda: os.unlink(self.twin / path))

    def rmdir(self, path: str) -> tuple[Any, Any]:
        return outcome(lambda: self.fs.rmdir(f"{self.here}/{path}")), outcome(lambda: os.rmdir(self.twin / path))

    def remove_all(self, path: str) -> tuple[Any, Any]:
        def remove() -> None:
            if (self.twin / path).is_dir():
                shutil.rmtree(self.twin / path)
            else:
                os.unlink(self.twin / path)

        return outcome(lambda: self.fs.rm(f"{self.here}/{path}", recursive=True)), outcome(remove)

    def rename(self, old: str, new: str) -> tuple[Any, Any]:
        if old.startswith(f"{new}/"):
            # ENOTEMPTY or EISDIR: POSIX lets systems choose, and Linux chooses before it asks a file system.
            return None, None
        return (
            outcome(lambda: self.fs.mv_file(f"{self.here}/{old}", f"{self.here}/{new}")),
            outcome(lambda: os.rename(self.twin / old, self.twin / new)),
        )

    def copy(self, old: str, new: str) -> tuple[Any, Any]:
        def copy() -> None:
            shutil.copyfile(self.twin / old, self.twin / new)

        if old == new or (self.twin / old).is_dir():
            return None, None
        return (
            outcome(lambda: self.fs.cp_file(f"{self.here}/{old}", f"{self.here}/{new}")),
            outcome(copy),
        )

    def tree(self) -> tuple[list[Any], list[Any]]:
        found = self.fs.find(self.here, withdirs=True, detail=True)
        ours = [(name[len(self.here) :], entry["type"], entry["size"]) for name, entry in found.items()]
        theirs = [
            (f"/{path.relative_to(self.twin)}", "directory", 0)
            if path.is_dir()
            else (f"/{path.relative_to(self.twin)}", "file", path.stat().st_size)
            for path in self.twin.rglob("*")
        ]
        return sorted(ours)[1:], sorted(theirs)


def test_random_operations_have_the_outcome_that_a_local_disk_gives(
    place: Place, here: str, tmp_path: Path, seed: int
) -> None:
    chance = random.Random(seed)

    def path() -> str:
        return "/".join(chance.choice(NAMES) for _ in range(chance.choice((1, 1, 2, 2, 3))))

    def step(pair: Pair) -> tuple[str, tuple[Any, Any]]:
        match chance.randrange(11):
            case 0 | 1:
                return "mkdir", pair.mkdir(path())
            case 2 | 3 | 4:
                size = chance.choice((0, 1, 300, 5_000, 100_000))
                mode = chance.choice(("wb", "ab", "r+b", "xb"))
                return f"write {mode}", pair.write(path(), chance.randbytes(size), mode, chance.randrange(7_000))
            case 5 | 6:
                return "read", pair.read(path(), chance.randrange(7_000), chance.choice((-1, 0, 10, 3_000)))
            case 7:
                return "truncate", pair.truncate(path(), chance.randrange(9_000))
            case 8:
                return "rename", pair.rename(path(), path())
            case 9:
                return "copy", pair.copy(path(), path())
            case _:
                remove = chance.choice((pair.remove, pair.rmdir, pair.remove_all))
                return "remove", remove(path())

    with place.opened(auto_mkdir=False) as fs:
        pair = Pair(fs, here, tmp_path)
        for number in range(STEPS):
            name, (ours, theirs) = step(pair)
            assert ours == theirs, f"step {number}: {name}"
            if number % 50 == 49:
                found, expected = pair.tree()
                assert found == expected, f"step {number}"
