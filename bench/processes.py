"""Processes and mounts of the benchmark: start, wait with a deadline, end by id, unmount whatever happens.

Owns every process that the benchmark starts. Each gets a session of its own, so that ctrl-C on the terminal reaches
only the benchmark, which then unmounts before it ends servers. Must not know which systems are compared.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from shutil import which
from types import FrameType
from typing import Final

_END_DEADLINE_S: Final = 30.0
_UNMOUNT_DEADLINE_S: Final = 120.0


class StepFailed(Exception):
    """A step of the benchmark failed or overran its time limit; the text is one line for the table of failures."""


def find_command(name: str) -> str:
    """Find a program beside this Python, else on the PATH. Raise StepFailed if there is none."""
    beside = Path(sys.executable).with_name(name)
    found = str(beside) if beside.exists() else which(name)
    if found is None:
        raise StepFailed(f"{name}: no such command; `make bench` installs what the benchmark compares with")
    return found


def wait_until(condition: Callable[[], bool], *, what: str, deadline_s: float, child: "Child | None" = None) -> None:
    """Poll a condition until it holds; raise StepFailed at the deadline or when the child has ended before."""
    end_s = time.monotonic() + deadline_s
    while not condition():
        if child is not None and not child.alive():
            raise StepFailed(f"{what}: the process ended: {child.last_words()}")
        if time.monotonic() >= end_s:
            raise StepFailed(f"{what}: not within {deadline_s:.0f} s")
        time.sleep(0.01)


class Child:
    """A started process with its log file; `stop` ends it and the children of its session."""

    def __init__(self, arguments: Sequence[str], *, log: Path, environment: Mapping[str, str] | None = None) -> None:
        self._log = log
        self._name = Path(arguments[0]).name
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                arguments,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **(environment or {})},
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    def alive(self) -> bool:
        return self._process.poll() is None

    def last_words(self) -> str:
        return _last_line(self._log)

    def wait(self, deadline_s: float) -> int:
        """Wait for the end and return the exit status; raise StepFailed at the deadline."""
        try:
            return self._process.wait(deadline_s)
        except subprocess.TimeoutExpired:
            raise StepFailed(f"{self._name}: did not end within {deadline_s:.0f} s") from None

    def stop(self, goodbye: signal.Signals) -> None:
        """End the process with that signal, and its whole session with SIGKILL after the deadline."""
        if self.alive():
            self._process.send_signal(goodbye)
        try:
            self._process.wait(_END_DEADLINE_S)
        except subprocess.TimeoutExpired:
            self._signal_session(signal.SIGKILL)
            self._process.wait(_END_DEADLINE_S)
        # A supervisor may be gone while its worker is not: the session has the id of the process we started.
        self._signal_session(signal.SIGKILL)

    def _signal_session(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)


@contextmanager
def running(
    arguments: Sequence[str],
    *,
    log: Path,
    environment: Mapping[str, str] | None = None,
    goodbye: signal.Signals = signal.SIGTERM,
) -> Iterator[Child]:
    """Run a process for the time of a block."""
    child = Child(arguments, log=log, environment=environment)
    try:
        yield child
    finally:
        child.stop(goodbye)


def run_step(
    arguments: Sequence[str],
    *,
    log: Path,
    limit_s: float,
    environment: Mapping[str, str] | None = None,
    directory: Path | None = None,
) -> str:
    """Run a command to its end and return what it printed.

    Output goes to files, because a daemon that the command leaves behind would keep a pipe open for ever. Raises
    StepFailed with the last line of its errors if it fails, or after killing it at the time limit.
    """
    output, errors = log.with_suffix(".out"), log.with_suffix(".err")
    with output.open("wb") as stdout, errors.open("wb") as stderr:
        process = subprocess.Popen(
            arguments,
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            env={**os.environ, **(environment or {})},
            cwd=directory,
            start_new_session=True,
        )
        name = " ".join([Path(arguments[0]).name, *arguments[1:3]])
        try:
            status = process.wait(limit_s)
        except BaseException as error:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            # A process in a system call of a dead file system ends only when that is unmounted: do not wait for it here.
            with suppress(subprocess.TimeoutExpired):
                process.wait(2)
            if isinstance(error, subprocess.TimeoutExpired):
                raise StepFailed(f"{name}: took longer than {limit_s:.0f} s") from None
            raise
    if status != 0:
        raise StepFailed(f"{name}: exit status {status}: {_last_line(errors) or _last_line(output)}")
    return output.read_text(errors="replace")


def _last_line(path: Path) -> str:
    if not path.exists():
        return ""
    lines = path.read_text(errors="replace").strip().splitlines()
    return lines[-1][-300:] if lines else ""


def has_ended(pid: int) -> bool:
    """Say whether a process that is not our child has ended; one that nobody has waited for yet has."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return True
    return any(line.split()[:2] == ["State:", "Z"] for line in status.splitlines())


def end_process(pid: int) -> None:
    """End a daemon that is not our child: SIGTERM, then SIGKILL after the deadline."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            return
        with suppress(StepFailed):
            wait_until(lambda: has_ended(pid), what=f"process {pid}", deadline_s=_END_DEADLINE_S)
            return


def is_mounted(mountpoint: Path) -> bool:
    """Say whether something is mounted there, without touching the mount, which may hang."""
    wanted = str(mountpoint).replace("\\", "\\134").replace(" ", "\\040").replace("\t", "\\011")
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    return any(line.split(" ", 5)[4] == wanted for line in lines)


def unmount(
    mountpoint: Path, command: Sequence[str], *, log: Path, environment: Mapping[str, str] | None = None
) -> None:
    """Unmount with the system's own command, and by force if that fails.

    Raises StepFailed if force was needed: the caller then has no clean state, and the table says so.
    """
    if not is_mounted(mountpoint):
        return
    try:
        run_step(command, log=log, limit_s=_UNMOUNT_DEADLINE_S, environment=environment)
        wait_until(lambda: not is_mounted(mountpoint), what=f"unmount of {mountpoint.name}", deadline_s=_END_DEADLINE_S)
    finally:
        _detach(mountpoint)


def _detach(mountpoint: Path) -> None:
    """Take a mount out of the tree of names, whether its daemon answers or not."""
    if is_mounted(mountpoint):
        subprocess.run(["umount", "-l", str(mountpoint)], check=False, timeout=_END_DEADLINE_S)


@contextmanager
def no_mount_left(mountpoint: Path) -> Iterator[None]:
    """Leave no mount behind after a block, in which a daemon may have ended between mounting and being unmounted."""
    try:
        yield
    finally:
        _detach(mountpoint)


def interrupt_once(*numbers: signal.Signals) -> None:
    """Let the first of these signals raise KeyboardInterrupt and ignore those that follow.

    What comes then is unmounting and ending servers, all of it with deadlines, and must not be cut short.
    """

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        for number in numbers:
            signal.signal(number, lambda _number, _frame: None)
        raise KeyboardInterrupt

    for number in numbers:
        signal.signal(number, interrupt)


def go_on_unless_interrupted(error: BaseException) -> None:
    """Raise KeyboardInterrupt if an error came up while one was unwinding: unmounting after an interrupt may fail as well."""
    earlier: BaseException | None = error
    while earlier is not None:
        if isinstance(earlier, KeyboardInterrupt):
            raise KeyboardInterrupt from error
        earlier = earlier.__context__


def drop_page_cache() -> None:
    """Write out what is dirty and drop page cache, dentries and inodes of the whole machine."""
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3\n")
