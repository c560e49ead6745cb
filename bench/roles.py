"""Processes of a benchmark that do as they are told: a command a line on stdin, an answer a line on stdout, both JSON.

Owns such a process from start to end, and the loop in it that answers. Must not know what is commanded. Commands are answered
one after the other; what goes on in between is the affair of the process.
"""

from __future__ import annotations

import asyncio
import json
import os
import selectors
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from bench.processes import StepFailed

_END_S: Final = 20.0
_MOST_BYTES: Final = 1 << 28

Commands = Mapping[str, Callable[..., Awaitable[Any]]]


class Role:
    """A process of ours that is told what to do."""

    def __init__(self, script: Path, arguments: Mapping[str, Any], *, log: Path) -> None:
        """Start it; what it has to say besides goes to the log."""
        self._name = script.stem
        self._log = log
        with log.open("ab") as errors:
            self._process = subprocess.Popen(
                [sys.executable, str(script), json.dumps(arguments)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                start_new_session=True,
            )
        self._buffer = b""
        self._selector = selectors.DefaultSelector()
        assert self._process.stdout is not None
        self._selector.register(self._process.stdout, selectors.EVENT_READ)

    @property
    def pid(self) -> int:
        return self._process.pid

    def tell(self, command: str, **arguments: Any) -> None:
        """Give a command, whose answer is heard later."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps([command, arguments]).encode() + b"\n")
            self._process.stdin.flush()
        except OSError as error:
            raise StepFailed(f"{self._name}: the process ended: {self._last_words()}") from error

    def has_answered(self) -> bool:
        """Say whether `hear` would return at once."""
        return b"\n" in self._buffer or bool(self._selector.select(0))

    def hear(self, *, limit_s: float) -> Any:
        """Return the answer to the command that was given. StepFailed if it failed, or there is none in time."""
        assert self._process.stdout is not None
        end_s = time.monotonic() + limit_s
        while b"\n" not in self._buffer:
            if not self._selector.select(max(0.0, end_s - time.monotonic())):
                raise StepFailed(f"{self._name}: no answer within {limit_s:.0f} s")
            data = os.read(self._process.stdout.fileno(), 1 << 20)
            if not data:
                raise StepFailed(f"{self._name}: the process ended: {self._last_words()}")
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        answer = json.loads(line)
        if "error" in answer:
            raise StepFailed(f"{self._name}: {answer['error']}")
        return answer["result"]

    def ask(self, command: str, *, limit_s: float = 60.0, **arguments: Any) -> Any:
        """Give a command and return the answer."""
        self.tell(command, **arguments)
        return self.hear(limit_s=limit_s)

    def stop(self) -> None:
        """Let it end, or end it."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.close()
            self._process.wait(_END_S)
        except (OSError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait(_END_S)
        self._selector.close()
        self._process.stdout.close()

    def _last_words(self) -> str:
        lines = self._log.read_text(errors="replace").strip().splitlines()
        return lines[-1][-300:] if lines else "it said nothing"


@contextmanager
def role(script: Path, arguments: Mapping[str, Any], *, log: Path) -> Iterator[Role]:
    """Run such a process for the time of a block."""
    one = Role(script, arguments, log=log)
    try:
        yield one
    finally:
        one.stop()


async def answer(commands: Commands) -> None:
    """Do what stdin says until it ends."""
    reader = asyncio.StreamReader(limit=_MOST_BYTES)
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    while line := await reader.readline():
        command, arguments = json.loads(line)
        try:
            told = {"result": await commands[command](**arguments)}
        except Exception as error:  # noqa: BLE001 (told to who commands)
            told = {"error": f"{command}: {error!r}"}
        print(json.dumps(told), flush=True)
