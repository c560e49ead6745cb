"""Random system calls on the vfs, on a real directory and on a model: the same answers, the same errno, the same tree."""

from __future__ import annotations

import asyncio
import errno as E
import os
import random
from pathlib import Path
from typing import Any

import pytest

from chunkstore.errors import AtollError
from tests.client.vfs.trees import ModelTree, Names, RealTree, VfsTree
from tests.client.vfs.volumes import FlakyBucket, Place, VfsVolume
from tests.metasvc.store.kinds import KINDS, new_store_of
from tests.servers.fixtures import Servers

CALLS = 1500
NAMES = [b"a", b"b", b"c", b"d", "ä€".encode(), b"\xff\xfe"]
TOO_LONG = b"x" * 256
LONGEST = b"y" * 255
SLOTS = 4
ANSWERS_THAT_DIFFER = {
    # A kernel refuses user.* on fifos and symlinks itself, with EPERM; asking for one there is ENODATA or EPERM.
    ("getxattr", E.EPERM, E.ENODATA),
    ("removexattr", E.EPERM, E.ENODATA),
    # Two things are wrong: the source is a directory, and the new name is taken.
    ("link", E.EPERM, E.EEXIST),
    # The target is a directory, not empty, and the source is none.
    ("rename", E.EISDIR, E.ENOTEMPTY),
    # A symbolic link that is not followed: a kernel may refuse it by its owner and its directory first.
    ("open", E.EACCES, E.ELOOP),
}


class Player:
    """Make random calls, on all trees at once."""

    def __init__(self, trees: dict[str, Any], rng: random.Random, bucket: FlakyBucket) -> None:
        self.trees = trees
        self.bucket = bucket
        self.rng = rng
        self.slots: set[int] = set()
        self.log: list[str] = []
        self.flush_may_fail = False

    def end_outage(self) -> None:
        self.bucket.puts_fail = self.flush_may_fail = False

    def path(self) -> Names:
        rng = self.rng
        there = self.trees["model"].paths()
        if there and rng.random() < 0.6:
            names = list(rng.choice(there))
            if rng.random() < 0.3 and len(names) < 4:
                names.append(rng.choice(NAMES))
        else:
            names = [rng.choice(NAMES) for _ in range(rng.choice((1, 1, 2)))]
        links = self.trees["model"].symlinks()
        # What lies below a symbolic link is where its target says: a kernel's affair.
        length = next((end for end in range(1, len(names)) if tuple(names[:end]) in links), len(names))
        del names[length:]
        if rng.random() < 0.02:
            names[-1] = rng.choice((TOO_LONG, LONGEST))
        return tuple(names)

    def length(self) -> int:
        return self.rng.choice((1, 100, 3000, self.rng.randrange(1, 100_000)))

    def draw(self) -> tuple[Any, ...]:
        """Return a call: its name and arguments."""
        rng = self.rng
        on_slots = ["read", "write", "fsync", "fstat", "close"] if self.slots else []
        on_paths = ["mkdir", "rmdir", "mkfifo", "symlink", "readlink", "link", "unlink", "unlink", "rename", "rename"]
        on_paths += ["open", "open", "truncate", "chmod", "chown", "utime", "stat", "readdir"]
        on_paths += ["setxattr", "getxattr", "removexattr", "listxattr"]
        call = rng.choice(on_paths + 2 * on_slots)
        slot = rng.choice(sorted(self.slots)) if self.slots else 0
        match call:
            case "mkdir" | "mkfifo" | "chmod":
                return call, self.path(), rng.choice((0o700, 0o755, 0o4711, 0o2755, 0o1700))
            case "symlink":
                return call, self.path(), rng.choice((b"nowhere", b"x" * 200 + b"/nowhere"))
            case "link":
                return call, self.path(), self.path()
            case "rename":
                return call, self.path(), self.path(), rng.choice((0, 0, 0, 1, 2))
            case "open":
                free = sorted(set(range(SLOTS)) - self.slots)
                if not free:
                    return "close", slot
                flags = rng.choice((os.O_RDONLY, os.O_WRONLY, os.O_RDWR))
                flags |= rng.choice((0, os.O_CREAT, os.O_CREAT, os.O_CREAT | os.O_EXCL))
                if flags & os.O_ACCMODE:
                    flags |= rng.choice((0, 0, os.O_TRUNC))
                return call, free[0], self.path(), flags
            case "read":
                return call, slot, rng.randrange(120_000), self.length()
            case "write":
                return call, slot, rng.choice((None, rng.randrange(120_000))), rng.randbytes(self.length())
            case "truncate":
                return call, self.path(), rng.choice((0, rng.randrange(150_000)))
            case "chown":
                return call, self.path(), rng.randrange(3), rng.randrange(3)
            case "utime":
                return call, self.path(), rng.randrange(10**9, 900 * 10**9)
            case "setxattr":
                flags = rng.choice((0, os.XATTR_CREATE, os.XATTR_REPLACE))
                return call, self.path(), rng.choice((b"user.a", b"user.b")), rng.randbytes(rng.randrange(50)), flags
            case "getxattr" | "removexattr":
                return call, self.path(), rng.choice((b"user.a", b"user.b"))
            case "fsync" | "fstat" | "close":
                return call, slot
            case _:
                return call, self.path()

    async def play(self) -> None:
        """Make one call on all trees and compare."""
        call, *arguments = self.draw()
        if call == "open" and await self._is_fifo_or_directory(arguments[1]):
            return
        answers = {}
        for name, tree in self.trees.items():
            try:
                answers[name] = await getattr(tree, call)(*arguments)
            except (OSError, AtollError) as error:
                answers[name] = -(error.errno or 0), type(error).__name__
        self.log.append(f"{call} {_short(arguments)} -> { {name: _short(answer) for name, answer in answers.items()} }")
        failed = {name: answer[0] for name, answer in answers.items() if _is_errno(answer)}
        if call == "write" and failed == {"vfs": -E.EIO}:
            # Too much waits for a bucket that is away. The program tries again, when it is back.
            assert self.flush_may_fail
            self.end_outage()
            assert await self.trees["vfs"].write(*arguments) == answers["model"]
            return
        if call in ("fsync", "close") and failed == {"vfs": -E.EIO}:
            assert self.flush_may_fail, "flushes fail only while the bucket is away"
        elif failed:
            first = next(iter(failed.values()))
            allowed = any(
                call == verb and set(failed.values()) <= {-one, -other} for verb, one, other in ANSWERS_THAT_DIFFER
            )
            # With a second thing wrong, which of the two is told is not laid down.
            allowed |= any(isinstance(path, tuple) and TOO_LONG in path for path in arguments)
            assert len(failed) == len(answers), self.log[-1]
            assert allowed or set(failed.values()) == {first}, self.log[-1]
        else:
            first = next(iter(answers.values()))
            assert all(answer == first for answer in answers.values()), self.log[-1]
        if call == "open" and not failed:
            self.slots.add(arguments[0])
        if call == "close":
            self.slots.discard(arguments[0])

    async def _is_fifo_or_directory(self, path: Names) -> bool:
        """Opening a fifo is the kernel's own affair, and opening a directory is opendir."""
        try:
            kind = (await self.trees["model"].stat(path))[0]
        except OSError:
            return False
        return kind in (0o010000, 0o040000)

    async def compare(self, path: Names = ()) -> None:
        """Walk all trees and compare names, attributes, contents."""
        model = self.trees["model"]
        listed = [await tree.readdir(path) for tree in self.trees.values()]
        assert all(names == listed[0] for names in listed), path
        for name, kind in listed[0]:
            below = (*path, name)
            seen = {await tree.stat(below) for tree in self.trees.values()}
            assert len(seen) == 1, (below, seen)
            xattrs = [await tree.listxattr(below) for tree in self.trees.values()]
            assert all(found == xattrs[0] for found in xattrs), below
            if kind == 0o040000:
                await self.compare(below)
            elif kind == 0o100000:
                content = bytes(model._find(below).content)
                for tree in self.trees.values():
                    await tree.open(99, below, os.O_RDONLY)
                    assert await tree.read(99, 0, len(content) + 10) == content, below
                    await tree.close(99)

    async def close_all(self) -> None:
        for slot in sorted(self.slots):
            for tree in self.trees.values():
                await tree.close(slot)
        self.slots.clear()


def _is_errno(answer: Any) -> bool:
    return isinstance(answer, tuple) and len(answer) == 2 and isinstance(answer[1], str)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 200 else f"{text[:60]}... ({len(value) if hasattr(value, '__len__') else 0})"


def new_player(volume: VfsVolume, directory: Path, rng: random.Random) -> Player:
    directory.mkdir()
    trees = {"real": RealTree(directory), "model": ModelTree(), "vfs": VfsTree(volume.vfs)}
    return Player(trees, rng, volume.bucket)


@pytest.mark.parametrize(
    ("kind", "run"), [*(("memory", run) for run in range(6)), *((kind, 6) for kind in KINDS if kind != "memory")]
)
@pytest.mark.parametrize("trash_days", [0.0, 1.0])
def test_calls_answer_like_a_directory_of_linux_and_like_the_model(
    tmp_path: Path, servers: Servers, seed: int, kind: str, run: int, trash_days: float
) -> None:
    rng = random.Random(seed * 1000 + run * 10 + int(trash_days))
    previous = os.umask(0)

    async def scenario() -> None:
        store = await new_store_of(kind, tmp_path, servers)
        place = Place(tmp_path, format_changes={"trash_days": trash_days}, store=store)
        async with place.opened() as volume:
            player = new_player(volume, tmp_path / "real", rng)
            try:
                for number in range(CALLS):
                    if rng.random() < 0.02:
                        volume.bucket.puts_fail = player.flush_may_fail = rng.random() < 0.3
                    if rng.random() < 0.02:
                        volume.clock.now_s += 10
                        await volume.vfs.flush_due()
                    await player.play()
                    if number % 300 == 299:
                        await player.compare()
            except BaseException:
                print("last calls:", *player.log[-25:], sep="\n  ")  # noqa: T201 - what a failure needs
                raise
            finally:
                volume.bucket.puts_fail = False
            await player.close_all()
            await player.compare()
        async with place.opened(fresh_cache=True) as volume:
            player.trees["vfs"] = VfsTree(volume.vfs)
            await player.compare()
        await store.close()

    try:
        asyncio.run(scenario())
    finally:
        os.umask(previous)
