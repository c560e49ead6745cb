"""The operations on names that `make bench-meta` times, each by several processes at once.

Owns what is done: `python -m bench.meta_works WORK DIRECTORY OPTIONS` forks the processes, lets them begin together, and
counts from the first beginning to the last end. Each has its files in a directory of its own, or all have theirs in one
directory. Files are empty, so that nothing but names and attributes moves. The directories are made before the clock
starts, and what a work was to leave is compared after it stopped. Must not know which file system lies below.
"""

import argparse
import gc
import json
import multiprocessing
import os
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Barrier
from pathlib import Path
from time import perf_counter_ns
from typing import Final

from bench.works import Mismatch, Timing

_BEGIN_DEADLINE_S: Final = 60.0
_POLL_S: Final = 0.005
_SEED: Final = 20_240_229


@dataclass(frozen=True, slots=True)
class Options:
    """How much is done, and by how many."""

    processes: int
    # Of each process.
    files: int
    # All files in one directory, instead of one directory for each process.
    shared: bool
    # A work that changes nothing is repeated for so long where it is asked for again what it knows.
    at_least_s: float
    # After which the processes are ended.
    limit_s: float

    def __post_init__(self) -> None:
        if min(self.processes, self.files) < 1:
            raise ValueError("processes and files are at least 1")


def directory_of(root: Path, options: Options, process: int) -> str:
    """Return where a process has its files."""
    return f"{root}/shared" if options.shared else f"{root}/process-{process:03d}"


def names_of(options: Options, process: int, *, renamed: bool = False) -> list[str]:
    """Return the names of a process's files, in the order of their creation."""
    prefix = "renamed" if renamed else "file"
    return [f"{prefix}.{process:03d}.{index:06d}" for index in range(options.files)]


def _paths(root: Path, options: Options, process: int, *, renamed: bool = False) -> list[str]:
    parent = directory_of(root, options, process)
    return [f"{parent}/{name}" for name in names_of(options, process, renamed=renamed)]


def _shuffled(paths: list[str], process: int) -> list[str]:
    """Take the order in which nobody has stored them."""
    random.Random(_SEED + process).shuffle(paths)
    return paths


def _create(root: Path, options: Options, process: int) -> Callable[[], int]:
    paths = _paths(root, options, process)

    def run() -> int:
        for path in paths:
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o644))
        return len(paths)

    return run


def _stat(root: Path, options: Options, process: int) -> Callable[[], int]:
    paths = _shuffled(_paths(root, options, process), process)

    def run() -> int:
        for path in paths:
            if os.stat(path).st_size:
                raise Mismatch(f"{path}: not empty")
        return len(paths)

    return run


def _stat_again(root: Path, options: Options, process: int) -> Callable[[], int]:
    once = _stat(root, options, process)

    def run() -> int:
        end_ns, done = perf_counter_ns() + int(options.at_least_s * 1e9), 0
        while not done or perf_counter_ns() < end_ns:
            done += once()
        return done

    return run


def _rename(root: Path, options: Options, process: int) -> Callable[[], int]:
    pairs = list(zip(_paths(root, options, process), _paths(root, options, process, renamed=True), strict=True))

    def run() -> int:
        for old, new in pairs:
            os.rename(old, new)
        return len(pairs)

    return run


def _readdir(root: Path, options: Options, process: int) -> Callable[[], int]:
    directory = directory_of(root, options, process)
    entries = options.files * (options.processes if options.shared else 1)

    def run() -> int:
        found = len(os.listdir(directory))
        if found != entries:
            raise Mismatch(f"{directory}: {found} entries, expected {entries}")
        return found

    return run


def _unlink(root: Path, options: Options, process: int) -> Callable[[], int]:
    paths = _paths(root, options, process, renamed=True)

    def run() -> int:
        for path in paths:
            os.unlink(path)
        return len(paths)

    return run


WORKS: Final[dict[str, Callable[[Path, Options, int], Callable[[], int]]]] = {
    "create": _create,
    "stat": _stat,
    "stat_again": _stat_again,
    "readdir": _readdir,
    "rename": _rename,
    "unlink": _unlink,
}


def _prepare(work: str, root: Path, options: Options) -> None:
    if work == "create":
        for name in sorted({directory_of(root, options, process) for process in range(options.processes)}):
            os.mkdir(name)


def _verify(work: str, root: Path, options: Options) -> None:
    """Compare the names with those that the work leaves, and take away the directories of the last one."""
    if work not in ("create", "rename", "unlink"):
        return
    left: dict[str, set[str]] = {}
    for process in range(options.processes):
        names = [] if work == "unlink" else names_of(options, process, renamed=work == "rename")
        left.setdefault(directory_of(root, options, process), set()).update(names)
    for directory, expected in left.items():
        if set(os.listdir(directory)) != expected:
            raise Mismatch(f"{directory}: not the names that {work} leaves")
        if work == "unlink":
            os.rmdir(directory)


def _process(run: Callable[[], int], barrier: Barrier, answer: Connection) -> None:
    """Work in a process of its own; answer with count, beginning and end, or with the error."""
    gc.disable()
    try:
        barrier.wait(_BEGIN_DEADLINE_S)
        begin_ns = perf_counter_ns()
        count = run()
        answer.send((count, begin_ns, perf_counter_ns()))
    except (Mismatch, OSError, RuntimeError) as error:
        answer.send(f"{type(error).__name__}: {error}")


def run_work(work: str, root: Path, options: Options) -> Timing:
    """Run a work by all its processes. Raise Mismatch or OSError where one failed, or took too long; none is left behind."""
    _prepare(work, root, options)
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(options.processes)
    children, answers = [], []
    for process in range(options.processes):
        mine, theirs = context.Pipe(duplex=False)
        run = WORKS[work](root, options, process)
        child = context.Process(target=_process, args=(run, barrier, theirs), daemon=True)
        child.start()
        theirs.close()
        children.append(child)
        answers.append(mine)
    end_s = time.monotonic() + options.limit_s
    try:
        found = [_answer(answer, end_s) for answer in answers]
    finally:
        for child in children:
            child.join(_POLL_S)
            if child.is_alive():
                child.kill()
    _verify(work, root, options)
    begin_ns = min(begin_ns for _, begin_ns, _ in found)
    end_ns = max(end_ns for _, _, end_ns in found)
    return Timing(sum(count for count, _, _ in found), 0, end_ns - begin_ns)


def _answer(connection: Connection, end_s: float) -> tuple[int, int, int]:
    if not connection.poll(max(0.0, end_s - time.monotonic())):
        raise Mismatch("a process did not end in time")
    try:
        answer = connection.recv()
    except EOFError:
        raise Mismatch("a process ended without an answer") from None
    if isinstance(answer, str):
        raise Mismatch(answer)
    count, begin_ns, end_ns = answer
    return count, begin_ns, end_ns


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one work and print its timing as one JSON document."""
    parser = argparse.ArgumentParser(prog="python -m bench.meta_works", description=main.__doc__)
    parser.add_argument("work", choices=sorted(WORKS))
    parser.add_argument("directory", type=Path)
    parser.add_argument("options", help="the options as JSON")
    parsed = parser.parse_args(arguments)
    try:
        timing = run_work(parsed.work, parsed.directory, Options(**json.loads(parsed.options)))
    except (Mismatch, OSError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    print(json.dumps(asdict(timing)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
