"""Leaving the terminal: the first process waits for one word of the daemon, and the daemon keeps nothing of its starter."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.mount.mounted import wait_until_gone

PROGRAM = """
import json, os, sys
from client.daemon import leave_terminal, raise_limits

def run(daemon):
    what = sys.argv[1]
    if what == "ready":
        raise_limits()
        facts = {
            "pid": os.getpid(),
            "session": os.getsid(0),
            "cwd": os.getcwd(),
            "open": sorted(int(name) for name in os.listdir("/proc/self/fd")),
        }
        print("on stdout", flush=True)
        with open(sys.argv[3], "w") as file:
            json.dump(facts, file)
        daemon.ready()
        daemon.failed("too late to count")
        sys.stdin.read()
        while True:
            os.read(os.open(sys.argv[4], os.O_RDONLY), 1)
            return 0
    if what == "failed":
        daemon.failed("cannot: do something else")
        return 1
    if what == "raise":
        raise ValueError("a bug")
    os.kill(os.getpid(), 9)

failure = leave_terminal(run, log_path=sys.argv[2])
print("first process:", failure)
"""


def start(what: str, tmp_path: Path, *more: str) -> str:
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM, what, tmp_path / "log", *more],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return ran.stdout + ran.stderr


def test_the_first_process_ends_when_the_daemon_is_ready(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    # The pipes of subprocess.run reach their end although the daemon lives: it has closed its copies.
    assert start("ready", tmp_path, str(tmp_path / "facts"), str(fifo)) == "first process: None\n"
    facts = json.loads((tmp_path / "facts").read_text())
    try:
        assert facts["session"] != facts["pid"]  # not a leader: it can get no terminal
        assert facts["session"] != os.getsid(0)
        assert facts["cwd"] == "/"
        assert len(facts["open"]) == 5  # three of stdio, the pipe, and the directory being listed
        assert "on stdout" in (tmp_path / "log").read_text()
        assert (tmp_path / "log").stat().st_mode & 0o777 == 0o600
    finally:
        os.kill(facts["pid"], signal.SIGKILL)
    wait_until_gone(facts["pid"])


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("failed", "first process: cannot: do something else\n"),
        ("raise", "first process: the daemon died while it started: see {log}\n"),
        ("die", "first process: the daemon died while it started: see {log}\n"),
    ],
)
def test_a_daemon_that_does_not_become_ready_is_told(tmp_path: Path, what: str, said: str) -> None:
    assert start(what, tmp_path) == said.format(log=tmp_path / "log")
    if what == "raise":
        assert "ValueError: a bug" in (tmp_path / "log").read_text()


def test_a_log_that_cannot_be_written_is_told_before_anything_is_begun(tmp_path: Path) -> None:
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM, "ready", tmp_path / "no" / "log"], capture_output=True, timeout=60, check=False
    )
    assert ran.returncode == 1
    assert b"FileNotFoundError" in ran.stderr
