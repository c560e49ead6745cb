"""How results and errors look: documents for programs, lines for people.

Owns ``--json``, alignment, times, and the one line of an error. Must not know commands.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import click

from client.sizes import format_size


def one_line(error: BaseException) -> str:
    """Return what is shown of an error: one line, printable."""
    # Here, not above: the commands' errors come from modules that --help need not import.
    from chunkstore.errors import AtollError
    from client.address import shown

    if isinstance(error, AtollError):
        return _printable(error.message)
    if isinstance(error, OSError) and error.strerror:
        where = f"{shown(error.filename)}: " if isinstance(error.filename, str | bytes) else ""
        return _printable(f"{where}{error.strerror}: check the path and its permissions")
    if isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        return one_line(error.exceptions[0])
    text = _printable(str(error))
    return f"unexpected {type(error).__name__}: {text} (set ATOLL_TRACEBACK=1 to see where)"


def _printable(text: str) -> str:
    line = " ".join(text.split())
    return line.encode("utf-8", "backslashreplace").decode("utf-8")


def echo_json(document: Any) -> None:
    """Print one document. ASCII only: bytes of names that are no UTF-8 are lone surrogates (PEP 383), as in Python."""
    click.echo(json.dumps(document, indent=2 if sys.stdout.isatty() else None))


def echo_pairs(pairs: Iterable[tuple[str, str]]) -> None:
    """Print names and values, aligned."""
    rows = list(pairs)
    width = max((len(name) for name, _ in rows), default=0)
    for name, value in rows:
        click.echo(f"{name:<{width}}  {printable_name(value)}".rstrip())


def echo_table(header: Sequence[str], rows: Iterable[Sequence[str]], *, right: frozenset[int] = frozenset()) -> None:
    """Print rows under a header, in columns; those in ``right`` are aligned there."""
    table = [list(header), *([printable_name(cell) for cell in row] for row in rows)]
    widths = [max(len(row[column]) for row in table) for column in range(len(header))]
    for row in table:
        cells = [
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        click.echo("  ".join(cells).rstrip())


def printable_name(text: str) -> str:
    """Return a name as a terminal may show it: line breaks, control characters and bytes that are no text are escaped."""
    if text.isprintable():
        return text
    from client.address import shown
    from client.control.messages import name_of

    return shown(name_of(text))


def limit(value: int, *, size: bool = True) -> str:
    """Return a limit for people; 0 is none."""
    if value == 0:
        return "unlimited"
    return format_size(value) if size else f"{value:,}"


def moment(time_ns: int) -> str:
    """Return a time for people, in this machine's zone."""
    import time

    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(time_ns / 1e9))


def keep_quiet() -> None:
    """Keep the library's log off stderr: a command says what went wrong once, in one line, when it gives up."""
    import logging

    logging.getLogger().addHandler(logging.NullHandler())


def say(message: str) -> None:
    """Print a message for people on stderr."""
    click.echo(f"atoll: {message}", err=True)
