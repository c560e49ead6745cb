"""Progress for people: a bar on stderr when that is a terminal and the work takes long, otherwise nothing.

Owns when rich is imported (0.1 s): only for what lasts, at a terminal.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

from client.control.messages import Progress

if TYPE_CHECKING:
    from rich.progress import Progress as Bar
    from rich.progress import TaskID

PATIENCE_S: Final = 0.5
"""What takes less gets no bar."""


class Shown:
    """Take progress; show it if somebody looks."""

    def __init__(self, *, enabled: bool) -> None:
        self._enabled = enabled
        self._since_s = time.monotonic()
        self._bar: Bar | None = None
        self._task: TaskID | None = None

    def progress(self, progress: Progress) -> None:
        """Show how far something is."""
        if not self._enabled:
            return
        if self._bar is None:
            if time.monotonic() - self._since_s < PATIENCE_S:
                return
            self._bar = _bar()
            self._task = self._bar.add_task("", total=None)
        assert self._task is not None
        count = f"{progress.done:,} {progress.unit}" if progress.unit else ""
        text = f"{progress.text}  {count}".rstrip()
        self._bar.update(self._task, description=text, completed=progress.done, total=progress.total)

    def close(self) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def _bar() -> Bar:
    from rich.console import Console
    from rich.progress import BarColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as RichProgress

    bar = RichProgress(
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        transient=True,
    )
    bar.start()
    return bar


@contextmanager
def shown_progress() -> Iterator[Shown]:
    """Yield what takes progress; nothing of it is left on the screen."""
    shown = Shown(enabled=sys.stderr.isatty())
    try:
        yield shown
    finally:
        shown.close()
