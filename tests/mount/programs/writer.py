"""Change files at random and log what was acknowledged: `writer.py STOP {DIRECTORY LOG SEED} ...`.

Each DIRECTORY has a writer, which is a thread of its own where there are several; several write less and keep fewer files.
Before each step its description goes to LOG, which lies outside the file system under test, and after the call returned 0
that it is done: what stands there as done must survive whatever happens to the file system. Both lines have the time
(CLOCK_MONOTONIC), so what was under way at a moment can be told. The first error ends the writer with its errno in the log
and exit code 0: judging it is the reader's task (`tests.mount.journal`). All end when the file STOP exists. Runs on the
standard library only.
"""

from __future__ import annotations

import json
import mmap
import os
import random
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final, NamedTuple

KIB: Final = 1 << 10
MIB: Final = 1 << 20
# Around what is inline, a frame, a block and several blocks; mostly small, as files are.
SIZES: Final = (0, 1, 100, 5000, 32 * KIB, 32 * KIB + 1, 100 * KIB, 300 * KIB, MIB, 4 * MIB, 4 * MIB + 1, 6 * MIB)
SIZE_WEIGHTS: Final = (2, 4, 10, 20, 4, 4, 10, 6, 4, 2, 2, 1)


class Appetite(NamedTuple):
    """Say how much a writer writes and keeps."""

    sizes: tuple[int, ...]
    weights: tuple[int, ...]
    max_files: int
    max_directories: int
    syncs: tuple[str, ...]
    """What `write` does in the end."""
    leaves_directory: float
    """How probable it is that a rename chooses among all directories."""


ALONE: Final = Appetite(
    SIZES, SIZE_WEIGHTS, max_files=60, max_directories=12, syncs=("close", "fsync", "msync"), leaves_directory=1
)
# Of 100 and more: names and the order of commits matter, not how much a machine writes. No mappings: while a page of one
# comes no other thread runs, for Python's lock is held. Few renames from one directory into another: of these the kernel
# does one at a time, and the others would wait for it in place of being in flight.
ONE_OF_MANY: Final = Appetite(
    SIZES[:6], SIZE_WEIGHTS[:6], max_files=10, max_directories=4, syncs=("close", "fsync"), leaves_directory=0.02
)


def content(token: int, size_bytes: int) -> bytes:
    """Return the bytes that a step with this token writes."""
    return random.Random(token).randbytes(size_bytes)


def directory_of(name: str) -> str:
    """Return the directory of a name, with its slash; empty at the top."""
    return name[: name.rfind("/") + 1]


class Writer:
    """Hold what is known of the directory: its files and directories by relative path; nobody else changes it."""

    def __init__(self, root: Path, log: int, rng: random.Random, appetite: Appetite) -> None:
        self.root = root
        self.log = log
        self.rng = rng
        self.appetite = appetite
        self.step = 0
        self.directories = [""]
        self.files: list[str] = []
        for directory, subdirectories, names in os.walk(root):
            subdirectories.sort()
            relative = os.path.relpath(directory, root)
            prefix = "" if relative == "." else relative + "/"
            self.directories += [prefix + name + "/" for name in subdirectories]
            self.files += [prefix + name for name in sorted(names) if not os.path.islink(os.path.join(directory, name))]
        self.steps: tuple[tuple[int, Callable[[], None]], ...] = (
            (20, self.new_file),
            (8, self.create),
            (12, self.replace),
            (14, self.write),
            (6, self.append),
            (4, self.truncate),
            (8, self.rename),
            (3, self.rename_over),
            (6, self.mkdir),
            (3, self.rename_directory),
            (2, self.rmdir),
            (4, self.link),
            (4, self.symlink),
            (4, self.chmod),
            (4, self.setxattr),
            (6, self.unlink),
            (3, self.unlink_while_open),
        )

    def run(self, stop: Path) -> None:
        """Take steps until one fails or `stop` exists."""
        weights, steps = [weight for weight, _ in self.steps], [step for _, step in self.steps]
        while not stop.exists():
            if len(self.files) >= self.appetite.max_files:
                self.unlink()
            else:
                self.rng.choices(steps, weights)[0]()

    def logged(self, call: Callable[[], None], **description: object) -> None:
        """Announce a step, take it, and acknowledge it, or log its errno and end the program."""
        self.step += 1
        self.write_line({"step": self.step, **description})
        try:
            call()
        except OSError as error:
            self.write_line({"step": self.step, "errno": error.errno, "message": str(error)})
            raise SystemExit(0) from None
        self.write_line({"step": self.step, "done": True})

    def write_line(self, line: dict[str, object]) -> None:
        """Append one line with a single write(2)."""
        os.write(self.log, json.dumps({**line, "at_ns": time.monotonic_ns()}).encode() + b"\n")

    def path(self, name: str) -> str:
        """Return the absolute path of a relative one."""
        return os.path.join(self.root, name)

    def new_name(self, beside: str = "") -> str:
        """Choose a name that does not exist, in any directory, or in the one of `beside`."""
        directory = self.rng.choice(self.directories)
        if beside and self.rng.random() >= self.appetite.leaves_directory:
            directory = directory_of(beside)
        return f"{directory}{self.rng.randrange(1 << 60):x}"

    def size(self) -> int:
        """Choose how much to write."""
        return self.rng.choices(self.appetite.sizes, self.appetite.weights)[0]

    def put(self, descriptor: int, data: bytes, offset: int, sync: str) -> None:
        """Write in pieces as programs do, then make it durable as asked: `fsync`, `msync` or only `close`; closes."""
        try:
            view, piece = memoryview(data), self.rng.choice((512, 4096, 100_000, 1 << 20))
            if sync == "msync" and data:
                end = offset + len(data)
                if os.fstat(descriptor).st_size < end:
                    os.ftruncate(descriptor, end)
                with mmap.mmap(descriptor, end) as mapped:
                    mapped[offset:end] = data
                    mapped.flush()
                return
            piece = max(piece, len(data) // 50)
            for start in range(0, len(data), piece):
                os.pwrite(descriptor, view[start : start + piece], offset + start)
            if sync == "fsync":
                os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def new_file(self, beside: str = "") -> None:
        """Create a file with content."""
        name, size_bytes, token = self.new_name(beside), self.size(), self.rng.randrange(1 << 60)
        sync = self.rng.choice(("close", "close", "fsync"))

        def call() -> None:
            descriptor = os.open(self.path(name), os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
            self.put(descriptor, content(token, size_bytes), 0, sync)

        self.logged(call, op="new_file", name=name, size=size_bytes, token=token, offset=0)
        self.files.append(name)

    def create(self) -> None:
        """Create an empty file; acknowledged once it is open, before it is closed."""
        name = self.new_name()
        descriptors: list[int] = []

        def call() -> None:
            descriptors.append(os.open(self.path(name), os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644))

        self.logged(call, op="create", name=name)
        self.files.append(name)
        os.close(descriptors[0])

    def replace(self) -> None:
        """Write a new file and rename it over an old one: what careful programs do."""
        if not self.files:
            return
        target = self.rng.choice(self.files)
        self.new_file(beside=target)
        source = self.files[-1]
        if source != target:
            self.logged(lambda: os.rename(self.path(source), self.path(target)), op="rename", name=source, to=target)
            self.files.remove(source)

    def write(self) -> None:
        """Write into an existing file, within it, across its end or past it."""
        if not self.files:
            return
        name, size_bytes, token = self.rng.choice(self.files), self.size(), self.rng.randrange(1 << 60)
        offset = self.rng.choice((0, self.rng.randrange(1 << 13), self.rng.randrange(1 << 20)))
        sync = self.rng.choice(self.appetite.syncs)
        self.logged(
            lambda: self.put(os.open(self.path(name), os.O_RDWR), content(token, size_bytes), offset, sync),
            op="write",
            name=name,
            size=size_bytes,
            token=token,
            offset=offset,
        )

    def append(self) -> None:
        """Write at the end with O_APPEND and fsync, as a log does."""
        if not self.files:
            return
        name, size_bytes, token = self.rng.choice(self.files), self.rng.randrange(1, 5000), self.rng.randrange(1 << 60)

        def call() -> None:
            descriptor = os.open(self.path(name), os.O_WRONLY | os.O_APPEND)
            try:
                os.write(descriptor, content(token, size_bytes))
                os.fsync(descriptor)
            finally:
                os.close(descriptor)

        self.logged(call, op="append", name=name, size=size_bytes, token=token)

    def truncate(self) -> None:
        """Make a file shorter or longer."""
        if self.files:
            name, size_bytes = self.rng.choice(self.files), self.size()
            self.logged(lambda: os.truncate(self.path(name), size_bytes), op="truncate", name=name, size=size_bytes)

    def rename(self) -> None:
        """Give a file another name in any directory."""
        if self.files:
            name = self.rng.choice(self.files)
            to = self.new_name(beside=name)
            self.logged(lambda: os.rename(self.path(name), self.path(to)), op="rename", name=name, to=to)
            self.files[self.files.index(name)] = to

    def rename_over(self) -> None:
        """Rename a file over another."""
        if len(self.files) > 1:
            name, to = self.rng.sample(self.files, 2)
            if directory_of(name) != directory_of(to) and self.rng.random() >= self.appetite.leaves_directory:
                return
            if not os.path.samefile(self.path(name), self.path(to)):  # then rename(2) does nothing
                self.logged(lambda: os.rename(self.path(name), self.path(to)), op="rename", name=name, to=to)
                self.files.remove(name)

    def mkdir(self) -> None:
        """Make a directory."""
        if len(self.directories) < self.appetite.max_directories:
            name = self.new_name()
            self.logged(lambda: os.mkdir(self.path(name), 0o755), op="mkdir", name=name)
            self.directories.append(name + "/")

    def rename_directory(self) -> None:
        """Give a directory another name, with all that is below."""
        if len(self.directories) > 1:
            directory = self.rng.choice(self.directories[1:])
            to = f"{self.rng.randrange(1 << 60):x}"  # at the top, so never below itself
            self.logged(
                lambda: os.rename(self.path(directory[:-1]), self.path(to)), op="rename", name=directory[:-1], to=to
            )

            def moved(name: str) -> str:
                return f"{to}/{name[len(directory) :]}" if name.startswith(directory) else name

            self.directories = [moved(name) for name in self.directories]
            self.files = [moved(name) for name in self.files]

    def rmdir(self) -> None:
        """Remove an empty directory."""
        empty = [name for name in self.directories[1:] if not os.listdir(self.path(name))]
        if empty:
            directory = self.rng.choice(empty)
            self.logged(lambda: os.rmdir(self.path(directory)), op="rmdir", name=directory[:-1])
            self.directories.remove(directory)

    def link(self) -> None:
        """Give a file one more name."""
        if self.files:
            name, to = self.rng.choice(self.files), self.new_name()
            self.logged(lambda: os.link(self.path(name), self.path(to)), op="link", name=name, to=to)
            self.files.append(to)

    def symlink(self) -> None:
        """Make a symbolic link to nothing in particular."""
        name, target = self.new_name(), "t" * self.rng.randrange(1, 300)
        self.logged(lambda: os.symlink(target, self.path(name)), op="symlink", name=name, target=target)

    def chmod(self) -> None:
        """Change permissions."""
        if self.files:
            name, mode = self.rng.choice(self.files), self.rng.choice((0o600, 0o640, 0o644, 0o755))
            self.logged(lambda: os.chmod(self.path(name), mode), op="chmod", name=name, mode=mode)

    def setxattr(self) -> None:
        """Set an attribute."""
        if self.files:
            name, value = self.rng.choice(self.files), f"{self.rng.randrange(1 << 60):x}"
            self.logged(
                lambda: os.setxattr(self.path(name), "user.note", value.encode()), op="setxattr", name=name, value=value
            )

    def unlink(self) -> None:
        """Remove a name."""
        if self.files:
            name = self.rng.choice(self.files)
            self.logged(lambda: os.unlink(self.path(name)), op="unlink", name=name)
            self.files.remove(name)

    def unlink_while_open(self) -> None:
        """Remove a name whose file is open, and go on writing to it: a crash must not leave its data behind."""
        if not self.files:
            return
        name, token = self.rng.choice(self.files), self.rng.randrange(1 << 60)
        links = os.stat(self.path(name)).st_nlink
        descriptor = os.open(self.path(name), os.O_RDWR)
        try:
            self.logged(lambda: os.unlink(self.path(name)), op="unlink", name=name)
            self.files.remove(name)
            if links == 1:
                os.pwrite(descriptor, content(token, min(MIB, self.appetite.sizes[-1])), 0)
                os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write(root: str, log: str, seed: str, stop: Path, appetite: Appetite) -> None:
    """Open the log and run."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        Writer(Path(root), descriptor, random.Random(seed), appetite).run(stop)
    except OSError as error:
        # A call between the steps failed, on which nothing depends.
        os.write(descriptor, json.dumps({"errno": error.errno, "message": str(error)}).encode() + b"\n")
    finally:
        os.close(descriptor)


def main(stop: str, *places: str) -> None:
    """Run one writer, or several in threads; ends with exit code 1 where one met anything but an error of the system."""
    each = list(zip(places[::3], places[1::3], places[2::3], strict=True))
    if len(each) == 1:
        write(*each[0], Path(stop), ALONE)
        return
    failed: list[threading.ExceptHookArgs] = []
    tell = threading.excepthook

    def note(arguments: threading.ExceptHookArgs) -> None:
        if arguments.exc_type is not SystemExit:
            failed.append(arguments)
        tell(arguments)

    threading.excepthook = note
    threads = [threading.Thread(target=write, args=(*place, Path(stop), ONE_OF_MANY)) for place in each]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main(*sys.argv[1:])
