"""Leaving the terminal: a command goes on as a daemon, and its first process waits until the daemon is ready or has failed.

Owns fork, session, descriptors and the pipe over which the daemon says one of two things: ready, or one line of what went
wrong. Fork comes before threads, event loops and heavy imports. Must not know mounts.
"""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Final, NoReturn

_READY: Final = b"+"
_FAILED: Final = b"-"
MAX_MESSAGE_BYTES: Final = 16 << 10


class Daemon:
    """The daemon's end of the pipe."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def _say(self, message: bytes) -> None:
        if self._descriptor >= 0:
            # The first process may have been interrupted: then nobody listens, and that is no reason to stop.
            with suppress(OSError):
                os.write(self._descriptor, message[:MAX_MESSAGE_BYTES])
            os.close(self._descriptor)
            self._descriptor = -1

    def ready(self) -> None:
        """Let the first process end with success. Only the first of ready() and failed() counts."""
        self._say(_READY)

    def failed(self, message: str) -> None:
        """Let the first process end with an error of one line."""
        self._say(_FAILED + message.encode("utf-8", "backslashreplace"))


def leave_terminal(run: Callable[[Daemon], int], *, log_path: str) -> str | None:
    """Run a function in a daemon and wait until it is ready: None, or the line that it failed with.

    Returns in the first process only. The daemon is nobody's child, leads no terminal, stands in ``/``, keeps no descriptor
    of its starter, and has stdout and stderr appended to the log. OSError if the log cannot be written.
    """
    # Before the fork: who cannot write a log is told at once, and the daemon needs no path any more.
    log = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    reader, writer = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        os.close(reader)
        _become_daemon(run, writer, log)
    os.close(writer)
    os.close(log)
    os.waitpid(child, 0)
    with open(reader, "rb") as pipe:
        message = pipe.read(MAX_MESSAGE_BYTES)
    if message == _READY:
        return None
    if message.startswith(_FAILED):
        return message[1:].decode("utf-8", "replace")
    return f"the daemon died while it started: see {log_path}"


def _become_daemon(run: Callable[[Daemon], int], writer: int, log: int) -> NoReturn:
    code = 1
    try:
        os.setsid()
        # Again, so that it can never get a controlling terminal; the session's leader ends here.
        if os.fork() != 0:
            os._exit(0)
        os.chdir("/")
        os.umask(0o077)
        null = os.open(os.devnull, os.O_RDONLY)
        for source, target in ((null, 0), (log, 1), (log, 2)):
            os.dup2(source, target)
        _close_others(keep=writer)
        code = run(Daemon(writer))
    except BaseException:  # noqa: BLE001
        # Nobody above sees it: this process ends below. stderr is the log.
        sys.excepthook(*sys.exc_info())
    finally:
        with suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        # Not sys.exit(): what the first process set up for its own end is not this one's.
        os._exit(code)


def _close_others(*, keep: int) -> None:
    """Close what was inherited: a pipe of the starter's caller would otherwise stay open as long as the daemon runs."""
    for name in os.listdir("/proc/self/fd"):
        descriptor = int(name)
        if descriptor > 2 and descriptor != keep:
            with suppress(OSError):
                os.close(descriptor)


def raise_limits() -> None:
    """Allow as many open files as the system lets: an image for each slice in use, and SQLite's."""
    _soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = hard if hard != resource.RLIM_INFINITY else 1 << 20
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
