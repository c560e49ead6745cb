"""Writers at work on a mount, of `programs/writer.py`, each in a directory of its own, and what they logged.

Owns the processes, which end when asked, when the file system fails them, or by force at the end of the block.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from tests.mount.journal import Log, Model, count_lines, read_log
from tests.mount.programs import writer

DEADLINE_S: Final = 90


@dataclass(slots=True)
class Writers:
    """Run several writers in `count` directories below `root`, round after round, with one model each.

    `outside` is a directory on another file system, for logs. Each writer is a process, or one of `threads` threads of one.
    """

    root: Path
    outside: Path
    count: int
    threads: int = 1
    models: list[Model] = field(default_factory=list)
    round: int = 0
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def make_directories(self) -> None:
        """Make the directories that the writers work in, once."""
        for number in range(self.count):
            self.directory(number).mkdir()
            self.models.append(Model())

    def directory(self, number: int) -> Path:
        """Return the directory of one writer."""
        return self.root / f"writer{number}"

    def log(self, number: int) -> Path:
        """Return the log of one writer in this round."""
        return self.outside / f"round{self.round}-writer{number}.log"

    @property
    def stop_file(self) -> Path:
        """Return the file whose existence ends the writers of this round."""
        return self.outside / f"round{self.round}.stop"

    @contextmanager
    def working(self, seed: int) -> Iterator[None]:
        """Let the writers of one round work while the body runs; none is left after it."""
        self.round += 1
        for first in range(0, self.count, self.threads):
            command = [sys.executable, writer.__file__, str(self.stop_file)]
            for number in range(first, min(first + self.threads, self.count)):
                command += [str(self.directory(number)), str(self.log(number)), f"{seed} {self.round} {number}"]
            self.processes.append(subprocess.Popen(command, stdin=subprocess.DEVNULL))
        try:
            yield
        finally:
            for process in self.processes:
                process.kill()
            for process in self.processes:
                process.wait(DEADLINE_S)
            self.processes.clear()

    def steps(self) -> int:
        """Return how many lines were logged in this round so far: two for each step."""
        return count_lines(self.log(number) for number in range(self.count))

    def wait_for_steps(self, count: int) -> None:
        """Return when that many lines are logged in this round, or when a writer has ended; AssertionError after 90 s."""
        deadline = time.monotonic() + DEADLINE_S
        while self.steps() < count and all(process.poll() is None for process in self.processes):
            assert time.monotonic() < deadline, f"{self.steps()} of {count} lines after {DEADLINE_S} s"
            # All logs are read each time.
            time.sleep(0.002 if self.count < 10 else 0.05)

    def wait_until_all_work(self) -> None:
        """Return when each writer has taken its first step; AssertionError after 90 s, or if one has ended."""
        deadline = time.monotonic() + DEADLINE_S
        for number in range(self.count):
            while count_lines([self.log(number)]) < 2:
                assert time.monotonic() < deadline, f"writer {number} has not begun after {DEADLINE_S} s"
                assert all(process.poll() is None for process in self.processes), self.logs()[number].message
                time.sleep(0.01)

    def wait_for_end(self) -> list[int]:
        """Return the exit codes when all have ended by themselves; TimeoutExpired after 90 s."""
        return [process.wait(DEADLINE_S) for process in self.processes]

    def stop(self) -> None:
        """Ask all to end after the step under way and wait for that; AssertionError if one failed."""
        self.stop_file.touch()
        assert self.wait_for_end() == [0] * self.count, [log.message for log in self.logs()]

    def logs(self) -> list[Log]:
        """Read the logs of this round."""
        return [read_log(self.log(number)) for number in range(self.count)]

    def settle(self) -> None:
        """Compare each directory with what its writer logged in this round; StateDiffers where they do not agree."""
        for number, (model, log) in enumerate(zip(self.models, self.logs(), strict=True)):
            model.settle(log, self.directory(number))

    def verify(self) -> None:
        """Compare each directory with what is known of it, nobody having worked since `settle`."""
        for number, model in enumerate(self.models):
            model.settle(Log([], None, None, ""), self.directory(number))
