"""Running `atoll` in tests of the command line: with its output apart, a deadline, and a picture of the files around it."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from tests.mount.mounted import atoll

DEADLINE_S: Final = 60
VOLATILE: Final = (".owner", ".log", "-wal", "-shm")
"""Names of files that any command may touch: locks, logs, SQLite's log."""


@dataclass(frozen=True, slots=True)
class Ran:
    """What a command did."""

    code: int
    stdout: str
    stderr: str

    @property
    def document(self) -> dict[str, Any]:
        """Return the one JSON document on stdout."""
        document = json.loads(self.stdout)
        assert isinstance(document, dict)
        return document

    def error(self, code: int = 1) -> str:
        """Return the one line on stderr of a command that failed as it is to fail."""
        assert (self.code, self.stdout) == (code, ""), self
        lines = self.stderr.splitlines()
        assert len(lines) == 1, self
        assert lines[0].startswith("atoll: "), self
        return lines[0]


def run(*arguments: str | Path, environment: Mapping[str, str] | None = None) -> Ran:
    """Run `atoll` with these arguments."""
    done: subprocess.CompletedProcess[str] = atoll(
        *(str(argument) for argument in arguments), environment=environment, timeout_s=DEADLINE_S
    )
    return Ran(done.returncode, done.stdout, done.stderr)


def done(*arguments: str | Path, environment: Mapping[str, str] | None = None) -> Ran:
    """Run `atoll`, which must succeed."""
    ran = run(*arguments, environment=environment)
    assert ran.code == 0, ran
    return ran


def picture(directory: Path) -> dict[str, tuple[int, str]]:
    """Return all paths below a directory with type, permissions and a digest of the content; volatile files left out."""
    seen: dict[str, tuple[int, str]] = {}
    for top, directories, files in os.walk(directory):
        for name in sorted(directories + files):
            path = Path(top, name)
            if name.endswith(VOLATILE):
                continue
            mode = path.lstat().st_mode
            content = hashlib.sha256(path.read_bytes()).hexdigest() if stat.S_ISREG(mode) and name != "meta.db" else ""
            seen[str(path.relative_to(directory))] = (mode, content)
    return seen
