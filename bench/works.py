"""The pieces of work that the benchmark times, each a function on a directory.

Owns what is done, in which order and with which bytes. Must not know which file system lies below: the same function
runs on all of them, in a process of its own (`python -m bench.works WORK DIRECTORY OPTIONS`), so that a file system
that hangs costs one killed process and not the benchmark. Names and contents follow from the scale alone, hence a work
that reads can verify what another process wrote. Only system calls stand between two readings of the clock; contents
are verified after it stopped.
"""

import argparse
import gc
import itertools
import json
import os
import random
import subprocess
import sys
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from time import perf_counter_ns
from typing import Final, NamedTuple

KIB: Final = 1024
MIB: Final = 1024 * KIB
_FILES_PER_DIRECTORY: Final = 1000
# The big file repeats its pool after this distance. It exceeds the largest block that a peer or we can compress (16
# MiB), so the data cannot be squeezed, while no source of random bytes is as fast as the page cache.
_POOL_SIZE_BYTES: Final = 64 * MIB
_PIECE_SIZE_BYTES: Final = MIB
_PAGE_SIZE_BYTES: Final = 4 * KIB
_MARK_SIZE_BYTES: Final = 16


class Mismatch(Exception):
    """The file system gave other names, attributes or bytes than were written."""


@dataclass(frozen=True, slots=True)
class Scale:
    """How much work is done; the seed decides names, order and contents."""

    files_4k: int
    files_64k: int
    tree_files: int
    random_reads: int
    big_size_bytes: int
    seed: int = 20_240_229

    def __post_init__(self) -> None:
        if min(self.files_4k, self.files_64k, self.tree_files, self.random_reads) < 1:
            raise ValueError("every count of a scale is at least 1")
        if self.big_size_bytes < _PIECE_SIZE_BYTES or self.big_size_bytes % _PIECE_SIZE_BYTES:
            raise ValueError("the big file is a whole number of MiB, at least 1")


@dataclass(frozen=True, slots=True)
class Options:
    """What a work is told besides its directory."""

    scale: Scale
    # rclone keeps no permission bits; all others have theirs compared.
    check_modes: bool


@dataclass(frozen=True, slots=True)
class Timing:
    """What one run of a work took; the percentiles are those of single operations, None where only the whole is timed."""

    operations: int
    size_bytes: int
    elapsed_ns: int
    p50_ns: int | None = None
    p99_ns: int | None = None


class SmallFile(NamedTuple):
    """One of the many small files, with the bytes that belong into it."""

    path: str
    content: bytes


class SourceFile(NamedTuple):
    """A file of the source tree, its path relative to the tree's root."""

    path: str
    content: bytes
    mode: int


@cache
def _pool(seed: int, size_bytes: int) -> bytes:
    return random.Random(seed).randbytes(size_bytes)


def small_files(directory: Path, options: Options, *, size_kib: int) -> list[SmallFile]:
    """Say which small files of a size the scale names, in the order in which they are created."""
    scale = options.scale
    count = {4: scale.files_4k, 64: scale.files_64k}[size_kib]
    size_bytes = size_kib * KIB
    pool = _pool(scale.seed + size_kib, 8 * MIB)
    root = directory / "small" / f"{size_kib}k"
    files = []
    for index in range(count):
        start = (index * 7919 * 16) % (len(pool) - size_bytes)
        content = index.to_bytes(_MARK_SIZE_BYTES, "little") + pool[start + _MARK_SIZE_BYTES : start + size_bytes]
        files.append(SmallFile(f"{root}/d{index // _FILES_PER_DIRECTORY:03d}/f{index:06d}", content))
    return files


def _directories_of(files: Sequence[SmallFile]) -> list[str]:
    return sorted({os.path.dirname(file.path) for file in files})


def source_tree(options: Options) -> dict[str, list[SourceFile]]:
    """Say which directories and files make the source tree: directory to its files, parents before children.

    About ten files to a directory, up to five levels deep, 1 to 20 KiB each, as a checkout of a mid-sized project has.
    """
    rng = random.Random(options.scale.seed + 1)
    pool = _pool(options.scale.seed + 1, MIB)
    tree: dict[str, list[SourceFile]] = {"": []}
    parents = [""]
    left = options.scale.tree_files
    for number in itertools.count():
        if left <= 0:
            return tree
        parent = rng.choice([name for name in parents if name.count("/") < 4])
        name = f"{parent}/package{number:04d}"
        parents.append(name)
        files = []
        for index in range(min(left, rng.randint(5, 15))):
            size_bytes = rng.randint(KIB, 20 * KIB)
            start = rng.randrange(len(pool) - size_bytes)
            mode = 0o755 if rng.random() < 0.1 else 0o644
            files.append(SourceFile(f"{name}/module{index:02d}.c", pool[start : start + size_bytes], mode))
        tree[name] = files
        left -= len(files)
    raise AssertionError("unreachable: the count is endless")


def _percentiles(laps_ns: "array[int]") -> tuple[int, int]:
    ordered = sorted(laps_ns)
    return ordered[len(ordered) // 2], ordered[min(len(ordered) - 1, len(ordered) * 99 // 100)]


def _timed_each(calls: Iterable[Callable[[], None]], *, size_bytes: int) -> Timing:
    """Run the calls one after the other and time each."""
    laps_ns = array("q")
    begin_ns = before_ns = perf_counter_ns()
    for call in calls:
        call()
        now_ns = perf_counter_ns()
        laps_ns.append(now_ns - before_ns)
        before_ns = now_ns
    p50_ns, p99_ns = _percentiles(laps_ns)
    return Timing(len(laps_ns), size_bytes, before_ns - begin_ns, p50_ns, p99_ns)


def _write_file(path: str, content: bytes) -> None:
    descriptor = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC | os.O_CLOEXEC, 0o644)
    try:
        written_bytes = os.write(descriptor, content)
    finally:
        os.close(descriptor)
    if written_bytes != len(content):
        raise Mismatch(f"{path}: wrote {written_bytes} of {len(content)} bytes")


def _read_file(path: str, size_bytes: int) -> bytes:
    """Read a small file as a loader does: open, read to its known end, close."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        content = os.read(descriptor, size_bytes + 1)
        # read(2) may stop early, which POSIX allows and no file system here does without reason.
        while len(content) < size_bytes and (more := os.read(descriptor, size_bytes + 1 - len(content))):
            content += more
        return content
    finally:
        os.close(descriptor)


def _verify_small(files: Sequence[SmallFile], contents: Sequence[bytes]) -> None:
    for file, content in zip(files, contents, strict=True):
        if content != file.content:
            raise Mismatch(f"{file.path}: {len(content)} bytes, not those that were written")


def _create_small(directory: Path, options: Options, *, size_kib: int) -> Timing:
    files = small_files(directory, options, size_kib=size_kib)
    for name in _directories_of(files):
        os.makedirs(name, exist_ok=True)

    def create(file: SmallFile) -> Callable[[], None]:
        return lambda: _write_file(file.path, file.content)

    timing = _timed_each([create(file) for file in files], size_bytes=sum(len(file.content) for file in files))
    _verify_small(files, [_read_file(file.path, len(file.content)) for file in files])
    return timing


def create_4k(directory: Path, options: Options) -> Timing:
    """Create 4 KiB files one by one: open, write, close."""
    return _create_small(directory, options, size_kib=4)


def create_64k(directory: Path, options: Options) -> Timing:
    """Create 64 KiB files one by one: open, write, close."""
    return _create_small(directory, options, size_kib=64)


def _read_small(directory: Path, options: Options, *, size_kib: int) -> Timing:
    files = small_files(directory, options, size_kib=size_kib)
    random.Random(options.scale.seed + 2).shuffle(files)
    contents: list[bytes] = []

    def read(file: SmallFile) -> Callable[[], None]:
        return lambda: contents.append(_read_file(file.path, size_kib * KIB))

    timing = _timed_each([read(file) for file in files], size_bytes=sum(len(file.content) for file in files))
    _verify_small(files, contents)
    return timing


def read_4k(directory: Path, options: Options) -> Timing:
    """Open, read and close every 4 KiB file, in random order."""
    return _read_small(directory, options, size_kib=4)


def read_64k(directory: Path, options: Options) -> Timing:
    """Open, read and close every 64 KiB file, in random order."""
    return _read_small(directory, options, size_kib=64)


def _walk(directory: str) -> Iterator[os.stat_result]:
    pending = [directory]
    while pending:
        with os.scandir(pending.pop()) as entries:
            for entry in entries:
                yield entry.stat(follow_symlinks=False)
                if entry.is_dir(follow_symlinks=False):
                    pending.append(entry.path)


def walk(directory: Path, options: Options) -> Timing:
    """List the small files recursively and stat every entry."""
    files = small_files(directory, options, size_kib=4) + small_files(directory, options, size_kib=64)
    directories = {os.path.dirname(file.path) for file in files}
    directories |= {os.path.dirname(name) for name in directories}
    begin_ns = perf_counter_ns()
    attributes = list(_walk(str(directory / "small")))
    elapsed_ns = perf_counter_ns() - begin_ns
    sizes_bytes = sorted(each.st_size for each in attributes if each.st_mode & 0o170000 == 0o100000)
    if len(attributes) != len(files) + len(directories) or sizes_bytes != sorted(len(f.content) for f in files):
        raise Mismatch(f"{directory}: {len(attributes)} entries, expected {len(files) + len(directories)}")
    return Timing(len(attributes), 0, elapsed_ns)


def stat_by_path(directory: Path, options: Options) -> Timing:
    """Stat every small file by its path, in random order."""
    files = small_files(directory, options, size_kib=4) + small_files(directory, options, size_kib=64)
    random.Random(options.scale.seed + 3).shuffle(files)
    sizes_bytes = array("q")

    def stat(file: SmallFile) -> Callable[[], None]:
        return lambda: sizes_bytes.append(os.stat(file.path).st_size)

    timing = _timed_each([stat(file) for file in files], size_bytes=0)
    if list(sizes_bytes) != [len(file.content) for file in files]:
        raise Mismatch(f"{directory}: stat gave wrong sizes")
    return timing


def build_tree(directory: Path, options: Options) -> Timing:
    """Build a source tree as unpackers and package managers do.

    Each directory is made, each of its files written beside its name, given its mode and renamed to its name. Counted
    are mkdir, create, chmod and rename.
    """
    tree = source_tree(options)
    final = f"{directory}/source"
    operations = 0
    begin_ns = perf_counter_ns()
    for name, files in tree.items():
        os.mkdir(final + name)
        for file in files:
            path = final + file.path
            _write_file(path + ".new", file.content)
            os.chmod(path + ".new", file.mode)
            os.rename(path + ".new", path)
        operations += 1 + 3 * len(files)
    elapsed_ns = perf_counter_ns() - begin_ns
    expected = {final + file.path: file for files in tree.values() for file in files}
    found = {os.path.join(parent, name) for parent, _, names in os.walk(final) for name in names}
    if found != set(expected):
        raise Mismatch(f"{final}: {len(found)} files, expected {len(expected)}")
    for path, file in expected.items():
        if _read_file(path, len(file.content)) != file.content:
            raise Mismatch(f"{path}: not the bytes that were written")
        if options.check_modes and os.stat(path).st_mode & 0o777 != file.mode:
            raise Mismatch(f"{path}: not the mode that was set")
    return Timing(operations, sum(len(file.content) for file in expected.values()), elapsed_ns)


def remove_tree(directory: Path, options: Options) -> Timing:
    """Remove the source tree with rm -r; counted are the files and directories."""
    tree = source_tree(options)
    begin_ns = perf_counter_ns()
    subprocess.run(["rm", "-r", f"{directory}/source"], check=True, stdin=subprocess.DEVNULL)
    elapsed_ns = perf_counter_ns() - begin_ns
    if os.path.lexists(directory / "source") or "source" in os.listdir(directory):
        raise Mismatch(f"{directory}/source: still there after rm -r")
    return Timing(len(tree) + sum(map(len, tree.values())), 0, elapsed_ns)


def _piece_mark(index: int) -> bytes:
    return b"piece " + index.to_bytes(_MARK_SIZE_BYTES - 6, "little")


def _big_bytes(options: Options, offset_bytes: int, size_bytes: int) -> bytes:
    """Compute what the big file holds in a range that lies within one piece."""
    index, start = divmod(offset_bytes, _PIECE_SIZE_BYTES)
    pool = _pool(options.scale.seed + 4, _POOL_SIZE_BYTES)
    base = index * _PIECE_SIZE_BYTES % _POOL_SIZE_BYTES
    return (_piece_mark(index)[start:] + pool[base + max(start, _MARK_SIZE_BYTES) : base + start + size_bytes])[
        :size_bytes
    ]


def write_big(directory: Path, options: Options) -> Timing:
    """Write one big file of incompressible bytes in pieces of 1 MiB, then fsync and close it."""
    pool = memoryview(_pool(options.scale.seed + 4, _POOL_SIZE_BYTES))
    piece = bytearray(_PIECE_SIZE_BYTES)
    size_bytes = options.scale.big_size_bytes
    begin_ns = perf_counter_ns()
    descriptor = os.open(directory / "big", os.O_CREAT | os.O_WRONLY | os.O_TRUNC | os.O_CLOEXEC, 0o644)
    try:
        for index in range(size_bytes // _PIECE_SIZE_BYTES):
            base = index * _PIECE_SIZE_BYTES % _POOL_SIZE_BYTES
            piece[:] = pool[base : base + _PIECE_SIZE_BYTES]
            piece[:_MARK_SIZE_BYTES] = _piece_mark(index)
            if os.write(descriptor, piece) != _PIECE_SIZE_BYTES:
                raise Mismatch(f"{directory}/big: short write in piece {index}")
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    elapsed_ns = perf_counter_ns() - begin_ns
    _verify_big(directory, options)
    return Timing(1, size_bytes, elapsed_ns)


def _verify_big(directory: Path, options: Options) -> None:
    path = directory / "big"
    if path.stat().st_size != options.scale.big_size_bytes:
        raise Mismatch(f"{path}: {path.stat().st_size} bytes, expected {options.scale.big_size_bytes}")
    with path.open("rb", buffering=0) as file:
        piece = bytearray(_PIECE_SIZE_BYTES)
        for index in range(options.scale.big_size_bytes // _PIECE_SIZE_BYTES):
            _fill(file.fileno(), piece)
            if piece != _big_bytes(options, index * _PIECE_SIZE_BYTES, _PIECE_SIZE_BYTES):
                raise Mismatch(f"{path}: piece {index} holds other bytes than were written")


def _fill(descriptor: int, piece: bytearray) -> None:
    view = memoryview(piece)
    done_bytes = 0
    while done_bytes < len(piece):
        count = os.readv(descriptor, [view[done_bytes:]])
        if count == 0:
            raise Mismatch(f"the big file ends {len(piece) - done_bytes} bytes early")
        done_bytes += count


def read_big(directory: Path, options: Options) -> Timing:
    """Read the big file from begin to end in pieces of 1 MiB.

    The clock covers reading and a look at the mark of each piece; a second pass compares every byte.
    """
    piece = bytearray(_PIECE_SIZE_BYTES)
    size_bytes = options.scale.big_size_bytes
    begin_ns = perf_counter_ns()
    descriptor = os.open(directory / "big", os.O_RDONLY | os.O_CLOEXEC)
    try:
        for index in range(size_bytes // _PIECE_SIZE_BYTES):
            _fill(descriptor, piece)
            if piece[:_MARK_SIZE_BYTES] != _piece_mark(index):
                raise Mismatch(f"{directory}/big: piece {index} holds other bytes than were written")
    finally:
        os.close(descriptor)
    elapsed_ns = perf_counter_ns() - begin_ns
    _verify_big(directory, options)
    return Timing(1, size_bytes, elapsed_ns)


def read_random(directory: Path, options: Options) -> Timing:
    """Read 4 KiB at random aligned offsets of the big file, one after the other."""
    rng = random.Random(options.scale.seed + 5)
    pages = options.scale.big_size_bytes // _PAGE_SIZE_BYTES
    offsets_bytes = [rng.randrange(pages) * _PAGE_SIZE_BYTES for _ in range(options.scale.random_reads)]
    contents: list[bytes] = []
    descriptor = os.open(directory / "big", os.O_RDONLY | os.O_CLOEXEC)
    try:

        def read(offset_bytes: int) -> Callable[[], None]:
            return lambda: contents.append(os.pread(descriptor, _PAGE_SIZE_BYTES, offset_bytes))

        timing = _timed_each(
            [read(offset_bytes) for offset_bytes in offsets_bytes], size_bytes=len(offsets_bytes) * _PAGE_SIZE_BYTES
        )
    finally:
        os.close(descriptor)
    for offset_bytes, content in zip(offsets_bytes, contents, strict=True):
        if content != _big_bytes(options, offset_bytes, _PAGE_SIZE_BYTES):
            raise Mismatch(f"{directory}/big: other bytes than were written at offset {offset_bytes}")
    return timing


WORKS: Final[dict[str, Callable[[Path, Options], Timing]]] = {
    function.__name__: function
    for function in (
        create_4k,
        create_64k,
        build_tree,
        remove_tree,
        write_big,
        walk,
        stat_by_path,
        read_4k,
        read_64k,
        read_big,
        read_random,
    )
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one work and print its timing as one JSON document."""
    parser = argparse.ArgumentParser(prog="python -m bench.works", description=main.__doc__)
    parser.add_argument("work", choices=sorted(WORKS))
    parser.add_argument("directory", type=Path)
    parser.add_argument("options", help="the options as JSON")
    parsed = parser.parse_args(arguments)
    raw = json.loads(parsed.options)
    options = Options(scale=Scale(**raw["scale"]), check_modes=raw["check_modes"])
    gc.disable()
    try:
        timing = WORKS[parsed.work](parsed.directory, options)
    except (Mismatch, OSError, subprocess.CalledProcessError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    print(json.dumps(asdict(timing)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
