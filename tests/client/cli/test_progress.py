"""Progress: a bar at a terminal for what takes long, nothing anywhere else."""

from __future__ import annotations

import os
import pty
import subprocess
import sys

import pytest

from client.cli import progress
from client.control.messages import Progress

SHOW = """
from client.cli import progress
from client.control.messages import Progress
progress.PATIENCE_S = {patience}
with progress.shown_progress() as shown:
    for done in range(3):
        shown.progress(Progress("verifying [data]", done, 3, "objects"))
"""


def on_terminal(patience: float) -> str:
    """Return what a terminal gets on stderr."""
    leader, follower = pty.openpty()
    code = SHOW.format(patience=patience)
    process = subprocess.Popen([sys.executable, "-c", code], stderr=follower, env={**os.environ, "TERM": "xterm"})
    os.close(follower)
    written = b""
    try:
        while piece := os.read(leader, 4096):
            written += piece
    except OSError:
        pass  # the terminal's other end is closed: all was read
    finally:
        os.close(leader)
    assert process.wait(30) == 0
    return written.decode()


def test_a_terminal_sees_what_is_done_and_how_far_it_is() -> None:
    assert "verifying [data]  2 objects" in on_terminal(0.0)


def test_what_is_done_soon_shows_nothing() -> None:
    assert on_terminal(60.0) == ""


def test_what_is_no_terminal_sees_nothing(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "PATIENCE_S", 0.0)
    with progress.shown_progress() as shown:
        shown.progress(Progress("verifying"))
    assert capfd.readouterr() == ("", "")
